"""Starting and leaving Ray: a local instance or an existing cluster, quiet, with capacity checked first."""

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final

from ddray.errors import DdrayError, InputError
from ddray.system.progress import phase
from ddray.system.worker import cpu_count

log = logging.getLogger(__name__)

# Set before Ray is imported: docs/ray.md, 8 (folder), 10 (GPUs of num_gpus=0 workers), 14 (the rest).
_ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_prestart_worker_first_driver": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}

_GRACE_S = 30.0
_ANSWER_S: Final = 10.0  # until a cluster's head node must have accepted a connection
_MAX_SOCKET: Final = 103 if sys.platform == "darwin" else 107  # bytes of a Unix socket's path
_SOCKET: Final = "/ray/session_2026-01-01_00-00-00_000000_{pid}/sockets/plasma_store"


def check_temporary_folder() -> None:
    """Refuse a folder for temporary files in which a local Ray can't open its sockets: InputError."""
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return
    on_linux = sys.platform.startswith("linux")
    name = "TMPDIR" if on_linux and "RAY_TMPDIR" not in os.environ else "RAY_TMPDIR"  # as Ray looks
    folder, longest = os.environ.get(name, "/tmp"), _MAX_SOCKET - len(_SOCKET.format(pid=os.getpid()))
    if len(os.fsencode(folder)) > longest:
        raise InputError(
            f"{name} must have at most {longest} bytes (Ray opens sockets below it), got {folder}; set "
            "RAY_TMPDIR to a folder with a short name, such as /tmp"
        )


@contextmanager
def ray_runtime(address: str | None) -> Iterator[None]:
    """Run a block with Ray started (or connected to), and leave it afterwards.

    `address` is an existing cluster's (`auto`, `host:port`, `ray://...`); None starts a local instance.

    Raises:
        InputError: no cluster answers at `address`.
        DdrayError: a local instance could not be started.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    settings: dict[str, Any] = {
        "logging_level": logging.ERROR,
        "log_to_driver": False,
        "namespace": "ddray",
        "runtime_env": {"env_vars": {**_ENVIRONMENT, **_worker_environment()}},
    }
    if address is None:
        check_temporary_folder()
        # "local" even if a cluster runs on this machine: one is joined only on request.
        settings |= {"include_dashboard": False, "num_cpus": cpu_count()}
    else:
        _check_reachable(address)
    try:
        with phase("starting Ray" if address is None else f"connecting to Ray at {address}"):
            ray.init(address="local" if address is None else address, **settings)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        if address is not None:
            raise InputError(f"--address must be a running Ray cluster, got {address!r}: {reason}") from error
        raise DdrayError(f"Ray could not be started here: {reason}") from error
    try:
        with sigterm_as_sigint():  # again: ray.init installs its own handler
            yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Refuse `host:port` where nobody listens, which Ray would try for minutes: InputError."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():  # `auto`, or what Ray itself refuses at once
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"--address must be a running Ray cluster, got {address!r}: {error}; `ray status` on its "
            "head node tells whether it runs"
        ) from error


def _worker_environment() -> dict[str, str]:
    """Return the environment variables that workers need: where data and the package are."""
    variables = {name: os.environ[name] for name in ("DDRAY_HOME", "DDRAY_DATA") if name in os.environ}
    return {**variables, "PYTHONPATH": python_path()}


def python_path() -> str:
    """Return a PYTHONPATH for other processes: they too must find a package that is run from a folder."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return os.pathsep.join(path for path in paths if path)


def total_resource(kind: str) -> float:
    """Return how much of a resource (CPU, GPU) all nodes have together."""
    import ray

    return sum(node["Resources"].get(kind, 0.0) for node in ray.nodes() if node["Alive"])  # type: ignore[no-untyped-call]


def check_capacity(cpus: float, gpus: float, *, per: str = "trial", without: Collection[str] = ()) -> int:
    """Return how many workers with `cpus` cores and `gpus` (at most 1) GPUs fit the cluster at once.

    Checked because a task that never fits hangs silently (docs/ray.md, 9). `per` is what the command's
    options call a worker: `--cpus-per-<per>`. Nodes `without` (their ids) are left out.

    Raises:
        InputError: not even one fits.
    """
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    nodes = [node["Resources"] for node in alive if node["NodeID"] not in without]
    largest = {kind: max((node.get(kind, 0.0) for node in nodes), default=0.0) for kind in ("CPU", "GPU")}
    for option, per_worker, kind in (("cpus", cpus, "CPU"), ("gpus", gpus, "GPU")):
        if per_worker > largest[kind]:
            raise InputError(
                f"--{option}-per-{per} must be <= {largest[kind]:g} (of the largest node), got {per_worker:g}"
            )
    # A worker's share is of one GPU: of two, three workers with 0.6 each fit no more than two.
    per_gpu = int(1 / gpus + 1e-9) if gpus > 0 else 0
    fits = sum(
        min(int(node.get("CPU", 0.0) / cpus + 1e-9), int(node.get("GPU", 0.0)) * per_gpu or 2**31)
        for node in nodes
        if gpus == 0 or node.get("GPU", 0.0) >= 1
    )
    if fits == 0:
        raise InputError(f"no node has {cpus:g} CPUs and {gpus:g} GPUs together; ask for less per {per}")
    return fits


@contextmanager
def sigterm_as_sigint() -> Iterator[None]:
    """Handle SIGTERM as SIGINT, which ends Tune cleanly (docs/ray.md, 1). Only in the main thread.

    A signal to the whole process group (`timeout`, `scancel`) also kills Ray's own processes, which the
    driver then waits for: after a grace period it exits without them. The ledger holds everything that had
    finished.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def forward(signal_number: int, frame: FrameType | None) -> None:
        watchdog = threading.Timer(_GRACE_S, _end_now)
        watchdog.daemon = True
        watchdog.start()
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a background job of a script
            signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGTERM, forward)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end_now() -> None:
    """End the process without waiting for Ray."""
    text = "error: interrupted, and Ray did not stop in time; run again with --resume to continue\n"
    sys.stderr.write(text)
    sys.stderr.flush()
    os._exit(1)
