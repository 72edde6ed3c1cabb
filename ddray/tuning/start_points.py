"""Points that a user wants tried first: read, checked against the space, and numbered as trials."""

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ddray.config import flatten, lookup, read_yaml
from ddray.errors import InputError, unknown
from ddray.jobs.context import check_plan
from ddray.jobs.plan import Plan
from ddray.tuning.settings import Settings
from ddray.tuning.space import Range, Space, by_short_names, check_names, conditions, drawn

log = logging.getLogger(__name__)
Points = dict[int, dict[str, Any]]
"""Settings by trial number."""


def read_start_points(
    sources: Sequence[Path | Mapping[str, Any]], plan: Plan, settings: Settings, space: Space
) -> list[dict[str, Any]]:
    """Return what each source sets of the space: a file or a mapping of names to values.

    Names that a source leaves out keep the plan's values. A source may also be a run's settings, of which
    `method` holds the method's (a search's best.yaml). Settings that are not drawn beside the others (`when`)
    are left out.

    Raises:
        InputError: a name is not the space's, or a value lies outside it or does not fit the method.
    """
    return [_read(source, plan, settings, space) for source in sources]


def _read(source: Path | Mapping[str, Any], plan: Plan, settings: Settings, space: Space) -> dict[str, Any]:
    where = f"start point {source}" if isinstance(source, Path) else "a start point"
    values = read_yaml(source) if isinstance(source, Path) else source
    check_names(values, where)
    if isinstance(values.get("method"), Mapping):
        check_names(values["method"], f"{where}: method")
        values = _of_run(values, settings, space, where)
    values = by_short_names(values, where)
    for name in sorted(values.keys() - space.keys()):
        if name not in settings.names() or not settings.is_preset(name, values[name]):
            raise unknown(f"{where}: a name", name, space)
    in_space = {name: values[name] for name in space if name in values}
    check_plan(settings.apply(plan, in_space, where))
    point = drawn(space, settings.values(space, in_space))
    for name, value in in_space.items():
        if name in point:
            point[name] = _inside(name, space[name], point[name], where)
        elif not settings.is_preset(name, value):
            rule = f"{name} is drawn only when {json.dumps(conditions(space, name))}"
            raise InputError(f"{where}: {rule}, got {value!r} beside other values; leave it out")
    return point


def _of_run(values: Mapping[str, Any], settings: Settings, space: Space, where: str) -> dict[str, Any]:
    """Return a run's settings by name: the method's, and of the others those in the space."""
    named: dict[str, Any] = {}
    for name, value in values["method"].items():
        has_parts = any(one.startswith(f"{name}.") for one in space)
        named |= flatten(value, f"{name}.") if has_parts and isinstance(value, dict) else {name: value}
    used = {"method"}
    for name in space:
        path = settings.path(name)
        if not path.startswith("method."):
            with suppress(KeyError, TypeError):  # the run lacks it
                named[name] = lookup(values, path)
                used.add(path.partition(".")[0])
    if ignored := sorted(values.keys() - used):
        log.warning("%s: not used, as the space does not name it: %s", where, ", ".join(ignored))
    return named


def _inside(name: str, value_range: Range, value: Any, where: str) -> Any:
    """Return a value as its range has it; InputError if it lies outside."""
    if value_range.kind == "randint" and isinstance(value, float) and value.is_integer():
        value = int(value)  # as such a range is sampled
    if not value_range.contains(value):
        text = f"{value_range.kind} {value_range.ends()}"
        step = f" in steps of {value_range.step}" if value_range.step else ""
        rule = f"{name} must lie in the space, {text}{step}"
        raise InputError(f"{where}: {rule}, got {value!r}; widen the space, or change the point")
    return value


def number_start_points(
    points: Sequence[dict[str, Any]], paper: Mapping[str, Any], earlier: Points, numbers: range
) -> Points:
    """Return all start points of a search by trial number: the `earlier` ones, and those that are new.

    New ones take the first of `numbers`, which have not been run. One that the search tries anyway, such as
    the preset's, is left out with a warning.

    Raises:
        InputError: there are not enough numbers.
    """
    fresh: list[dict[str, Any]] = []
    for point in points:
        if point == paper or point in fresh:
            log.warning("the start point %s is among the search's points already: it is run once", point)
        elif point not in earlier.values():
            fresh.append(point)
    if len(fresh) > len(numbers):
        least = numbers.stop + len(fresh) - len(numbers)
        raise InputError(
            f"--num-samples must be >= {least} for {len(fresh)} new start points (a search is extended by a "
            f"larger number), got {numbers.stop}"
        )
    return {**earlier, **dict(zip(numbers, fresh, strict=False))}
