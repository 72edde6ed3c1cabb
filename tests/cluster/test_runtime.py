"""Signals and folders of a driver, without a cluster."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from ddray.cluster import runtime
from ddray.cluster.executor import RayExecutor
from ddray.errors import InputError

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


class TestTemporaryFolder:
    @pytest.fixture(autouse=True)
    def _no_ray_runs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
        monkeypatch.delenv("RAY_TMPDIR", raising=False)
        monkeypatch.setattr(sys, "platform", "linux")

    @pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
    def test_a_folder_that_is_too_long_for_a_socket_is_refused(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        longest = 107 - len(runtime._SOCKET.format(pid=runtime.os.getpid()))
        monkeypatch.setenv(name, "/" + "x" * (longest - 1))
        RayExecutor(1, 0)

        monkeypatch.setenv(name, "/" + "x" * longest)
        with pytest.raises(InputError, match=f"{name} must have at most {longest} bytes .* set RAY_TMPDIR"):
            RayExecutor(1, 0)
        RayExecutor(1, 0, address="auto")  # of the cluster's nodes

    def test_rays_own_variable_comes_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TMPDIR", "/" + "x" * 100)
        with pytest.raises(InputError, match="TMPDIR must have at most"):
            RayExecutor(1, 0)
        monkeypatch.setenv("RAY_TMPDIR", "/tmp")
        assert RayExecutor(1, 0).address is None
