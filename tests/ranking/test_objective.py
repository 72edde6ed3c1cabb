"""Rank correlation as a search objective: its truth, and that test is never opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ddray.data import Dataset, Split, carve_val
from ddray.errors import DdrayError
from ddray.ranking.objective import SpearmanObjective, spearman_objective
from ddray.ranking.options import NasOptions
from ddray.ranking.sweep import Execute, execute_locally
from ddray.ranking.worker import CODE_VERSION, NasTask, SweepData, SweepJob, truth_ledger
from ddray.runs.ledger import Ledger, Row, Unit

OPTIONS = NasOptions(sample=3, epochs=1, max_mflops=3.0, executor="local")


@pytest.fixture
def dataset(toy: Callable[..., Dataset]) -> Dataset:
    def opened() -> Split:
        raise AssertionError("test was opened before the search had ended")

    return replace(toy((40, 40, 40)), load_test=opened)


def objective(dataset: Dataset, folder: Path, execute: Execute = execute_locally) -> SpearmanObjective:
    train, val = carve_val(dataset.train(), seed=0)
    return spearman_objective(OPTIONS, dataset, train, val, execute, folder)


def fake(accuracies: Sequence[float | None]) -> Execute:
    """Return an executor that trains nothing: architecture i gets accuracies[i], or fails for None."""

    def execute(
        job: SweepJob, data: SweepData, tasks: Sequence[NasTask], on_start: Any
    ) -> Iterator[tuple[str, Exception | None, int]]:
        for task, accuracy in zip(sorted(tasks, key=lambda task: task.index), accuracies, strict=True):
            (unit,) = task.units
            if accuracy is None:
                yield task.key, MemoryError("out of memory"), 3
                continue
            result = {"val_accuracy": accuracy}
            row = Row(key=unit.key, kind="truth", spec=unit.spec, status="done", result=result, wall_s=0.0)
            Ledger(Path(job.run_dir)).publish(unit, row, epoch=job.epoch)
            yield task.key, None, 1

    return execute


def test_a_search_does_not_open_test(tmp_path: Path, dataset: Dataset) -> None:
    result = objective(dataset, tmp_path / "run")
    assert len(result.truth) == 3
    rows = Ledger(tmp_path / "run").rows("truth")
    assert len(rows) == 3
    assert all(row.status == "done" and "test_accuracy" not in row.result for row in rows)


def test_a_search_takes_known_truth_without_its_test_score(tmp_path: Path, dataset: Dataset) -> None:
    first = objective(dataset, tmp_path / "one")
    for row in truth_ledger().rows("truth"):
        (truth_ledger().folder / f"{row.key}.json").unlink()
        spec = {**row.spec, "test": True}
        unit = Unit(kind="truth", spec=spec, code_version=CODE_VERSION)
        result = {**row.result, "test_accuracy": 0.25}
        tested_row = row.model_copy(update={"key": unit.key, "spec": spec, "result": result})
        truth_ledger().publish(unit, tested_row, epoch=0)
    again = objective(dataset, tmp_path / "two", fake([]))
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
        objective(dataset, tmp_path / "run", fake(accuracies))
    assert all(word in str(caught.value) for word in words), caught.value
