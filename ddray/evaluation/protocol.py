"""Evaluation protocols: one file each; a protocol's settings are its constructor's arguments."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ddray.artifact.distilled_set import TrainSet
from ddray.data import Dataset, PixelSpace, Split


@dataclass(frozen=True)
class EvalContext:
    """What a protocol scores against.

    Attributes:
        dataset: the target (classes, whether images may be flipped).
        split: its held-out part: val while searching, test at the end.
        space: pixel space of the training images, applied to the split too.
        device: where to compute.
    """

    dataset: Dataset
    split: Split
    space: PixelSpace
    device: torch.device


@dataclass(frozen=True)
class EvalResult:
    """One network's score.

    Attributes:
        arch: canonical architecture name.
        seed: which network.
        accuracy: fraction right on the split.
        num_images: images trained on, as decoded.
        wall_s: seconds.
        measures: the protocol's other measures by name: a number, or one per step.
    """

    arch: str
    seed: int
    accuracy: float
    num_images: int
    wall_s: float
    measures: Mapping[str, float | tuple[float, ...]] = field(default_factory=dict)


class Evaluator(Protocol):
    """A protocol: trains something on a set and scores it."""

    def evaluate(self, train_set: TrainSet, ctx: EvalContext, *, arch: str, seed: int) -> EvalResult:
        """Train one network on `train_set` and score it on the context's split."""
        ...


def summarise(results: Sequence[EvalResult]) -> dict[str, Any]:
    """Return an arch's results as mean, sample standard deviation (None for one network) and all values.

    A measure `m` becomes its mean `m` and standard deviation `m_std`; one with a value per step, a list of
    each.
    """
    values = [result.accuracy for result in results]
    summary: dict[str, Any] = {
        "arch": results[0].arch,
        "accuracy_mean": statistics.fmean(values),
        "accuracy_std": _std(values),
        "per_seed": values,
        "num_images": results[0].num_images,
    }
    for name in results[0].measures:
        summary[name], summary[f"{name}_std"] = _over_seeds([result.measures[name] for result in results])
    return {**summary, "wall_s": sum(result.wall_s for result in results)}


def _over_seeds(values: Sequence[float | tuple[float, ...]]) -> tuple[Any, Any]:
    """Return mean and standard deviation of numbers, or of each position of equally long tuples."""
    numbers = [value for value in values if not isinstance(value, tuple)]
    if numbers:
        return statistics.fmean(numbers), _std(numbers)
    steps = list(zip(*(value for value in values if isinstance(value, tuple)), strict=True))
    return [statistics.fmean(step) for step in steps], [_std(step) for step in steps]


def _std(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation; None for one value."""
    return statistics.stdev(values) if len(values) > 1 else None


def evaluate_archs(
    evaluator: Evaluator,
    train: TrainSet,
    ctx: EvalContext,
    *,
    archs: Sequence[str],
    num_seeds: int,
    seed: int = 0,
    on_result: Callable[[EvalResult], None] | None = None,
) -> list[dict[str, Any]]:
    """Score every architecture with `num_seeds` networks; return one summary each, in order."""
    summaries = []
    for arch in archs:
        results = []
        for seed_index in range(num_seeds):
            results.append(evaluator.evaluate(train, ctx, arch=arch, seed=seed + seed_index))
            if on_result is not None:
                on_result(results[-1])
        summaries.append(summarise(results))
    return summaries
