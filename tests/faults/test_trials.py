"""What happens to trials: diverged, out of memory, killed, stopped early; the ledger says how each ended."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from ddray.data import Dataset
from ddray.errors import InputError
from ddray.runs.ledger import Row
from tests.faults.processes import count, ray_workers, stamps, wait_for
from tests.faults.search import TINY, search, trials

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_here")]


def _journal(run: Path) -> JournalStorage:
    """Return the study file as optuna-dashboard opens it."""
    return JournalStorage(JournalFileBackend(str(run / "optuna.journal")))


GRID = "lr_img: {choice: [1.0, 1.0e+30]}"


@dataclass(frozen=True)
class Finished:
    """A search over `GRID`, first with a broken test set, then to its end.

    Attributes:
        run: its folder; tests do not change it.
        before_test: its rows when the test set was to be opened.
        result: what it returned.
    """

    run: Path
    before_test: list[Row]
    result: dict[str, Any]


@pytest.fixture(scope="module")
def searches() -> list[Finished]:
    return []


@pytest.fixture
def finished(searches: list[Finished], ray_here: None, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The same search for all tests that read it."""
    if not searches:
        run = tmp_path_factory.mktemp("finished") / "run"

        def broken(self: Dataset) -> None:
            raise InputError("the test set is broken")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Dataset, "test", broken)
            with pytest.raises(InputError, match="the test set is broken"):
                search(run, GRID, strategy="grid")
        before = trials(run)
        searches.append(Finished(run, before, search(run, GRID, strategy="grid", resume=True)))
    return searches[0]


def test_test_set_is_not_opened_by_the_search(finished: Finished) -> None:
    assert [row.status for row in finished.before_test] == ["done", "failed"]
    assert trials(finished.run) == finished.before_test


def test_a_diverging_trial_fails_alone_and_is_not_tried_again(finished: Finished) -> None:
    run, out = finished.run, finished.result
    rows = trials(run)
    assert [row.status for row in rows] == ["done", "failed"]
    assert "lower lr_img" in str(rows[1].error)
    assert count(run, "start", rows[1].key) == 1
    assert count(run, "retry", rows[1].key) == 0
    assert (out["num_trials"], out["num_failed"], out["best"]["config"]) == (2, 1, {"lr_img": 1.0})
    # plotly's script is inside: no network access needed
    assert (run / "report.html").stat().st_size > 1_000_000
    assert list((run / "tune").rglob("events.out.tfevents*"))


def test_a_finished_search_resumes_without_work(finished: Finished) -> None:
    run = finished.run
    before, events = stamps(run), (run / "events.jsonl").read_text()
    again = search(run, GRID, strategy="grid", resume=True)
    assert {k: v for k, v in again.items() if k != "wall_s"} == {
        k: v for k, v in finished.result.items() if k != "wall_s"
    }
    assert stamps(run) == before
    assert (run / "events.jsonl").read_text() == events
    with pytest.raises(InputError, match=r"space\.lr_img"):
        search(run, "lr_img: {choice: [0.25, 1.0]}", strategy="grid", resume=True)


def test_a_killed_worker_costs_a_retry_and_nothing_else(tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome: dict[str, object] = {}
    layers = {**TINY, "steps": 100, "method": {"batch_real": 8}}

    def body() -> None:
        outcome.update(search(run, "lr_img: {choice: [1.0]}", strategy="grid", layers=layers))

    thread = threading.Thread(target=body)
    thread.start()
    try:
        wait_for(lambda: any((run / "checkpoints").glob("*.pt")), None)
        victims = ray_workers("_trainable") or ray_workers("ImplicitFunc")
        assert victims, "no trial worker found"
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
    finally:
        thread.join(timeout=300)
    rows = trials(run)
    assert [row.status for row in rows] == ["done"]
    assert count(run, "start", rows[0].key) == 1
    assert count(run, "retry", rows[0].key) == 1
    assert outcome["num_failed"] == 0


def test_asha_stops_poor_trials_early_but_never_the_papers_point(tmp_path: Path) -> None:
    run = tmp_path / "run"
    # Trial 0 is the paper's point, made the worst by its learning rate; it must still reach full length.
    layers = {
        **TINY,
        "steps": 27,
        "evaluate": {"epochs": 8, "seeds": 1},
        "method": {"batch_real": 4, "lr_img": 1e-6},
    }
    handler = signal.getsignal(signal.SIGINT)
    out = search(
        run,
        "lr_img: {loguniform: [0.1, 1.0]}",
        num_samples=7,
        strategy="asha-tpe",
        layers=layers,
    )
    assert signal.getsignal(signal.SIGINT) is handler  # Tune's own would swallow the next signal
    rows = trials(run)
    assert [int(row.spec["number"]) for row in rows] == list(range(7))
    assert sorted(map(int, rows[0].result["rungs"])) == [1, 3, 9]
    stopped = [row for row in rows if row.result["stopped_early"]]
    assert stopped
    assert out["num_stopped_early"] == len(stopped)
    assert all(max(map(int, row.result["rungs"])) < 9 for row in stopped)
    best = next(row for row in rows if row.spec["number"] == out["best"]["trial"])
    assert not best.result["stopped_early"]
    assert out["best"]["val_accuracy"] >= out["paper_point"]["val_accuracy"]
    study = optuna.load_study(study_name=None, storage=_journal(run))
    assert study.study_name == "datadam-digits-ipc1-seed0"
    # The preset lies outside the range: Optuna can't store its settings, and it holds its number alone.
    assert [trial.user_attrs["number"] for trial in study.trials] == list(range(7))
    states = [trial.state.name for trial in study.trials]
    assert states[0] == "FAIL"
    assert sorted(states[1:]) == ["COMPLETE"] * (6 - len(stopped)) + ["PRUNED"] * len(stopped)


def test_pb2_changes_settings_inside_a_trial_and_resumes_by_generation(tmp_path: Path) -> None:
    run = tmp_path / "run"
    layers = {**TINY, "steps": 8, "evaluate": {"epochs": 4, "seeds": 1}, "method": {"batch_real": 4}}
    settings = {"strategy": "pb2", "num_samples": 4, "max_concurrent": None, "layers": layers}
    out = search(run, "lr_img: {loguniform: [0.001, 2.0]}\nmomentum: {uniform: [0.0, 0.9]}", **settings)
    rows = trials(run)
    assert [row.status for row in rows] == ["done"] * 4
    assert all(segment["params"] == rows[0].spec["params"] for segment in rows[0].result["schedule"])
    assert all([s["until"] for s in row.result["schedule"]] == [2, 4, 6, 8] for row in rows)
    changed = [row for row in rows if len({json.dumps(s["params"]) for s in row.result["schedule"]}) > 1]
    assert changed, "no member was given new settings"
    # A crash before the rows were published: segments are not run again, and the choices stay the same.
    segments = {path: path.stat().st_mtime_ns for path in (run / "pb2").glob("*.json")}
    assert len(segments) == 4 * 5
    for path in [*(run / "ledger").glob("*.json"), run / "search.closed"]:
        path.unlink()
    last_segments = sorted((run / "pb2").glob("*generation4*"))
    assert len(last_segments) == 8
    for path in last_segments:
        path.unlink()
    again = search(
        run,
        "lr_img: {loguniform: [0.001, 2.0]}\nmomentum: {uniform: [0.0, 0.9]}",
        resume=True,
        **{**settings, "max_concurrent": 1},
    )
    unchanged_segments = {path: stamp for path, stamp in segments.items() if "generation4" not in path.name}
    assert unchanged_segments
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in unchanged_segments.items())
    for key in ("best", "paper_point", "test_accuracy_mean"):
        assert again[key] == out[key]


def test_a_closed_search_adds_no_trial_but_mends_its_own(tmp_path: Path) -> None:
    """After test was opened, --resume recomputes a torn row but adds no trials, unless more are asked for."""
    run = tmp_path / "run"
    space = "lr_img: {loguniform: [0.1, 1.0]}"
    first = search(run, space, strategy="random", num_samples=3, time_budget=0.01)
    assert first["num_trials"] < 3
    assert (
        search(run, space, strategy="random", num_samples=3, resume=True)["num_trials"] == first["num_trials"]
    )
    row = trials(run)[0]
    torn = run / "ledger" / f"{row.key}.json"
    torn.write_bytes(torn.read_bytes()[:40])
    again = search(run, space, strategy="random", num_samples=3, resume=True)
    assert again["num_trials"] == first["num_trials"]
    assert trials(run)[0].result["val_accuracy"] == row.result["val_accuracy"]
    assert search(run, space, strategy="random", num_samples=4, resume=True)["num_trials"] == 4
    assert [int(row.spec["number"]) for row in trials(run)] == [0, 1, 2, 3]


def test_choices_are_taken_as_the_method_holds_them(tmp_path: Path) -> None:
    """`1` for a float field equals the paper's `1.0`: one trial, which the sampler sees."""
    run = tmp_path / "run"
    out = search(run, "lr_img: {choice: [1, 2]}\np: {choice: [1, 4]}", strategy="tpe", num_samples=2)
    assert out["num_trials"] == 2
    assert trials(run)[0].spec["params"] == {"lr_img": 1.0, "p": 4.0}
    study = optuna.load_study(study_name=None, storage=_journal(run))
    assert len(study.trials) == 2


@pytest.mark.parametrize(
    ("space", "word"),
    [
        ("lr_img: {uniform: [-1.0, 1.0]}", "greater than 0"),
        ("batch_real: {uniform: [16, 64]}", "integer"),
        ("layers: {choice: [[1], [9]]}", "within 1..2"),
        ("lr: {uniform: [0.1, 1.0]}", "lr_img"),
    ],
)
def test_a_bad_range_is_refused_before_a_folder_is_made(tmp_path: Path, space: str, word: str) -> None:
    with pytest.raises(InputError, match=re.escape(word)):
        search(tmp_path / "run", space, strategy="random")
    assert not (tmp_path / "run").exists()


def test_what_never_fits_is_refused_instead_of_hanging(tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(InputError, match="--cpus-per-trial must be <="):
        search(tmp_path / "a", "lr_img: {choice: [1.0]}", strategy="grid", cpus_per_trial=4096.0)
    with pytest.raises(InputError, match="--gpus-per-trial must be 0"):
        search(tmp_path / "b", "lr_img: {choice: [1.0]}", strategy="grid", gpus_per_trial=0.5)
    assert time.monotonic() - begin < 60
