"""What a run changes of its method's preset, and what of that cuts its budget."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from ddray.config import flatten
from ddray.errors import InputError
from ddray.jobs.plan import Plan, resolve

# Settings that change no number, or that a table's cell holds as facts of their own.
_ELSEWHERE: Final = frozenset(
    {"checkpoint_every", "compile", "memory_budget", "arch"}
    | {"evaluate.seeds", "evaluate.val_seeds", "evaluate.every"}
    | {"method.diffusion", "method.class_ids", "method.generator.init", "method.teacher_arch"}
)
_BUDGET: Final = re.compile(r"(^|_)(steps|epochs|loop|limit|images)(_|$)|^(num|max)_|^pool_size$")
"""Names of settings of which less is less work."""


class Change(NamedTuple):
    """A setting that is not the preset's."""

    name: str
    text: str
    """What differs, in words."""
    ours: Any = None
    theirs: Any = None

    @property
    def cut(self) -> str | None:
        """`steps 10 of 8,000` if the setting is a budget, and less than the preset's; else None."""
        name = re.sub(r"^(method|evaluate)\.", "", self.name)
        if not _BUDGET.search(name.rpartition(".")[2]) or not _is_number(self.ours):
            return None
        if self.theirs == ALL:
            return f"{name} {self.ours:,} of all"
        return f"{name} {self.ours:,} of {self.theirs:,}" if _is_less(self.ours, self.theirs) else None


ALL: Final = "all"
"""The preset's value of a limit that it does not have."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_less(ours: Any, theirs: Any) -> bool:
    return _is_number(theirs) and bool(ours < theirs)


def preset_of(plan: Plan, layers: Sequence[Mapping[str, Any]] = ()) -> Plan:
    """Return the plan of a plan's preset, with `layers` of settings over it."""
    size: dict[str, Any] = {"ipc": plan.ipc} if plan.budget is None else {"budget": plan.budget}
    return resolve(plan.method, plan.dataset, **size, seed=plan.seed, preset=plan.preset, layers=layers)


def plan_changes(
    plan: Plan,
    layers: Sequence[Mapping[str, Any]] = (),
    is_idle: Callable[[str], bool] = lambda name: False,
) -> Iterator[Change]:
    """Yield what a plan changes of its preset with `layers` over it; idle settings change no number."""
    preset = preset_of(plan, layers)
    ours, theirs = flatten(plan.config.dump()), flatten(preset.config.dump())
    for name in sorted(ours.keys() | theirs.keys()):
        our, their = ours.get(name), theirs.get(name)
        if name not in _ELSEWHERE and not is_idle(name) and our != their:
            yield Change(name, f"{name} {yaml_text(our)}, the preset's {yaml_text(their)}", our, their)
    if plan.arch != preset.arch:
        yield Change("arch", f"distilled in {plan.arch}, by the preset in {preset.arch}")


def departure(changes: Iterable[Change]) -> dict[str, Any]:
    """Return `cut`, what was lowered of budgets, and `overridden`, the other settings' names, if any."""
    by_name: dict[str, Change] = {}
    for change in changes:
        by_name.setdefault(change.name, change)
    cut = [change.cut for change in by_name.values() if change.cut is not None]
    overridden = [name for name, change in by_name.items() if change.cut is None]
    return {**({"cut": "; ".join(cut)} if cut else {}), **({"overridden": overridden} if overridden else {})}


def plan_departure(plan: Plan) -> dict[str, Any]:
    """Return what `departure` does of a plan; nothing where the preset alone can't be run."""
    try:
        return departure(plan_changes(plan))
    except InputError:  # a setting must be named
        return {}


def yaml_text(value: Any) -> str:
    """Return a value as people write it in YAML."""
    return "unset" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
