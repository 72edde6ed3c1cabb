"""The real side of a matching method: batches by class, augmented as the synthetic images are, in chunks.

Also what learns the synthetic images.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, Final, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ddray.artifact.distilled_set import DistilledSet
from ddray.data import PixelSpace
from ddray.data.packed import PackedImages, read, resident
from ddray.distillation.method import DistillContext, MethodConfig
from ddray.distillation.shards import Part, parts_of
from ddray.methods.families.matching.draws import MANY_IMAGES, distinct
from ddray.methods.families.matching.groups import class_groups, image_bytes, rows_of
from ddray.methods.families.matching.initial import initial_images
from ddray.methods.families.state import images_state, load_images_state
from ddray.nets import Net, build_net, reinitialize, training_format
from ddray.nets.convnet import ChainNet
from ddray.seeding import derive_seed
from ddray.system.memory import memory_budget
from ddray.system.numerics import current
from ddray.system.transfer import to_device
from ddray.training.dsa import DsaPlan, siamese
from ddray.training.engine import Order, Step, run
from ddray.training.graph import WORTHWHILE_STEPS, Graphs
from ddray.training.loop import Training, augmenter
from ddray.training.recipe import Recipe

Statistics = Callable[[Net, Tensor], tuple[Tensor, ...]]
"""Per-sample statistics, each [N, D_l], of images [N, C, H, W] under a network."""

# A block's map of one chunk stays below this: larger ones leave the cache, and from 32 MiB on glibc maps
# fresh pages for each (unless ddray has told it to reuse memory). A DataDAM step (2,560 real images of 32 px)
# took 2.09 s at 8 MiB, 1.86 at 16, 1.96 at 32 on 2 cores.
_CHUNK_BYTES: Final = 16 * 2**20
_MOST_CHUNK_BYTES: Final = 2**31  # on a GPU, which larger chunks do not keep busier
CHUNK_SHARE: Final = 4  # of the memory budget: a layer has its input, its output and a workspace
_ENCODED: Final = 1024  # images whitened at a time
_GPU_SHARE: Final = 16  # a quarter of that, as a chunk's CUDA graph has its memory for itself


class ClassBatches:
    """Draws real images class by class, without a loop over classes.

    Args:
        ctx: its split is moved to the device once, as uint8 (whitened images: once, as float32). Packed
            images stay on the disk where the device has no room, and are encoded batch by batch.
        batch_real: images per class; capped by the smallest class with at least ipc images. A smaller class
            gives its images several times.

    Attributes:
        num_classes: K, of the context's classes.
        per_class: real images of each in a draw.
        labels_cpu: of a draw, int64 [K * per_class], on the CPU: they select DSA's operations without a sync.
        labels: the same on the device.
    """

    def __init__(self, ctx: DistillContext, batch_real: int) -> None:
        self._space = ctx.space.to(ctx.device)
        split, self._device = ctx.split, ctx.device
        self._encoded = ctx.space.kind == "zca" and not isinstance(split.images, PackedImages)
        if self._encoded:
            self._images = _encode_all(ctx, self._space)
        else:
            self._images = resident(split.images, ctx.device)
        self.num_classes, self._classes = len(ctx.classes), slice(ctx.classes.start, ctx.classes.stop)
        counts = ctx.counts
        enough = counts[counts >= ctx.ipc]
        self.per_class = min(batch_real, int(enough.min() if len(enough) else counts.max()))
        # The tail's rows of members are repeated whole, so that all of its images are drawn equally often.
        rounds = (self.per_class + counts - 1) // counts
        self._lengths = counts * rounds
        columns = torch.arange(int(self._lengths.max()))
        self._table = (len(counts), len(columns))
        order, counts = torch.argsort(split.labels, stable=True), counts[self._classes]
        self._members = order[(counts.cumsum(0) - counts)[:, None] + columns % counts[:, None]]
        self._absent = columns >= self._lengths[self._classes, None]
        labels = torch.arange(ctx.classes.start, ctx.classes.stop)
        self.labels_cpu = labels.repeat_interleave(self.per_class)
        self.labels = self.labels_cpu.to(ctx.device)

    def draw(self, generator: torch.Generator) -> Tensor:
        """Return image indices [K * per_class], class-sorted, without repetition in classes of as many."""
        if self._table[0] * self._table[1] < MANY_IMAGES:
            keys = torch.rand(self._table, generator=generator)[self._classes].masked_fill_(self._absent, 2.0)
            columns = keys.topk(self.per_class, dim=1, largest=False, sorted=False).indices
        else:
            columns = distinct(self._lengths, self.per_class, generator)[self._classes]
        return to_device(self._members.gather(1, columns).flatten(), self._images.device)

    def take(self, index: Tensor) -> Tensor:
        """Return the images of `index` [n] in their pixel space, float32 [n, C, H, W]."""
        return next(self.take_parts(index, [slice(0, len(index))]))

    def take_parts(self, index: Tensor, parts: Sequence[slice]) -> Iterator[Tensor]:
        """Yield what `take` returns of each part of `index`; packed images are read one part ahead."""
        rows = (index[part].to(self._images.device) for part in parts)
        for stored in read(self._images, rows):
            yield stored if self._encoded else self._space.encode(to_device(stored, self._device))


def _encode_all(ctx: DistillContext, space: PixelSpace) -> Tensor:
    """Return the real images in a pixel space, float32 [N, C, H, W], made on the device in chunks."""
    images = ctx.split.images
    whole = torch.empty(images.shape, dtype=torch.float32, device=ctx.device)
    for start in range(0, len(images), _ENCODED):
        part = slice(start, start + _ENCODED)
        whole[part] = space.encode(images[part].to(ctx.device))
    return whole


class RealBranch:
    """Batches of real images under a working network, and the augmentation they share with synthetic ones.

    Args:
        ctx: what to work on.
        batch_real: real images per class and step, as `ClassBatches` caps it.
        augment: `dsa` | `dsa_idc` | `none`.
        strategy: operations of the augmentation, joined by "_"; None: all of them.

    Attributes:
        batches: draws real images.
        net: the working network, in train mode; its weights are swapped in place.
        sample_bytes: of one image's largest map in it.
        budget: bytes that a group of classes, or some chunks of real images, may take.
    """

    def __init__(
        self,
        ctx: DistillContext,
        batch_real: int,
        augment: Literal["dsa", "dsa_idc", "none"],
        strategy: str | None = None,
    ) -> None:
        self._ctx, self._augment = ctx, augment
        self._classes = slice(ctx.classes.start, ctx.classes.stop)
        self.batches = ClassBatches(ctx, batch_real)
        self._dsa = siamese(ctx.dataset.can_flip, augment, strategy)
        shape, num_classes = ctx.dataset.image_shape, ctx.dataset.num_classes
        net = build_net(ctx.arch, shape, num_classes, seed=0, device=ctx.device)
        # One format for the run, as graphs keep the weights' memory; on a CPU that of forward passes.
        on_cpu, bf16 = ctx.device.type == "cpu", current().precision == "bf16"
        self._format = torch.channels_last if on_cpu else training_format(net, ctx.device, bf16=bf16)
        self.net = net.to(memory_format=self._format)
        self.sample_bytes = max(self.net.eval().map_bytes(), default=1)
        self.net.train()
        self._trainer: Step | None = None
        self.budget = memory_budget(ctx.device, ctx.memory_budget)
        self._exact = not _has_stable_bits(ctx, self.net)
        self._nets = [self.net]

    def sees_too(self, net: Net) -> None:
        """Reckon with a second network that the synthetic images go through, in eval mode."""
        self._nets.append(net)
        self._exact = self._exact or not _has_stable_bits(self._ctx, net)

    @property
    def mixes(self) -> bool:
        """Whether a layer mixes samples as the network is now: batch norm in train mode."""
        return any(isinstance(module, _BatchNorm) and module.training for module in self.net.modules())

    def groups(self, forward: Callable[[Tensor], Any], per_class: int) -> list[slice]:
        """Return ranges of classes whose synthetic images, `per_class` of each, fit the budget in a step.

        `forward` is what is computed of images [N, C, H, W]. Batch norm in train mode mixes samples: all
        classes are one group then, with a warning if they do not fit. A shard gets those groups of all
        classes that have classes of its own: `part` tells which.
        """
        blank = torch.zeros(2, *self.net.image_shape, device=self.batches.labels.device)
        images = self.augmented(blank, None, self.batches.labels_cpu[:2])
        weights = chain.from_iterable(net.parameters() for net in self._nets)
        size = image_bytes(forward, images, self.sample_bytes, weights)
        num_classes = self._ctx.dataset.num_classes
        groups = class_groups(num_classes, per_class * size, self.budget, mixes=self.mixes)
        return [part.whole for part in parts_of(groups, self._classes, exact=True)]

    def part(self, classes: slice, per_class: int) -> Part:
        """Return which of a group's images, `per_class` of each class, are those of the context's classes."""
        group, present = rows_of(classes, per_class), rows_of(self._classes, per_class)
        return next(parts_of([group], present, exact=self._exact))

    def renew(self, net_index: int) -> None:
        """Give the network the fresh random weights of number `net_index`."""
        reinitialize(self.net, derive_seed(self._ctx.seed, "distill", "net", net_index))

    def train(
        self, images: Tensor, labels: Tensor, generator: torch.Generator, epochs: int, lr: float, batch: int
    ) -> None:
        """Train the network on synthetic images, augmented as for matching: SGD at one rate, no momentum."""
        sgd = {"lr": lr, "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}
        recipe = Recipe.parse({**sgd, "epochs": epochs, "batch": batch, "augment": self._augment})
        augment = augmenter(self._augment, can_flip=self._ctx.dataset.can_flip, space=self._ctx.space)
        training = Training(images, labels.to(images.device), recipe, augment)
        num_steps = epochs * len(Order(len(labels), batch).sizes)
        if self._trainer is None:  # one for the whole run, and so one CUDA graph
            self._trainer = training.step([self.net], self._ctx.config["steps"] * num_steps)
        on_cpu = images.device.type == "cpu"
        form = training_format(self.net, images.device) if on_cpu else self._format
        self.net.to(memory_format=form).train()
        batches = training.batches(images.contiguous(memory_format=form), [generator])
        run(self._trainer, islice(batches, num_steps), lr=lambda step: lr)
        self.net.to(memory_format=self._format).eval()

    def draw(self, generator: torch.Generator) -> tuple[Tensor, DsaPlan | None]:
        """Return indices of real images [K * n], class-sorted, and augmentation parameters of every class."""
        index = self.batches.draw(generator)
        num_classes = self._ctx.dataset.num_classes
        return index, self._dsa.draw(num_classes, generator, shared_op=False) if self._dsa else None

    def augmented(
        self, images: Tensor, plan: DsaPlan | None, labels: Tensor, among: slice | None = None
    ) -> Tensor:
        """Return images [N, C, H, W] under their classes' parameters; `labels` on the CPU.

        A shard's images are augmented as the unsharded run does it, together with all images of `among`.
        """
        if plan is not None and self._dsa is not None:
            images = self._dsa.apply(images, plan, labels, among)
        return images.contiguous(memory_format=self._format)

    def chunks(
        self, index: Tensor, plan: DsaPlan | None, labels: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows of `index` with their images, augmented: in chunks that fit a CPU's cache.

        Where samples mix they are one batch (as in other DM code).

        Args:
            index: real images [N].
            plan: the augmentation's parameters.
            labels: of the images, on the CPU; default: those of a whole draw.
        """
        labels = self.batches.labels_cpu if labels is None else labels
        parts = self._chunks(len(index))
        for rows, images in zip(parts, self.batches.take_parts(index, parts), strict=True):
            yield rows, self.augmented(images, plan, labels[rows])

    def _chunks(self, total: int) -> list[slice]:
        device = self.batches.labels.device
        return [slice(0, total)] if self.mixes else [*chunks(total, self.sample_bytes, device, self.budget)]

    def passes(self, index: Tensor, plan: DsaPlan | None, classes: slice) -> Iterator[tuple[Part, Tensor]]:
        """Yield the images of a draw chunk by chunk, augmented, for the context's classes of a group.

        Args:
            index: real images of a whole draw.
            plan: the augmentation's parameters.
            classes: the group.

        Yields:
            What of the group's real images a chunk has, and the chunk's images [n, C, H, W] with blanks;
            `Part.here` counts from the first image of the context's classes in the group.
        """
        num, group = self.batches.per_class, self.part(classes, self.batches.per_class)
        index, labels = index[group.here], self.batches.labels_cpu[group.here]
        first = self._classes.start * num + group.here.start - group.whole.start
        grid = self._chunks(group.whole.stop - group.whole.start)
        parts = list(parts_of(grid, slice(first, first + len(index)), exact=self._exact))
        taken = self.batches.take_parts(index, [part.here for part in parts])
        for part, images in zip(parts, taken, strict=True):
            ends = part.whole.start // num, -(-part.whole.stop // num)
            among = slice(*(classes.start + end for end in ends))
            augmented = self.augmented(images, plan, labels[part.here], among)
            yield part, self.padded(augmented, part)

    def padded(self, images: Tensor, part: Part) -> Tensor:
        """Return augmented images [n, C, H, W] with the blanks of their part."""
        return part.padded(images).contiguous(memory_format=self._format) if part.is_padded else images

    @torch.no_grad()
    def class_means(
        self, index: Tensor, plan: DsaPlan | None, statistics: Statistics, classes: slice | None = None
    ) -> list[Tensor]:
        """Return the means [K, D_l] of the statistics of a draw's real images, for `classes` or for all.

        In a shard, for those of `classes` that are the shard's.
        """
        batches, classes = self.batches, classes or slice(0, self._ctx.dataset.num_classes)
        here = self.part(classes, 1).here
        num_classes, first = here.stop - here.start, batches.labels[:1]
        sums: list[Tensor] = []
        for part, images in self.passes(index, plan, classes):
            chunk = statistics(self.net, images)
            if not sums:
                sums = [values.new_zeros(num_classes, values.shape[1]) for values in chunk]
            for total, values in zip(sums, chunk, strict=True):  # counted from the first of the group
                total.index_add_(0, batches.labels[part.here] - first, part.without_blanks(values))
        return [total.div_(batches.per_class) for total in sums]


def _has_stable_bits(ctx: DistillContext, net: Net) -> bool:
    """Return whether the bits of a sample do not depend on how many samples are computed with it.

    Of float32 on a CPU that is so for chains of convolutions (measured: any number from two on), not for
    residual networks with average pooling, depthwise convolutions, attention, nor for kernels that are
    compiled or chosen by the shapes of their arguments.
    """
    settings = ctx.config.get("method", {}).get("precision"), current().precision
    eager = ctx.device.type == "cpu" and not ctx.compile and "bf16" not in settings
    return ctx.shard is None or (eager and isinstance(net.body, ChainNet))


def chunks(total: int, sample_bytes: int, device: torch.device, budget: int | None = None) -> Iterator[slice]:
    """Yield slices over `total` samples whose largest maps (`sample_bytes` each) fit the cache or the GPU.

    A chunk's forward pass also fits `budget`, by default the device's `memory_budget`.
    """
    budget = memory_budget(device) if budget is None else budget
    on_cpu = device.type == "cpu"
    most, share = (_CHUNK_BYTES, CHUNK_SHARE) if on_cpu else (_MOST_CHUNK_BYTES, _GPU_SHARE)
    size = max(1, min(total, min(most, budget // share) // max(1, sample_bytes)))
    if size >= 8 and (on_cpu or size < total):
        size -= size % 8
    for start in range(0, total, size):
        yield slice(start, min(total, start + size))


def step_graphs(ctx: DistillContext) -> Graphs:
    """Return CUDA graphs for a function that each step calls: on a GPU, where there are enough steps."""
    return Graphs(on=ctx.device.type == "cuda" and int(ctx.config["steps"]) >= WORTHWHILE_STEPS)


class ImagesConfig(MethodConfig):
    """Settings of every method that learns whole images."""

    lr_img: float = Field(default=0.1, gt=0)
    """Learning rate of the images (SGD)."""
    momentum: float = Field(default=0.5, ge=0, lt=1)
    """Momentum of the images' SGD."""
    batch_real: int = Field(default=256, ge=1)
    """Real images per class and step; never more than the smallest class of at least ipc images has."""
    init: Literal["random", "kcenter", "noise"] = "noise"
    """Initial images: random real ones, k-center's choice, or Gaussian noise."""
    augment: Literal["dsa", "dsa_idc", "none"] = "none"
    """Siamese augmentation: the same parameters for real and synthetic images, a fresh draw per class."""


class ImagesEngine:
    """Images [K * ipc, C, H, W] and what learns them; a subclass adds its `step`, which counts in `_step`."""

    _momentum = "velocity"  # its key in states

    def __init__(self, ctx: DistillContext, config: ImagesConfig) -> None:
        self._ctx, self._step = ctx, 0
        self._branch = RealBranch(ctx, config.batch_real, config.augment)
        images, self._labels = initial_images(ctx, config.init)
        self._images = images.contiguous().requires_grad_(True)
        self._optimizer = torch.optim.SGD([self._images], lr=config.lr_img, momentum=config.momentum)

    def snapshot(self) -> DistilledSet:
        return self._ctx.make_set(self._images, self._labels)

    def state_dict(self) -> dict[str, Any]:
        """Return images, momentum and step; draws need no state, they depend on the step alone."""
        return {"step": self._step, **images_state(self._images, self._optimizer, momentum=self._momentum)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step = int(state["step"])
        load_images_state(self._images, self._optimizer, state, momentum=self._momentum)
