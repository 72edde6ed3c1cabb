"""Runs and a pool entry that release 0.1.0 (commit ebda3b3) left are found and continued.

`tests/stored` was written by that release: `distill` was killed at step 11 of 12, after the checkpoint of
step 8; `distilled.pt` is what the same command gave when left alone. `bench`, `nas` and `tune` had finished.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddray.artifact.reading import load
from ddray.cli import _run

STORED = Path(__file__).parent / "stored"
DISTIL = (
    *("distill", "--method", "dsdm", "--dataset", "digits", "--ipc", "1", "--steps", "12"),
    *("--set", "checkpoint_every=4", "--set", "method.batch_real=8", "--set", "arch=convnet4_w4"),
    *("--set", "method.pool.num_models=1", "--set", "method.pool.epochs=2"),
    # That release's preset was Algorithm 1 to the letter.
    *("--set", "method.momentum=0", "--set", "method.augment=none"),
)
NAS = ("nas", "--sample", "3", "--max-mflops", "1", "--epochs", "1", "--executor", "local")
TUNE = (
    *("tune", "--method", "dm", "--ipc", "1", "--num-samples", "3", "--strategy", "random", "--steps", "3"),
    *("--set", "method.batch_real=8", "--set", "arch=convnet4_w4", "--set", "evaluate.epochs=2"),
    *("--set", "evaluate.seeds=1", "--set", "evaluate.val_seeds=1", "--final-sets", "1"),
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of everything stored; its `home` is $DDRAY_HOME."""
    copied = shutil.copytree(STORED, tmp_path / "stored")
    monkeypatch.setenv("DDRAY_HOME", str(copied / "home"))
    return copied


@pytest.fixture
def resume(folder: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Continues a stored run by its command, in this process; gives the command's JSON."""

    def run_command(run: str, *arguments: str) -> dict[str, Any]:
        code = _run([*arguments, "--run-dir", str(folder / run), "--resume", "--json"], debug=True)
        printed = capfd.readouterr()
        assert code == 0, printed.err
        result: dict[str, Any] = json.loads(printed.out)
        return result

    return run_command


def started(folder: Path, run: str) -> list[str]:
    lines = (folder / run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event["key"] for event in map(json.loads, lines) if event["event"] == "start"]


def forget(folder: Path, run: str, fits: Callable[[dict[str, Any]], bool]) -> str:
    """Remove the one row of a run for which `fits` holds; return its key."""
    (path,) = (p for p in (folder / run / "ledger").glob("*.json") if fits(json.loads(p.read_text())))
    path.unlink()
    return path.stem


def test_a_killed_distillation_goes_on_with_the_pool_entry_of_its_release(folder: Path, resume: Any) -> None:
    result = resume("distill", *DISTIL)

    assert result["resumed_from_step"] == 8
    entries = [json.loads(path.read_text()) for path in (folder / "home" / "pool").glob("*/entry.json")]
    assert {entry["spec"]["kind"]: entry["times_trained"] for entry in entries} == {
        "supervised": 1,  # by that release
        "features": 1,  # of it, apart since
    }
    left_alone, continued = load(folder / "distilled.pt"), load(Path(result["artifact"]))
    assert torch.equal(left_alone.labels, continued.labels)
    torch.testing.assert_close(left_alone.images, continued.images, rtol=1e-4, atol=1e-4)


def test_a_finished_bench_starts_nothing_and_a_missing_row_alone_is_run(folder: Path, resume: Any) -> None:
    before = started(folder, "bench")
    command = ("bench", str(folder / "bench.yaml"), "--executor", "local")
    cells = resume("bench", *command)["cells"]
    assert started(folder, "bench") == before

    forgotten = forget(folder, "bench", lambda row: row["key"].startswith("1a903bbe"))
    again = resume("bench", *command)["cells"]

    assert started(folder, "bench") == [*before, forgotten]
    assert [cell["method"] for cell in again] == ["random", "dm"]
    assert all(cell["accuracy_mean"] is not None for cell in (*cells, *again))


def test_a_ranking_takes_its_rows_and_the_truth_of_its_release(folder: Path, resume: Any) -> None:
    before = started(folder, "nas")
    command = (*NAS, "--proxy", str(folder / "distilled.pt"))
    assert resume("nas", *command)["num_archs"] == 3
    assert started(folder, "nas") == before

    forgotten = forget(folder, "nas", lambda row: row["kind"] == "nas" and row["spec"]["index"] == 14)
    forget(folder, "nas", lambda row: row["kind"] == "truth" and row["spec"]["index"] == 14)
    resume("nas", *command)

    assert started(folder, "nas") == [*before, forgotten]  # the truth was taken from $DDRAY_HOME


def test_a_finished_search_is_read(folder: Path, resume: Any) -> None:
    before = started(folder, "tune")

    result = resume("tune", *TUNE)

    assert (result["num_trials"], result["num_failed"]) == (3, 0)
    assert started(folder, "tune") == before
