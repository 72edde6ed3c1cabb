"""Signals of a driver, without a cluster."""

from __future__ import annotations

import subprocess
import sys

_DRIVER = """
import os, signal, sys, time
from ddray.cluster.runtime import sigterm_as_sigint
signal.signal(signal.SIGINT, signal.SIG_IGN)
try:
    with sigterm_as_sigint():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)
except KeyboardInterrupt:
    sys.exit(7)
"""


def test_sigterm_ends_a_background_job_whose_shell_ignores_sigint() -> None:
    """A script's `ddray tune &` inherits an ignored SIGINT: SIGTERM did nothing until the watchdog's 30 s."""
    assert subprocess.run([sys.executable, "-c", _DRIVER], timeout=60, check=False).returncode == 7
