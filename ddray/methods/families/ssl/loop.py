"""The bilevel loop of KRR-ST, which Boost-SSDD runs on other parameters, and FRePo by other rules.

Each step takes an inner network of the pool, fits its last layer to the distilled set by kernel ridge
regression, and moves the set so that the fit predicts the teacher's representations of real images (Eq 3);
then the network is trained for one more step (Eq 2; Algorithm 1 is Boost-SSDD's). The gradient in features
and targets is in closed form: no graph goes through the solve.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.artifact.distilled_set import DistilledSet
from ddray.data import normalized_space
from ddray.distillation.method import DistillContext
from ddray.methods.families.matching.batches import chunks
from ddray.methods.families.ssl.budget import KrrConfig, teacher_of
from ddray.methods.families.ssl.memory import Extent, LoopConfig, images_at_once, network_costs
from ddray.methods.families.ssl.ridge import RidgeLoss, ridge_loss
from ddray.methods.families.ssl.teacher import teacher_net
from ddray.methods.families.state import (
    cpu_copy,
    load_optimizer_state,
    load_velocities,
    optimizer_state,
    velocities,
)
from ddray.nets import Net, build_net, reinitialize
from ddray.seeding import derive_seed
from ddray.system.transfer import to_device
from ddray.training.engine import Rule, Step
from ddray.training.operations import crop_and_flip

SCHEDULE: Final = "its learning rate falls linearly to 0 over the steps"
DrawRows = Callable[[torch.Generator], tuple[Tensor, Tensor]]
"""Returns the rows of an inner step, detached: images [n, C, H, W] and targets [n, D]."""
Rows = slice | Tensor
"""Which of the m images."""
Synthesise = Callable[[Mapping[str, Tensor], Rows], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class InnerRules:
    """How inner networks are trained and replaced.

    Attributes:
        arch: their architecture.
        rule: loss and optimiser of a step.
        lr: its learning rate.
        num_steps: the counter at which a network is replaced.
        resets: whether a replaced one counts from 0.
        is_staggered: the counters of untrained networks begin evenly spread (FRePo); otherwise each network
            is trained for a random number of steps first (KRR-ST).
    """

    arch: str
    rule: Rule
    lr: float
    num_steps: int
    resets: bool = True
    is_staggered: bool = False


@dataclass(frozen=True)
class Rules:
    """What a method decides about the loop.

    Attributes:
        outputs: what the regression predicts for all real images [N, D], on the CPU.
        regress: maps distilled features and targets, and chunks of real features and outputs, to the loss.
        optimizer: of the parameters; a class of torch.optim with its settings.
        factor: maps a step, counted from 0, to its factor on `lr_outer`.
        inner: of the inner networks.
        teacher: gives the outputs anew of augmented real batches; None: they are not augmented.
        representations: the outputs, if they are a teacher's.
        synthesise_inner: what inner networks are trained on, images without views; None: as the regression.
    """

    outputs: Tensor
    regress: Callable[[Tensor, Tensor, Iterable[tuple[Tensor, Tensor]]], RidgeLoss]
    optimizer: Callable[..., torch.optim.Optimizer]
    factor: Callable[[int], float]
    inner: InnerRules
    teacher: Net | None = None
    representations: Tensor | None = None
    synthesise_inner: Synthesise | None = None


def krr_inner_rules(arch: str, config: KrrConfig) -> InnerRules:
    """Return KRR-ST's rules for inner networks of an architecture."""
    optimizer = partial(torch.optim.SGD, momentum=config.momentum_inner, weight_decay=config.decay_inner)
    resets = config.pool_reset == "paper"
    return InnerRules(arch, Rule(F.mse_loss, optimizer), config.lr_inner, config.inner_steps_max, resets)


def krr_rules(ctx: DistillContext, config: KrrConfig) -> Rules:
    """Return KRR-ST's and Boost-SSDD's rules; the teacher is taken from the pool."""
    entry, num_steps = teacher_of(ctx, config.teacher), max(1, int(ctx.config["steps"]))
    return Rules(
        outputs=entry.tensors["features"],
        regress=partial(ridge_loss, ridge=config.ridge),
        optimizer=partial(torch.optim.AdamW, weight_decay=0.0),
        factor=lambda step: max(1 - step / num_steps, 0.0),
        inner=krr_inner_rules(ctx.arch, config),
        teacher=teacher_net(entry).to(ctx.device) if config.augment_real == "crop_flip" else None,
        representations=entry.tensors["features"],
    )


class _Slot:
    """One network, its optimiser and its step counter."""

    def __init__(self, net: Net, rules: InnerRules) -> None:
        self.net = net
        self.trained = 0
        self.step = Step([net], rules.rule, lr=rules.lr)
        self.optimizer = self.step.optimizer

    def state(self) -> dict[str, Any]:
        """Return counter, weights, statistics and the optimiser's averages as copies on the CPU."""
        state = {"trained": self.trained, "net": cpu_copy(self.net.state_dict())}
        if isinstance(self.optimizer, torch.optim.SGD):
            return {**state, "velocity": velocities(self.optimizer)}
        return {**state, "averages": optimizer_state(self.optimizer)}

    def load(self, state: dict[str, Any]) -> None:
        self.trained = int(state["trained"])
        self.net.load_state_dict(state["net"])
        if "velocity" in state:
            load_velocities(self.optimizer, state["velocity"])
        else:
            load_optimizer_state(self.optimizer, state["averages"])


class InnerPool:
    """Inner networks, each trained for a different number of steps on the current set; `num_outputs` is D."""

    def __init__(self, ctx: DistillContext, config: LoopConfig, num_outputs: int, rules: InnerRules) -> None:
        self._ctx, self._config, self._rules = ctx, config, rules
        self._slots = [_Slot(self._new(index, num_outputs), rules) for index in range(config.pool_size)]
        self.filled = False

    def _new(self, slot_index: int, num_outputs: int) -> Net:
        ctx = self._ctx
        seed = self._seed(slot_index, 0)
        net = build_net(self._rules.arch, ctx.dataset.image_shape, num_outputs, seed=seed, device=ctx.device)
        return net.to(memory_format=torch.channels_last).requires_grad_(False)

    def _seed(self, slot_index: int, step: int) -> int:
        """Return the seed of the weights that slot `slot_index` gets at outer step `step`."""
        return derive_seed(self._ctx.seed, "distill", "inner", slot_index, step)

    def fill(self, draw: DrawRows) -> None:
        """Train every network for a random number of steps, uniform in 1..Z (Algorithm 1, lines 4-5).

        Staggered ones only begin to count from there.
        """
        config = self._config
        if self._rules.is_staggered:
            for slot_index, slot in enumerate(self._slots):
                slot.trained = slot_index * config.inner_steps_max // config.pool_size
            self.filled = True
            return
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
        if slot.trained < self._rules.num_steps:
            self._train(slot, *draw(self._ctx.generator("inner", "rows", step)))
            return
        reinitialize(slot.net, self._seed(slot_index, step))
        slot.optimizer.state.clear()
        if self._rules.resets:
            slot.trained = 0

    def _train(self, slot: _Slot, images: Tensor, targets: Tensor) -> None:
        """Take one step on the rule's loss (KRR-ST: Eq 2, the mean squared error), in train mode."""
        net = slot.net.train().requires_grad_(True)
        slot.step(_channels_last(images), targets)
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


class BilevelLoop:
    """The outer loop over a set's parameters, with its inner networks and its optimiser.

    `parameters` are learned in place, on the device. `synthesise` maps them and k of the images to these with
    their views [k * (A + 1), C, H, W] and to targets [k * (A + 1), D], and is differentiable; `make_set`
    returns the set that they stand for. `representations` are the teacher's, of all real images [N, D], on
    the CPU, where there is one.
    """

    def __init__(
        self,
        ctx: DistillContext,
        config: LoopConfig,
        parameters: Mapping[str, Tensor],
        synthesise: Synthesise,
        extent: Extent,
        make_set: Callable[[Mapping[str, Tensor]], DistilledSet],
        rules: Rules,
    ) -> None:
        self.representations = rules.representations
        self._ctx, self._config, self._extent = ctx, config, extent
        self._synthesise, self._make_set, self._rules = synthesise, make_set, rules
        self.parameters = {
            name: value.detach().to(ctx.device, copy=True).contiguous().requires_grad_(True)
            for name, value in parameters.items()
        }
        self._optimizer = rules.optimizer(self.parameters.values(), lr=config.lr_outer)
        self._outputs = rules.outputs.to(ctx.device)
        self._teacher = rules.teacher
        self._teacher_space = normalized_space(ctx.dataset)
        self._images = ctx.split.images.to(ctx.device)
        self._space = ctx.space.to(ctx.device)
        self._costs = network_costs(ctx)
        self.inner = InnerPool(ctx, config, self._outputs.shape[1], rules.inner)
        self._step = 0

    def step(self) -> dict[str, Tensor]:
        """Take one outer step (Algorithm 1, lines 8-19)."""
        if not self.inner.filled:
            self.inner.fill(self._draw())
        self._step += 1
        generator = self._ctx.generator("step", self._step)
        slot_index = int(torch.randint(self._config.pool_size, (), generator=generator))
        loss = self._outer(self.inner.net(slot_index), generator)
        self.inner.advance(slot_index, self._draw(), self._step)
        return {"loss": loss}

    @torch.no_grad()
    def _draw(self) -> DrawRows:
        """Return what draws an inner step's rows: all, or random images that fit `inner_batch`."""
        batch, num_images = self._config.inner_batch, self._extent.num_images
        rows_per_image = 1 if self._rules.synthesise_inner else self._extent.num_views + 1
        synthesise = self._rules.synthesise_inner or self._synthesise
        if batch is None or batch >= num_images * rows_per_image:
            pairs = synthesise(self.parameters, slice(None))
            return lambda generator: pairs
        num = max(1, batch // rows_per_image)

        @torch.no_grad()
        def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
            index = torch.randperm(num_images, generator=generator)[:num]
            # Only these are synthesised: the whole set may not fit the device.
            return synthesise(self.parameters, to_device(index, self._images.device))

        return draw

    def _outer(self, net: Net, generator: torch.Generator) -> Tensor:
        """Update the parameters on Eq 3 under one network; return the loss."""
        num, size = self._extent.num_images, images_at_once(self._costs, self._extent)
        parts = [slice(start, min(num, start + size)) for start in range(0, num, size)]
        whole = len(parts) == 1
        with torch.set_grad_enabled(whole):
            embedded = [self._embedded(net, part) for part in parts]
        lengths = [len(targets) for _, targets in embedded]
        if whole:
            features, targets = embedded[0]
        else:
            features, targets = (torch.cat(tensors) for tensors in zip(*embedded, strict=True))
            embedded.clear()
        real = self._real(net, generator)
        result = self._rules.regress(features.detach(), targets.detach(), real)
        del features, targets
        self._optimizer.zero_grad()
        gradients = (torch.split(gradient, lengths) for gradient in (result.features, result.targets))
        for part, *gradient in zip(parts, *gradients, strict=True):
            torch.autograd.backward(embedded.pop() if whole else self._embedded(net, part), gradient)
        self._optimizer.param_groups[0]["lr"] = self._config.lr_outer * self._rules.factor(self._step - 1)
        self._optimizer.step()
        return result.loss

    def _embedded(self, net: Net, part: slice) -> tuple[Tensor, Tensor]:
        """Return features [k * (A + 1), F] and targets [k * (A + 1), D] of k images with their views."""
        images, targets = self._synthesise(self.parameters, part)
        return net.embed(_channels_last(images)), targets

    @torch.no_grad()
    def _real(self, net: Net, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield chunks of a fresh real batch: features under `net`, and what is to be predicted of them."""
        num = min(self._config.batch_real, len(self._images))
        index = torch.randperm(len(self._images), generator=generator)[:num]
        index = to_device(index, self._images.device)
        for part in chunks(num, self._costs.sample, self._images.device):
            images, outputs = self._images[index[part]], self._outputs[index[part]]
            if self._teacher is not None:
                images = crop_and_flip(images.float() / 255, generator, can_flip=self._ctx.dataset.can_flip)
                outputs = self._teacher.embed(_channels_last(self._teacher_space.encode(images)))
            yield net.embed(_channels_last(self._space.encode(images))), outputs

    def snapshot(self) -> DistilledSet:
        return self._make_set(self.parameters)

    def state_dict(self) -> dict[str, Any]:
        """Return parameters, the optimiser's averages, inner networks and the step count."""
        buffers = optimizer_state(self._optimizer)
        return {
            "step": self._step,
            "parameters": cpu_copy(self.parameters),
            "optimizer": {name: buffers[i] for i, name in enumerate(self.parameters) if i in buffers},
            "inner": self.inner.state(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step = int(state["step"])
        for name, parameter in self.parameters.items():
            parameter.copy_(state["parameters"][name])
        buffers, names = state["optimizer"], enumerate(self.parameters)
        load_optimizer_state(self._optimizer, {i: buffers[name] for i, name in names if name in buffers})
        self.inner.load(state["inner"])


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)
