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

from ddray.cluster.runtime import cpu_count
from ddray.ledger import Ledger, Row, Unit

UNIT_S = 0.2
REPEATS = 3


def synthetic_unit(run_dir: str, epoch: int, number: int, seconds: float, fails: int) -> int:
    """Sleep, publish a row and return the process; the first `fails` tries crash their worker."""
    ledger = Ledger(Path(run_dir))
    unit = Unit(kind="distill", spec={"number": number})
    if ledger.begin(unit, epoch=epoch) < fails:
        os._exit(1)
    time.sleep(seconds)
    row = Row(
        key=unit.key, kind=unit.kind, spec=unit.spec, status="done", result={"n": number}, wall_s=seconds
    )
    ledger.publish(unit, row, epoch=epoch)
    return os.getpid()


@contextlib.contextmanager
def local_ray(*, num_cpus: int, num_gpus: int) -> Iterator[None]:
    """Start a Ray of pretended size on this machine."""
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
    fails: Callable[[int], int] = lambda number: 0,
    gpus: float = 0.0,
) -> dict[str, Any]:
    """Run synthetic units on so many workers of a Ray that is there; check that each has one row.

    The rate is that between the moment when every worker has ended a unit and that when the last units begin:
    the start of processes is no part of it.
    """
    from ddray.cluster.fanout import Task, fan_out

    (folder / "ledger").mkdir(parents=True)
    ledger = Ledger(folder)
    epoch = ledger.open_epoch()
    tasks = [
        Task(str(n), synthetic_unit, (str(folder), epoch, n, UNIT_S, fails(n))) for n in range(num_units)
    ]
    begin, ends, seen, full, failed = time.monotonic(), [], set(), 0, 0
    for outcome in fan_out(tasks, num_workers=workers, cpus=0.01 if gpus else 1.0, gpus=gpus):
        ends.append(time.monotonic())
        failed += outcome.error is not None
        if outcome.value not in seen and len(seen) < workers:
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
        "units_per_s": (last - full) / (ends[last - 1] - ends[full - 1]),
        "failed": failed,
        "retries": sum(event["event"] == "retry" for event in ledger.events()),
    }


def scaling() -> dict[str, Any]:
    """Units per second with 1, 2 and 4 workers; the unit sleeps, so that two cores hold four of them."""
    rows = []
    with local_ray(num_cpus=4, num_gpus=0):
        for workers in (1, 2, 4):
            rates = []
            for _ in range(REPEATS):
                with tempfile.TemporaryDirectory() as held:
                    found = run_units(Path(held) / "run", 50 * workers, workers)
                rates.append(found["units_per_s"])
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
    """Units on fake GPUs; every tenth crashes its worker once, every hundredth on all three tries."""

    def fails(number: int) -> int:
        return 3 if number % 100 == 99 else 1 if number % 10 == 9 else 0

    workers = min(num_gpus, int(os.environ.get("DDRAY_SIMULATED_WORKERS", num_gpus)))
    with local_ray(num_cpus=cpu_count(), num_gpus=num_gpus), tempfile.TemporaryDirectory() as held:
        found = run_units(Path(held) / "run", num_units, workers, fails=fails, gpus=1.0)
    assert found["failed"] == num_units // 100
    ideal = num_units * UNIT_S / workers
    return {**found, "fake_gpus": num_gpus, "unit_s": UNIT_S, "ideal_s": ideal, "exactly_once": True}


def faults() -> dict[str, Any]:
    """Run the fault tests of trials, sweeps and benches; return what was injected and what survived."""
    with tempfile.TemporaryDirectory() as held:
        out = Path(held) / "faults.xml"
        chosen = os.environ.get("DDRAY_FAULT_TESTS", "tests/faults")
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *chosen.split(), f"--junitxml={out}"],
            cwd=Path(__file__).resolve().parents[1],
            check=False,
            stdout=sys.stderr,
        )
        return {"rows": fault_rows(out.read_text(encoding="utf-8"))}


def fault_rows(junit: str) -> list[dict[str, Any]]:
    """Return a JUnit file's tests by name, parameters together: how many were injected, how many survived."""
    from xml.etree import ElementTree

    groups: dict[str, list[bool]] = {}
    for case in ElementTree.fromstring(junit).iter("testcase"):
        if case.find("skipped") is None:
            name = case.attrib["name"].partition("[")[0].removeprefix("test_").replace("_", " ")
            survived = case.find("failure") is None and case.find("error") is None
            groups.setdefault(name, []).append(survived)
    return [{"fault": name, "injected": len(held), "survived": sum(held)} for name, held in groups.items()]


PARTS = {"scaling": scaling, "simulation": simulation, "faults": faults}


def main() -> None:
    """Run a part and print its JSON."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.stdout.write(json.dumps(PARTS[sys.argv[1]]()) + "\n")


if __name__ == "__main__":
    main()
