"""Protocol `steps`: train by exactly the steps that were distilled with the images (DD, Wang et al. 2018).

A network of the initialisation that the set was distilled for takes the steps of the set's schedule, in their
order, by plain SGD at their rates, and is scored once. Nothing is augmented. A fixed initialisation is one
network, so that every seed gives the same score.

A set without a schedule takes the same kind of steps at one `rate`, which DD's baselines do: an image of each
class per step, `epochs` times over.

**Deviations** (DD's code | ours): networks scored: 1 by default, 200 in the paper | `--seeds`, by default 5.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from pydantic import Field
from torch import Tensor

from ddray.artifact.distilled_set import DistilledSet, TrainSet
from ddray.artifact.schedule import Schedule
from ddray.config import Config, parse_overrides
from ddray.data.packed import resident
from ddray.errors import DivergedError, InputError
from ddray.evaluation.options import EvaluateOptions
from ddray.evaluation.protocol import EvalContext, EvalResult, EvaluationProtocol, RealImages, Scoring
from ddray.nets import Net, build_net, check_arch, is_per_sample
from ddray.training.student import Student, descend, flat_parameters, ordered_loss

log = logging.getLogger(__name__)


class StepsConfig(Config):
    """Settings of the protocol."""

    seeds: int = Field(default=5, ge=1)
    """Networks."""
    rate: float | None = Field(default=None, gt=0)
    """One learning rate for all steps; default the schedule's."""
    epochs: int = Field(default=3, ge=1)
    """Passes over a set without a schedule."""


@dataclass(frozen=True)
class Steps:
    """Training by a set's schedule.

    Attributes:
        schedule: the set's; None: `epochs` passes over it at `rate`.
        rate: in place of the schedule's rates, or None.
        epochs: see `schedule`.
    """

    schedule: Schedule | None
    rate: float | None = None
    epochs: int = 3

    def evaluate(self, train_set: TrainSet, ctx: EvalContext, *, arch: str, seed: int) -> EvalResult:
        """Take the steps with one network and score it."""
        begin, labels = time.perf_counter(), train_set.labels
        order, rates = self._order_and_rates(labels)
        net = self._start(train_set.images, ctx, arch, seed)
        student = Student(net)
        rows = [torch.tensor(step, device=ctx.device) for step in order]
        loss_of_step = ordered_loss(student, rows, train_set.supervision.to(ctx.device))
        images, start = resident(train_set.images, ctx.device), flat_parameters(net)
        path = descend(loss_of_step, [images], start, torch.tensor(rates, device=ctx.device))
        end = deque(path, maxlen=1).pop()  # the others are as large
        if not bool(torch.isfinite(end).all()):
            raise DivergedError(
                f"training {arch} by the set's steps diverged: its weights are not finite; use the --arch "
                "that it was distilled for, or --set rate=0.001"
            )
        with torch.no_grad():
            for parameter, value in zip(net.parameters(), student.parameters(end).values(), strict=True):
                parameter.copy_(value)
        score = ctx.score(net.to(memory_format=torch.channels_last).eval())
        wall_s = time.perf_counter() - begin
        return EvalResult(
            check_arch(arch), seed, score.accuracy, len(labels), wall_s, per_class=score.per_class
        )

    def _order_and_rates(self, labels: Tensor) -> tuple[Sequence[Sequence[int]], Sequence[float]]:
        schedule = self.schedule
        order = class_order(labels) * self.epochs if schedule is None else schedule.order
        if self.rate is not None:
            return order, [self.rate] * len(order)
        return order, [] if schedule is None else schedule.rates

    def _start(self, images: Tensor, ctx: EvalContext, arch: str, seed: int) -> Net:
        """Return the network before the steps; a fixed one is drawn on the CPU, as while distilling."""
        init_seed = None if self.schedule is None else self.schedule.init_seed
        if init_seed is None:
            net = ctx.fresh_net(arch, images, seed=seed)
        else:
            _, channels, height, width = images.shape
            shape, num_classes = (channels, height, width), ctx.dataset.num_classes
            net = build_net(arch, shape, num_classes, seed=init_seed).to(ctx.device)
        if not is_per_sample(net):
            raise InputError(
                f"--protocol steps needs a network without batch norm, got {arch}: a few steps give it no "
                "statistics; use another --arch"
            )
        return net.train()


def class_order(labels: Tensor) -> list[list[int]]:
    """Return the rows of each step of a pass: the first image of every class, then the second, and so on.

    `labels` are int64 [N], in any order.
    """
    counts: dict[int, int] = {}
    steps: list[list[int]] = []
    for row, label in enumerate(labels.tolist()):
        position = counts.get(label, 0)
        counts[label] = position + 1
        if position == len(steps):
            steps.append([])
        steps[position].append(row)
    return steps


def _make(options: EvaluateOptions, distilled: DistilledSet, ctx: EvalContext, real: RealImages) -> Scoring:
    section = distilled.meta.config.get("evaluate", {})
    default = {"seeds": section["seeds"]} if isinstance(section, dict) and "seeds" in section else {}
    counts = options.model_dump(include={"seeds"}, exclude_none=True)
    sets = parse_overrides(options.sets)
    config = StepsConfig.parse({**default, **sets, **counts})
    schedule = distilled.meta.schedule
    if distilled.targets is not None or distilled.meta.label_kind == "values":
        raise InputError(
            "--protocol steps needs a set with labels, this one has values to regress to; use --protocol hard"
        )
    if schedule is not None and "epochs" in sets:
        raise InputError(
            f"--set epochs must be left out for a set with a schedule, got {sets['epochs']}: its "
            f"{len(schedule.order)} steps decide"
        )
    if schedule is None:
        _check_rate(distilled.meta.method, config.rate)
    if schedule is not None and schedule.init == "fixed":
        _check_fixed(options.archs, distilled.meta.arch, config.seeds)
    details = {"init": "random" if schedule is None else schedule.init}
    return Scoring(Steps(schedule, config.rate, config.epochs), config.seeds, details)


def _check_fixed(archs: Sequence[str], arch: str, num_seeds: int) -> None:
    """Refuse other networks than the one that a set is for; warn of one that is scored more than once."""
    others = [name for name in archs if check_arch(name) != arch]
    if others:
        raise InputError(
            f"--arch must be {arch} for a set with a fixed initialisation, which is of one network, got "
            f"{', '.join(others)}; leave it out"
        )
    if num_seeds > 1:
        log.warning("a fixed initialisation is one network: its %d scores are the same", num_seeds)


def _check_rate(method: str, rate: object) -> None:
    if rate is None:
        raise InputError(
            "--protocol steps needs a set with a schedule, as method dd makes, got one of method "
            f"{method} without; use --set rate=0.02 for one rate, or --protocol hard"
        )


def _check_method(method: str, config: Config, settings: Mapping[str, Any]) -> None:
    if not getattr(config, "orders_steps", False):
        _check_rate(method, settings.get("rate"))


PROTOCOL: Final = EvaluationProtocol(
    _make,
    config_type=StepsConfig,
    recipes=(),
    without=("epochs", "augment", "train_limit", "recipe"),
    why="the set's steps decide",
    check_method=_check_method,
    published_metric="top1_accuracy",
)
