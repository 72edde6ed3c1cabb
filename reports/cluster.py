"""Measurements of the fan-out for reports/: scaling, a simulation of a large cluster, injected faults.

`python reports/cluster.py scaling` (simulation, faults) prints JSON, which reports/regenerate.py keeps.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ddray.runs.ledger import Ledger, Row, Unit
from ddray.system.worker import cpu_count

UNIT_S = 0.2
REPEATS = 3


def synthetic_unit(run_dir: str, epoch: int, unit_index: int, seconds: float, fails: int) -> int:
    """Sleep, publish a row and return the process id; the first `fails` tries crash the worker."""
    ledger = Ledger(Path(run_dir))
    unit = Unit(kind="distill", spec={"number": unit_index})
    if ledger.begin(unit, epoch=epoch) < fails:
        os._exit(1)
    time.sleep(seconds)
    row = Row(
        key=unit.key, kind=unit.kind, spec=unit.spec, status="done", result={"n": unit_index}, wall_s=seconds
    )
    ledger.publish(unit, row, epoch=epoch)
    return os.getpid()


@contextlib.contextmanager
def local_ray(*, num_cpus: int, num_gpus: int) -> Iterator[None]:
    """Start a local Ray that pretends to have these resources."""
    import ray

    size = {"num_cpus": num_cpus, "num_gpus": num_gpus}
    ray.init(address="local", include_dashboard=False, log_to_driver=False, namespace="ddray", **size)
    try:
        yield
    finally:
        ray.shutdown()


def run_units(
    folder: Path,
    num_units: int,
    workers: int,
    *,
    fails: Callable[[int], int] = lambda unit_index: 0,
    gpus: float = 0.0,
) -> dict[str, Any]:
    """Run synthetic units on a running Ray; check that each unit has exactly one row.

    The rate is measured from when every worker has finished a unit until the last units begin, so it excludes
    the start of processes.
    """
    from ddray.cluster.executor import RayExecutor
    from ddray.runs.executor import Task

    (folder / "ledger").mkdir(parents=True)
    ledger = Ledger(folder)
    epoch = ledger.open_epoch()
    tasks = [
        Task(str(n), synthetic_unit, (str(folder), epoch, n, UNIT_S, fails(n))) for n in range(num_units)
    ]
    begin, ends, seen, full, failed = time.monotonic(), [], set(), 0, 0
    executor = RayExecutor(cpus=0.01 if gpus else 1.0, gpus=gpus, max_workers=workers)
    with executor.workers() as pool:
        for outcome in pool.run(tasks):
            ends.append(time.monotonic())
            failed += outcome.error is not None
            if outcome.error is None and outcome.value not in seen and len(seen) < workers:
                seen.add(outcome.value)
                full = len(ends)
    rows = ledger.rows()
    assert len(rows) == num_units - failed, "a unit has no row"
    finished = [event["key"] for event in ledger.events() if event["event"] == "finish"]
    assert len(finished) == len(set(finished)), "a unit was published twice"
    last = num_units - workers
    return {
        "units": num_units,
        "workers": workers,
        "wall_s": ends[-1] - begin,
        "units_per_s": (last - full) / (ends[last - 1] - ends[full - 1]) if last > full else None,
        "failed": failed,
        "retries": sum(event["event"] == "retry" for event in ledger.events()),
    }


def scaling() -> dict[str, Any]:
    """Measure units per second with 1, 2 and 4 workers; units sleep, so two cores can run four of them."""
    rows = []
    with local_ray(num_cpus=4, num_gpus=0):
        for workers in (1, 2, 4):
            rates = []
            for _ in range(REPEATS):
                with tempfile.TemporaryDirectory() as temporary:
                    result = run_units(Path(temporary) / "run", 50 * workers, workers)
                rates.append(result["units_per_s"])
            mean = statistics.fmean(rates)
            rows.append(
                {
                    "workers": workers,
                    "units_per_s": mean,
                    "std": statistics.stdev(rates),
                    "n": REPEATS,
                    "efficiency": mean * UNIT_S / workers,
                }
            )
    base = rows[0]["units_per_s"]
    return {"rows": [{**row, "speedup": row["units_per_s"] / base} for row in rows], "unit_s": UNIT_S}


def simulation(num_units: int = 1000, num_gpus: int = 64) -> dict[str, Any]:
    """Run units on fake GPUs; every tenth crashes its worker once, every hundredth on all three tries."""

    def fails(unit_index: int) -> int:
        return 3 if unit_index % 100 == 99 else 1 if unit_index % 10 == 9 else 0

    workers = min(num_gpus, int(os.environ.get("DDRAY_SIMULATED_WORKERS", num_gpus)))
    with local_ray(num_cpus=cpu_count(), num_gpus=num_gpus), tempfile.TemporaryDirectory() as temporary:
        result = run_units(Path(temporary) / "run", num_units, workers, fails=fails, gpus=1.0)
    assert result["failed"] == num_units // 100
    ideal = num_units * UNIT_S / workers
    return {**result, "fake_gpus": num_gpus, "unit_s": UNIT_S, "ideal_s": ideal, "exactly_once": True}


def faults() -> dict[str, Any]:
    """Run the fault tests of trials, sweeps and benches; return what was injected and what survived."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "faults.xml"
        test_paths = os.environ.get("DDRAY_FAULT_TESTS", "tests/faults")
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *test_paths.split(), f"--junitxml={out}"],
            cwd=Path(__file__).resolve().parents[1],
            check=False,
            stdout=sys.stderr,
        )
        return {"rows": fault_rows(out.read_text(encoding="utf-8"))}


_SINCE_CHECKPOINT = "0 finished units; of unfinished ones the steps since their last checkpoint"
_UNFINISHED = "0 finished units; unfinished ones from their start"
_NETWORK = "0 finished networks; the one in training from its start"
# Tests that inject a fault, by file and name: the fault, and the work that is repeated because of it.
FAULTS = {
    "test_bench.test_a_killed_driver_resumes": ("bench: driver killed", _SINCE_CHECKPOINT),
    "test_bench.test_a_driver_killed_at_any_moment_resumes": (
        "bench: driver killed up to three times, at random moments",
        _SINCE_CHECKPOINT,
    ),
    "test_bench.test_a_full_disk_ends_the_bench_and_leaves_it_resumable": ("bench: disk full", _UNFINISHED),
    "test_bench.test_a_node_dies_and_another_joins": (
        "bench: a node dies, another joins",
        _SINCE_CHECKPOINT,
    ),
    "test_bench.test_units_wait_while_no_node_fits_them": (
        "bench: the only node dies, another joins",
        _SINCE_CHECKPOINT,
    ),
    "test_bench.test_a_killed_worker_costs_a_retry_and_nothing_else": (
        "bench: workers killed",
        _SINCE_CHECKPOINT,
    ),
    "test_drivers.test_killed_driver_resumes": ("search: driver killed", _SINCE_CHECKPOINT),
    "test_drivers.test_memory_and_foreign_methods": (
        "search: a trial asks for more memory than there is",
        "0 finished units; the trial, after three tries",
    ),
    "test_drivers.test_full_disk_names_the_path_and_leaves_a_resumable_run": (
        "distillation: disk full",
        "the steps since the last checkpoint that fitted",
    ),
    "test_trials.test_a_diverging_trial_fails_alone_and_is_not_tried_again": (
        "search: a trial's loss is NaN",
        "0 finished units; the trial",
    ),
    "test_trials.test_a_killed_worker_costs_a_retry_and_nothing_else": (
        "search: workers killed",
        _SINCE_CHECKPOINT,
    ),
    "test_nas.test_killed_driver_resumes": ("NAS sweep: driver killed", _UNFINISHED),
    "test_nas.test_a_hung_or_killed_worker_costs_its_task_alone": (
        "fan-out: a worker hangs, another is killed",
        _UNFINISHED,
    ),
    "test_pool.test_a_silent_trainer_loses_its_lease_and_its_late_entry_is_refused": (
        "pool: a trainer falls silent",
        _NETWORK,
    ),
    "test_pool.test_a_damaged_entry_is_set_aside_and_leased": ("pool: an entry is damaged", "this entry"),
    "test_pool.test_a_killed_trainer_is_taken_over_at_once": ("pool: a process that trains killed", _NETWORK),
    "test_pool.test_a_killed_trainer_is_taken_over": ("pool: a worker that trains killed", _NETWORK),
    "test_pool.test_a_stopped_trainer_is_taken_over_and_its_late_entry_refused": (
        "pool: a trainer stopped (SIGSTOP)",
        _NETWORK,
    ),
    "test_pool.test_without_its_service_the_files_go_on_and_nothing_is_trained_again": (
        "pool: its actor dies",
        "nothing",
    ),
    "test_pool.test_a_driver_killed_while_the_pool_is_trained_resumes": (
        "search: driver killed while the pool is trained",
        _NETWORK,
    ),
}


def fault_rows(junit: str) -> list[dict[str, Any]]:
    """Return per fault in a JUnit file how often it was injected and survived, and the work lost.

    Cases of a parametrised test are counted together; tests that inject no fault (capacity, options, sharing)
    are ignored. The work lost is what the tests check: rows of finished units keep their time stamps, and
    finished units are started once.
    """
    from xml.etree import ElementTree

    groups: dict[str, list[bool]] = {}
    for case in ElementTree.fromstring(junit).iter("testcase"):
        module = next(part for part in case.attrib["classname"].split(".") if part.startswith("test_"))
        name = f"{module}.{case.attrib['name'].partition('[')[0]}"
        if name in FAULTS and case.find("skipped") is None:
            survived = case.find("failure") is None and case.find("error") is None
            groups.setdefault(name, []).append(survived)
    return [
        {
            "fault": FAULTS[name][0],
            "injected": len(outcomes),
            "survived": sum(outcomes),
            "lost_work": FAULTS[name][1],
        }
        for name, outcomes in groups.items()
    ]


PARTS = {"scaling": scaling, "simulation": simulation, "faults": faults}


def main() -> None:
    """Run a part and print its JSON."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.redirect_stdout(sys.stderr):  # Ray reports killed workers on stdout
        measured = PARTS[sys.argv[1]]()
    sys.stdout.write(json.dumps(measured) + "\n")


if __name__ == "__main__":
    main()
