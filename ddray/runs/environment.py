"""What a run was computed with: versions, hardware, commit."""

import contextlib
import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ddray.system.gpus import gpu_names

_PACKAGES = ("ddray", "torch", "torchvision", "numpy", "kornia", "scikit-learn", "ray", "optuna")


def environment() -> dict[str, Any]:
    """Return what a reader needs to judge a run: versions, hardware, commit, command, date (UTC)."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpu_count": os.cpu_count(),
        "devices": gpu_names(),
        "git_commit": git_commit(),
        "git_dirty": bool(git_commit() and _git("status", "--porcelain", "--untracked-files=no")),
        "command": sys.argv,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str]:
    """Return the versions of ddray, Python and the libraries that affect the results."""
    installed = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


@functools.cache
def git_commit() -> str | None:
    """Return the commit of ddray's own checkout, or None for an installed wheel."""
    return _git("rev-parse", "HEAD")


def _git(*arguments: str) -> str | None:
    """Return what git prints in ddray's own checkout; None where there is none, or it prints nothing."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    except OSError:  # a checkout on a machine without git
        return None
    return done.stdout.strip() or None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
