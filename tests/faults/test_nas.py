"""A NAS sweep on Ray: driver killed, worker killed, unit hung; every unit runs once."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from ddray.cluster.executor import RayExecutor
from ddray.runs import executor as executor_module
from ddray.runs.executor import Task
from ddray.runs.ledger import Ledger
from tests.faults.processes import DDRAY, start, wait_for

pytestmark = pytest.mark.ray


@pytest.fixture
def proxy(tmp_path: Path, run_command: Any) -> Path:
    path = tmp_path / "random.pt"
    target = ("--out", str(path), "--run-dir", str(tmp_path / "set"))
    run_command("distill", "--method", "random", "--ipc", "1", *target)
    return path


def sweep(run: Path, proxy: Path, *extra_arguments: str) -> list[str]:
    """Return the arguments of a sweep of 8 architectures x 2 seeds; the truth comes from a table."""
    return [
        *("nas", "--proxy", str(proxy), "--space", "nasbench201", "--sample", "8", "--seeds", "2"),
        *("--epochs", "20", "--truth", "table", "--truth-column", "cifar10_test_200_mean"),
        *("--run-dir", str(run), *extra_arguments),
    ]


@pytest.mark.parametrize(
    "signal_number",
    # test_drivers runs SIGKILL by default
    [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGTERM],
)
@pytest.mark.usefixtures("ray_here")
def test_killed_driver_resumes(
    tmp_path: Path, proxy: Path, signal_number: signal.Signals, run_command: Any
) -> None:
    run = tmp_path / "run"
    victim = start([*DDRAY, *sweep(run, proxy)])
    wait_for(lambda: len(list((run / "ledger").glob("*.json"))) >= 3, victim)
    victim.send_signal(signal_number)
    _, errors = victim.communicate(timeout=120)
    if signal_number == signal.SIGTERM:
        assert victim.returncode == 1
        assert "--resume" in errors.strip().splitlines()[-1]
        assert "Traceback" not in errors
    before = {path: path.stat().st_mtime_ns for path in (run / "ledger").glob("*.json")}
    assert len(before) < 16, "too late: the sweep was over"
    starts = [event["key"] for event in Ledger(run).events() if event["event"] == "start"]
    out = run_command(*sweep(run, proxy, "--resume"))
    rows = Ledger(run).rows("nas")
    assert len(rows) == 16
    assert len({(row.spec["index"], row.spec["seed"]) for row in rows}) == 16
    assert out["num_archs"] == 8
    assert out["num_failed"] == 0
    after = {path: path.stat().st_mtime_ns for path in (run / "ledger").glob("*.json")}
    assert before.items() <= after.items()
    again = [event["key"] for event in Ledger(run).events() if event["event"] == "start"][len(starts) :]
    assert not {path.stem for path in before} & set(again)


def _record(folder: str, name: str) -> int:
    """Count this call in a file, and return the number of calls so far."""
    path = Path(folder) / name
    with path.open("a") as file:
        file.write("x")
    return len(path.read_text())


def _fine(folder: str, name: str) -> str:
    _record(folder, name)
    return name


def _dies_once(folder: str, name: str) -> str:
    if _record(folder, name) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return name


def _hangs(folder: str, name: str) -> str:
    _record(folder, name)
    time.sleep(600)
    return name


def _hangs_once(folder: str, name: str) -> str:
    if _record(folder, name) == 1:
        time.sleep(600)
    return name


@pytest.mark.usefixtures("ray_here")
def test_a_hung_or_killed_worker_costs_its_task_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor_module, "MAX_ATTEMPTS", 2)
    started: list[tuple[str, int]] = []
    functions = {"hangs": _hangs, "once": _hangs_once, "dies": _dies_once}
    tasks = [
        Task(name, functions.get(name, _fine), (str(tmp_path), name))
        for name in ("hangs", "a", "dies", "b", "once", "c")
    ]
    begin = time.monotonic()
    with RayExecutor(cpus=1, gpus=0, max_workers=2).workers() as workers:
        outcomes = {
            outcome.key: outcome
            for outcome in workers.run(
                tasks, timeout_s=8.0, on_start=lambda key, attempt: started.append((key, attempt))
            )
        }
    assert time.monotonic() - begin < 120
    assert ray.is_initialized()
    assert {key for key, outcome in outcomes.items() if outcome.error is None} == {
        "a",
        "b",
        "c",
        "dies",
        "once",
    }
    assert isinstance(outcomes["hangs"].error, TimeoutError)
    assert {key: outcome.attempts for key, outcome in outcomes.items()} == {
        **dict.fromkeys("abc", 1),
        "dies": 2,
        "once": 2,
        "hangs": 2,
    }
    assert sorted(started) == sorted(
        [*((name, 1) for name in outcomes), *((name, 2) for name in ("dies", "once", "hangs"))]
    )
    assert {name: len((tmp_path / name).read_text()) for name in "abc"} == dict.fromkeys("abc", 1)


@pytest.mark.usefixtures("ray_here")
def test_a_search_for_rank_correlation(tmp_path: Path, run_command: Any) -> None:
    """A search for rank correlation runs to its end, using val only; this seed draws small networks."""
    out = run_command(
        *("tune", "--method", "random", "--ipc", "1", "--objective", "nas-spearman", "--nas-sample", "3"),
        *("--nas-epochs", "1", "--num-samples", "1", "--strategy", "random", "--final-sets", "1"),
        *("--set", "evaluate.epochs=2", "--set", "evaluate.seeds=1", "--run-dir", str(tmp_path / "run")),
        *("--seed", "18"),
    )
    assert out["objective"] == "val_spearman"
    assert -1 <= out["best"]["val_spearman"] <= 1
    (row,) = Ledger(tmp_path / "run").rows("trial")
    assert row.result["objective"] == "val_spearman"
    assert len(row.spec["objective"]["truth"]) == 3
    truth = Ledger(tmp_path / "run" / "architectures").rows("truth")
    assert len(truth) == 3
    assert not [row for row in truth if "test_accuracy" in row.result], "test was opened before the end"
