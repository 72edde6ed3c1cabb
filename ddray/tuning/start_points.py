"""Points that a user wants tried first: read, checked against the space, and numbered as trials."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ddray.config import read_yaml
from ddray.errors import InputError, unknown
from ddray.jobs.context import check_plan
from ddray.jobs.plan import Plan
from ddray.tuning.space import Space

log = logging.getLogger(__name__)
Points = dict[int, dict[str, Any]]
"""Settings by trial number."""


def read_start_points(
    sources: Sequence[Path | Mapping[str, Any]], plan: Plan, space: Space
) -> list[dict[str, Any]]:
    """Return a value for each of the space's names per source: a file or a mapping of names to values.

    Names that a source leaves out keep the plan's values. A source may also be a run's settings, of which
    `method` holds the names (a search's best.yaml).

    Raises:
        InputError: a name is not the space's, or a value lies outside it or does not fit the method.
    """
    return [_read(source, plan, space) for source in sources]


def _read(source: Path | Mapping[str, Any], plan: Plan, space: Space) -> dict[str, Any]:
    where = f"start point {source}" if isinstance(source, Path) else "a start point"
    values = read_yaml(source) if isinstance(source, Path) else source
    if isinstance(settings := values.get("method"), Mapping):
        if ignored := sorted(values.keys() - {"method"}):
            log.warning("%s: only its method's settings are used, not %s", where, ", ".join(ignored))
        values = settings
    method = plan.config.method
    preset = method.every_value()
    for name in sorted(values.keys() - space.keys()):
        if name not in preset or values[name] != preset[name]:
            raise unknown(f"{where}: a name", name, space)
    changed = type(method).parse({**preset, **values}, source=where)
    check_plan(replace(plan, config=plan.config.model_copy(update={"method": changed})))
    point = {name: changed.every_value()[name] for name in space}
    for name in sorted(values.keys() & space.keys()):
        value = point[name]
        if space[name].kind == "randint" and isinstance(value, float) and value.is_integer():
            point[name] = int(value)  # as such a range is sampled
        if not space[name].contains(point[name]):
            rule = f"{name} must lie in the space, {space[name].kind} {space[name].ends()}"
            raise InputError(f"{where}: {rule}, got {point[name]!r}; widen the space, or change the point")
    return point


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
