"""The real side of a matching method: batches by class, augmented as the synthetic images are, in chunks.

Also the initial synthetic images, and what learns them.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Final, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ddray.artifact.distilled_set import DistilledSet
from ddray.data import PixelSpace
from ddray.data.packed import PackedImages, read, resident
from ddray.distillation.method import DistillContext, MethodConfig
from ddray.methods.families.matching.draws import MANY_IMAGES, distinct
from ddray.methods.families.matching.groups import class_groups, image_bytes, rows_of
from ddray.methods.families.selection import kcenter_order, pool_features
from ddray.methods.families.state import images_state, load_images_state
from ddray.nets import Net, build_net, reinitialize, training_format
from ddray.seeding import derive_numpy, derive_seed
from ddray.system.memory import memory_budget
from ddray.system.numerics import current
from ddray.system.transfer import to_device
from ddray.training.dsa import DsaPlan, siamese
from ddray.training.engine import Order, Step, run
from ddray.training.graph import WORTHWHILE_STEPS, Graphs
from ddray.training.loop import Training, augmenter
from ddray.training.recipe import Recipe

Init = Literal["random", "first", "kcenter", "noise"]
Statistics = Callable[[Net, Tensor], tuple[Tensor, ...]]
"""Per-sample statistics, each [N, D_l], of images [N, C, H, W] under a network."""

# A block's map of one chunk stays below this: larger ones leave the cache, and from 32 MiB on glibc maps
# fresh pages for each (unless ddray has told it to reuse memory). A DataDAM step (2,560 real images of 32 px)
# took 2.09 s at 8 MiB, 1.86 at 16, 1.96 at 32 on 2 cores.
_CHUNK_BYTES: Final = 16 * 2**20
_MOST_CHUNK_BYTES: Final = 2**31  # on a GPU, which larger chunks do not keep busier
CHUNK_SHARE: Final = 4  # of the memory budget: a layer has its input, its output and a workspace
_GPU_SHARE: Final = 16  # a quarter of that, as a chunk's CUDA graph has its memory for itself
_COPY_NOISE: Final = 0.1  # of the images' standard deviation


class ClassBatches:
    """Draws real images class by class, without a loop over classes.

    Args:
        ctx: its split is moved to the device once, as uint8 (whitened images: once, as float32). Packed
            images stay on the disk where the device has no room, and are encoded batch by batch.
        batch_real: images per class; capped by the smallest class with at least ipc images. A smaller class
            gives its images several times.
    """

    def __init__(self, ctx: DistillContext, batch_real: int) -> None:
        self._space = ctx.space.to(ctx.device)
        split, self._device = ctx.split, ctx.device
        self._encoded = ctx.space.kind == "zca" and not isinstance(split.images, PackedImages)
        self._images = (
            _encode_all(split.images, self._space, ctx.device)
            if self._encoded
            else resident(split.images, ctx.device)
        )
        self.num_classes = ctx.dataset.num_classes
        counts = torch.bincount(split.labels, minlength=self.num_classes)
        enough = counts[counts >= ctx.ipc]
        self.per_class = min(batch_real, int(enough.min() if len(enough) else counts.max()))
        # The tail's rows of members are repeated whole, so that all of its images are drawn equally often.
        rounds = (self.per_class + counts - 1) // counts
        columns = torch.arange(int((counts * rounds).max()))
        order = torch.argsort(split.labels, stable=True)
        self._members = order[(counts.cumsum(0) - counts)[:, None] + columns % counts[:, None]]
        self._lengths = counts * rounds
        self._absent = columns >= self._lengths[:, None]
        # The CPU copy selects DSA's ops without a sync, the device copy indexes the sums.
        self.labels_cpu = torch.arange(self.num_classes).repeat_interleave(self.per_class)
        self.labels = self.labels_cpu.to(ctx.device)

    def draw(self, generator: torch.Generator) -> Tensor:
        """Return image indices [K * per_class], class-sorted, without repetition in classes of as many."""
        if self._members.numel() < MANY_IMAGES:
            keys = torch.rand(self._members.shape, generator=generator).masked_fill_(self._absent, 2.0)
            columns = keys.topk(self.per_class, dim=1, largest=False, sorted=False).indices
        else:
            columns = distinct(self._lengths, self.per_class, generator)
        return to_device(self._members.gather(1, columns).flatten(), self._images.device)

    def take(self, index: Tensor) -> Tensor:
        """Return the images of `index` [n] in their pixel space, float32 [n, C, H, W]."""
        return next(self.take_parts(index, [slice(0, len(index))]))

    def take_parts(self, index: Tensor, parts: Iterable[slice]) -> Iterator[Tensor]:
        """Yield what `take` returns of each part of `index`; packed images are read one part ahead."""
        rows = (index[part].to(self._images.device) for part in parts)
        for images in read(self._images, rows):
            yield images if self._encoded else self._space.encode(to_device(images, self._device))


def _encode_all(images: Tensor, space: PixelSpace, device: torch.device) -> Tensor:
    """Return images in a pixel space, float32 [N, C, H, W], made on the device in chunks."""
    whole = torch.empty(images.shape, dtype=torch.float32, device=device)
    for start in range(0, len(images), 1024):
        whole[start : start + 1024] = space.encode(images[start : start + 1024].to(device))
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

    @property
    def mixes(self) -> bool:
        """Whether a layer mixes samples as the network is now: batch norm in train mode."""
        return any(isinstance(module, _BatchNorm) and module.training for module in self.net.modules())

    def groups(self, forward: Callable[[Tensor], Any], per_class: int) -> list[slice]:
        """Return ranges of classes whose synthetic images, `per_class` of each, fit the budget in a step.

        `forward` is what is computed of images [N, C, H, W]. Batch norm in train mode mixes samples: all
        classes are one group then, with a warning if they do not fit.
        """
        blank = torch.zeros(2, *self.net.image_shape, device=self.batches.labels.device)
        images = self.augmented(blank, None, self.batches.labels_cpu[:2])
        size = image_bytes(forward, images, self.sample_bytes, self.net.parameters())
        return class_groups(self.batches.num_classes, per_class * size, self.budget, mixes=self.mixes)

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
        """Return indices of real images [K * n], class-sorted, and augmentation parameters for each class."""
        index = self.batches.draw(generator)
        num_classes = self.batches.num_classes
        return index, self._dsa.draw(num_classes, generator, shared_op=False) if self._dsa else None

    def augmented(self, images: Tensor, plan: DsaPlan | None, labels: Tensor) -> Tensor:
        """Return images [N, C, H, W] under their classes' parameters; `labels` on the CPU."""
        if plan is not None and self._dsa is not None:
            images = self._dsa.apply(images, plan, labels)
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
        whole = [slice(0, len(index))]
        cut = chunks(len(index), self.sample_bytes, self._ctx.device, self.budget)
        parts = whole if self.mixes else list(cut)
        for rows, images in zip(parts, self.batches.take_parts(index, parts), strict=True):
            yield rows, self.augmented(images, plan, labels[rows])

    @torch.no_grad()
    def class_means(
        self, index: Tensor, plan: DsaPlan | None, statistics: Statistics, classes: slice | None = None
    ) -> list[Tensor]:
        """Return the means [K, D_l] of the statistics of a draw's real images, for `classes` or for all."""
        batches, classes = self.batches, classes or slice(0, self.batches.num_classes)
        part = rows_of(classes, batches.per_class)
        sums: list[Tensor] = []
        for rows, images in self.chunks(index[part], plan, batches.labels_cpu[part]):
            chunk = statistics(self.net, images)
            if not sums:
                num_classes = classes.stop - classes.start
                sums = [values.new_zeros(num_classes, values.shape[1]) for values in chunk]
            for total, values in zip(sums, chunk, strict=True):
                total.index_add_(0, batches.labels[rows], values)  # counted from the first of `classes`
        return [total.div_(batches.per_class) for total in sums]


def initial_images(
    ctx: DistillContext, init: Init, count: int | None = None, *, repeat: bool = True
) -> tuple[Tensor, Tensor]:
    """Return initial images [K * count, C, H, W] and class-sorted labels, on the device.

    Args:
        ctx: what to work on.
        init: random real images, the first of each class, k-center's choice, or Gaussian noise.
        count: images per class; default: ipc.
        repeat: a class with fewer real images starts with copies of them; in a class of fewer than ipc images
            under a little noise, so that they can part. False: it gives all it has.
    """
    num_classes, num = ctx.dataset.num_classes, count or ctx.ipc
    labels = torch.arange(num_classes).repeat_interleave(num).to(ctx.device)
    if init == "noise":
        noise = torch.randn((len(labels), *ctx.dataset.image_shape), generator=ctx.generator("init"))
        return noise.to(ctx.device), labels
    features = pool_features(ctx) if init == "kcenter" else None
    rng = derive_numpy(ctx.seed, "distill", "random images")
    indices, copies = [], []
    for label in range(num_classes):
        members = torch.nonzero(ctx.split.labels == label).flatten()
        if features is not None:
            members = members[kcenter_order(features[members], min(num, len(members)))]
        elif init == "random":
            members = members[torch.from_numpy(rng.permutation(len(members)))]
        positions = torch.arange(num if repeat else min(num, len(members)))
        indices.append(members[positions % len(members)])
        copies.append((positions >= len(members)) & (len(members) < ctx.ipc))
    index, is_copy = torch.cat(indices), torch.cat(copies)
    images = ctx.space.encode(ctx.split.images[index])
    if bool(is_copy.any()):
        noise = torch.randn((int(is_copy.sum()), *images.shape[1:]), generator=ctx.generator("init copies"))
        images[is_copy] += _COPY_NOISE * images.std() * noise
    return images.to(ctx.device), ctx.split.labels[index].to(ctx.device)


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
