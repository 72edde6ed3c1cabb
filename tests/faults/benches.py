"""A small bench on digits for the fault tests: as a function call, and as a command's arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddray.cluster.executor import bench_executor
from ddray.runs.ledger import Ledger
from ddray.tables.options import BenchOptions
from ddray.tables.run import prepare, run_bench
from ddray.tables.spec import read_spec

NUM_UNITS = 2 * 2 + 2 * 2 + 2  # sets, evaluations, networks of the pool


def write_spec(folder: Path, steps: int = 40) -> Path:
    """Write the table: two methods, two sets each, one architecture; kcenter needs one network per seed."""
    path = folder / "bench.yaml"
    path.write_text(
        "name: faults\ndataset: digits\nipc: 1\nseeds: 2\n"
        "methods:\n"
        "  - {name: kcenter, set: {method.feature_epochs: 1}}\n"
        f"  - {{name: dm, steps: {steps}, set: {{method.batch_real: 8, checkpoint_every: 5}}}}\n"
        "set: {arch: convnet3_w32, compile: 'off'}\n"
        "evaluate: {archs: [convnet3_w32], epochs: 3, seeds: 2}\n"
    )
    return path


def bench(spec: Path, run_dir: Path, *, resume: bool = False, **options: Any) -> dict[str, Any]:
    """Run the bench from this process, on Ray unless the options say otherwise."""
    bench_options = BenchOptions(**options)
    prepared = prepare(read_spec(spec), bench_options)
    return run_bench(prepared, bench_executor(bench_options), run_dir=run_dir, resume=resume).dump()


def local_bench(spec: Path, run_dir: Path, *, resume: bool = False) -> dict[str, Any]:
    """Run the bench in this process, without Ray."""
    return bench(spec, run_dir, resume=resume, executor="local")


def arguments(spec: Path, run_dir: Path, *extra_arguments: str) -> list[str]:
    """Return the arguments of the bench as a command, one unit at a time."""
    return ["bench", str(spec), "--run-dir", str(run_dir), "--max-concurrent", "1", *extra_arguments]


def check_exactly_once(run_dir: Path, before: dict[str, int]) -> None:
    """Check that every unit has one row, and that rows from before the fault were not touched."""
    rows = Ledger(run_dir).rows()
    assert len(rows) == NUM_UNITS
    assert {row.status for row in rows} == {"done"}
    now = {path.stem: path.stat().st_mtime_ns for path in (run_dir / "ledger").glob("*.json")}
    assert before.items() <= now.items()
    events = Ledger(run_dir).events()
    for key in before:
        assert sum(event["event"] == "start" and event["key"] == key for event in events) == 1
    finished = [event["key"] for event in events if event["event"] == "finish"]
    assert len(finished) == len(set(finished)), "a unit was published twice"
