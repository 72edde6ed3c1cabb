"""What a bench is made of: its units, the cells of its table, and the graph of both."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ddray.config import Config
from ddray.data import SplitName
from ddray.jobs.plan import Plan
from ddray.jobs.shard_worker import shard_units
from ddray.pool.spec import PoolSpec
from ddray.runs.ledger import Kind, Unit, classes_of
from ddray.tables.spec import WHOLE, EvaluateSpec, PublishedSource


@dataclass(frozen=True)
class BenchUnit:
    """One unit and what a worker needs to run it."""

    identity: Unit  # the ledger's unit
    title: str  # shown to people, such as `dm digits ipc 1 seed 0`
    method: str  # the method's name
    dataset: str  # name or path of the dataset that is distilled
    size: tuple[str, int]  # (`ipc` or `budget`, images per class or images of storage); (WHOLE, 0)
    ipc: int  # images per class; with a budget, the budget's share per class
    budget: int | None  # images of storage, for methods that ignore classes; None otherwise
    seed: int  # the distillation's seed
    config: Mapping[str, Any]  # the method's resolved configuration as plain values
    amount: float  # expected work, in arbitrary units that are the same for all units of a kind
    split: SplitName = field(default_factory=SplitName)  # what is distilled
    options: Mapping[str, Any] = field(default_factory=dict)  # an evaluation's, for `EvaluateOptions`
    pool: PoolSpec | None = None  # a pool unit's spec
    step: int | None = None  # of an evaluation: which of the sets along the steps it scores; None: the last
    limit: int | None = None  # of a `whole` row: how many real images, stratified; None: all
    shards: int = 1  # groups of classes that a set is distilled in; no part of its identity
    waited_for: str = ""  # what the unit, which was started before, then waited for

    @property
    def key(self) -> str:
        """The unit's key."""
        return self.identity.key

    @property
    def is_whole(self) -> bool:
        """Whether it belongs to a `whole` row."""
        return self.size[0] == WHOLE

    @property
    def kind(self) -> Kind:
        """The unit's kind."""
        return self.identity.kind


def pool_unit(asker: BenchUnit, spec: PoolSpec) -> BenchUnit:
    """Return the unit that trains a pool entry, with the settings of the unit that asked for it."""
    return replace(
        asker,
        identity=Unit(kind="pool", spec={"pool_key": spec.key, **spec.dump()}),
        title=f"pool {spec.kind} {spec.arch} seed {spec.seed}",
        pool=spec,
        amount=0.0,
        waited_for="",
    )


def shards_of(unit: BenchUnit, num_classes: int) -> list[BenchUnit]:
    """Return the units of a set's shards."""
    return [
        _shard_unit(unit, identity, num_classes)
        for identity in shard_units(unit.identity, num_classes, unit.shards)
    ]


def _shard_unit(unit: BenchUnit, identity: Unit, num_classes: int) -> BenchUnit:
    start, stop = identity.spec["classes"]
    return replace(
        unit,
        identity=identity,
        title=f"{unit.title}, {classes_of(identity.spec)}",
        amount=unit.amount * (stop - start) / num_classes,
        waited_for="",
    )


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
    """(`ipc` or `budget`, value), or (WHOLE, 0)."""
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
    along: tuple[tuple[int, tuple[str, ...]], ...] = ()
    """(step, keys of the evaluations by seed) of the sets along the steps, the last one included."""
    image_size: int | None = None
    """Larger side of the sets' images in pixels; None if unknown, as in runs of before it was noted."""
    distilled_in: str | None = None
    """The network that the sets were distilled in."""
    distilled_with: str | None = None
    """The teacher that made the sets, for methods with one."""
    num_images: int | None = None
    """Images that a budget holds."""
    generator: str | None = None
    """The diffusion model that made the sets' images."""
    changes: tuple[str, ...] = ()
    """What the table, a scale or --set changes in the preset's conditions."""
    cut: str | None = None
    """What of it lowers a budget, such as `steps 10 of 8,000`."""
    overridden: tuple[str, ...] = ()
    """Names of the other settings that differ."""


@dataclass(frozen=True)
class SweepSpec:
    """A NAS sweep of the table: the sets of one dataset and size as its proxies."""

    evaluation_index: int  # which of the table's evaluations
    evaluate: EvaluateSpec
    dataset: str  # name or path of what was distilled
    cells: tuple[Cell, ...]  # one for each row

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
    """All units of a bench."""

    distil: dict[str, BenchUnit]  # by key, the most expensive first
    evaluate: dict[str, BenchUnit]  # by key, in the table's order
    cells: tuple[Cell, ...]  # the table's cells, in order
    sweeps: tuple[SweepSpec, ...]  # its NAS sweeps, which have ledgers of their own
    plans: dict[str, Plan]  # the plan of every distillation, by key

    def units(self) -> list[BenchUnit]:
        """Return every unit known before the run; pool units turn up during it."""
        return [*self.distil.values(), *self.evaluate.values()]

    def scored_from(self, key: str) -> list[BenchUnit]:
        """Return the evaluations of a distilled set."""
        return [unit for unit in self.evaluate.values() if key in unit.identity.inputs]
