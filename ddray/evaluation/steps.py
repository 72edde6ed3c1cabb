"""Protocol `steps`: train by exactly the steps that were distilled with the images (DD, Wang et al. 2018).

A network of the initialisation that the set was distilled for takes the steps of the set's schedule, in their
order, by plain SGD at their rates, and is scored once. Nothing is augmented. A fixed initialisation is one
network, so that every seed gives the same score.

A set without a schedule takes the same kind of steps at one `rate`, which DD's baselines do: an image of each
class per step, `epochs` times over.

**Deviations** (DD's code | ours): networks scored: 1 by default, 200 in the paper | `--seeds`, by default 5.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

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
    """Training by a schedule."""

    schedule: Schedule

    def evaluate(self, train_set: TrainSet, ctx: EvalContext, *, arch: str, seed: int) -> EvalResult:
        """Take the steps with one network and score it."""
        begin = time.perf_counter()
        net = self._start(train_set.images, ctx, arch, seed)
        student = Student(net)
        images = resident(train_set.images, ctx.device)
        order = [torch.tensor(rows, device=ctx.device) for rows in self.schedule.order]
        loss_of_step = ordered_loss(student, order, train_set.supervision.to(ctx.device))
        rates = torch.tensor(self.schedule.rates, device=ctx.device)
        *_, end = descend(loss_of_step, [images], flat_parameters(net), rates)
        if not bool(torch.isfinite(end).all()):
            raise DivergedError(
                f"training {arch} by the set's steps diverged: weights are NaN; use the --arch that it was "
                "distilled for, or --set rate=..."
            )
        with torch.no_grad():
            for parameter, value in zip(net.parameters(), student.parameters(end).values(), strict=True):
                parameter.copy_(value)
        score = ctx.score(net.to(memory_format=torch.channels_last).eval())
        wall_s, num = time.perf_counter() - begin, len(train_set.labels)
        return EvalResult(check_arch(arch), seed, score.accuracy, num, wall_s, per_class=score.per_class)

    def _start(self, images: Tensor, ctx: EvalContext, arch: str, seed: int) -> Net:
        """Return the network before the steps; a fixed one is drawn on the CPU, as while distilling."""
        if self.schedule.init_seed is None:
            net = ctx.fresh_net(arch, images, seed=seed)
        else:
            _, channels, height, width = images.shape
            shape, num_classes = (channels, height, width), ctx.dataset.num_classes
            net = build_net(arch, shape, num_classes, seed=self.schedule.init_seed).to(ctx.device)
        if not is_per_sample(net):
            raise InputError(
                f"--protocol steps needs a network without batch norm, got {arch}: a few steps give it no "
                "statistics; use another --arch"
            )
        return net.train()


def plain_schedule(labels: Tensor, rate: float, epochs: int) -> Schedule:
    """Return steps at one rate: the first image of every class, then the second, `epochs` times over.

    Args:
        labels: of the images, int64 [N].
        rate: the learning rate.
        epochs: passes over the set.
    """
    seen: dict[int, int] = {}
    by_position: dict[int, list[int]] = {}
    for row, label in enumerate(labels.tolist()):
        position = seen.get(label, 0)
        seen[label] = position + 1
        by_position.setdefault(position, []).append(row)
    order = tuple(tuple(rows) for rows in by_position.values()) * epochs
    return Schedule(order=order, rates=(rate,) * len(order))


def _check(options: EvaluateOptions) -> None:
    """Refuse what the set's steps decide."""
    for name in ("epochs", "augment"):
        if getattr(options, name) is not None:
            raise InputError(
                f"--{name} must be left out with --protocol steps: the set says how it is trained on"
            )
    StepsConfig.parse(parse_overrides(options.sets))


def _make(options: EvaluateOptions, distilled: DistilledSet, ctx: EvalContext, real: RealImages) -> Scoring:
    section = distilled.meta.config.get("evaluate", {})
    default = {"seeds": section["seeds"]} if isinstance(section, dict) and "seeds" in section else {}
    counts = options.model_dump(include={"seeds"}, exclude_none=True)
    config = StepsConfig.parse({**default, **parse_overrides(options.sets), **counts})
    schedule = distilled.meta.schedule
    if distilled.targets is not None or distilled.meta.label_kind == "values":
        raise InputError("--protocol steps needs a set with labels; this one has values to regress to")
    if schedule is None and config.rate is None:
        raise InputError(
            f"--protocol steps needs a set with a schedule, as method dd makes, got one of "
            f"{distilled.meta.method} without; use --set rate=0.02 for one rate, or --protocol hard"
        )
    if schedule is None:
        schedule = plain_schedule(distilled.labels, config.rate or 0.0, config.epochs)
    elif config.rate is not None:
        schedule = schedule.model_copy(update={"rates": (config.rate,) * len(schedule.order)})
    details = {"steps": len(schedule.order), "init": schedule.init}
    return Scoring(Steps(schedule), config.seeds, details)


PROTOCOL: Final = EvaluationProtocol(
    _make, config_type=StepsConfig, check=_check, recipes=(), published_metric="top1_accuracy"
)
