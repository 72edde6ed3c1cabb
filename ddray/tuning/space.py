"""Search spaces: ranges of settings, read from YAML, sampled as a pure function of (seed, trial number).

A range with `when` is drawn only in trials whose other settings have the values that it names; one with a
`step` has the values low, low + step, ... A `Space` holds the ranges that others depend on before these.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from ddray.config import Config, read_yaml
from ddray.errors import InputError, did_you_mean, unknown
from ddray.seeding import derive
from ddray.system.shipped import shipped

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.distributions import BaseDistribution

Kind = Literal["loguniform", "uniform", "randint", "choice"]
_KINDS = get_args(Kind)


@dataclass(frozen=True)
class Range:
    """One setting's range: floats in [low, high], whole numbers low..high (inclusive), or `choices`.

    Attributes:
        kind: how values are drawn.
        low: lowest value.
        high: highest value; with a step, low plus a multiple of it.
        choices: the values of a `choice`.
        step: distance between neighbouring values of a `uniform` or `randint`; None: 1 of whole numbers, else
            none.
        when: values that other settings must be drawn with for this one to be drawn; empty: it always is.
    """

    kind: Kind
    low: float = 0.0
    high: float = 0.0
    choices: tuple[Any, ...] = ()
    step: float | None = None
    when: Mapping[str, Any] = field(default_factory=dict)

    def is_drawn(self, params: Mapping[str, Any]) -> bool:
        """Return whether the setting is drawn beside `params`, drawn settings with all that it depends on."""
        return all(name in params and params[name] == value for name, value in self.when.items())

    def sample(self, generator: torch.Generator) -> Any:
        """Draw a value."""
        u = float(torch.rand((), generator=generator, dtype=torch.float64))
        if self.kind == "choice":
            return self.choices[min(int(u * len(self.choices)), len(self.choices) - 1)]
        if self.step is not None:
            return self._at(min(int(u * self._num_values()), self._num_values() - 1))
        if self.kind == "randint":
            return min(int(self.low + u * (self.high - self.low + 1)), int(self.high))
        value = self.low + u * (self.high - self.low)
        if self.kind == "loguniform":
            value = math.exp(math.log(self.low) + u * (math.log(self.high) - math.log(self.low)))
        # Rounding can put a draw near an end just outside, where Optuna would refuse it.
        return min(max(value, self.low), self.high)

    def values(self) -> list[Any]:
        """Return every value of a range with choices or a step, in order; empty for another range."""
        if self.kind == "choice":
            return list(self.choices)
        return [] if self.step is None else [self._at(index) for index in range(self._num_values())]

    def _num_values(self) -> int:
        low, high, step = (Decimal(str(number)) for number in (self.low, self.high, self.step))
        return int((high - low) / step) + 1

    def _at(self, index: int) -> Any:
        """Return the value `index` steps above the lowest, added as decimals: .3, not .30000000000000004."""
        value = Decimal(str(self.low)) + index * Decimal(str(self.step))
        return int(value) if self.kind == "randint" else float(value)

    def _nearest(self, value: float) -> Any:
        """Return the value of a range with a step that is nearest to one."""
        index = round((value - self.low) / self.step) if self.step else 0
        return self._at(min(max(index, 0), self._num_values() - 1))

    def ends(self) -> list[Any]:
        """Return the values to check against a method's rules: all choices, or both ends."""
        if self.kind == "choice":
            return list(self.choices)
        return [int(self.low), int(self.high)] if self.kind == "randint" else [self.low, self.high]

    def probes(self) -> list[Any]:
        """Return values that stand for the whole range: its ends, and one between them."""
        if self.kind in ("choice", "randint"):
            return self.ends()
        between = self.low + 0.37 * (self.high - self.low) if self.step is None else self._at(1)
        return [*self.ends(), between]

    def describe(self) -> dict[str, Any]:
        """Return the range as a space file has it."""
        extra = {"step": self.step, "when": dict(self.when)}
        return {self.kind: self.ends(), **{name: value for name, value in extra.items() if value}}

    def distribution(self) -> BaseDistribution:
        """Return Optuna's distribution; choices enter as JSON text, so that lists can be chosen too."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.kind == "choice":
            return CategoricalDistribution([_json(choice) for choice in self.choices])
        if self.kind == "randint":
            return IntDistribution(int(self.low), int(self.high), step=int(self.step or 1))
        return FloatDistribution(self.low, self.high, log=self.kind == "loguniform", step=self.step)

    def suggest(self, trial: Trial, name: str) -> Any:
        """Return the value that Optuna suggests to a trial for the setting called `name`."""
        if self.kind == "choice":
            choices = [_json(choice) for choice in self.choices]
            return self.from_optuna(trial.suggest_categorical(name, choices))
        if self.kind == "randint":
            return trial.suggest_int(name, int(self.low), int(self.high), step=int(self.step or 1))
        value = trial.suggest_float(name, self.low, self.high, log=self.kind == "loguniform", step=self.step)
        return self.from_optuna(value)

    def to_optuna(self, value: Any) -> Any:
        """Return a value as the distribution stores it."""
        return _json(value) if self.kind == "choice" else value

    def from_optuna(self, value: Any) -> Any:
        """Return a distribution's value as the method expects it, without the rounding errors of a step."""
        if self.kind == "choice":
            return json.loads(value)
        return value if self.step is None else self._nearest(value)

    def contains(self, value: Any) -> bool:
        """Return whether a value lies in the range (the paper's point may lie outside)."""
        if self.kind == "choice":
            return value in self.choices
        if not isinstance(value, int if self.kind == "randint" else int | float):
            return False
        if not self.low <= value <= self.high:
            return False
        return self.step is None or math.isclose(value, self._nearest(value), abs_tol=1e-9 * self.step)


Space = Mapping[str, Range]
"""Ranges by the settings' names (`tuning.settings.Settings`); one with `when` follows those that it names."""


def method_space(
    method: str, config_type: type[Config], source: Path | Mapping[str, Any] | None = None
) -> tuple[dict[str, Range], str]:
    """Return a method's ranges, and what to call the place where they are written.

    `source` is a space file or what one would hold; default: the shipped file, or else the settings' own
    `search_space`.

    Raises:
        InputError: there is no space, or a range is malformed.
    """
    title = "the space"
    if source is None:
        source = shipped("search_spaces", "hpo", f"{method}.yaml")
        declared = getattr(config_type, "search_space", None)
        if declared is not None and not source.is_file():
            source, title = declared, f"{config_type.__name__}.search_space"
    if isinstance(source, Path):
        title = str(source)
        if not source.is_file():
            what = "is a folder" if source.is_dir() else "does not exist"
            fix = "write one and pass it with --space"
            raise InputError(f"a search needs a space file, {source} {what}; {fix}")
    return read_space(source, title), title


def check_names(entries: Mapping[Any, Any], where: str) -> None:
    """Refuse names that are no text, such as a number (InputError, which begins with `where`)."""
    if odd := [name for name in entries if not isinstance(name, str)]:
        raise InputError(
            f"{where}: a name must be a setting's, such as lr_img, got {odd[0]!r}; write its name"
        )


def by_short_names(entries: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return entries by what trials call settings: the method's own without `method.`.

    InputError, which begins with `where`, if a name is no text, or a setting is there under both names.
    """
    check_names(entries, where)
    short = {name.removeprefix("method."): entry for name, entry in entries.items()}
    if both := [name for name in short if name in entries and f"method.{name}" in entries]:
        raise InputError(f"{where}: {both[0]} must be there once, got method.{both[0]} too: keep one")
    return short


def read_space(source: Path | Mapping[str, Any], title: str = "the space") -> dict[str, Range]:
    """Read a space file, or what one would hold.

    An entry is `name: {kind: [a, b]}`, kind loguniform, uniform or randint, or `name: {choice: [...]}`. With
    it may stand `step: s` (uniform, randint) and `when: {other: value}`, where `other` has choices or a step.
    Names may begin with `method.`, which is left out. `title` is what messages call content that is not from
    a file.

    Raises:
        InputError: the file can't be read, a range is none of these or empty, or a condition can't hold.
    """
    where = title if isinstance(source, Mapping) else str(source)
    entries = by_short_names(source if isinstance(source, Mapping) else read_yaml(source), where)
    ranges = {name: _range(value, f"{where}: {name}") for name, value in entries.items()}
    for name, value_range in ranges.items():
        _check_conditions(name, value_range, ranges, where)
    space: dict[str, Range] = {}
    for name in ranges:
        _add_after_conditions(name, ranges, space, where)
    return space


def _check_conditions(name: str, value_range: Range, ranges: Mapping[str, Range], where: str) -> None:
    """Refuse a condition that can't hold (InputError)."""
    for other, value in value_range.when.items():
        if other not in ranges:
            raise unknown(f"{where}: {name}: when", other, ranges.keys() - {name})
        condition = ranges[other]
        if condition.kind not in ("choice", "randint") and condition.step is None:
            rule = f"when takes settings with choices or a step, {other} is a {condition.kind}"
            raise InputError(f"{where}: {name}: {rule}")
        if not condition.contains(value):
            rule = f"when: {other} must lie in {condition.describe()}"
            raise InputError(f"{where}: {name}: {rule}, got {value!r}")


def _add_after_conditions(
    name: str, ranges: Mapping[str, Range], space: dict[str, Range], where: str, above: tuple[str, ...] = ()
) -> None:
    """Add a range to `space`, behind those that it depends on; InputError if it depends on itself."""
    if name in above:
        chain = " -> ".join((*above, name))
        raise InputError(f"{where}: {name} must not depend on itself, got when: {chain}")
    for other in ranges[name].when:
        _add_after_conditions(other, ranges, space, where, (*above, name))
    space.setdefault(name, ranges[name])


def _range(entry: Any, where: str) -> Range:
    extras = {name: entry[name] for name in ("step", "when") if isinstance(entry, dict) and name in entry}
    value = {k: v for k, v in entry.items() if k not in extras} if isinstance(entry, dict) else entry
    kinds = ", ".join(_KINDS)
    if not isinstance(value, dict) or len(value) != 1:
        raise InputError(f"{where} must be {{kind: [...]}} with kind one of {kinds}, got {entry!r}")
    when = extras.get("when", {})
    if not isinstance(when, dict) or not all(isinstance(name, str) for name in when):
        raise InputError(f"{where}: when takes a mapping of names to values, got {when!r}")
    value_range = replace(_plain_range(value, where), when=by_short_names(when, f"{where}: when"))
    return _with_step(value_range, extras["step"], where) if "step" in extras else value_range


def _with_step(value_range: Range, step: Any, where: str) -> Range:
    """Return a range in steps from its low end; its high end becomes the last value."""
    kind, width = value_range.kind, value_range.high - value_range.low
    if kind not in ("uniform", "randint"):
        raise InputError(f"{where}: step goes with uniform and randint, not with {kind}")
    is_number = isinstance(step, int if kind == "randint" else int | float) and not isinstance(step, bool)
    stepped = replace(value_range, step=step)
    # Counted in decimals: as floats, -.9 - -1 is less than .1.
    if not is_number or not 0 < step < math.inf or stepped._num_values() < 2:
        what = "a whole number" if kind == "randint" else "a number"
        raise InputError(f"{where}: step must be {what} in (0, high - low = {width:g}], got {step!r}")
    return replace(stepped, high=stepped._at(stepped._num_values() - 1))


def _plain_range(value: Mapping[Any, Any], where: str) -> Range:
    """Return the range without step and condition."""
    kinds = ", ".join(_KINDS)
    kind, values = next(iter(value.items()))
    if kind not in _KINDS:
        hint = did_you_mean(str(kind), _KINDS)
        raise InputError(f"{where}: range must be one of {kinds}, got {kind!r}{hint}")
    if not isinstance(values, list) or not values:
        raise InputError(f"{where}: {kind} takes a list of values, got {values!r}")
    if kind == "choice":
        if len({_text(choice, where) for choice in values}) != len(values):
            raise InputError(f"{where}: choices must differ, got {values!r}")
        return Range("choice", choices=tuple(values))
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if not len(values) == len(numbers) == 2 or not -math.inf < values[0] < values[1] < math.inf:
        raise InputError(f"{where}: {kind} takes finite [low, high] with low < high, got {values!r}")
    if kind == "loguniform" and values[0] <= 0:
        raise InputError(f"{where}: loguniform takes low > 0, got {values!r}")
    if kind == "randint" and not all(isinstance(v, int) for v in values):
        raise InputError(f"{where}: randint takes whole numbers, got {values!r}")
    return Range(kind, *(values if kind == "randint" else map(float, values)))


def _text(choice: Any, where: str) -> str:
    """Return a choice as JSON; InputError if YAML read it as a type that JSON lacks, such as a date."""
    try:
        return _json(choice)
    except TypeError as error:
        raise InputError(f"{where}: a choice must be a JSON value, got {choice!r}; quote it") from error


def sample(space: Space, seed: int, trial_number: int) -> dict[str, Any]:
    """Return the settings of a trial of a random search: a pure function of (seed, trial_number)."""
    return drawn(
        space,
        {
            name: value_range.sample(derive(seed, "space", trial_number, name))
            for name, value_range in space.items()
        },
    )


def suggest(space: Space, trial: Trial) -> dict[str, Any]:
    """Return the settings that Optuna suggests to a trial, one after the other."""
    params: dict[str, Any] = {}
    for name, value_range in space.items():
        if value_range.is_drawn(params):
            params[name] = value_range.suggest(trial, name)
    return params


def drawn(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of `values` (a value for each name) whose conditions hold: a trial's settings."""
    params: dict[str, Any] = {}
    for name, value_range in space.items():
        if value_range.is_drawn(params):
            params[name] = values[name]
    return params


def conditions(space: Space, name: str) -> dict[str, Any]:
    """Return the values that other settings must have for `name` to be drawn, and those for them."""
    values = dict(space[name].when)
    for other in space[name].when:
        values = {**conditions(space, other), **values}
    return values


def grid(space: Space, paper: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every combination of choices and steps, the paper's point first (added if the grid lacks it).

    InputError if a range has neither.
    """
    points: list[dict[str, Any]] = [{}]
    for name, value_range in space.items():
        values = value_range.values()
        if not values:
            kind = value_range.kind
            hint = "" if kind == "loguniform" else ", or give it a step"
            raise InputError(f"strategy grid needs choices, {name} is a {kind}: use {{choice: [...]}}{hint}")
        points = [
            {**point, **extra}
            for point in points
            for extra in ([{name: value} for value in values] if value_range.is_drawn(point) else [{}])
        ]
    return [dict(paper), *(point for point in points if point != dict(paper))]


def _json(choice: Any) -> str:
    """Return a choice as JSON with sorted keys, as in the ledger."""
    return json.dumps(choice, sort_keys=True)
