"""Commands that are started, watched and killed; light, because workers import the tests' modules."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddray.runs.ledger import Ledger

DDRAY = (sys.executable, "-m", "ddray")


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
