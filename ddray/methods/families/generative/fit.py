"""Training of networks that move by turns: real batches, averaged weights, one loop with a checkpoint.

Every step draws from its own generator, and all that steps leave behind is in the networks' states and the
optimisers': training that goes on from its checkpoint ends with the same bytes.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ddray.data import Split
from ddray.data.packed import resident
from ddray.errors import DivergedError, InputError
from ddray.methods.families.diffusion.fit import Checkpoint
from ddray.seeding import derive
from ddray.system.progress import progress
from ddray.system.transfer import to_device


@dataclass(frozen=True)
class RealImages:
    """The real images, on the device where they fit.

    Attributes:
        split: uint8 images [N, C, H, W] with labels.
        num_classes: K.
        can_flip: whether a mirrored image keeps its class.
        seed: decides the order of every epoch, and all draws of the training.
        device: where to compute.
    """

    split: Split
    num_classes: int
    can_flip: bool
    seed: int
    device: torch.device

    def __post_init__(self) -> None:
        if self.split.images.dtype != torch.uint8:
            raise InputError("a generator is trained on uint8 images, got spectrograms; use another method")

    def __len__(self) -> int:
        return len(self.split)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        images = self.split.images
        return (images.shape[1], images.shape[2], images.shape[3])

    def size_within(self, batch: int) -> int:
        """Return the size of a batch: all images, if they are fewer."""
        return min(batch, len(self))

    def per_epoch(self, batch: int) -> int:
        """Return the number of whole batches in a pass over the images."""
        return len(self) // self.size_within(batch)

    def batch(self, number: int, batch: int, name: str = "real") -> tuple[Tensor, Tensor]:
        """Return a whole batch of shuffled passes, by its number: images in [-1, 1] and labels [n].

        The order of an epoch depends on the seed, the `name` and its number alone.
        """
        size = self.size_within(batch)
        epoch, position = divmod(number, self.per_epoch(batch))
        order = _order(self.seed, name, epoch, len(self))
        return self.take(order[position * size : (position + 1) * size])

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images of `index` [n] (on the CPU) in [-1, 1], channels-last, and their labels."""
        pixels = self._images.index_select(0, to_device(index, self._images.device))
        images = to_device(pixels, self.device).float() / 127.5 - 1
        labels = self._labels.index_select(0, to_device(index, self.device))
        return images.contiguous(memory_format=torch.channels_last), labels

    @cached_property
    def _images(self) -> Tensor:
        return resident(self.split.images, self.device)

    @cached_property
    def _labels(self) -> Tensor:
        return self.split.labels.to(self.device)

    def draws(self, step: int) -> torch.Generator:
        """Return the generator, on the device, of all draws of a step."""
        return derive(self.seed, "step", step, device=self.device)

    def labels_for(self, num: int, generator: torch.Generator) -> Tensor:
        """Return labels [num] for samples, each class as likely as any other."""
        return torch.randint(self.num_classes, (num,), generator=generator, device=self.device)


@lru_cache(maxsize=4)
def _order(seed: int, name: str, epoch: int, num: int) -> Tensor:
    return torch.randperm(num, generator=derive(seed, name, "epoch", epoch))


class Average:
    """A moving average of a network's parameters and buffers.

    Args:
        net: what is averaged.
        decay: of the average.
        start: updates before, of which it is a copy.
    """

    def __init__(self, net: nn.Module, decay: float, start: int = 0) -> None:
        self.net = copy.deepcopy(net).requires_grad_(False)
        self._decay, self._start = decay, start
        pairs = list(zip(self.net.state_dict().values(), net.state_dict().values(), strict=True))
        self._floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._counts = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the network's values of after `step` (from 0)."""
        mine, theirs = (list(tensors) for tensors in zip(*self._floats, strict=True))
        torch._foreach_lerp_(mine, theirs, 1.0 if step < self._start else 1 - self._decay)
        for count, new in self._counts:
            count.copy_(new)


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    """Take one step of an optimiser on a loss; return the loss, detached."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.detach()


class Training(ABC):
    """Networks and optimisers of a system, and what one of its steps does.

    Attributes:
        loss_names: of the losses that `update` returns.
        nets: all that steps change besides the optimisers' states.
        optimizers: in the order in which they are stored.
        per_epoch: steps in an epoch.
        epochs: of the whole training.
    """

    loss_names: ClassVar[tuple[str, ...]]
    nets: nn.ModuleDict
    optimizers: Sequence[torch.optim.Optimizer]
    per_epoch: int
    epochs: int

    @abstractmethod
    def update(self, step: int) -> Tensor:
        """Take step number `step`; return its losses, on the device, as `loss_names` lists them."""

    @abstractmethod
    def generator_state(self) -> dict[str, Tensor]:
        """Return the weights of what is sampled, once training is over."""

    def run(self, checkpoint: Checkpoint) -> dict[str, float]:
        """Train from the checkpoint's state, if it has one; return the mean losses of the last epoch.

        DivergedError if a loss is NaN or infinite.
        """
        total, done, means = self.per_epoch * self.epochs, 0, [math.nan] * len(self.loss_names)
        sums = torch.zeros(len(means), device=next(self.nets.parameters()).device)
        if "generator" in checkpoint.stages:
            state = checkpoint.stages["generator"]
            done, means = state["step"], state["means"]
            self.nets.load_state_dict(state["nets"])
            for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(stored)
            sums += state["sums"].to(sums.device)

        def current_state() -> dict[str, Any]:
            optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
            nets = self.nets.state_dict()
            return {"step": done, "means": means, "nets": nets, "optimizers": optimizers, "sums": sums}

        with progress("training the generator", total, start=done) as show:
            while done < total:
                sums += self.update(done)
                done += 1
                if done % self.per_epoch == 0:
                    means = self._means(sums / self.per_epoch)
                    sums.zero_()
                    show(done, ", ".join(f"{n} {v:.4g}" for n, v in zip(self.loss_names, means, strict=True)))
                checkpoint.save("generator", current_state, now=done == total)
        return dict(zip(self.loss_names, means, strict=True))

    def _means(self, losses: Tensor) -> list[float]:
        means: list[float] = losses.tolist()
        if not all(map(math.isfinite, means)):
            raise DivergedError(f"the generator's losses must stay finite, got {means}; lower its lr")
        return means
