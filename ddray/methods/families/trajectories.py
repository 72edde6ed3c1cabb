"""Matching expert trajectories (MTT, Cazenavette et al., CVPR 2022): what MTT and DATM share.

An iteration draws an expert and an epoch t, starts a student at the expert's weights theta*_t, trains it for
N steps of plain SGD on batches of the synthetic set at a learned rate a, and compares where it ends with
where the expert was M epochs later (Eq 2):

    L = ||theta_N - theta*_{t+M}||^2 / ||theta*_t - theta*_{t+M}||^2

`families/unrolled` has the exact gradients in images, labels and rate, `pool/trajectories` the experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from ddray.artifact.distilled_set import DistilledSet
from ddray.config import Config
from ddray.distillation.method import DistillContext, MethodConfig, SetExtras, Target
from ddray.errors import DivergedError
from ddray.methods.families.state import cpu_copy
from ddray.methods.families.unrolled import EndGradient, Gradient, Swept, sweep
from ddray.nets import build_net
from ddray.nets.names import parse_arch
from ddray.pool.spec import PoolEntry, PoolSpec
from ddray.pool.trajectories import SNAPSHOTS, trajectory_specs
from ddray.system.transfer import to_device
from ddray.training.dsa import Dsa, DsaPlan, siamese
from ddray.training.experts import ExpertRecipe, expert_images
from ddray.training.student import StepLoss, Student, check_repeats

COUPLING: Final = "its students are trained on the images of all classes"
_RATE_STEPS: Final = 50  # on a GPU, between looks at the learned rate, each of which waits for the device


class ExpertsConfig(Config):
    """The experts: networks trained on the real images, shared by runs of all seeds."""

    num_models: int = Field(default=100, ge=1)
    """How many."""
    epochs: int = Field(default=50, ge=1)
    """Epochs on the real images. A setting of its own, so that settings of max_start share experts."""
    lr: float = Field(default=0.01, gt=0)
    """Learning rate (SGD without momentum and decay)."""
    batch: int = Field(default=256, ge=1)
    """Real images per step."""
    rho: float = Field(default=0.0, ge=0)
    """Radius of GSAM's neighbourhood, FTD's experts; 0 with alpha 0 is plain SGD, MTT's."""
    alpha: float = Field(default=0.0, ge=0)
    """Weight of GSAM's second term, FTD's experts."""
    seed: int = Field(default=0, ge=0)
    """Seed of the first expert, the others count up; not the run's."""


class TrajectoryConfig(MethodConfig):
    """Settings of the methods that match trajectories."""

    with_fewer_epochs: ClassVar[Mapping[str, Any]] = {"expert_epochs": 1, "max_start": 1}

    inner_steps: int = Field(default=50, ge=1)
    """N, steps of the student."""
    expert_epochs: int = Field(default=2, ge=1)
    """M, epochs of the expert that the student imitates."""
    max_start: int = Field(default=2, ge=1)
    """T+: students start at epochs below it."""
    batch_syn: int | None = Field(default=None, ge=1)
    """Synthetic images per step; None, or as many as there are: all."""
    lr_img: float = Field(default=100.0, gt=0)
    """Learning rate of the images (SGD)."""
    momentum: float = Field(default=0.5, ge=0, lt=1)
    """Momentum of the images' and the rate's SGD."""
    lr_start: float = Field(default=0.01, gt=0)
    """a_0, the learned rate at the start."""
    lr_lr: float = Field(default=1e-7, ge=0)
    """Learning rate of the rate (SGD); 0 keeps it."""
    augment: Literal["dsa", "none"] = "dsa"
    """Augmentation of experts and students, a fresh draw per step."""
    gradient: Gradient = "exact"
    """Of the unrolled steps: exact, or without the dependence of later steps on earlier ones (TESLA)."""
    experts: ExpertsConfig = ExpertsConfig()
    """The experts; `--set method.experts.num_models=10`."""

    @model_validator(mode="after")
    def _trajectories_are_long_enough(self) -> Self:
        last = self.max_start + self.expert_epochs - 1
        if last > self.experts.epochs:
            raise ValueError(
                f"experts.epochs must be >= max_start + expert_epochs - 1 = {last}, got {self.experts.epochs}"
            )
        return self

    def starts(self, step: int) -> range:
        """Return the epochs that the student of a step, counted from 0, may start at."""
        return range(self.max_start)

    def work_per_step(self, num_images: int, num_classes: int, *network: Any) -> float:
        """Return an iteration's multiply-adds: those of the student's N batches."""
        batch = min(self.batch_syn or num_images, num_images)
        return super().work_per_step(self.inner_steps * batch, num_classes, *network)


def expert_specs(ctx: DistillContext, config: TrajectoryConfig) -> list[PoolSpec]:
    """Return the experts' specs: none has seen val, so that searches and other runs share them.

    Raises:
        InputError: a student of this architecture can't repeat its steps; no expert is trained for it.
    """
    arch = parse_arch(ctx.arch)
    if arch.drops or arch.is_external:  # only others' networks must be built to know
        check_repeats(build_net(ctx.arch, ctx.dataset.image_shape, ctx.dataset.num_classes, seed=0))
    recipe = config.experts.model_dump(exclude={"num_models", "seed"})
    return trajectory_specs(
        ctx.dataset,
        split=ctx.shared_split,
        pixel_space=ctx.config["pixel_space"],  # not the space's: a dry run of a bench has a stand-in
        arch=ctx.arch,
        device=ctx.device.type,
        recipe=ExpertRecipe.parse({**recipe, "augment": config.augment}),
        seed=config.experts.seed,
        num=config.experts.num_models,
    )


def in_expert_space(ctx: DistillContext) -> DistillContext:
    """Return the context in the experts' pixel space: ZCA fitted on the images that they have seen."""
    if ctx.space.kind != "zca" or ctx.split_name == ctx.shared_split:
        return ctx
    _, space = expert_images("zca", ctx.dataset, ctx.shared_split, ctx.split, ctx.device)
    return replace(ctx, space=space)


def family(target: Target) -> str:
    """Return whose row of a table of settings applies: cifar10, cifar100, tinyimagenet or imagenet."""
    if min(target.image_shape[1:]) >= 128:
        return "imagenet"
    if min(target.image_shape[1:]) >= 64:
        return "tinyimagenet"
    return "cifar10" if target.num_classes <= 20 else "cifar100"


def evaluation(**changes: Any) -> dict[str, Any]:
    """Return the evaluation's settings: the peers' recipe at the learned rate."""
    return {"epochs": 1000, "augment": "dsa", "lr": "learned", **changes}


def draw_batches(num: int, batch: int | None, steps: int, generator: torch.Generator) -> list[Tensor]:
    """Return the rows of every step's batch: permutations of `num`, cut into batches, the last one first.

    A short remainder so comes first; a fresh permutation follows when one is used up (authors' code).
    """
    size = num if batch is None else min(batch, num)
    batches: list[Tensor] = []
    while len(batches) < steps:
        batches += reversed(torch.split(torch.randperm(num, generator=generator), size))
    return batches[:steps]


def soft_cross_entropy(logits: Tensor, label_logits: Tensor) -> Tensor:
    """Return the mean cross entropy of logits [n, K] against the softmax of label logits [n, K]."""
    return -(label_logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


def distance(start: Tensor, target: Tensor) -> EndGradient:
    """Return the map of a student's last weights [P] to L and its gradient, for an expert's two snapshots."""
    scale = (start - target).square().sum()

    def loss_of(end: Tensor) -> tuple[Tensor, Tensor]:
        difference = end - target
        return difference.square().sum() / scale, 2 * difference / scale

    return loss_of


class Learned:
    """A tensor that SGD with momentum learns; the device decides about an update, and is not waited for."""

    def __init__(self, value: Tensor, *, lr: float, momentum: float) -> None:
        self.value = value.detach().clone(memory_format=torch.contiguous_format)
        self.velocity = torch.zeros_like(self.value)
        self._lr, self._momentum = lr, momentum

    def move(self, gradient: Tensor, accepted: Tensor | None = None) -> None:
        """Do a step; if the scalar `accepted` is False, value and momentum stay as they are."""
        velocity = self._momentum * self.velocity + gradient
        value = self.value - self._lr * velocity
        if accepted is not None:
            velocity = torch.where(accepted, velocity, self.velocity)
            value = torch.where(accepted, value, self.value)
        self.value, self.velocity = value, velocity

    def state(self) -> dict[str, Tensor]:
        """Return copies on the CPU."""
        state: dict[str, Tensor] = cpu_copy({"value": self.value, "velocity": self.velocity})
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self.value.copy_(state["value"])
        self.velocity.copy_(state["velocity"])


@dataclass(frozen=True)
class Draw:
    """What an iteration draws.

    Attributes:
        expert: its number.
        start: t, the epoch that the student starts at.
        batches: rows of the set of every step, int64, on the CPU.
        plans: augmentation of every step; None: there is none.
    """

    expert: int
    start: int
    batches: list[Tensor]
    plans: list[DsaPlan | None]


def draw_iteration(
    config: TrajectoryConfig, step: int, num: int, dsa: Dsa | None, generator: torch.Generator
) -> Draw:
    """Draw what iteration `step`, counted from 0, needs, for a set of `num` images."""
    starts = config.starts(step)
    expert = int(torch.randint(config.experts.num_models, (), generator=generator))
    start = int(torch.randint(starts.start, starts.stop, (), generator=generator))
    batches = draw_batches(num, config.batch_syn, config.inner_steps, generator)
    plans = [None if dsa is None else dsa.draw(len(b), generator, shared_op=True) for b in batches]
    return Draw(expert, start, batches, plans)


class TrajectoryMatching:
    """Images, a rate, and labels where they are learned, so that students follow the experts.

    Args:
        ctx: what to work on, in the experts' pixel space.
        config: settings.
        experts: the pool's entries.
        images: initial ones [N, C, H, W].
        labels: their classes, int64 [N].
        soft: logits [N, K] to learn in the classes' place; None: labels are hard and fixed.
    """

    def __init__(
        self,
        ctx: DistillContext,
        config: TrajectoryConfig,
        experts: Sequence[PoolEntry],
        images: Tensor,
        labels: Tensor,
        soft: Learned | None = None,
    ) -> None:
        self._ctx, self._config, self._step = ctx, config, 0
        self._experts = [entry.tensors[SNAPSHOTS] for entry in experts]
        shape, num_classes = ctx.dataset.image_shape, ctx.dataset.num_classes
        self._student = Student(build_net(ctx.arch, shape, num_classes, seed=0, device=ctx.device))
        self._dsa = siamese(ctx.dataset.can_flip, config.augment)
        self._labels, self._soft = labels.to(ctx.device), soft
        momentum = config.momentum
        self._images = Learned(images.to(ctx.device), lr=config.lr_img, momentum=momentum)
        rate = torch.full((), config.lr_start, device=ctx.device)
        self._rate = Learned(rate, lr=config.lr_lr, momentum=momentum)

    def step(self) -> dict[str, Tensor]:
        """Train a student, and move images, labels and rate."""
        self._step += 1
        if self._ctx.device.type == "cpu" or self._step % _RATE_STEPS == 0:
            self._checked_rate()
        num, generator = len(self._labels), self._ctx.generator("step", self._step)
        drawn = draw_iteration(self._config, self._step - 1, num, self._dsa, generator)
        swept = self._match(drawn)
        accepted = self._accepts(swept.loss)
        for learned, gradient in zip(self._leaves(), swept.leaves, strict=True):
            learned.move(gradient, accepted)
        self._rate.move(swept.rates.sum(), accepted)
        return {"loss": self._reported(swept.loss)}

    def snapshot(self) -> DistilledSet:
        soft = {} if self._soft is None else {"soft_labels": self._soft.value, "label_kind": "logits"}
        extras = SetExtras(learned_lr=self._checked_rate(), **soft)  # type: ignore[arg-type]
        return self._ctx.make_set(self._images.value, self._labels, extras=extras)

    def state_dict(self) -> dict[str, Any]:
        """Return what is learned, with momenta; draws depend on the step alone, experts are the pool's."""
        return {"step": self._step, **{name: one.state() for name, one in self._named().items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step = int(state["step"])
        for name, learned in self._named().items():
            learned.load(state[name])

    def _leaves(self) -> list[Learned]:
        return [self._images] if self._soft is None else [self._images, self._soft]

    def _named(self) -> dict[str, Learned]:
        names = ("images", "soft_labels")
        return {**dict(zip(names, self._leaves(), strict=False)), "rate": self._rate}

    def _match(self, drawn: Draw) -> Swept:
        """Return L of an iteration, and its gradients."""
        device, snapshots = self._ctx.device, self._experts[drawn.expert]
        start = to_device(snapshots[drawn.start], device)
        target = to_device(snapshots[drawn.start + self._config.expert_epochs], device)
        leaves = [learned.value for learned in self._leaves()]
        rates = self._rate.value.expand(self._config.inner_steps)
        loss_of_step = self._loss_of_step(drawn)
        return sweep(loss_of_step, leaves, start, rates, distance(start, target), self._config.gradient)

    def _loss_of_step(self, drawn: Draw) -> StepLoss:
        """Return the student's loss in each step, which repeats the draws."""
        sizes = [len(rows) for rows in drawn.batches]
        batches = torch.split(to_device(torch.cat(drawn.batches), self._ctx.device), sizes)

        def loss(index: int, weights: Tensor, leaves: Sequence[Tensor]) -> Tensor:
            rows, plan = batches[index], drawn.plans[index]
            images = leaves[0].index_select(0, rows)
            if plan is not None and self._dsa is not None:
                images = self._dsa.apply(images, plan)
            logits = self._student.logits(weights, images)
            if self._soft is None:
                return F.cross_entropy(logits, self._labels.index_select(0, rows))
            return soft_cross_entropy(logits, leaves[1].index_select(0, rows))

        return loss

    def _accepts(self, loss: Tensor) -> Tensor | None:
        """Return whether an update with this L is done, a scalar on the device; None: every one is."""
        return None

    def _reported(self, loss: Tensor) -> Tensor:
        """Return the loss of a step for the run's record."""
        return loss

    def _checked_rate(self) -> float:
        """Return the learned rate; DivergedError if it is not positive, as students would climb."""
        rate = float(self._rate.value)
        if rate > 0:
            return rate
        raise DivergedError(
            f"{self._ctx.method} diverged by step {self._step}: the learned rate must be > 0, got "
            f"{rate:.3g}; lower lr_lr or lr_img"
        )


QUICK: Final[dict[str, Any]] = {
    "inner_steps": 2,
    "expert_epochs": 1,
    "max_start": 1,
    "lr_start": 0.1,
    "lr_lr": 1e-9,
    "experts": {"num_models": 2, "epochs": 2, "batch": 64},
}
"""For the contract tests."""
SEARCH_SPACE: Final[dict[str, Any]] = {
    "lr_img": {"loguniform": [10.0, 10_000.0]},
    "lr_lr": {"loguniform": [1e-8, 1e-4]},
    "inner_steps": {"choice": [10, 20, 30, 50, 80]},
    "expert_epochs": {"choice": [1, 2, 3]},
}
"""What both methods vary, beside where students start."""
