"""The contract of a method: its context, what its presets may depend on, and what it offers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from ddray.artifact.bases import Bases, images_of, targets_of
from ddray.artifact.distilled_set import ADDED, DistilledSet, LabelKind, Meta
from ddray.artifact.partition import Partition
from ddray.artifact.schedule import Schedule
from ddray.config import Config
from ddray.data import Dataset, PixelSpace, Split, SplitName
from ddray.distillation.shards import Shard
from ddray.nets.build import multiply_adds
from ddray.nets.names import parse_arch
from ddray.pool.spec import ModelPool
from ddray.runs.environment import git_commit, versions
from ddray.seeding import derive


@dataclass(frozen=True)
class Target:
    """What a preset may depend on."""

    dataset: str
    image_shape: tuple[int, int, int]
    num_classes: int
    ipc: int
    budget: int | None = None
    """Storage in images, for methods without classes."""
    is_audio: bool = False
    """Whether the images are spectrograms (the shape alone does not tell)."""
    factor: int | None = None
    """Parts along each axis of a stored image, if settings that override the preset set it."""
    can_flip: bool = True
    """Whether a mirrored image keeps its class."""


@dataclass(frozen=True)
class SetExtras:
    """What a set may hold beside images and classes.

    Attributes:
        soft_labels: [N, K], a value per class of every stored image; its class is then the largest one.
        label_kind: what these are (`Meta.label_kind`); None: probabilities.
        learned_lr: the learning rate that was distilled, > 0.
        schedule: the steps that networks are trained by.
    """

    soft_labels: Tensor | None = None
    label_kind: LabelKind | None = None
    learned_lr: float | None = None
    schedule: Schedule | None = None


@dataclass(frozen=True)
class DistillContext:
    """Everything a method gets.

    Attributes:
        dataset: name, classes, shape; its test set is never opened here.
        split: the real images to distil from, uint8 [N, C, H, W], on the CPU.
        split_name: which part of the dataset `split` is (included in pool hashes).
        space: the pixel space that images are matched and stored in.
        ipc: images per class.
        arch: the network to match in.
        seed: the run's seed; all randomness derives from it.
        device: where to compute.
        pool: provides shared networks, trained on first use.
        compile: whether the hot function may be compiled.
        method: the method's name.
        config: the resolved configuration, stored in the artifact.
        budget: storage in images, for methods without classes.
        search_seed: for a run on all of train: the seed whose val tenth its shared networks must not see.
        memory_budget: bytes that one part of a step may take; None: `memory.memory_budget` of the device.
        shard: the classes to distil, all that `split` has images of; None: every class.
    """

    dataset: Dataset
    split: Split
    split_name: str
    space: PixelSpace
    ipc: int
    arch: str
    seed: int
    device: torch.device
    pool: ModelPool
    compile: bool
    method: str
    config: Mapping[str, Any]
    budget: int | None = None
    search_seed: int = 0
    memory_budget: int | None = None
    shard: Shard | None = None

    @property
    def classes(self) -> range:
        """The labels of the classes to distil."""
        return range(self.dataset.num_classes) if self.shard is None else self.shard.classes

    @property
    def whole(self) -> Split:
        """The split that this context's is a shard of; its images, in a shard, are blanks."""
        return self.split if self.shard is None else self.shard.whole

    @property
    def counts(self) -> Tensor:
        """The number of real images of every class, int64 [K], of other shards' classes too."""
        return torch.bincount(self.whole.labels, minlength=self.dataset.num_classes)

    @property
    def shared_split(self) -> str:
        """The part of train for networks shared by searches, their final runs and other runs.

        It excludes val: networks trained on val would bias the val scores of a search.
        """
        return str(SplitName(self.search_seed)) if self.split_name == "train" else self.split_name

    def generator(self, *labels: str | int) -> torch.Generator:
        """Return a CPU generator for one purpose; step i's draws depend only on the seed and i."""
        return derive(self.seed, "distill", *labels)

    def make_set(
        self,
        images: Tensor,
        labels: Tensor,
        partition: Partition | None = None,
        *,
        extras: SetExtras | None = None,
    ) -> DistilledSet:
        """Return stored images [N, C, H, W] (in `space`) and labels [N] as a self-describing set on the CPU.

        Each image splits into the mini-images of a partition; None or one part: not at all. Soft labels among
        the `extras` take the place of `labels`, and count as storage.
        """
        extras, soft = extras or SetExtras(), None
        if extras.soft_labels is not None:
            soft = extras.soft_labels.detach().to("cpu", torch.float32, copy=True).contiguous()
            labels = soft.argmax(1)
        if partition is not None and partition.num_parts == 1:
            partition = None
        zca = {"zca_mean": self.space.zca_mean, "zca_matrix": self.space.zca_matrix}
        meta = Meta(
            dataset=self.dataset.name,
            fingerprint=self.dataset.fingerprint,
            class_names=self.dataset.class_names,
            ipc=self.ipc,
            ipc_decoded=self.ipc * (partition.num_parts if partition else 1),
            storage_floats=images.numel() + (0 if soft is None else soft.numel()),
            pixel_space=self.space.kind,
            mean=self.dataset.mean,
            std=self.dataset.std,
            image_shape=self.dataset.image_shape,
            method=self.method,
            config=dict(self.config),
            seed=self.seed,
            split=self.split_name,
            arch=self.arch,
            norm=parse_arch(self.arch).norm,
            decoder="partition" if partition else None,
            partition=partition,
            **{name: getattr(extras, name) for name in ADDED},
            versions=versions(),
            git_commit=git_commit(),
        )
        return DistilledSet(
            images=images.detach().to("cpu", torch.float32, copy=True).contiguous(),
            labels=labels.detach().to("cpu", torch.int64, copy=True),
            meta=meta,
            zca={k: v.cpu() for k, v in zca.items() if v is not None} if self.space.kind == "zca" else {},
            soft_labels=soft,
        )

    def make_ssl_set(self, images: Tensor, targets: Tensor) -> DistilledSet:
        """Return images [N, C, H, W] (in `space`) and targets [N, D] as a set without labels."""
        distilled = self.make_set(images, torch.zeros(0, dtype=torch.int64))
        counted = {"storage_floats": images.numel() + targets.numel(), "budget": self.budget}
        return replace(
            distilled,
            targets=targets.detach().to("cpu", torch.float32, copy=True).contiguous(),
            meta=distilled.meta.model_copy(update=counted),
        )

    def make_based_set(self, tensors: Mapping[str, Tensor], bases: Bases) -> DistilledSet:
        """Return a set that is stored as bases, coefficients and networks (decoder `boost_ssdd`)."""
        compact = {
            name: t.detach().to("cpu", torch.float32, copy=True).contiguous() for name, t in tensors.items()
        }
        distilled = self.make_ssl_set(images_of(compact, bases), targets_of(compact))
        decoded = len(distilled.images) * (bases.num_views + 1)
        counted = {
            "storage_floats": sum(tensor.numel() for tensor in compact.values()),
            "ipc_decoded": max(1, decoded // self.dataset.num_classes),
            "decoder": "boost_ssdd",
            "bases": bases,
        }
        return replace(distilled, compact=compact, meta=distilled.meta.model_copy(update=counted))


class MethodConfig(Config):
    """Settings of a method, with what a method says about them; every class attribute may be left out."""

    search_space: ClassVar[Mapping[str, Mapping[str, Any]] | None] = None
    """What `ddray tune` varies without `--space`, as in a space file: `{"lr": {"loguniform": [0.01, 1]}}`."""
    protocol: ClassVar[str] = ""
    """What `ddray tune` scores its sets by: the papers' protocol; default `hard`, for targets `linear`."""
    dataset_settings: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Run settings by dataset, over the preset's: `{"digits": {"steps": 300}, "digits_ipc10": {...}}`."""
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Run settings of presets of its own, by name: over preset `paper` and over the dataset's settings."""
    quick: ClassVar[Mapping[str, Any]] = {}
    """Settings with which the contract tests take seconds."""
    with_fewer_epochs: ClassVar[Mapping[str, Any]] = {}
    """Settings that a table's limit changes too where it lowers epochs, such as which of them are used."""
    decide_defaults: ClassVar[tuple[str, ...]] = ()
    """Settings that the defaults of others depend on: a search varies none of them."""
    uses_maps: ClassVar[bool] = False
    """Whether the method needs `Features.maps`, which other people's networks may not have."""
    orders_steps: ClassVar[bool] = False
    """Whether sets have a schedule, by which the protocol `steps` trains."""
    compiles: ClassVar[bool] = False
    """Whether the method uses `ctx.compile`, which else is false."""

    @property
    def edition(self) -> int:
        """How often these settings have come to make other sets: from 1 on it is in the keys of units."""
        return 0

    @property
    def has_space(self) -> bool:
        """Whether the search space of the method varies anything that these settings use."""
        return True

    def learns_in_turn(self, num_classes: int, ipc: int) -> bool:
        """Return whether some images are learned only after others: a part of the steps tells little then."""
        return False

    def work_per_step(
        self, num_images: int, num_classes: int, arch: str, image_shape: tuple[int, int, int]
    ) -> float:
        """Return what a step on `num_images` learned images computes, up to a factor, for forecasts.

        Here its learned and real images' multiply-adds; `batch_real` counts the real ones of a class.
        """
        real = num_classes * int(getattr(self, "batch_real", 0))
        return float((num_images + real) * multiply_adds(arch, image_shape))


class Engine(Protocol):
    """What a method does once it has a context."""

    def step(self) -> dict[str, Tensor]:
        """Run the next step; return device scalars, including `loss`."""

    def snapshot(self) -> DistilledSet:
        """Return the current set as a detached CPU copy."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state to checkpoint: tensors and counters, no hyperparameters."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state."""


class Distiller(Engine, Protocol):
    """The interface of a method.

    Attributes:
        config_type: the method's settings, a `MethodConfig`.
        num_steps: steps of a whole run; 0 for methods that select in `setup`. If the number depends on the
            images (D3HR), it is 0 until `setup` has run.

    A class attribute `schedule`, a str, says what depends on the number of steps, such as "its learning rate
    falls to 0 over the run". Without it, the first steps of a longer run are those of a shorter one, which
    `--resume --steps MORE` therefore continues (see `schedule_of`).

    A static method `independent_classes(config, arch)` returns None if the images of a class depend on no
    other class, and the method distils those of `DistillContext.shard` where there is one; else the reason in
    a line. Without it, `--shards` is refused (see `coupling_of`).

    An attribute `measures`, a mapping of names to numbers, is what a method measured itself, such as seconds
    of a part of it; a run's row has them.
    """

    config_type: ClassVar[type[Config]]
    num_steps: int

    def __init__(self, config: Any, num_steps: int) -> None: ...

    @staticmethod
    def preset(name: str, target: Target) -> dict[str, Any]:
        """Return the run settings (nested, as in a YAML) of preset `paper` or `repo` for a target."""

    def setup(self, ctx: DistillContext) -> None:
        """Take splits, pool, generators and device; make the initial images."""


def schedule_of(method_class: type[Distiller]) -> str:
    """Return what of a method depends on the number of steps; empty: nothing."""
    return str(getattr(method_class, "schedule", ""))


def coupling_of(method_class: type[Distiller], config: Config, arch: str) -> str | None:
    """Return why classes can't be distilled apart with these settings and network; None if they can."""
    declare = getattr(method_class, "independent_classes", None)
    if getattr(method_class, "uses_budget", False):
        return "it learns from all images together, without classes"
    if declare is None:
        return "the method does not say that its classes are independent"
    reason: str | None = declare(config, arch)
    return reason


def coupling_by_norm(arch: str) -> str | None:
    """Return why a network in train mode couples classes: batch norm, or layers that ddray does not know.

    Dropout and stochastic depth draw from one stream for all samples.
    """
    parsed = parse_arch(arch)
    if parsed.is_external:
        return f"whether {arch} mixes samples is not known"
    if parsed.drops:
        return f"the layers that {arch} drops are drawn for images of all classes at once"
    return f"the batch norm of {arch} mixes images of all classes" if "batch" in parsed.norm else None


class BudgetDistiller(Distiller, Protocol):
    """A method without classes, which takes a storage budget instead of images per class.

    Attributes:
        uses_budget: marks such a method.
    """

    uses_budget: ClassVar[Literal[True]]

    @staticmethod
    def num_distilled(config: Any, budget: int, image_shape: tuple[int, int, int], num_real: int) -> int:
        """Return how many images the method can store within `budget` images of storage; 0: none fits."""
