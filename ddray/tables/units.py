"""What a bench is made of: its units, the cells of its table, and the graph of both."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ddray.config import Config
from ddray.jobs.plan import Plan
from ddray.pool.spec import PoolSpec
from ddray.runs.ledger import Kind, Unit
from ddray.tables.spec import EvaluateSpec, PublishedSource


@dataclass(frozen=True)
class BenchUnit:
    """One unit and what a worker needs to run it.

    Attributes:
        identity: the ledger's unit.
        title: shown to people, such as `dm digits ipc 1 seed 0`.
        method: the method's name.
        dataset: name or path of the dataset that is distilled.
        size: (`ipc` or `budget`, images per class or images of storage).
        ipc: images per class; with a budget, the budget's share per class.
        budget: images of storage, for methods that ignore classes; None otherwise.
        seed: the distillation's seed.
        config: the method's resolved configuration as plain values.
        amount: expected work, in arbitrary units that are the same for all units of a kind.
        val_seed: seed of the val tenth left out of train; None distils from all of train.
        options: an evaluation's, as `EvaluateOptions` takes them.
        pool: a pool unit's spec.
        waited: whether the unit was started before and then waited for pool networks.
    """

    identity: Unit
    title: str
    method: str
    dataset: str
    size: tuple[str, int]
    ipc: int
    budget: int | None
    seed: int
    config: Mapping[str, Any]
    amount: float
    val_seed: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    pool: PoolSpec | None = None
    waited: bool = False

    @property
    def key(self) -> str:
        """The unit's key."""
        return self.identity.key

    @property
    def kind(self) -> Kind:
        """The unit's kind."""
        return self.identity.kind


class Cell(Config):
    """One number of the table: a row's sets, scored in one way."""

    method: str
    """The row's label."""
    name: str
    """The method's name."""
    dataset: str
    """What was distilled."""
    num_classes: int
    size: tuple[str, int]
    """(`ipc` or `budget`, value)."""
    protocol: str
    arch: str
    """Canonical name of the network; the space in a NAS sweep."""
    target: str
    """The dataset scored on."""
    teacher: str | None = None
    augment: str | None = None
    """The table's setting, if any."""
    settings: str | None = None
    """The table's other evaluation settings, such as `epochs=300`; None if there are none."""
    keys: tuple[str, ...] = ()
    """Keys of the evaluations, by seed."""
    source: PublishedSource = PublishedSource()
    sets: tuple[str, ...] = ()
    """Keys of the sets, by seed."""


@dataclass(frozen=True)
class SweepSpec:
    """A NAS sweep of the table: the sets of one dataset and size as its proxies.

    Attributes:
        evaluation_index: which of the table's evaluations.
        evaluate: that evaluation.
        dataset: name or path of what was distilled.
        cells: one for each row.
    """

    evaluation_index: int
    evaluate: EvaluateSpec
    dataset: str
    cells: tuple[Cell, ...]

    @property
    def sets(self) -> list[str]:
        """Keys of the sets."""
        return [key for cell in self.cells for key in cell.sets]

    @property
    def baselines(self) -> tuple[str, ...]:
        """Proxies besides the sets."""
        return tuple(self.evaluate.options.get("baselines", ()))


@dataclass(frozen=True)
class Graph:
    """All units of a bench.

    Attributes:
        distil: by key, the most expensive first.
        evaluate: by key, in the table's order.
        cells: the table's cells, in order.
        sweeps: its NAS sweeps, which have ledgers of their own.
        plans: the plan of every distillation, by key.
    """

    distil: dict[str, BenchUnit]
    evaluate: dict[str, BenchUnit]
    cells: tuple[Cell, ...]
    sweeps: tuple[SweepSpec, ...]
    plans: dict[str, Plan]

    def units(self) -> list[BenchUnit]:
        """Return every unit known before the run; pool units turn up during it."""
        return [*self.distil.values(), *self.evaluate.values()]

    def scored_from(self, key: str) -> list[BenchUnit]:
        """Return the evaluations of a distilled set."""
        return [unit for unit in self.evaluate.values() if key in unit.identity.inputs]
