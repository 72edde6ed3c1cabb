"""`ddray doctor`: checks what a run needs: versions, devices, data, Ray, a folder all nodes can write."""

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import torch

from ddray.cluster.runtime import python_path, ray_runtime
from ddray.config import Result
from ddray.data import dataset_names, open_dataset
from ddray.errors import DdrayError, InputError, one_line
from ddray.system.files import home
from ddray.system.worker import cpu_count, cuda_failure

_MIN_FREE_GIB = 5.0
_PATIENCE_S = 60.0  # for what may hang: a GPU's driver, a node
_PROBE = """
import json, torch
from ddray.system.gpus import driver_versions, gpu_names
from ddray.system.worker import cuda_failure
gpus = [(name, cuda_failure(f"cuda:{index}")) for index, name in enumerate(gpu_names())]
print(json.dumps({"driver": driver_versions(), "cuda": torch.version.cuda, "gpus": gpus}))
"""


class Check(Result):
    """One check: `ok`, `warning` or `failed`, and what was seen."""

    check: str
    status: str
    detail: str


class DoctorResult(Result):
    """What `ddray doctor` returns; warnings keep `ok` true."""

    ok: bool
    checks: list[Check]


def examine(*, address: str | None, run_dir: Path, data_dir: Path | None) -> DoctorResult:
    """Run every check; all nodes must share `run_dir` and be able to write it.

    Without `address` a local Ray is started; without `data_dir` the datasets' folder is $DDRAY_DATA.
    """
    checks: dict[str, Callable[[], tuple[str, str]]] = {
        "versions": _versions,
        "devices": _devices,
        "compiler": _compiler,
        "data": lambda: _data(data_dir),
        "home": lambda: _writable(home()),
        "run folder": lambda: _writable(run_dir),
        "ray": lambda: _ray(address, run_dir),
    }
    results = []
    for name, check in checks.items():
        try:
            status, detail = check()
        except (DdrayError, OSError) as error:
            status, detail = "failed", " ".join(str(error).split())
        results.append(Check(check=name, status=status, detail=detail))
    return DoctorResult(ok=all(entry.status != "failed" for entry in results), checks=results)


def _versions() -> tuple[str, str]:
    """Compare installed versions with pyproject's requirements."""
    from packaging.requirements import Requirement

    mismatches = []
    for line in requires("ddray") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        installed = version(requirement.name)
        if not requirement.specifier.contains(installed, prereleases=True):
            mismatches.append(f"{requirement.name} {installed} (needs {requirement.specifier})")
    if mismatches:
        return "failed", "; ".join(mismatches)
    libraries = f"torch {torch.__version__}, ray {version('ray')}, optuna {version('optuna')}"
    return "ok", f"Python {sys.version.split()[0]}, {libraries}"


def _devices() -> tuple[str, str]:
    """Let a process of its own run a kernel on every GPU: a driver that hangs must not hang this one."""
    cores = f"{cpu_count()} CPU cores"
    try:
        seen = _probe()
    except subprocess.TimeoutExpired:
        return "failed", f"{cores}; no answer from the GPU's driver within {_PATIENCE_S:g} s"
    if seen is None:
        return "failed", f"{cores}; the process that looks for GPUs crashed"
    driver = "no NVIDIA driver"
    if seen["driver"] is not None:
        driver = "driver {} (up to CUDA {})".format(*seen["driver"])
    facts = f"{driver}, torch {'without CUDA' if seen['cuda'] is None else 'for CUDA ' + seen['cuda']}"
    if not seen["gpus"]:
        status = "ok" if seen["driver"] is None else "warning"
        return status, f"{cores}; no GPU that torch can use: {facts}"
    gpus = ", ".join(name if reason is None else f"{name} ({reason})" for name, reason in seen["gpus"])
    is_broken = any(reason is not None for _, reason in seen["gpus"])
    return "failed" if is_broken else "ok", f"{cores}; {gpus}: {facts}"


def _probe() -> dict[str, Any] | None:
    """Return what `_PROBE` prints, None if it fails; subprocess.TimeoutExpired if it takes too long."""
    environment = {**os.environ, "PYTHONPATH": python_path()}
    process = subprocess.Popen(
        [sys.executable, "-c", _PROBE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    )
    try:
        printed, _ = process.communicate(timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        with suppress(subprocess.TimeoutExpired):  # in the driver's code a process can't be killed
            process.communicate(timeout=1)
        raise
    return json.loads(printed) if process.returncode == 0 else None


def _compiler() -> tuple[str, str]:
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    return ("ok", compiler) if compiler else ("warning", "no C++ compiler: compile=auto stays eager")


def _data(data_dir: Path | None) -> tuple[str, str]:
    """List the datasets that can be opened."""
    available = []
    for name in dataset_names():
        with suppress(InputError):
            open_dataset(name, data_dir=data_dir)
            available.append(name)
    folder = data_dir or os.environ.get("DDRAY_DATA")
    if folder is None:
        return "warning", f"$DDRAY_DATA is not set: only {', '.join(available)} can be found"
    return "ok", f"{folder}: {', '.join(available)}"


def _writable(folder: Path) -> tuple[str, str]:
    """Write, sync, link and remove a file, as the ledger does."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".doctor-{uuid.uuid4().hex}.tmp"
    linked = probe.with_suffix(".link.tmp")
    try:
        with probe.open("wb") as file:
            file.write(b"ddray")
            file.flush()
            os.fsync(file.fileno())
        os.link(probe, linked)
    finally:
        probe.unlink(missing_ok=True)
        linked.unlink(missing_ok=True)
    free = shutil.disk_usage(folder).free / 2**30
    status = "ok" if free >= _MIN_FREE_GIB else "warning"
    return status, f"{folder}: writable, {free:.1f} GiB free"


def _ray(address: str | None, run_dir: Path) -> tuple[str, str]:
    """Start or join Ray; check that files which the nodes write to the run folder appear here."""
    with ray_runtime(address):
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        token = uuid.uuid4().hex
        write = ray.remote(num_cpus=0)(write_token)
        tokens, writes = [run_dir / f".doctor-{token}-{node}.tmp" for node in nodes], []
        for node, path in zip(nodes, tokens, strict=True):
            here = NodeAffinitySchedulingStrategy(node, soft=False)
            writes.append(write.options(scheduling_strategy=here).remote(path))
        ray.get(writes, timeout=_PATIENCE_S)
        written = [path for path in tokens if path.exists()]
        for path in written:
            path.unlink()
        resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
        summary = f"{len(nodes)} nodes, {resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"
        broken, untested = _gpu_nodes()
    if elsewhere := len(nodes) - len(written):
        return "failed", f"{summary}; {run_dir} is not shared: {elsewhere} nodes wrote elsewhere"
    summary = f"{summary}; {run_dir} is shared by all of them"
    if broken:
        return "failed", "; ".join((summary, *broken))
    return ("warning", f"{summary}; busy: {untested} GPUs were not tested") if untested else ("ok", summary)


def _gpu_nodes() -> tuple[list[str], int]:
    """Let a worker on every node with GPUs use one; return what failed, and how many did not answer."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    probe: Any = ray.remote(num_cpus=0, num_gpus=1, max_calls=1)(cuda_failure)
    probes = {}
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["Alive"] and node["Resources"].get("GPU", 0) >= 1:
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            probes[probe.options(scheduling_strategy=here).remote()] = node["NodeManagerHostname"]
    if not probes:
        return [], 0
    ready, waiting = ray.wait(list(probes), num_returns=len(probes), timeout=_PATIENCE_S)
    for reference in waiting:
        ray.cancel(reference)
    failures = []
    for reference in ready:
        try:
            reason = ray.get(reference)
        except ray.exceptions.RayError as error:
            reason = one_line(error, 160)
        if reason is not None:
            failures.append(f"{probes[reference]}: {reason}")
    return failures, len(waiting)


def write_token(path: Path) -> None:
    """Write an empty file; runs on a node."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
