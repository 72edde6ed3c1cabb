"""The bilevel loop of KRR-ST, which Boost-SSDD runs on other parameters.

Each step takes an inner network of the pool, fits its last layer to the distilled set by kernel ridge
regression, and moves the set so that the fit predicts the teacher's representations of real images (Eq 3);
then the network is trained on for one step (Eq 2). The whole gradient is taken from features and targets,
never from a graph through the solve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Literal

import torch
from pydantic import Field
from torch import Tensor

from ddray.data import normalized_space
from ddray.data.dsa_ops import crop_and_flip
from ddray.distill import DistillContext
from ddray.errors import InputError
from ddray.memory import available_bytes
from ddray.methods._inner import InnerPool, InnerRecipe, PoolReset
from ddray.methods._matching import chunks, largest_map_bytes
from ddray.methods._ridge import ridge_loss, solve_bytes
from ddray.methods._ssl import SslConfig, teacher_of
from ddray.nets import Net, build_net
from ddray.ssl import teacher_net

Synthesise = Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor]]

# Distilled images whose graph is held at once: beyond, the pass is made twice, in parts.
_GRAPH_BYTES: Final = 8 * 2**30


class KrrConfig(SslConfig):
    """Settings of the bilevel loop."""

    lr_outer: float = Field(default=1e-3, gt=0)
    """Learning rate of what is distilled (AdamW without weight decay), falling linearly to 0."""
    batch_real: int = Field(default=1024, ge=1)
    """Real images per step; never more than there are."""
    augment_real: Literal["crop_flip", "none"] = "none"
    """`crop_flip`: the teacher sees each real batch under RandomCrop and a flip; `none`: its features are
    those of the pool."""
    ridge: float = Field(default=1e-6, gt=0)
    """lambda of Eq 3, as a part of the Gram matrix's trace."""
    pool_size: int = Field(default=10, ge=1)
    """L, inner networks."""
    inner_steps_max: int = Field(default=1000, ge=1)
    """Z, steps after which an inner network is replaced."""
    pool_reset: PoolReset = "paper"
    """`paper`: a replaced network counts from 0; `krrst_code`: its counter stays at Z, so that it is replaced
    each time it is taken."""
    lr_inner: float = Field(default=0.1, gt=0)
    """Learning rate of the inner networks (SGD)."""
    momentum_inner: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of the inner networks."""
    decay_inner: float = Field(default=1e-3, ge=0)
    """Weight decay of the inner networks."""
    inner_batch: int | None = Field(default=None, ge=2)
    """Rows of the set per inner step, drawn at random; default: all of them, as in the papers."""


class BilevelLoop:
    """The outer loop over a set's parameters, with its inner networks and its optimiser.

    Args:
        ctx: what to work on.
        config: the loop's settings.
        parameters: initial values by name; learned in place, on the device.
        synthesise: from the parameters to images with views [M, C, H, W] and targets [M, D], differentiable.
        num_steps: of the whole run: the rate falls linearly over them.

    Raises:
        InputError: the set is too large for the device's memory.
    """

    def __init__(
        self,
        ctx: DistillContext,
        config: KrrConfig,
        parameters: Mapping[str, Tensor],
        synthesise: Synthesise,
        num_steps: int,
    ) -> None:
        self._ctx, self._config = ctx, config
        self._synthesise, self._num_steps = synthesise, max(1, num_steps)
        self.parameters = {
            name: value.detach().to(ctx.device, copy=True).contiguous().requires_grad_(True)
            for name, value in parameters.items()
        }
        self._optimizer = torch.optim.AdamW(
            list(self.parameters.values()), lr=config.lr_outer, weight_decay=0.0
        )
        entry = teacher_of(ctx, config.teacher)
        self._wanted = entry.tensors["features"].to(ctx.device)
        augmented = config.augment_real == "crop_flip"
        self._teacher = teacher_net(entry).to(ctx.device) if augmented else None
        self._teacher_space = normalized_space(ctx.dataset)
        self._images = ctx.split.images.to(ctx.device)
        self._space = ctx.space.to(ctx.device)
        with torch.no_grad():
            num_rows = len(synthesise(self.parameters)[0])
        self._measure(num_rows)
        recipe = InnerRecipe(
            size=config.pool_size,
            longest=config.inner_steps_max,
            lr=config.lr_inner,
            momentum=config.momentum_inner,
            weight_decay=config.decay_inner,
            batch=config.inner_batch,
            reset=config.pool_reset,
        )
        self.inner = InnerPool(ctx, recipe, self._wanted.shape[1])
        self._step = 0

    def _measure(self, num_rows: int) -> None:
        """Find what one image costs, and refuse a set that the device can't hold.

        Raises:
            InputError: naming the memory it would need.
        """
        ctx, config = self._ctx, self._config
        net = build_net(ctx.arch, ctx.dataset.image_shape, 1, seed=0, device=ctx.device).eval()
        with torch.no_grad():
            found = net.features(torch.zeros(1, *ctx.dataset.image_shape, device=ctx.device))
        self._sample_bytes = largest_map_bytes(net, ctx)
        # A map's output of convolution and norm, and what pooling leaves of it.
        self._graph_bytes = sum(2 * m.numel() * m.element_size() for m in found.maps) * 5 // 4
        inner_rows = min(num_rows, config.inner_batch or num_rows)
        outer_rows = min(num_rows, _GRAPH_BYTES // self._graph_bytes)
        graph = max(inner_rows, outer_rows) * self._graph_bytes
        needed = graph + solve_bytes(num_rows, found.embedding.shape[1])
        available = available_bytes(ctx.device)
        if needed > available:
            raise InputError(
                f"{ctx.method} needs about {needed / 2**30:.1f} GiB for {num_rows} images with their views, "
                f"{ctx.device} has {available / 2**30:.1f}: lower the budget, or set method.inner_batch"
            )

    def step(self) -> dict[str, Tensor]:
        """Take one outer step (Algorithm 1, lines 8-19)."""
        if not self.inner.filled:
            self.inner.fill(*self._current())
        self._step += 1
        generator = self._ctx.generator("step", self._step)
        number = int(torch.randint(self._config.pool_size, (), generator=generator))
        loss = self._outer(self.inner.net(number), generator)
        self.inner.advance(number, *self._current(), self._step)
        return {"loss": loss}

    @torch.no_grad()
    def _current(self) -> tuple[Tensor, Tensor]:
        return self._synthesise(self.parameters)

    def _outer(self, net: Net, generator: torch.Generator) -> Tensor:
        """Update the parameters on Eq 3 under one network; return the loss."""
        images, targets = self._synthesise(self.parameters)
        leaf = _channels_last(images.detach()).requires_grad_(True)
        rows = max(1, _GRAPH_BYTES // self._graph_bytes)
        parts = [slice(start, start + rows) for start in range(0, len(leaf), rows)]
        whole = len(parts) == 1
        with torch.set_grad_enabled(whole):
            features = torch.cat([net.embed(leaf[part]) for part in parts])
        found = ridge_loss(
            features.detach(), targets.detach(), self._real(net, generator), ridge=self._config.ridge
        )
        if whole:
            features.backward(found.features)  # type: ignore[no-untyped-call]
        else:
            for part in parts:
                net.embed(leaf[part]).backward(found.features[part])  # type: ignore[no-untyped-call]
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward([images, targets], [leaf.grad, found.targets])
        factor = 1 - (self._step - 1) / self._num_steps
        self._optimizer.param_groups[0]["lr"] = self._config.lr_outer * max(factor, 0.0)
        self._optimizer.step()
        return found.loss

    @torch.no_grad()
    def _real(self, net: Net, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield chunks of a fresh real batch: features under `net`, and the teacher's representations."""
        num = min(self._config.batch_real, len(self._images))
        index = torch.randperm(len(self._images), generator=generator)[:num]
        index = index.to(self._images.device, non_blocking=True)
        for part in chunks(num, self._sample_bytes, self._images.device):
            images, wanted = self._images[index[part]], self._wanted[index[part]]
            if self._teacher is not None:
                images = crop_and_flip(images.float() / 255, generator, can_flip=self._ctx.dataset.can_flip)
                wanted = self._teacher.embed(_channels_last(self._teacher_space.encode(images)))
            yield net.embed(_channels_last(self._space.encode(images))), wanted

    def state_dict(self) -> dict[str, Any]:
        """Return parameters, AdamW's averages, inner networks and the step count."""
        optimizer = {
            name: {key: value.detach().cpu().clone() for key, value in self._optimizer.state[p].items()}
            for name, p in self.parameters.items()
            if p in self._optimizer.state
        }
        return {
            "step": self._step,
            "parameters": {name: p.detach().cpu().clone() for name, p in self.parameters.items()},
            "optimizer": optimizer,
            "inner": self.inner.state(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`'s state."""
        self._step = int(state["step"])
        for name, parameter in self.parameters.items():
            parameter.copy_(state["parameters"][name])
            held = state["optimizer"].get(name)
            if held is not None:
                # AdamW counts its steps on the CPU.
                self._optimizer.state[parameter] = {
                    key: value.clone() if key == "step" else value.to(parameter.device, copy=True)
                    for key, value in held.items()
                }
        self.inner.load(state["inner"])


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)
