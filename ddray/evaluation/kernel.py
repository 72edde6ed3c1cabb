"""Protocol `kernel`: held-out images are classified by kernel ridge regression on the set (KIP's own score).

The kernel is the tangent kernel of an infinitely wide network (`nets.ntk`). Targets are one-hot - 1/K, soft
labels less 1/K, or the values that a set holds. No network is trained: architecture and seed do not matter.
"""

from __future__ import annotations

import time
from typing import Final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ddray.artifact.distilled_set import DistilledSet, TrainSet
from ddray.config import Config, added, parse_overrides
from ddray.data.packed import resident
from ddray.errors import DivergedError, InputError
from ddray.evaluation.options import EvaluateOptions
from ddray.evaluation.protocol import (
    EvalContext,
    EvalResult,
    EvaluationProtocol,
    Measure,
    RealImages,
    Scoring,
)
from ddray.nets import check_arch
from ddray.nets.ntk import KERNELS, KernelName, check_hours, gram, hours, ntk, pairs_at_once
from ddray.system.memory import available_bytes, memory_budget
from ddray.training.embedding import Score
from ddray.training.kernel_ridge import KernelRidge


class KernelConfig(Config):
    """Settings of kernel."""

    kernel: KernelName = "fc1"
    """fc1, fc2, fc3: so many hidden layers; conv3: three convolutions without pooling; convnet3: with it;
    convnet: one convolution more. Default: the set's own where KIP made it."""
    ridge: float = Field(default=1e-6, gt=0)
    """lambda, as a fraction of the mean of the kernel's diagonal. Default: KIP's own, as above."""
    max_hours: float = added(24.0, gt=0)
    """An evaluation that is estimated to take longer is refused."""


class Kernel:
    """Kernel ridge regression on a labelled set."""

    def __init__(self, config: KernelConfig) -> None:
        self._config = config

    @torch.no_grad()
    def evaluate(self, train_set: TrainSet, ctx: EvalContext, *, arch: str, seed: int) -> EvalResult:
        """Fit the set and classify the split.

        Raises:
            InputError: it would take more than `max_hours`, or than the memory.
            DivergedError: the kernel matrix is not positive definite, or not finite.
        """
        begin, num = time.perf_counter(), len(train_set.labels)
        images = resident(train_set.images, ctx.device)
        fit = self._fit(images, regression_targets(train_set, ctx.dataset.num_classes).to(ctx.device), ctx)
        predicted, space = [], ctx.space.to(ctx.device)
        for index in torch.split(torch.arange(len(ctx.split)), self._at_once(ctx, num)):
            held_out = space.encode(ctx.split.images[index].to(ctx.device))
            predicted.append(ntk(self._config.kernel, held_out, images) @ fit.alpha)
        values, labels = torch.cat(predicted).cpu(), ctx.split.labels
        error = values - F.one_hot(labels, values.shape[1]) + 1 / values.shape[1]
        right = (values.argmax(1) == labels).double()
        shares = tuple(_share(right[labels == label]) for label in range(values.shape[1]))
        score, loss = Score(float(right.mean()), shares), float(error.square().mean() / 2)
        wall_s, measures = time.perf_counter() - begin, {"kernel_loss": loss}
        return EvalResult(check_arch(arch), seed, score.accuracy, num, wall_s, measures, score.per_class)

    def _fit(self, images: Tensor, targets: Tensor, ctx: EvalContext) -> KernelRidge:
        """Return the fit to images [N, C, H, W], if it takes no more than the hours allowed."""
        config, num = self._config, len(images)
        shape = ctx.dataset.image_shape
        check_hours(
            hours(config.kernel, shape, num * (num + len(ctx.split)), ctx.device),
            config.max_hours,
            f"kernel {config.kernel} of {num} images and {len(ctx.split)} held-out ones on {ctx.device}",
            "take kernel=fc1 or conv3, or raise it by --set max_hours=N",
        )
        needed, free = 4 * 8 * num**2 / 2**30, available_bytes(ctx.device) / 2**30
        if needed > free:
            raise InputError(
                f"a kernel regression on {num} images needs about {needed:,.1f} GiB for its matrices, "
                f"{ctx.device} has {free:.1f} free: take fewer images (--train-limit N)"
            )
        size = self._at_once(ctx, num)
        if size >= num:
            square = gram(config.kernel, images)
        else:
            same = torch.eye(num, dtype=torch.bool, device=images.device)
            rows = torch.split(torch.arange(num, device=images.device), size)
            square = torch.cat([ntk(config.kernel, images[i], images, same=same[i]) for i in rows])
        fit = KernelRidge(square, targets, config.ridge)
        if not bool(torch.isfinite(fit.alpha).all()):
            raise DivergedError(
                f"the kernel matrix of {num} images is not positive definite at ridge={config.ridge:g}; "
                "raise --set ridge=R"
            )
        return fit

    def _at_once(self, ctx: EvalContext, num: int) -> int:
        pairs = pairs_at_once(self._config.kernel, ctx.dataset.image_shape, memory_budget(ctx.device))
        return max(1, pairs // num)


def regression_targets(train_set: TrainSet, num_classes: int) -> Tensor:
    """Return what a set's images are regressed to, float64 [N, K]: values, or probabilities less 1/K."""
    soft = train_set.soft_labels
    if soft is None:
        return F.one_hot(train_set.labels, num_classes).double() - 1 / num_classes
    return soft.double() if train_set.regress else soft.double() - 1 / num_classes


def _share(right: Tensor) -> float | None:
    return float(right.mean()) if len(right) else None


def _make(options: EvaluateOptions, distilled: DistilledSet, ctx: EvalContext, real: RealImages) -> Scoring:
    """Return the regression by the set's own kernel and ridge, or by those that are set."""
    method = distilled.meta.config.get("method", {})
    is_own = isinstance(method, dict) and method.get("kernel") in KERNELS
    default = {name: method[name] for name in ("kernel", "ridge") if is_own and name in method}
    config = KernelConfig.parse({**default, **parse_overrides(options.sets)})
    return Scoring(Kernel(config), 1, {"kernel": config.kernel})


PROTOCOL: Final = EvaluationProtocol(
    _make,
    config_type=KernelConfig,
    recipes=(),
    without=("archs", "epochs", "augment", "seeds", "recipe"),
    why="no network is trained",
    measures={"kernel_loss": Measure("kernel loss", in_tables=True, is_fraction=False)},
    published_metric="kernel_accuracy",
)
