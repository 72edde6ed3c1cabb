"""Runs the parts, each in a process that is killed at its limit. Standard library only."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from reports.gpu import record
from reports.gpu.plan import Part

ROOT = Path(__file__).resolve().parents[2]
_PROBE_SECONDS = 120
_PROBE = """
import json, platform, torch
there = torch.cuda.is_available()
facts = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
if there:
    properties = torch.cuda.get_device_properties(0)
    torch.ones(1, device="cuda").sum().item()
    facts["device"] = properties.name
    facts["memory_gib"] = round(properties.total_memory / 2**30, 1)
    facts["num_devices"] = torch.cuda.device_count()
print(json.dumps(facts))
"""


class NoGpuError(Exception):
    """There is no GPU to measure, and why."""


@dataclass(frozen=True)
class Run:
    """How parts are run.

    Attributes:
        command: starts one, with its name appended.
        lines: file of the JSON lines.
        environment: of the processes.
        ends_at: of `time.monotonic`, when the last part must have ended.
    """

    command: Sequence[str]
    lines: Path
    environment: Mapping[str, str]
    ends_at: float

    def part(self, part: Part) -> None:
        """Run one part to its end or its limit, and append the line of its end."""
        begin = time.monotonic()
        left = self.ends_at - begin
        if left < part.seconds / 2:
            reason = f"{max(0, left):.0f} s were left, it may take {part.seconds}"
            self._ended(part, "not run", reason, begin)
            return
        limit = min(part.seconds, left)
        with tempfile.TemporaryFile() as log:
            code = _code_of([*self.command, part.name], limit, log, self.environment)
            log.seek(0)
            output = log.read().decode(errors="replace").strip().splitlines()
        if code is None:
            self._ended(part, "timeout", f"killed after {limit:.0f} s", begin)
        elif code:
            self._ended(part, "failed", (output or [f"exit code {code}"])[-1][:300], begin)
        else:
            self._ended(part, "ok", "", begin)

    def _ended(self, part: Part, status: str, reason: str, begin: float) -> None:
        seconds = round(time.monotonic() - begin, 1)
        record.append(self.lines, part=part.name, status=status, reason=reason, seconds=seconds, date=_now())


def _code_of(command: Sequence[str], limit: float, log: Any, environment: Mapping[str, str]) -> int | None:
    """Return a command's exit code, None if it was killed at the limit, with all that it had started."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, process_group=0
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def probe(environment: Mapping[str, str], *, is_dry_run: bool = False) -> dict[str, Any]:
    """Return device, versions, driver and commit, as a process of its own sees them.

    Raises:
        NoGpuError: torch sees no GPU, or none that works, or there is no torch.
    """
    command = [sys.executable, "-c", _PROBE]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=_PROBE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise NoGpuError(f"the GPU did not answer within {_PROBE_SECONDS} s") from None
    if done.returncode:
        raise NoGpuError((done.stderr.strip().splitlines() or ["torch does not start"])[-1])
    facts: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if is_dry_run:
        facts |= {"device": "cpu", "is_dry_run": True}
    elif "device" not in facts:
        raise NoGpuError(f"torch {facts['torch']} sees no CUDA device")
    driver = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    commit = _first_line("git", "-C", str(ROOT), "rev-parse", "HEAD")
    return {**facts, "driver": driver, "commit": commit, "date": _now()}


def _first_line(*command: str) -> str | None:
    """Return the first line that a command prints; None if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if lines and done.returncode == 0 else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
