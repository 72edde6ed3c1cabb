"""A small search on digits for the fault tests: as a function call, and as a command that can be killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddray.cluster.tune import tune
from ddray.data import open_dataset
from ddray.jobs.plan import resolve
from ddray.runs.ledger import Ledger, Row
from ddray.tuning.options import TuneOptions

TINY = {"steps": 9, "checkpoint_every": 3, "evaluate": {"epochs": 2, "seeds": 1}}


def search(
    run_dir: Path,
    space: str,
    *,
    method: str = "datadam",
    resume: bool = False,
    layers: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Run a search in this process; `space` is the space file's text."""
    path = run_dir.parent / f"{run_dir.name}.yaml"
    path.write_text(space)
    settings = {"batch_real": 4} if method != "random" else {}
    plan = resolve(method, open_dataset("digits"), ipc=1, layers=[layers or {**TINY, "method": settings}])
    return tune(
        plan,
        TuneOptions(space=path, final_sets=1, **options),
        run_dir=run_dir,
        resume=resume,
    ).dump()


def command(run_dir: Path, *extra_arguments: str, steps: int = 60) -> list[str]:
    """Return the command line of a search with 4 random trials, slow enough to be killed halfway."""
    return [
        *(sys.executable, "-m", "ddray", "tune", "--method", "datadam", "--ipc", "1", "--strategy", "random"),
        *(
            "--num-samples",
            "4",
            "--steps",
            str(steps),
            "--set",
            "evaluate.epochs=2",
            "--set",
            "evaluate.seeds=1",
        ),
        *("--set", "method.batch_real=8", "--set", "checkpoint_every=5", "--max-concurrent", "1"),
        *("--final-sets", "1", "--run-dir", str(run_dir), "--json", *extra_arguments),
    ]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """Start a command in a session of its own."""
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(arguments: list[str]) -> dict[str, Any]:
    """Run a command to its end and return its JSON."""
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout))


def trials(run_dir: Path) -> list[Row]:
    """Return the trial rows by number."""
    return sorted(Ledger(run_dir).rows("trial"), key=lambda row: int(row.spec["number"]))


def stamps(run_dir: Path) -> dict[str, int]:
    """Return key -> modification time of every row."""
    return {path.stem: path.stat().st_mtime_ns for path in (run_dir / "ledger").glob("*.json")}


def count(run_dir: Path, event: str, key: str) -> int:
    """Return how often an event was logged for a key."""
    return sum(line["event"] == event and line["key"] == key for line in Ledger(run_dir).events())


def wait_for(
    condition: Callable[[], bool], process: subprocess.Popen[str] | None, seconds: float = 240
) -> None:
    """Wait until a condition holds; fail if the process ends first or time runs out."""
    end = time.monotonic() + seconds
    while not condition():
        if process is not None and process.poll() is not None:
            raise AssertionError(
                f"ended first with exit {process.returncode}: {process.communicate()[1][-1500:]}"
            )
        assert time.monotonic() < end, "not seen in time"
        time.sleep(0.1)


def ray_workers(name: str) -> list[int]:
    """Return the process ids of this session's Ray workers whose title contains `name`."""
    own_pid = os.getpid()
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if title.startswith("ray::") and name in title and own_pid in _ancestors(int(folder.name)):
            pids.append(int(folder.name))
    return pids


def _ancestors(pid: int) -> list[int]:
    ancestors = []
    while pid > 1:
        try:
            pid = int((Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            break
        ancestors.append(pid)
    return ancestors
