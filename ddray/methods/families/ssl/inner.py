"""The pool of inner networks that KRR-ST and Boost-SSDD train on their set (Boost-SSDD Algorithm 1)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.distillation.method import DistillContext
from ddray.methods.families.ssl.budget import KrrConfig
from ddray.methods.families.state import cpu_copy, load_velocities, velocities
from ddray.nets import Net, build_net, reinitialize
from ddray.seeding import derive_seed
from ddray.training.engine import Rule, Step

DrawRows = Callable[[torch.Generator], tuple[Tensor, Tensor]]
"""Returns the rows of an inner step, detached: images [n, C, H, W] and targets [n, D]."""


class _Slot:
    """One network, its momentum and its step counter."""

    def __init__(self, net: Net, config: KrrConfig) -> None:
        self.net = net
        self.trained = 0
        optimizer = partial(torch.optim.SGD, momentum=config.momentum_inner, weight_decay=config.decay_inner)
        self.step = Step([net], Rule(F.mse_loss, optimizer), lr=config.lr_inner)
        self.optimizer = self.step.optimizer

    def state(self) -> dict[str, Any]:
        """Return counter, weights, statistics and momentum as copies on the CPU."""
        net = cpu_copy(self.net.state_dict())
        return {"trained": self.trained, "net": net, "velocity": velocities(self.optimizer)}

    def load(self, state: dict[str, Any]) -> None:
        self.trained = int(state["trained"])
        self.net.load_state_dict(state["net"])
        load_velocities(self.optimizer, state["velocity"])


class InnerPool:
    """Inner networks, each trained for a different number of steps on the current set; `num_outputs` is D."""

    def __init__(self, ctx: DistillContext, config: KrrConfig, num_outputs: int) -> None:
        self._ctx, self._config = ctx, config
        self._slots = [_Slot(self._new(index, num_outputs), config) for index in range(config.pool_size)]
        self.filled = False

    def _new(self, slot_index: int, num_outputs: int) -> Net:
        ctx = self._ctx
        seed = self._seed(slot_index, 0)
        net = build_net(ctx.arch, ctx.dataset.image_shape, num_outputs, seed=seed, device=ctx.device)
        return net.to(memory_format=torch.channels_last).requires_grad_(False)

    def _seed(self, slot_index: int, step: int) -> int:
        """Return the seed of the weights that slot `slot_index` gets at outer step `step`."""
        return derive_seed(self._ctx.seed, "distill", "inner", slot_index, step)

    def fill(self, draw: DrawRows) -> None:
        """Train every network for a random number of steps, uniform in 1..Z (Algorithm 1, lines 4-5)."""
        config = self._config
        generator = self._ctx.generator("inner", "lengths")
        lengths = torch.randint(1, config.inner_steps_max + 1, (config.pool_size,), generator=generator)
        for slot_index, (slot, length) in enumerate(zip(self._slots, lengths.tolist(), strict=True)):
            rows = self._ctx.generator("inner", "fill", slot_index)
            for _ in range(length):
                self._train(slot, *draw(rows))
        self.filled = True

    def net(self, slot_index: int) -> Net:
        """Return a network in eval mode, its weights without gradient."""
        return self._slots[slot_index].net.eval()

    def advance(self, slot_index: int, draw: DrawRows, step: int) -> None:
        """Train a network for one step, or replace it (Algorithm 1, lines 13-19); outer `step` seeds it."""
        slot = self._slots[slot_index]
        if slot.trained < self._config.inner_steps_max:
            self._train(slot, *draw(self._ctx.generator("inner", "rows", step)))
            return
        reinitialize(slot.net, self._seed(slot_index, step))
        slot.optimizer.state.clear()
        if self._config.pool_reset == "paper":
            slot.trained = 0

    def _train(self, slot: _Slot, images: Tensor, targets: Tensor) -> None:
        """Take one step on Eq 2, the squared error's mean over rows and dimensions, in train mode."""
        net = slot.net.train().requires_grad_(True)
        slot.step(images.contiguous(memory_format=torch.channels_last), targets)
        slot.optimizer.zero_grad()
        net.requires_grad_(False)
        slot.trained += 1

    def state(self) -> list[dict[str, Any]]:
        """Return every network's state; empty before `fill`."""
        return [slot.state() for slot in self._slots] if self.filled else []

    def load(self, state: list[dict[str, Any]]) -> None:
        for slot, slot_state in zip(self._slots, state, strict=False):
            slot.load(slot_state)
        self.filled = bool(state)
