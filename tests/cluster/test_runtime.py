"""Signals and folders of a driver, without a cluster."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
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


@pytest.mark.parametrize("prefix", ["", "ray://"])
def test_an_address_where_nobody_listens_is_refused_at_once(
    prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray itself tries for minutes."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # by another test
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"{prefix}127.0.0.1:{closed.getsockname()[1]}"
        start = time.monotonic()
        expected = f"--address must be a running Ray cluster, got '{address}': .*refused; `ray status`"
        with pytest.raises(InputError, match=expected), runtime.ray_runtime(address):
            pass
    assert time.monotonic() - start < 10


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


class TestCapacity:
    """How many workers fit two nodes, of which one has two GPUs."""

    @pytest.fixture(autouse=True)
    def _two_nodes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        nodes = [
            {"NodeID": "a", "Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}},
            {"NodeID": "b", "Alive": True, "Resources": {"CPU": 4.0}},
            {"NodeID": "c", "Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
        ]
        monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(nodes=lambda: nodes))

    @pytest.mark.parametrize(
        ("gpus", "cpus", "workers"),
        [(0, 1, 12), (1, 1, 2), (0.5, 1, 4), (0.6, 1, 2), (0.1, 0.1, 20), (0.1, 1, 8), (0, 0.1, 120)],
    )
    def test_a_share_is_of_one_gpu(self, gpus: float, cpus: float, workers: int) -> None:
        assert runtime.check_capacity(cpus, gpus) == workers

    def test_nodes_that_are_left_out_hold_none(self) -> None:
        assert runtime.check_capacity(1, 0, without={"a"}) == 4
        with pytest.raises(InputError, match="--gpus-per-unit must be <= 0"):
            runtime.check_capacity(1, 1, per="unit", without={"a"})

    def test_all_nodes_together(self) -> None:
        assert (runtime.total_resource("GPU"), runtime.total_resource("CPU")) == (2, 12)
