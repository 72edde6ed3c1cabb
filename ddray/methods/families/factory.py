"""A method made of its parts: settings, presets, and an engine that does the work."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from ddray.artifact.distilled_set import DistilledSet
from ddray.config import Config
from ddray.distillation.method import DistillContext, Distiller, Engine, Target
from ddray.pool.spec import PoolSpec

Preset = Callable[[str, Target], dict[str, Any]]
PoolSpecs = Callable[[DistillContext, Any], list[PoolSpec]]
NumDistilled = Callable[[Any, int, tuple[int, int, int], int], int]
Coupling = Callable[[Any, str], str | None]


@dataclass(frozen=True)
class Selected:
    """The engine of a selection: no steps, and no state, since it is quick to repeat.

    `representations` are the teacher's, of the real images [N, D], where there is one.
    """

    distilled: DistilledSet
    representations: Tensor | None = None

    def step(self) -> dict[str, Tensor]:
        raise RuntimeError("a selection has no steps")

    def snapshot(self) -> DistilledSet:
        return self.distilled

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class _Run:
    """What every method does with the engine that its `setup` starts."""

    _engine: Engine

    def step(self) -> dict[str, Tensor]:
        return self._engine.step()

    def snapshot(self) -> DistilledSet:
        return self._engine.snapshot()

    def state_dict(self) -> dict[str, Any]:
        return self._engine.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._engine.load_state_dict(state)

    @property
    def representations(self) -> Tensor | None:
        """The teacher's, of the real images [N, D], from an engine that has them."""
        return getattr(self._engine, "representations", None)

    @property
    def measures(self) -> Mapping[str, float]:
        """What the engine measured itself, by name; empty for most."""
        return getattr(self._engine, "measures", {})


def make_method(
    config_class: type[Config],
    preset_of: Preset,
    start: Callable[[DistillContext, Any], Engine],
    *,
    specs_of: PoolSpecs | None = None,
    num_distilled_of: NumDistilled | None = None,
    has_steps: bool = True,
    depends_on_steps: str = "",
    coupling: Coupling | str | None = None,
) -> type[Distiller]:
    """Return a method's class.

    Args:
        config_class: its settings.
        preset_of: `Distiller.preset`.
        start: makes the engine from context and settings.
        specs_of: the pool entries that a run will request; default: none.
        num_distilled_of: `BudgetDistiller.num_distilled`, for a method that takes a budget.
        has_steps: False for a method that takes no number of steps: 0, or the engine's `num_steps`.
        depends_on_steps: what of the method does, and how: its `schedule` (see `Distiller`).
        coupling: `independent_classes` (see `Distiller`), or the reason whatever the settings; default: not
            declared.
    """

    class Method(_Run):
        config_type: ClassVar[type[Config]] = config_class
        schedule: ClassVar[str] = depends_on_steps

        def __init__(self, config: Any, num_steps: int) -> None:
            self._config = config
            self.num_steps = num_steps if has_steps else 0

        @staticmethod
        def preset(name: str, target: Target) -> dict[str, Any]:
            return preset_of(name, target)

        def pool_specs(self, ctx: DistillContext) -> list[PoolSpec]:
            return [] if specs_of is None else specs_of(ctx, self._config)

        def setup(self, ctx: DistillContext) -> None:
            self._engine = start(ctx, self._config)
            self.num_steps = getattr(self._engine, "num_steps", self.num_steps)

    if coupling is not None:
        declared = coupling if callable(coupling) else lambda config, arch: coupling
        Method.independent_classes = staticmethod(declared)  # type: ignore[attr-defined]
    return Method if num_distilled_of is None else _with_budget(Method, num_distilled_of)


def _with_budget(method: type[_Run], num_distilled_of: NumDistilled) -> type[Distiller]:
    num_stored: NumDistilled = staticmethod(num_distilled_of)

    class BudgetMethod(method):  # type: ignore[valid-type, misc]
        uses_budget: ClassVar[Literal[True]] = True
        num_distilled = num_stored

    return BudgetMethod
