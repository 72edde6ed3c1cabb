"""Rank correlation as a search objective: `ddray tune --objective nas-spearman`.

A small sample of architectures is trained on the whole train part once; a trial's set is scored by how well
training on it ranks them. Everything is scored on val.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddray.artifact.distilled_set import DistilledSet
from ddray.data import Dataset, Split
from ddray.data.packed import shared
from ddray.errors import DdrayError
from ddray.ranking.figures_of_merit import MIN_ARCHS, figures_of_merit
from ddray.ranking.options import NasOptions
from ddray.ranking.spaces import resolve_config
from ddray.ranking.sweep import Sweep, choose_architectures, run_sweep
from ddray.ranking.worker import NasTask, SweepData, Workbench, training_set
from ddray.runs.executor import Executor
from ddray.runs.ledger import Unit
from ddray.seeding import derive_seed


@dataclass(frozen=True)
class SpearmanObjective:
    """What is needed to score a trial by rank correlation.

    Attributes:
        indices: the sampled architectures.
        truth: their val accuracies after training on the whole train part.
        recipe: how they are trained on a proxy (`NasRecipe` as plain values).
        space: name and options for `get_space`.
        seed: of the networks.
    """

    indices: tuple[int, ...]
    truth: tuple[float, ...]
    recipe: Mapping[str, Any]
    space: Mapping[str, Any]
    seed: int

    def describe(self) -> dict[str, Any]:
        """Return plain values that identify the objective."""
        lists = {"indices": list(self.indices), "truth": list(self.truth)}
        return {**lists, "recipe": dict(self.recipe), "space": dict(self.space)}

    def score(self, distilled: DistilledSet, dataset: Dataset, val: Split, device: torch.device) -> float:
        """Return Spearman's rho between a set's ranking on val and the truth; 0 where it is undefined."""
        decoded = distilled.decode()
        data = SweepData(
            sets={"proxy": training_set(decoded.images, decoded.classes, distilled.space())},
            val=(shared(val.images), val.labels.numpy()),
            test=None,
            num_classes=dataset.num_classes,
            can_flip=dataset.can_flip,
        )
        bench = Workbench(data, device)
        scores = [bench.run(self._task(index))[0]["val_accuracy"] for index in self.indices]
        figures = figures_of_merit(scores, self.truth, storage_images=None, wall_s=None, num_bootstrap=1)
        return float(figures["spearman"] or 0.0)

    def _task(self, index: int) -> NasTask:
        return NasTask(
            units=(Unit(kind="nas", spec={"index": index}),),
            index=index,
            set_name="proxy",
            seeds=(derive_seed(self.seed, "nas", 0) % 2**31,),
            recipe=self.recipe,
            space=self.space,
        )


def spearman_objective(
    options: NasOptions, dataset: Dataset, train: Split, val: Split, executor: Executor, folder: Path
) -> SpearmanObjective:
    """Train the sampled architectures on `train` (the whole but val), or take them from `$DDRAY_HOME`.

    The run in `folder` is continued if it exists.

    Raises:
        DdrayError: fewer than 3 architectures finished, or all reach the same accuracy.
    """
    config = resolve_config(options)
    indices = choose_architectures(options, config, dataset)
    # A search must not open test (docs/architecture.md, Splits), not even for an unused column.
    sweep = Sweep(options, config, dataset, train, val, (), indices, options.device, with_test=False)
    _, rows = run_sweep(sweep, executor, run_dir=folder, resume=True)
    accuracies = {row.spec["index"]: row.result["val_accuracy"] for row in rows if row.status == "done"}
    finished = tuple(index for index in indices if index in accuracies)
    truth = tuple(accuracies[index] for index in finished)
    # A truth that ranks nothing would score every trial 0.
    if len(truth) < MIN_ARCHS:
        reasons = "; ".join(sorted({row.error for row in rows if row.error})) or "none failed"
        raise DdrayError(
            f"nas-spearman needs at least {MIN_ARCHS} architectures trained on the whole train part, got "
            f"{len(truth)} of {len(indices)} ({reasons}); raise --nas-sample"
        )
    if len(set(truth)) == 1:
        raise DdrayError(
            f"nas-spearman needs architectures of different accuracy, all {len(indices)} reach "
            f"{truth[0]:.3f} on val; raise --nas-epochs or --nas-sample"
        )
    return SpearmanObjective(finished, truth, config.recipe.dump(), sweep.space_options(), options.seed)
