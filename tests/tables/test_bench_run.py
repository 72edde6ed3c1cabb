"""Benches that run: rows, sets and tables, and how they survive damage, crashes and interruptions."""

from __future__ import annotations

import copy
import csv
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from ddray.artifact import distilled_set as artifact
from ddray.artifact.reading import load
from ddray.data import open_dataset
from ddray.errors import DdrayError, InputError, StorageError
from ddray.methods import get_method
from ddray.runs.ledger import Ledger
from ddray.tables import scheduler
from ddray.tables import worker as bench_worker
from ddray.tables.graph import build_graph
from ddray.tables.table import drop_scaled_differences
from tests.tables.benches import TINY, cut_after, run, spec, starts


def test_rows_artifacts_and_table(tmp_path: Path) -> None:
    result = run(tmp_path / "run")
    ledger = Ledger(tmp_path / "run")
    assert (len(ledger.rows("distill")), len(ledger.rows("evaluate"))) == (4, 8)
    assert result["num_failed"] == 0
    assert result["skipped"] == []
    for row in ledger.rows("distill"):
        assert {"method", "dataset", "ipc", "seed"} <= row.spec.keys()
        distilled = load(tmp_path / "run" / row.result["artifact"])
        assert (distilled.meta.method, distilled.meta.seed) == (row.spec["method"], row.spec["seed"])
        curve = json.loads((tmp_path / "run" / row.result["artifact"]).with_suffix(".json").read_text())
        assert len(curve["losses"]) == row.result["steps"]
    assert len(result["cells"]) == 4
    for cell in result["cells"]:
        values = [
            value
            for row in ledger.rows("evaluate")
            if (row.spec["method"], row.spec["arch"]) == (cell["method"], cell["arch"])
            for value in row.result["per_seed"]
        ]
        assert cell["n"] == len(values) == 4
        assert cell["accuracy_mean"] == pytest.approx(statistics.fmean(values), abs=1e-12)
        assert cell["accuracy_std"] == pytest.approx(statistics.stdev(values), abs=1e-12)
    with (tmp_path / "run" / "table.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == ["random", "random", "dm", "dm"]
    assert [float(line["accuracy_mean"]) for line in lines] == [c["accuracy_mean"] for c in result["cells"]]
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert not (tmp_path / "run" / "scores.jsonl").exists(), "its evaluations are rows"


def test_a_finished_bench_resumes_without_work(tmp_path: Path) -> None:
    first = run(tmp_path / "run")
    table = (tmp_path / "run" / "table.csv").read_bytes()
    events = (tmp_path / "run" / "events.jsonl").read_bytes()
    again = run(tmp_path / "run", resume=True)
    assert again["cells"] == first["cells"]
    assert (tmp_path / "run" / "table.csv").read_bytes() == table
    assert (tmp_path / "run" / "events.jsonl").read_bytes() == events
    with pytest.raises(InputError, match="seeds: 2 -> 3"):
        run(tmp_path / "run", spec(seeds=3), resume=True)


def test_a_worker_opens_a_dataset_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time it is opened, its warnings are printed and its files are read."""
    opened: list[str] = []

    def count(name: str, **options: Any) -> Any:
        opened.append(name)
        return open_dataset(name, **options)

    monkeypatch.setattr(bench_worker, "open_dataset", count)
    monkeypatch.setattr("ddray.jobs.score.open_dataset", count)
    bench_worker._opened.cache_clear()
    run(tmp_path / "run")

    assert opened == ["digits"]


def test_a_bench_cut_off_anywhere_ends_in_the_same_table(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    table = (tmp_path / "whole" / "table.csv").read_bytes()
    for stop in (1, 5, 9):
        folder = tmp_path / f"cut{stop}"
        with cut_after(stop):
            run(folder)
        before = {path: path.stat().st_mtime_ns for path in (folder / "ledger").glob("*.json")}
        assert len(before) == stop
        run(folder, resume=True)
        assert (folder / "table.csv").read_bytes() == table
        assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
        assert all(starts(folder)[path.stem] == 1 for path in before)


def test_a_diverged_set_fails_alone(tmp_path: Path) -> None:
    rows = ["random", {"name": "dm", "steps": 2, "set": {"method.lr_img": 1e30, "method.batch_real": 4}}]
    result = run(tmp_path / "run", spec(methods=rows, seeds=1))
    assert [cell["method"] for cell in result["cells"]] == ["random", "random"]
    assert result["num_failed"] == 1
    (failure,) = result["failures"]
    assert failure["unit"] == "dm digits ipc 1 seed 0"
    assert "lower lr_img" in failure["reason"]
    assert len(result["skipped"]) == 2
    again = run(tmp_path / "run", spec(methods=rows, seeds=1), resume=True, retry_failed=True)
    assert again["failures"] == result["failures"], "what diverged would diverge again"


def test_a_crash_is_tried_three_times_then_listed_and_can_be_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench_spec = spec(seeds=1)
    with monkeypatch.context() as patch:
        patch.setattr(get_method("dm"), "step", lambda self: 1 / 0)
        result = run(tmp_path / "run", bench_spec)
    assert result["failures"][0]["reason"] == "failed 3 times; last: ZeroDivisionError: division by zero"
    key = result["failures"][0]["key"]
    kinds = [event["event"] for event in Ledger(tmp_path / "run").events() if event["key"] == key]
    assert kinds == ["start", "retry", "retry", "fail"]
    assert run(tmp_path / "run", bench_spec, resume=True)["num_failed"] == 1
    mended = run(tmp_path / "run", bench_spec, resume=True, retry_failed=True)
    assert (mended["num_failed"], mended["skipped"], len(mended["cells"])) == (0, [], 4)


def test_a_torn_row_and_a_damaged_set_are_computed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bench_spec = spec(seeds=1)
    run(tmp_path / "run", bench_spec)
    table = (tmp_path / "run" / "table.csv").read_bytes()
    ledger = Ledger(tmp_path / "run")
    torn_row = ledger.rows("evaluate")[0]
    (source,) = [row for row in ledger.rows("distill") if row.spec["method"] == torn_row.spec["method"]]
    path = tmp_path / "run" / "ledger" / f"{torn_row.key}.json"
    path.write_bytes(path.read_bytes()[:30])
    set_file = tmp_path / "run" / source.result["artifact"]
    set_file.write_bytes(set_file.read_bytes()[:-100])
    run(tmp_path / "run", bench_spec, resume=True)
    assert (tmp_path / "run" / "table.csv").read_bytes() == table
    assert path.with_suffix(".corrupt").exists()
    assert "is torn" in caplog.text
    assert "it is distilled again" in caplog.text
    assert starts(tmp_path / "run")[source.key] == 2


def test_a_set_that_is_damaged_while_the_bench_runs_is_distilled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole", spec(seeds=1))
    real = bench_worker.publish
    hurt: list[Path] = []

    def publish(ledger: Ledger, job: Any, unit: Any, *args: Any, **kwargs: Any) -> None:
        real(ledger, job, unit, *args, **kwargs)
        if unit.kind == "distill" and not hurt:
            hurt.append(tmp_path / "run" / bench_worker.artifact_name(unit.key))
            hurt[0].write_bytes(hurt[0].read_bytes()[:-7])

    monkeypatch.setattr(bench_worker, "publish", publish)
    result = run(tmp_path / "run", spec(seeds=1))
    assert (result["num_failed"], result["skipped"]) == (0, [])
    assert load(hurt[0])
    table = (tmp_path / "whole" / "table.csv").read_bytes()
    assert (tmp_path / "run" / "table.csv").read_bytes() == table


def test_a_set_that_is_damaged_again_and_again_fails_its_evaluations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_worker, "is_sound", lambda run_dir, row: False)
    monkeypatch.setattr(scheduler, "is_sound", lambda run_dir, row: False)
    with pytest.raises(DdrayError, match="damaged again and again"):
        run(tmp_path / "run", spec(methods=["random"], seeds=1))
    assert Ledger(tmp_path / "run").rows("evaluate")[0].result["attempts"]


def test_a_late_worker_does_not_replace_the_published_set(tmp_path: Path) -> None:
    """An orphan of a killed driver may finish after the new one has published, with different bytes."""
    bench_spec = spec(methods=["random"], seeds=1)
    run(tmp_path / "run", bench_spec)
    (row,) = Ledger(tmp_path / "run").rows("distill")
    path = tmp_path / "run" / row.result["artifact"]
    before = path.read_bytes()
    (unit,) = build_graph(bench_spec, open_dataset).distil.values()
    for epoch in (0, 1):  # an older driver's worker, and a second worker of this one
        job = bench_worker.BenchJob(tmp_path / "run", epoch, None, "cpu")
        bench_worker._draft(job, unit).write_bytes(b"other bytes")
        bench_worker.publish(Ledger(tmp_path / "run"), job, unit, {"sha256": "other"}, 1.0)
        assert path.read_bytes() == before
    assert bench_worker.is_sound(tmp_path / "run", row)


def test_a_scaled_run_is_no_reproduction() -> None:
    number = {"value": 32.0}
    cells: list[dict[str, Any]] = [
        {"compared": number, "published": {"difference": 0.1, "difference_se": 2.0}},
        {"compared": number},
        {"differs": ["resolution 64 px, theirs 32 px"]},
        {},
    ]
    before = copy.deepcopy(cells)
    drop_scaled_differences(cells, "paper")
    assert cells == before
    drop_scaled_differences(cells, "cpu")
    assert cells == [
        {"published": {"difference": None, "difference_se": None}, "differs": ["scale cpu"]},
        {"published": number, "differs": ["scale cpu"]},
        {"differs": ["scale cpu", "resolution 64 px, theirs 32 px"]},
        {},
    ]


def test_evaluations_that_differ_in_epochs_or_options_are_told_apart(tmp_path: Path) -> None:
    scored = [{"epochs": 1}, {"epochs": 2}, {"epochs": 1, "options": {"train_limit": 5}}]
    bench_spec = spec(methods=["random"], seeds=1, evaluate=[{**one, "seeds": 1} for one in scored])
    result = run(tmp_path / "run", bench_spec)
    expected = ["epochs=1", "epochs=2", "epochs=1, train_limit=5"]
    assert [cell["settings"] for cell in result["cells"]] == expected
    with (tmp_path / "run" / "table.csv").open() as file:
        assert [line["settings"] for line in csv.DictReader(file)] == expected


def test_a_full_disk_ends_the_bench_and_leaves_it_resumable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def full(*args: Any, **kwargs: Any) -> None:
            raise StorageError("could not write x: no space left on device")

        patch.setattr(artifact.DistilledSet, "save", full)
        with pytest.raises(StorageError, match="no space"):
            run(tmp_path / "run")
    assert Ledger(tmp_path / "run").rows() == []
    assert run(tmp_path / "run", resume=True)["num_failed"] == 0


def test_when_nothing_can_be_scored_the_reason_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(get_method("dm"), "step", lambda self: 1 / 0)
    with pytest.raises(DdrayError, match="no cell of the table was scored: failed 3 times"):
        run(tmp_path / "run", spec(methods=TINY["methods"][1:], seeds=1))
