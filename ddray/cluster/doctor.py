"""`ddray doctor`: checks what a run needs: versions, devices, data, Ray, a folder all nodes can write."""

import os
import shutil
import sys
import uuid
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import requires, version
from pathlib import Path

import torch

from ddray.cluster.runtime import ray_runtime
from ddray.config import Result
from ddray.data import dataset_names, open_dataset
from ddray.errors import DdrayError, InputError
from ddray.runs.environment import devices
from ddray.system.files import home
from ddray.system.worker import cpu_count

_MIN_FREE_GIB = 5.0


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
    return "ok", f"{cpu_count()} CPU cores; " + (", ".join(devices()) or "no GPU that torch can use")


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
        ray.get(writes, timeout=60)
        written = [path for path in tokens if path.exists()]
        for path in written:
            path.unlink()
        resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
        summary = f"{len(nodes)} nodes, {resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"
    if elsewhere := len(nodes) - len(written):
        return "failed", f"{summary}; {run_dir} is not shared: {elsewhere} nodes wrote elsewhere"
    return "ok", f"{summary}; {run_dir} is shared by all of them"


def write_token(path: Path) -> None:
    """Write an empty file; runs on a node."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
