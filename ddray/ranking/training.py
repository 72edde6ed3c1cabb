"""Training the architectures of a NAS space: the hot loop behind `ddray nas`.

Images, labels and the batch order are on the device, augmentation runs there, and no step synchronises. On
CUDA the whole step (forward, backward, update) is one CUDA graph per architecture and batch size, with the
eager step as the fallback, and the seeds of one architecture are trained as one vmapped network where a probe
shows that this is faster. Never on a CPU: 8 fused ConvNets took twice the time of a loop (docs/ray.md, 17).
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.nets import Net, is_per_sample, training_format
from ddray.nets.features import CpuLayer
from ddray.ranking.recipe import NasRecipe
from ddray.seeding import derive
from ddray.training.dsa import Dsa, DsaPlan

log = logging.getLogger(__name__)

Mode = Literal["auto", "loop", "fused"]
_PROBE_STEPS = 6
# Images per chunk where no layer mixes images: a batch of 256 at once took up to 1.5 times as long.
_CPU_CHUNK = 64


def train_seeds(
    nets: Sequence[Net],
    images: Tensor,
    labels: Tensor,
    recipe: NasRecipe,
    *,
    seeds: Sequence[int],
    dsa: Dsa | None,
    num_steps: int | None = None,
    shuffle: bool = True,
    mode: Mode = "auto",
) -> str:
    """Train networks of one architecture, one per seed, in place; they end in eval mode.

    Args:
        nets: networks of one architecture with different weights, on the images' device.
        images: float32 [N, C, H, W], in channels_last.
        labels: int64 [N].
        recipe: the settings.
        seeds: seeds of the networks' batch orders and augmentation.
        dsa: the augmentation; None leaves batches as they are.
        num_steps: optimiser steps; default the recipe's epochs over `images`.
        shuffle: False reproduces an unshuffled loader (`--compat dcbench`).
        mode: `loop` one network after another, `fused` all at once, `auto` by a probe on CUDA, else `loop`.

    Returns:
        How they were trained: `loop` or `fused`, with `+graph` where a CUDA graph ran.
    """
    total = num_steps or recipe.num_steps(len(labels))
    for net in nets:
        net.to(memory_format=training_format(net, images.device)).train()
    work = _Work(images, labels, recipe, dsa, shuffle, total)
    if mode == "auto":
        fuse = len(nets) > 1 and images.device.type == "cuda" and _fusing_pays(nets, work, seeds)
    else:
        fuse = mode == "fused"
    if fuse:
        graph = work.run(_Fused(nets, recipe), seeds, total)
    else:
        pairs = zip(nets, seeds, strict=True)
        graph = min([work.run(_Single(net, recipe), [seed], total) for net, seed in pairs])
    for net in nets:
        net.to(memory_format=torch.channels_last).eval()
    return ("fused" if fuse else "loop") + ("+graph" if graph else "")


@torch.no_grad()
def count_right(net: Net, images: Tensor, labels: Tensor, *, chunk: int | None = None) -> int:
    """Return how many images [N, C, H, W] `net` classifies correctly; it is in eval mode, on their device."""
    chunk = chunk or (32 if images.device.type == "cpu" else 2048)
    right = torch.zeros((), dtype=torch.int64, device=images.device)
    for image_chunk, label_chunk in zip(torch.split(images, chunk), torch.split(labels, chunk), strict=True):
        right += (net(image_chunk).argmax(1) == label_chunk).sum()
    return int(right)


class _Work:
    """The training data and the loop over its batches."""

    def __init__(
        self, images: Tensor, labels: Tensor, recipe: NasRecipe, dsa: Dsa | None, shuffle: bool, total: int
    ) -> None:
        self.images, self.labels, self.recipe, self.dsa = images, labels, recipe, dsa
        self.shuffle, self.total = shuffle, total

    def run(self, stepper: _Single | _Fused, seeds: Sequence[int], num_steps: int) -> bool:
        """Do the first `num_steps` steps of the training; return whether CUDA graphs ran them."""
        orders = [self._batches(seed) for seed in seeds]
        generators = [derive(seed, "nas", "augment") for seed in seeds]
        graphs = _Graphs(stepper) if self.images.device.type == "cuda" else None
        step = stepper.step if graphs is None else graphs.step
        for step_index in range(num_steps):
            index = torch.cat([next(order) for order in orders])
            batch = self.images.index_select(0, index)
            if self.dsa is not None:
                size = len(index) // len(seeds)
                plans = [self.dsa.draw(size, generator, shared_op=True) for generator in generators]
                choices = torch.cat([plan.choices for plan in plans])
                batch = self.dsa.apply(batch, DsaPlan(choices, torch.cat([plan.params for plan in plans])))
            stepper.set_lr(self.recipe.lr_at(step_index, self.total))
            step(batch, self.labels.index_select(0, index))
        stepper.finish()
        return graphs is not None and graphs.captured

    def _batches(self, seed: int) -> Iterator[Tensor]:
        """Yield batch indices, epoch after epoch, drawn on the CPU and copied once per epoch."""
        generator = derive(seed, "nas", "order")
        num, device = len(self.labels), self.images.device
        while True:
            order = torch.randperm(num, generator=generator) if self.shuffle else torch.arange(num)
            yield from torch.split(order.to(device, non_blocking=True), self.recipe.batch)


class _Single:
    """The training step of one network."""

    def __init__(self, net: Net, recipe: NasRecipe) -> None:
        self._net, self._recipe = net, recipe
        self._params: list[Tensor] = list(net.parameters())
        self._per_sample = is_per_sample(net)
        self._lr = torch.zeros((), device=self._params[0].device)
        self._momenta = [torch.zeros_like(param) for param in self._params]
        self.state: list[Tensor] = [*self._params, *net.buffers(), *self._momenta]

    def set_lr(self, lr: float) -> None:
        """Set the rate of the next step."""
        self._lr.fill_(lr)

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Do one step on images [B, C, H, W]."""
        grads = self._gradients(images, labels)
        with torch.no_grad():
            if self._recipe.clip is not None:
                norm = torch.stack(torch._foreach_norm(grads)).norm()
                torch._foreach_mul_(grads, (self._recipe.clip / (norm + 1e-6)).clamp(max=1.0))
            _update(self._params, grads, self._momenta, self._lr, self._recipe)

    def _gradients(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        """Return the gradient of the mean loss, summed over chunks that fit a CPU's cache."""
        grads: list[Tensor] = []
        size = _CPU_CHUNK if self._per_sample and images.device.type == "cpu" else len(labels)
        for image_chunk, label_chunk in zip(
            torch.split(images, size), torch.split(labels, size), strict=True
        ):
            with _autocast(images.device, self._recipe):
                loss = F.cross_entropy(self._net(image_chunk), label_chunk, reduction="sum") / len(labels)
            chunk_grads = torch.autograd.grad(loss, self._params, materialize_grads=True)
            if grads:
                torch._foreach_add_(grads, chunk_grads)
            else:
                grads = list(chunk_grads)
        return grads

    def finish(self) -> None:
        """Do nothing: the network was trained in place."""


class _Fused:
    """The training step of several networks of one architecture at once (torch.func over stacked weights)."""

    def __init__(self, nets: Sequence[Net], recipe: NasRecipe) -> None:
        self._nets, self._recipe = nets, recipe
        stacked, self._buffers = torch.func.stack_module_state(list(nets))
        self._names = list(stacked)
        self._params = [stacked[name].detach().requires_grad_(True) for name in self._names]
        self._lr = torch.zeros((), device=self._params[0].device)
        self._momenta = [torch.zeros_like(param) for param in self._params]
        self._template = copy.deepcopy(nets[0]).to("meta")
        for module in self._template.modules():
            if isinstance(module, CpuLayer):
                module.plain = True
        self.state: list[Tensor] = [*self._params, *self._buffers.values(), *self._momenta]

    def set_lr(self, lr: float) -> None:
        """Set the rate of the next step."""
        self._lr.fill_(lr)

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Do one step on images [S * B, C, H, W], ordered by seed."""
        num = len(self._nets)
        with _autocast(images.device, self._recipe):
            params = dict(zip(self._names, self._params, strict=True))
            logits = torch.func.vmap(self._forward)(
                params, self._buffers, images.view(num, -1, *images.shape[1:])
            )
            losses = F.cross_entropy(logits.flatten(0, 1), labels, reduction="none")
        # A sum over seeds keeps the networks' gradients separate, each that of its own mean loss.
        loss = losses.sum() * (num / len(labels))
        grads = list(torch.autograd.grad(loss, self._params, materialize_grads=True))
        with torch.no_grad():
            if self._recipe.clip is not None:
                squares = torch.stack([grad.flatten(1).square().sum(1) for grad in grads]).sum(0)
                scale = (self._recipe.clip / (squares.sqrt() + 1e-6)).clamp(max=1.0)
                grads = [grad * scale.view(-1, *[1] * (grad.ndim - 1)) for grad in grads]
            _update(self._params, grads, self._momenta, self._lr, self._recipe)

    def _forward(self, params: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor) -> Tensor:
        logits: Tensor = torch.func.functional_call(self._template, (params, buffers), (images,))
        return logits

    @torch.no_grad()
    def finish(self) -> None:
        """Copy the trained weights into the networks."""
        trained = dict(zip(self._names, self._params, strict=True)) | self._buffers
        for seed_index, net in enumerate(self._nets):
            for name, tensor in (*net.named_parameters(), *net.named_buffers()):
                tensor.copy_(trained[name][seed_index])


def _update(
    params: list[Tensor], grads: list[Tensor], momenta: list[Tensor], lr: Tensor, recipe: NasRecipe
) -> None:
    """Do the update of torch.optim.SGD with the rate in a tensor, so that a CUDA graph can replay it."""
    if recipe.weight_decay:
        torch._foreach_add_(grads, params, alpha=recipe.weight_decay)
    torch._foreach_mul_(momenta, recipe.momentum)
    torch._foreach_add_(momenta, grads)
    if recipe.nesterov:
        torch._foreach_add_(grads, momenta, alpha=recipe.momentum)
    moves = torch._foreach_mul(grads if recipe.nesterov else momenta, lr)
    torch._foreach_sub_(params, moves)


def _autocast(device: torch.device, recipe: NasRecipe) -> Any:
    """Return the autocast context, without weight cache: it would outlive the step in a CUDA graph."""
    return torch.autocast(
        device.type, torch.bfloat16, enabled=recipe.precision == "bf16", cache_enabled=False
    )


class _Graphs:
    """CUDA graphs of a stepper's step, one per batch size; what can't be captured runs eagerly."""

    def __init__(self, stepper: _Single | _Fused) -> None:
        self._stepper = stepper
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self._eager = False
        self.captured = False

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Do one step: capture it the first time, replay it afterwards."""
        if not self._eager and len(labels) not in self._graphs:
            try:
                self._graphs[len(labels)] = self._capture(images, labels)
                self.captured = True
            except RuntimeError as error:
                self._eager = True
                log.warning("no CUDA graph (%s): steps run eagerly", str(error).splitlines()[0])
        if len(labels) not in self._graphs:
            self._stepper.step(images, labels)
            return
        graph, static_images, static_labels = self._graphs[len(labels)]
        static_images.copy_(images)
        static_labels.copy_(labels)
        graph.replay()

    def _capture(self, images: Tensor, labels: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        """Warm up on a side stream, capture, and restore what the warm-up changed."""
        before = [tensor.detach().clone() for tensor in self._stepper.state]
        static_images, static_labels = images.clone(), labels.clone()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._stepper.step(static_images, static_labels)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._stepper.step(static_images, static_labels)
        finally:
            with torch.no_grad():
                for tensor, old in zip(self._stepper.state, before, strict=True):
                    tensor.copy_(old)
        return graph, static_images, static_labels


def _fusing_pays(nets: Sequence[Net], work: _Work, seeds: Sequence[int]) -> bool:
    """Return whether fusing is faster, by timing a few steps both ways on copies of the networks."""

    def seconds(run: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    steps = min(_PROBE_STEPS, work.total)
    try:
        fused = seconds(lambda: work.run(_Fused(copy.deepcopy(nets), work.recipe), seeds, steps))
    except RuntimeError as error:  # an operation that can't be vmapped
        log.info("seeds are not fused (%s)", str(error).splitlines()[0])
        return False
    alone = seconds(lambda: work.run(_Single(copy.deepcopy(nets[0]), work.recipe), seeds[:1], steps))
    return fused < alone * len(nets)
