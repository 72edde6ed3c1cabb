"""Protocol `continual`: class-incremental learning with the distilled set as memory.

Classes come in tasks, in an order decided by the seed. After each task a fresh network is trained on the
memory of all classes seen so far, and scored on the held-out images of these classes (GDumb, Prabhu et al.,
ECCV 2020; as in DM, arXiv:2110.04181, Sec 4.4: CIFAR-100 in 5 or 10 tasks, 20 images per class).

**Deviations** (DM's code | ours)

- memory: a set per class order and task, distilled from the task's classes alone | one distilled set, cut by
  class. That is the same for methods that treat every class by itself, as DM does; a pool of networks trained
  on all classes (DSDM) has seen the later ones.
- order and networks: 5 orders with 3 networks each | one network per order; `--seeds 15` trains as many.
- classes that the number of tasks does not divide: the rest is dropped | tasks differ by one class.
"""

import statistics
import time
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from ddray.artifact.distilled_set import DistilledSet, TrainSet
from ddray.data import Split
from ddray.errors import InputError
from ddray.evaluation.hard import fit
from ddray.evaluation.options import EvaluateOptions, evaluation_config, learned_rate
from ddray.evaluation.protocol import (
    EvalContext,
    EvalResult,
    EvaluationProtocol,
    Measure,
    RealImages,
    Scoring,
)
from ddray.nets import check_arch
from ddray.seeding import derive, derive_seed
from ddray.training.embedding import Score
from ddray.training.loop import score_net
from ddray.training.recipe import Recipe

NUM_TASKS: Final = 5


def class_tasks(num_classes: int, num_tasks: int, seed: int) -> list[Tensor]:
    """Return the classes of each task, int64 [k]: a random order cut into parts that differ by one at most.

    Raises:
        InputError: `num_tasks` is not in 2..`num_classes`.
    """
    if not 2 <= num_tasks <= num_classes:
        raise InputError(f"--num-tasks must be in 2..{num_classes} (the classes), got {num_tasks}")
    order = torch.randperm(num_classes, generator=derive(seed, "evaluate", "continual", "classes"))
    return list(torch.tensor_split(order, num_tasks))


@dataclass(frozen=True)
class Continual:
    """Class-incremental learning in `num_tasks` tasks (the papers: 5 and 10), each by the recipe."""

    recipe: Recipe
    num_tasks: int = NUM_TASKS

    def evaluate(self, train_set: TrainSet, ctx: EvalContext, *, arch: str, seed: int) -> EvalResult:
        """Train and score one network per task.

        The result's accuracy is that after the last task; `per_step` holds one per task, over the classes
        seen so far, and `incremental_accuracy` their mean.
        """
        begin = time.perf_counter()
        tasks = class_tasks(ctx.dataset.num_classes, self.num_tasks, seed)
        scores: list[Score] = []
        for step, task in enumerate(tasks):
            memory, held_out = _of_classes(train_set, ctx.split, torch.cat(tasks[: step + 1]), task)
            net = fit(memory, ctx, self.recipe, arch=arch, seed=derive_seed(seed, "continual", step))
            scores.append(score_net(net, held_out, ctx.space, device=ctx.device))
        steps, last = tuple(score.accuracy for score in scores), scores[-1]
        measures: dict[str, Any] = {"per_step": steps, "incremental_accuracy": statistics.fmean(steps)}
        wall_s, num = time.perf_counter() - begin, len(train_set.labels)
        return EvalResult(check_arch(arch), seed, last.accuracy, num, wall_s, measures, last.per_class)


def _of_classes(train_set: TrainSet, split: Split, seen: Tensor, new: Tensor) -> tuple[TrainSet, Split]:
    """Return the memory and the held-out images of the classes seen so far.

    Raises:
        InputError: one of the `new` classes has no image in the set, or all of them none in the split.
    """
    empty = [label for label in new.tolist() if not bool((train_set.labels == label).any())]
    if empty:
        raise InputError(f"a memory must hold images of every class, got none of class {empty[0]}")
    if not bool(torch.isin(split.labels, new).any()):
        raise InputError(f"every task needs held-out images, got none of classes {sorted(new.tolist())}")
    is_seen = torch.isin(train_set.labels, seen)
    return train_set.select(is_seen), split.select(torch.isin(split.labels, seen).nonzero()[:, 0])


def _make(options: EvaluateOptions, distilled: DistilledSet, ctx: EvalContext, real: RealImages) -> Scoring:
    config = evaluation_config(distilled, options)
    evaluator = Continual(config.as_recipe(), options.num_tasks or NUM_TASKS)
    return Scoring(evaluator, config.seeds, learned_rate(distilled, options))


PROTOCOL: Final = EvaluationProtocol(
    _make,
    options=("num_tasks",),
    measures={"per_step": Measure("task"), "incremental_accuracy": Measure("mean")},
)
