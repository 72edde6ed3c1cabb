"""What `ddray evaluate` notes in the record of the run that wrote a set."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

import ddray
from ddray.evaluation.options import EvaluateOptions, EvaluateRunOptions
from ddray.jobs.distill import distill
from ddray.jobs.plan import resolve
from ddray.jobs.score import evaluate
from ddray.jobs.score_run import evaluate_in_run
from ddray.runs.executor import LocalExecutor
from ddray.runs.scores import read_scores
from ddray.system.files import file_sha256

CPU = torch.device("cpu")
LAYER = {"arch": "convnet1_w8", "compile": "off", "evaluate": {"epochs": 1, "seeds": 2}}


@pytest.fixture
def run_dir(digits: Any, tmp_path: Path) -> Path:
    plan = resolve("random", digits, ipc=1, seed=3, layers=[LAYER])
    distill(plan, device=CPU, run_dir=tmp_path / "run")
    return tmp_path / "run"


def test_the_record_says_what_was_scored_and_how(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/ddray", "evaluate", "a set.pt"])
    path = run_dir / "distilled.pt"

    result = evaluate(path, EvaluateOptions(seeds=1), device=CPU)

    (score,) = read_scores(run_dir)
    assert datetime.fromisoformat(score.pop("time")).utcoffset() is not None
    assert score == {
        "artifact": "distilled.pt",
        "artifact_sha256": file_sha256(path),
        "method": "random",
        "dataset": "digits",
        "ipc": 1,
        "budget": None,
        "protocol": "hard",
        "split": "test",
        "recipe": None,
        "options": {"seeds": 1},
        "results": result.dump()["results"],
        "command": "ddray evaluate 'a set.pt'",
    }
    assert result.recorded_in == str(run_dir)
    assert "recorded_in" not in result.dump()


def test_the_record_has_a_sets_budget(run_dir: Path) -> None:
    distilled = ddray.load(run_dir / "distilled.pt")
    meta = distilled.meta.model_copy(update={"budget": 10})
    replace(distilled, meta=meta).save(run_dir / "distilled.pt")

    evaluate(run_dir / "distilled.pt", EvaluateOptions(seeds=1), device=CPU)

    (score,) = read_scores(run_dir)
    assert score["budget"] == 10


def test_a_repeated_evaluation_is_noted_once_another_beside_it(run_dir: Path) -> None:
    for seeds in (1, 1, 2):
        assert evaluate(
            run_dir / "distilled.pt", EvaluateOptions(seeds=seeds), device=CPU
        ).recorded_in == str(run_dir)

    assert [len(score["results"][0]["per_seed"]) for score in read_scores(run_dir)] == [1, 2]


def test_an_evaluation_in_a_folder_is_in_the_sets_run_too(run_dir: Path, tmp_path: Path) -> None:
    where = EvaluateRunOptions(run_dir=tmp_path / "evaluation")
    options = EvaluateOptions(seeds=2)
    result = evaluate_in_run(run_dir / "distilled.pt", options, where, LocalExecutor(), device="cpu")

    (score,) = read_scores(run_dir)
    assert score["results"] == result.dump()["results"]


def test_a_set_that_was_written_elsewhere_has_its_run_too(digits: Any, tmp_path: Path) -> None:
    plan = resolve("random", digits, ipc=1, layers=[LAYER])
    distill(plan, device=CPU, run_dir=tmp_path / "run", out=tmp_path / "sets" / "one.pt")
    shutil.move(tmp_path / "sets" / "one.pt", tmp_path / "two.pt")

    result = ddray.evaluate(ddray.load(tmp_path / "two.pt"), seeds=1, device="cpu")

    assert result.recorded_in == str(tmp_path / "run")
    assert len(read_scores(tmp_path / "run")) == 1


def test_a_set_of_no_run_leaves_no_trace(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(run_dir / "distilled.pt", tmp_path / "copy.pt")

    result = evaluate(tmp_path / "copy.pt", EvaluateOptions(seeds=1), device=CPU)

    assert result.recorded_in is None
    assert read_scores(run_dir) == []
    assert not list(tmp_path.glob("*.jsonl"))


def test_a_record_that_can_not_be_read_costs_no_result(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run_dir / "scores.jsonl").mkdir()
    with caplog.at_level(logging.WARNING):
        result = evaluate(run_dir / "distilled.pt", EvaluateOptions(seeds=1), device=CPU)

    assert result["results"][0]["num_images"] == 10
    assert result.recorded_in is None
    assert "not in the run's record" in caplog.text


def test_a_record_that_can_not_be_written_costs_no_result(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, line: str) -> None:
        raise ddray.errors.StorageError(f"could not write {path}: no space")

    monkeypatch.setattr("ddray.runs.scores.append_line", full)
    with caplog.at_level(logging.WARNING):
        result = evaluate(run_dir / "distilled.pt", EvaluateOptions(seeds=1), device=CPU)

    assert result["results"][0]["num_images"] == 10
    assert result.recorded_in is None
    assert "not in the run's record: could not write" in caplog.text
