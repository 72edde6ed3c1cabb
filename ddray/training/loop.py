"""Training a network by a recipe, augmented by name: for protocols, the pool and methods' inner loops."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.data import PixelSpace, Split
from ddray.data.packed import PackedImages, read
from ddray.nets import Net, training_format
from ddray.seeding import derive_seed, forked_global
from ddray.system.memory import total_bytes
from ddray.system.numerics import current
from ddray.system.progress import Row, progress
from ddray.system.transfer import to_device
from ddray.training.crops import padded_crop
from ddray.training.cutmix import cutmix, mixed_cross_entropy
from ddray.training.dsa import Dsa, DsaPlan, siamese
from ddray.training.embedding import Score, score
from ddray.training.engine import Batch, Order, Rule, Step, run
from ddray.training.fusing import PROBE_STEPS, fusing_pays
from ddray.training.gsam import Gsam
from ddray.training.jitter import crop_jitter
from ddray.training.rates import phases, step_rate
from ddray.training.recipe import Augment, Recipe
from ddray.training.team import Team

Augmenter = Callable[[Tensor, torch.Generator], Tensor]
_PADDING: Final = 4


class Checkpoints(Protocol):
    """Where a training leaves its state at the end of an epoch, and finds it when it is started again."""

    def load(self) -> dict[str, Any] | None:
        """Return the last state that was saved, if there is one."""
        ...

    def save(self, state: Callable[[], dict[str, Any]]) -> None:
        """Save the state, or leave it for this epoch; every member of a team calls this."""
        ...


def train(
    net: Net,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    *,
    generator: torch.Generator,
    augment: Augmenter | None,
    on_epoch: Callable[[Tensor], None] | None = None,
    regress: bool = False,
) -> Tensor:
    """Train `net` in place, leave it in eval mode, and return the mean loss of the last epoch.

    The loss is a scalar on the device, which nothing has waited for.

    Args:
        net: the network, on the labels' device, where the images are too unless they are packed.
        images: float32 [N, C, H, W] in their pixel space, or what `augment` takes.
        labels: int64 [N], float32 [N, K] (soft labels, probabilities), or targets [N, D] if `regress`.
        recipe: epochs, rates, batch, schedule, CutMix; not its augmentation.
        generator: CPU generator of the batches' order and the augmentation.
        augment: applied to every batch, before CutMix; None leaves it as it is.
        on_epoch: called with each epoch's mean loss, a scalar on the device.
        regress: train on the mean squared error from the targets, instead of on the cross entropy.
    """
    training = Training(images, labels, recipe, augment, regress)
    loss = training.run([net], [generator], on_epoch=on_epoch)
    net.to(memory_format=torch.channels_last).eval()
    return loss


def train_together(
    nets: Sequence[Net],
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    *,
    generators: Sequence[torch.Generator],
    augment: Augmenter | None,
    regress: bool = False,
) -> Tensor:
    """Train networks of one architecture as `train` does each with its generator; return their mean loss.

    On CUDA they are trained as one where a probe shows that this is faster.
    """
    training = Training(images, labels, recipe, augment, regress)
    states = [generator.get_state() for generator in generators]

    def fit(copies: Sequence[Net], fused: bool) -> None:
        probed = [torch.Generator().set_state(state) for state in states[: len(copies)]]
        training.run(copies, probed, fused=fused, max_steps=PROBE_STEPS)

    can_fuse = len(nets) > 1 and images.device.type == "cuda" and recipe.cutmix == 0  # a share is a batch's
    if can_fuse and fusing_pays(nets, fit):
        loss = training.run(nets, generators, fused=True)
    else:
        pairs = zip(nets, generators, strict=True)
        loss = torch.stack([training.run([net], [generator]) for net, generator in pairs]).mean()
    for net in nets:
        net.to(memory_format=torch.channels_last).eval()
    return loss


@dataclass(frozen=True)
class Training:
    """What networks are trained on, and how: see `train`.

    Attributes:
        images: as of `train`, or what `encode` takes.
        labels: as of `train`.
        recipe: as of `train`.
        augment: as of `train`.
        regress: as of `train`.
        encode: applied to the images of a batch, or of its part, before all else.
        team: processes that train one network together, each with its rows of every batch.
        gsam: as of the engine's `Rule`.
    """

    images: Tensor  # packed ones may be on the disk while `labels` are on the device to compute on
    labels: Tensor
    recipe: Recipe
    augment: Augmenter | None
    regress: bool = False
    encode: Callable[[Tensor], Tensor] | None = None
    team: Team | None = None
    gsam: Gsam | None = None

    def run(
        self,
        nets: Sequence[Net],
        generators: Sequence[torch.Generator],
        *,
        fused: bool = False,
        max_steps: int | None = None,
        on_epoch: Callable[[Tensor], None] | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> Tensor:
        """Train a network, or several as one; return the mean loss.

        `max_steps` is for each phase; `checkpoints` take the place of `on_epoch`, for one network.
        """
        recipe, device = self.recipe, self.labels.device
        form = training_format(nets[0], device, fused=fused, bf16=current().precision == "bf16")
        images = self.images.contiguous(memory_format=form)
        for net in nets:
            net.to(memory_format=form).train()
        epoch = len(Order(len(self.labels), recipe.batch).sizes)
        loss = torch.zeros(())
        resuming = _Resuming(nets[0], generators[0], checkpoints)
        with _epochs_shown(nets, recipe.epochs) as show:
            for rates, done in resuming.left(phases(recipe)):
                step = self.step(nets, len(rates) * epoch, fused=fused)
                batches = _counted(self.batches(images, generators), show, done, epoch)
                loss = run(
                    step,
                    islice(batches, max_steps),
                    lr=step_rate(recipe, rates, done, epoch),
                    epoch=epoch,
                    on_epoch=on_epoch if checkpoints is None else resuming.begin(step, checkpoints),
                )
                step.finish()
        return loss

    def step(self, nets: Sequence[Net], num_steps: int, *, fused: bool = False) -> Step:
        """Return the engine's step."""
        recipe = self.recipe
        optimizer: Any = partial(torch.optim.Adam, weight_decay=recipe.weight_decay)
        if recipe.optimizer == "sgd":
            optimizer = partial(torch.optim.SGD, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
        rule = Rule(F.mse_loss if self.regress else mixed_cross_entropy, optimizer, gsam=self.gsam)
        return Step(nets, rule, fused=fused, num_steps=num_steps, team=self.team)

    def batches(self, images: Tensor, generators: Sequence[torch.Generator]) -> Iterator[Batch]:
        """Yield the batches, without end; `images` are those of the training in any memory format."""
        order = Order(len(self.labels), self.recipe.batch)
        orders = [order.indices(generator, images.device) for generator in generators]
        steps = zip(*orders, strict=True)
        if isinstance(images, PackedImages):
            yield from self._read_batches(images, steps, len(order.sizes), generators)
        for rows in steps:
            yield self._batch([images[index] for index in self._read(rows)], rows, generators)

    def _read_batches(
        self,
        images: Tensor,
        steps: Iterator[tuple[Tensor, ...]],
        epoch: int,
        generators: Sequence[torch.Generator],
    ) -> Iterator[Batch]:
        """Yield the batches of packed images; while one is used, the next one of its epoch is read."""
        while True:
            ahead = list(islice(steps, epoch))  # not more: the next order is drawn after this one's batches
            parts = read(images, chain.from_iterable(map(self._read, ahead)))
            for rows in ahead:
                yield self._batch([next(parts) for _ in rows], rows, generators)

    @property
    def _is_cut_first(self) -> bool:
        """Whether a member of a team needs its own images alone, and the draws of the whole batch.

        It needs all of them where images are mixed, or where one image's draws depend on another's.
        """
        mixes = self.recipe.cutmix > 0 and not self.regress
        by_image = self.augment is None or isinstance(self.augment, DsaAugment)
        return self.team is not None and by_image and not mixes

    def _read(self, rows: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return which rows of a batch this process has to read."""
        if self.team is None or not self._is_cut_first:
            return rows
        return [index[self.team.rows(len(index))] for index in rows]

    def _batch(
        self, parts: list[Tensor], rows: Sequence[Tensor], generators: Sequence[torch.Generator]
    ) -> Batch:
        """Return each network's inputs, with its own draws, one after another, and their targets.

        `parts` are the images of `_read(rows)`. A member of a team returns its rows of the batch.
        """
        if self.encode is not None:
            parts = [self.encode(part) for part in parts]
        if self._is_cut_first:
            return self._cut_batch(parts[0], rows[0], generators[0])
        if self.augment is not None:
            drawn = zip(parts, generators, strict=True)
            parts = [self.augment(part, generator) for part, generator in drawn]
        inputs, labels = _joined(parts), self.labels[to_device(_joined(rows), self.labels.device)]
        cutmixes = self.recipe.cutmix > 0 and not self.regress
        mixed = cutmix(inputs, self.recipe.cutmix, generators[0]) if cutmixes else None
        batch = (inputs, labels) if mixed is None else (mixed.images, *mixed.targets(labels))
        if self.team is None:
            return batch
        part = self.team.rows(len(inputs))
        return tuple(tensor[part] if tensor.ndim else tensor for tensor in batch)

    def _cut_batch(self, inputs: Tensor, rows: Tensor, generator: torch.Generator) -> Batch:
        """Return a member's images, augmented as they are in the whole batch of `rows`, and their targets."""
        part = slice(None) if self.team is None else self.team.rows(len(rows))
        if isinstance(self.augment, DsaAugment):
            plan = self.augment.draw(len(rows), generator)
            inputs = self.augment.dsa.apply(inputs, plan.rows(part))
        return inputs, self.labels[to_device(rows[part], self.labels.device)]


def _epochs_shown(nets: Sequence[Net], num_epochs: int) -> AbstractContextManager[Row]:
    """Return the row of a training."""
    several = f"{len(nets)} x " if len(nets) > 1 else ""
    name = getattr(nets[0], "arch", type(nets[0]).__name__)
    return progress(f"training {several}{name}", num_epochs, unit="epoch")


def _counted(batches: Iterator[Batch], show: Row, done: int, epoch: int) -> Iterator[Batch]:
    """Yield batches; show the epochs, of `epoch` batches each, that are behind them and the `done` ones."""
    for index, batch in enumerate(batches):
        show(done + index // epoch, "", work=(done + index / epoch) / max(1, show.total))
        yield batch


class _Resuming:
    """The epochs of a network's training that are left, and its state at the end of each."""

    def __init__(self, net: Net, generator: torch.Generator, checkpoints: Checkpoints | None) -> None:
        self._net, self._generator, self._done, self._num_epochs = net, generator, 0, 0
        self._optimizer: dict[int, Any] = {}
        if checkpoints is not None and (state := checkpoints.load()) is not None:
            net.load_state_dict(state["weights"])
            generator.set_state(state["generator"])
            self._done, self._optimizer = state["epochs"], state["optimizer"]

    def left(self, phases: Sequence[list[float]]) -> Iterator[tuple[list[float], int]]:
        """Yield the phases, without the epochs that are done, and the number of epochs before each.

        A later phase has a fresh optimiser.
        """
        self._num_epochs, begun, first = sum(map(len, phases)), self._done, 0
        for rates in phases:
            if begun == 0:
                self._optimizer = {}
            if begun < len(rates):
                yield rates[begun:], first + begun
            begun, first = max(0, begun - len(rates)), first + len(rates)

    def begin(self, step: Step, checkpoints: Checkpoints) -> Callable[[Tensor], None]:
        """Give a phase's step the state of its optimiser; return what to call at the end of an epoch."""
        optimizer = step.optimizer
        if self._optimizer:
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": self._optimizer, "param_groups": groups})

        def state() -> dict[str, Any]:
            return {
                "epochs": self._done,
                "weights": self._net.state_dict(),
                "optimizer": optimizer.state_dict()["state"],
                "generator": self._generator.get_state(),
            }

        def end_epoch(loss: Tensor) -> None:
            self._done += 1
            if self._done < self._num_epochs:
                checkpoints.save(state)

        return end_epoch


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def score_net(
    net: Net, split: Split, space: PixelSpace, *, device: torch.device, chunk: int | None = None
) -> Score:
    """Return the fractions of a split that `net` (in eval mode, trained in `space`) classifies correctly.

    On a GPU, a `chunk` is by default what takes an eighth of its memory, 1,024 images at most.
    """
    if chunk is None and device.type == "cuda" and isinstance(net, Net):
        largest = max(net.map_bytes(), default=1)
        chunk = max(1, min(1024, total_bytes(device) // (8 * 4 * largest)))
    return score(net, split.images, split.labels, space.to(device).encode, device, chunk=chunk)


@dataclass(frozen=True)
class DsaAugment:
    """DSA for training: one operation for a batch, with parameters per image."""

    dsa: Dsa

    def __call__(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """Return a batch [N, C, H, W] augmented by a draw of its own."""
        return self.dsa.apply(batch, self.draw(len(batch), generator))

    def draw(self, num: int, generator: torch.Generator) -> DsaPlan:
        """Return a draw for a batch of `num` images."""
        return self.dsa.draw(num, generator, shared_op=True)


def augmenter(
    name: Augment, *, can_flip: bool, space: PixelSpace, strategy: str | None = None
) -> Augmenter | None:
    """Return the augmentation called `name` for batches [N, C, H, W] in `space`; None if it does nothing.

    `crop_flip`: windows of the image with 4 black pixels around it, and a flip where `can_flip`;
    `crop_jitter`: resized crops, the same flip and colour jitter.

    `dsa` and `dsa_idc`: per-sample parameters, one op for a batch (`dsa`) as at the peers' evaluation; of all
    operations or those of `strategy`, without flip unless mirrored images keep their class (`can_flip`).
    `autoaugment` and `randaugment`: torchvision's policies on the pixels as 8-bit images, image by image
    (DataDAM supplement, Fig 4).

    Raises:
        InputError: the strategy names an unknown operation.
    """
    if name == "autoaugment" or name == "randaugment":
        return _policy(name, space)
    if name == "crop_flip":
        return partial(_crop_flip, space=space, flip=can_flip)
    if name == "crop_jitter":
        return crop_jitter(space, flip=can_flip)
    dsa = siamese(can_flip, name, strategy)
    return None if dsa is None else DsaAugment(dsa)


def _crop_flip(batch: Tensor, generator: torch.Generator, *, space: PixelSpace, flip: bool) -> Tensor:
    """Return random windows of a batch [N, C, H, W]; black is the mean over a whitened black image."""
    blank = torch.zeros(1, *batch.shape[1:])
    black = to_device(space.to(blank.device).encode(blank).mean((2, 3), keepdim=True), batch.device)
    crops = padded_crop(batch, generator, padding=_PADDING, fill=black, flip=flip)
    return crops.contiguous(memory_format=torch.channels_last)


def _policy(name: str, space: PixelSpace) -> Augmenter:
    """Return torchvision's AutoAugment or RandAugment on batches in `space`."""
    from torchvision.transforms import v2

    transform = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10) if name == "autoaugment" else v2.RandAugment()
    spaces: dict[torch.device, PixelSpace] = {}  # a whitening's inverse is computed once, not per batch

    def apply(batch: Tensor, generator: torch.Generator) -> Tensor:
        if (device := batch.device) not in spaces:
            spaces[device] = space.to(device)
        device_space = spaces[device]
        pixels = (device_space.decode(batch).clamp(0, 1) * 255).round().to(torch.uint8)
        seed = int(torch.randint(2**62, (), generator=generator))
        with forked_global(derive_seed(seed, "augment")):
            changed = torch.stack([transform(image) for image in pixels])
        return device_space.encode(changed).contiguous(memory_format=torch.channels_last)

    return apply
