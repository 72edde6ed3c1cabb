"""Rank correlation as a search objective: its truth, and that test is never opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ddray.data import Dataset, Split, carve_val
from ddray.distillation.loop import run_distillation
from ddray.errors import DdrayError
from ddray.ranking import objective as objective_module
from ddray.ranking.objective import SpearmanObjective, spearman_objective
from ddray.ranking.options import NasOptions
from ddray.ranking.worker import CODE_VERSION, truth_ledger
from ddray.runs.executor import Executor, LocalExecutor, Outcome, Task
from ddray.runs.ledger import Ledger, Row, Unit

OPTIONS = NasOptions(sample=3, epochs=1, max_mflops=3.0, executor="local")


@pytest.fixture
def dataset(toy: Callable[..., Dataset]) -> Dataset:
    def opened() -> Split:
        raise AssertionError("test was opened before the search had ended")

    return replace(toy((40, 40, 40)), load_test=opened)


def objective(dataset: Dataset, folder: Path, executor: Executor | None = None) -> SpearmanObjective:
    train, val = carve_val(dataset.train(), seed=0)
    return spearman_objective(OPTIONS, dataset, train, val, executor or LocalExecutor(), folder)


class FakeExecutor(LocalExecutor):
    """Trains nothing: architecture i gets accuracies[i], or fails for None."""

    def __init__(self, accuracies: Sequence[float | None]) -> None:
        self.accuracies = accuracies

    def run(self, tasks: Sequence[Task], **options: Any) -> Iterator[Outcome]:
        """Publish the rows."""
        in_order = sorted(tasks, key=lambda task: task.arguments[2].index)
        for task, accuracy in zip(in_order, self.accuracies, strict=True):
            job, _, nas_task = task.arguments
            (unit,) = nas_task.units
            if accuracy is None:
                yield Outcome(task.key, None, MemoryError("out of memory"), 3)
                continue
            row = Row.done(unit, {"val_accuracy": accuracy}, 0.0)
            Ledger(Path(job.run_dir)).publish(unit, row, epoch=job.epoch)
            yield Outcome(task.key, None, None, 1)


def test_a_search_does_not_open_test(tmp_path: Path, dataset: Dataset) -> None:
    result = objective(dataset, tmp_path / "run")
    assert len(result.truth) == 3
    rows = Ledger(tmp_path / "run").rows("truth")
    assert len(rows) == 3
    assert all(row.status == "done" and "test_accuracy" not in row.result for row in rows)


def test_cells_of_nas_bench_201_can_be_ranked_too(
    tmp_path: Path, dataset: Dataset, planned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective_module, "choose_architectures", lambda *_: (0, 3, 6))
    train, val = carve_val(dataset.train(), seed=0)
    options = NasOptions(space="nasbench201", sample=3, epochs=1, executor="local")
    executor = FakeExecutor([0.5, 0.6, 0.7])
    result = spearman_objective(options, dataset, train, val, executor, tmp_path / "run")
    assert result.space == {"name": "nasbench201", "channels": 16, "num_cells": 1, "cell_affine": False}
    assert (result.truth, result.recipe["augment"], result.recipe["epochs"]) == ((0.5, 0.6, 0.7), "none", 1)
    _, ctx, distiller = planned("random", dataset, ipc=2)
    distilled = run_distillation(distiller, ctx).distilled
    assert -1 <= result.score(distilled, dataset, val, torch.device("cpu")) <= 1


def test_a_search_takes_known_truth_without_its_test_score(tmp_path: Path, dataset: Dataset) -> None:
    first = objective(dataset, tmp_path / "one")
    for row in truth_ledger().rows("truth"):
        (truth_ledger().folder / f"{row.key}.json").unlink()
        spec = {**row.spec, "test": True}
        unit = Unit(kind="truth", spec=spec, code_version=CODE_VERSION)
        result = {**row.result, "test_accuracy": 0.25}
        tested_row = row.model_copy(update={"key": unit.key, "spec": spec, "result": result})
        truth_ledger().publish(unit, tested_row, epoch=0)
    again = objective(dataset, tmp_path / "two", FakeExecutor([]))
    assert again.truth == first.truth
    assert all("test_accuracy" not in row.result for row in Ledger(tmp_path / "two").rows("truth"))


@pytest.mark.parametrize(
    ("accuracies", "words"),
    [
        ([0.2, None, 0.3], ["at least 3", "2 of 3", "out of memory", "--nas-sample"]),
        ([0.5, 0.5, 0.5], ["all 3", "0.500", "--nas-epochs"]),
    ],
)
def test_a_truth_that_ranks_nothing_is_refused(
    tmp_path: Path, dataset: Dataset, accuracies: list[float | None], words: list[str]
) -> None:
    with pytest.raises(DdrayError) as caught:
        objective(dataset, tmp_path / "run", FakeExecutor(accuracies))
    assert all(word in str(caught.value) for word in words), caught.value
