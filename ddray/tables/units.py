"""What a bench is made of: its units, the cells of its table, and the graph of both."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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


@dataclass(frozen=True)
class Cell:
    """One number of the table: a row's sets, scored in one way.

    Attributes:
        method: the row's label.
        name: the method's name.
        dataset: what was distilled.
        num_classes: that dataset's number of classes.
        size: (`ipc` or `budget`, value).
        protocol: how the sets were scored.
        arch: canonical name of the network.
        target: the dataset scored on.
        teacher: for the protocol `soft`.
        augment: the table's setting, if any.
        settings: the table's other evaluation settings, such as `epochs=300`; None if there are none.
        keys: keys of the evaluations, by seed.
        source: where to find its published number.
    """

    method: str
    name: str
    dataset: str
    num_classes: int
    size: tuple[str, int]
    protocol: str
    arch: str
    target: str
    teacher: str | None
    augment: str | None
    settings: str | None
    keys: tuple[str, ...]
    source: PublishedSource


@dataclass(frozen=True)
class SweepSpec:
    """A NAS sweep of the table: the sets of one dataset and size as its proxies.

    Attributes:
        evaluation_index: which of the table's evaluations.
        evaluate: that evaluation.
        dataset: what was distilled.
        sets: for each row, its cell (without evaluations) and its sets' keys, by seed.
    """

    evaluation_index: int
    evaluate: EvaluateSpec
    dataset: str
    sets: tuple[tuple[Cell, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Graph:
    """All units of a bench.

    Attributes:
        distil: by key, the most expensive first.
        evaluate: by key, in the table's order.
        cells: the table's cells, in order.
        sweeps: its NAS sweeps, which have ledgers of their own.
        plans: the plan of every distillation, by key.
        labels: the rows that each distillation belongs to, by key.
    """

    distil: dict[str, BenchUnit]
    evaluate: dict[str, BenchUnit]
    cells: tuple[Cell, ...]
    sweeps: tuple[SweepSpec, ...]
    plans: dict[str, Plan]
    labels: dict[str, list[str]]

    def units(self) -> list[BenchUnit]:
        """Return every unit known before the run; pool units turn up during it."""
        return [*self.distil.values(), *self.evaluate.values()]

    def scored_from(self, key: str) -> list[BenchUnit]:
        """Return the evaluations of a distilled set."""
        return [unit for unit in self.evaluate.values() if key in unit.identity.inputs]

    def is_proxy(self, key: str) -> bool:
        """Return whether a distilled set is a proxy of a NAS sweep."""
        return any(key in keys for sweep in self.sweeps for _, keys in sweep.sets)
