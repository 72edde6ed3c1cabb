"""Search spaces: a method's ranges, read from YAML, sampled as a pure function of (seed, trial number)."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from ddray.config import Config, read_yaml
from ddray.errors import InputError, did_you_mean
from ddray.seeding import derive
from ddray.system.shipped import shipped

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Kind = Literal["loguniform", "uniform", "randint", "choice"]
_KINDS = get_args(Kind)


@dataclass(frozen=True)
class Range:
    """One setting's range: floats in [low, high], whole numbers low..high (inclusive), or `choices`."""

    kind: Kind
    low: float = 0.0
    high: float = 0.0
    choices: tuple[Any, ...] = ()

    def sample(self, generator: torch.Generator) -> Any:
        """Draw a value."""
        u = float(torch.rand((), generator=generator, dtype=torch.float64))
        if self.kind == "choice":
            return self.choices[min(int(u * len(self.choices)), len(self.choices) - 1)]
        if self.kind == "randint":
            return min(int(self.low + u * (self.high - self.low + 1)), int(self.high))
        value = self.low + u * (self.high - self.low)
        if self.kind == "loguniform":
            value = math.exp(math.log(self.low) + u * (math.log(self.high) - math.log(self.low)))
        # Rounding can put a draw near an end just outside, where Optuna would refuse it.
        return min(max(value, self.low), self.high)

    def ends(self) -> list[Any]:
        """Return the values to check against a method's rules: all choices, or both ends."""
        if self.kind == "choice":
            return list(self.choices)
        return [int(self.low), int(self.high)] if self.kind == "randint" else [self.low, self.high]

    def probes(self) -> list[Any]:
        """Return values that stand for the whole range: its ends, and one between them."""
        between = [self.low + 0.37 * (self.high - self.low)] if self.kind in ("uniform", "loguniform") else []
        return [*self.ends(), *between]

    def distribution(self) -> BaseDistribution:
        """Return Optuna's distribution; choices enter as JSON text, so that lists can be chosen too."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.kind == "choice":
            return CategoricalDistribution([_json(choice) for choice in self.choices])
        if self.kind == "randint":
            return IntDistribution(int(self.low), int(self.high))
        return FloatDistribution(self.low, self.high, log=self.kind == "loguniform")

    def to_optuna(self, value: Any) -> Any:
        """Return a value as the distribution stores it."""
        return _json(value) if self.kind == "choice" else value

    def from_optuna(self, value: Any) -> Any:
        """Return a distribution's value as the method expects it."""
        return json.loads(value) if self.kind == "choice" else value

    def contains(self, value: Any) -> bool:
        """Return whether a value lies in the range (the paper's point may lie outside)."""
        if self.kind == "choice":
            return value in self.choices
        if self.kind == "randint" and not isinstance(value, int):
            return False
        return isinstance(value, int | float) and self.low <= value <= self.high


Space = Mapping[str, Range]
"""Ranges by the names of a method's fields."""


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


def read_space(source: Path | Mapping[str, Any], title: str = "the space") -> dict[str, Range]:
    """Read a space file, or what one would hold.

    An entry is `name: {kind: [a, b]}`, kind loguniform, uniform or randint, or `name: {choice: [...]}`.
    `title` is what messages call content that is not from a file.

    Raises:
        InputError: the file can't be read, or a range is none of these or empty.
    """
    ranges = source if isinstance(source, Mapping) else read_yaml(source)
    where = title if isinstance(source, Mapping) else str(source)
    return {name: _range(value, f"{where}: {name}") for name, value in ranges.items()}


def _range(value: Any, where: str) -> Range:
    kinds = ", ".join(_KINDS)
    if not isinstance(value, dict) or len(value) != 1:
        raise InputError(f"{where} must be {{kind: [...]}} with kind one of {kinds}, got {value!r}")
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
    return {
        name: value_range.sample(derive(seed, "space", trial_number, name))
        for name, value_range in space.items()
    }


def grid(space: Space, paper: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every combination of choices, the paper's point first (added if the grid lacks it).

    InputError if a range is not a `choice`.
    """
    for name, value_range in space.items():
        if value_range.kind != "choice":
            kind = value_range.kind
            raise InputError(f"strategy grid needs choices, {name} is a {kind}: use {{choice: [...]}}")
    product = itertools.product(*(value_range.choices for value_range in space.values()))
    points = [dict(zip(space, values, strict=True)) for values in product]
    return [dict(paper), *(point for point in points if point != dict(paper))]


def _json(choice: Any) -> str:
    """Return a choice as JSON with sorted keys, as in the ledger."""
    return json.dumps(choice, sort_keys=True)
