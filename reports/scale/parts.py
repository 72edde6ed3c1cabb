"""The parts: each records a figure as soon as it is measured, and measures none that is recorded."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from reports.scale.lab import Lab, Ran, ddray, digest, made_arrays, made_folder, shard_rows, typed

if TYPE_CHECKING:
    from ddray.jobs.plan import Plan

GB: Final = 10**9
_SMALL: Final = "arch=convnet3_w32"
_DSDM: Final = ("--set", "method.pool.num_models=2", "--set", "method.pool.epochs=1")


def _distilled(lab: Lab, name: str, arguments: Sequence[object]) -> Ran:
    """Run `ddray distill` in a fresh run folder of this name."""
    run_dir = lab.folder / "runs" / name
    shutil.rmtree(run_dir, ignore_errors=True)
    return ddray(lab, "distill", *arguments, "--set", "compile=off", "--run-dir", run_dir)


def _of_shards(ran: Ran) -> dict[str, Any]:
    """Return the figures of a run in shards."""
    results = [row.result for row in shard_rows(Path(ran.out["run_dir"]))]
    return {
        "wall_s": ran.seconds,
        "largest_shard_s": max(result["seconds"] for result in results),
        "peak_memory_bytes": max(result["peak_memory_bytes"] for result in results),
        "sha256": digest(ran.out["artifact"]),
    }


def _of_one(ran: Ran) -> dict[str, Any]:
    """Return the figures of a run without shards."""
    return {
        "wall_s": ran.seconds,
        "largest_shard_s": ran.out["seconds"],
        "peak_memory_bytes": ran.out["peak_memory_bytes"],
        "sha256": digest(ran.out["artifact"]),
    }


def two_shards(lab: Lab) -> None:
    """Measure DataDAM and DSDM on CIFAR-10 (tiny: made data): no shards against two, on two cores."""
    dataset: object = made_arrays(lab, 10, 30, 32) if lab.is_tiny else "cifar10"
    steps, batch = lab.size(40, 2), lab.size(64, 8)
    for method, pool in (("datadam", ()), ("dsdm", _DSDM)):
        base = (
            *("--method", method, "--dataset", dataset, "--ipc", 10, "--steps", steps),
            *("--set", f"method.batch_real={batch}", *pool),
        )
        for shards in (1, 2):
            if ("two_shards", f"{method} {shards}") in lab.measured():
                continue
            arguments = (*base, *(("--shards", shards) if shards > 1 else ()))
            read = _of_shards if shards > 1 else _of_one
            if pool:  # the pool is trained once, before
                _distilled(lab, "pool", (*base, "--steps", 0))
            runs = [read(_distilled(lab, f"{method}{shards}", arguments)) for _ in range(lab.repeats)]
            lab.record("two_shards", f"{method} {shards}", typed(("distill", *arguments)), runs)
        figures = [lab.measured()["two_shards", f"{method} {shards}"] for shards in (1, 2)]
        sums = {run["sha256"] for figure in figures for run in figure["runs"]}
        if len(sums) > 1:
            raise SystemExit(f"{method}: two shards give other bytes than none")


def many_classes(lab: Lab) -> None:
    """Measure 1, 2, 4 and 8 shards of 1,000 classes, one at a time; `base` is a process with hardly any."""
    classes = lab.size(1000, 16)
    dataset = made_arrays(lab, classes, lab.size(100, 12), 32)
    small = made_arrays(lab, 2, 20, 32)
    steps = lab.size(10, 2)
    settings = (
        *("--method", "dm", "--ipc", 10, "--steps", steps, "--set", "method.batch_real=16"),
        *("--set", _SMALL, "--max-concurrent", 1),
    )
    cases: Mapping[str, tuple[object, ...]] = {
        "base": ("--dataset", small, *settings, "--shards", 1),
        **{f"{num}": ("--dataset", dataset, *settings, "--shards", num) for num in (1, 2, 4, 8)},
    }
    for figure, arguments in cases.items():
        if ("many_classes", figure) not in lab.measured():
            names = (f"many{figure}-{index}" for index in range(lab.repeats))
            runs = [_of_shards(_distilled(lab, name, arguments)) for name in names]
            lab.record("many_classes", figure, typed(("distill", *arguments)), runs)


def killed_node(lab: Lab) -> None:
    """Run 64 shards on 4 nodes with fake GPUs, one of which is killed; the set must be as without."""
    if ("killed_node", "64") in lab.measured():
        return
    from ddray.runs.ledger import Ledger

    num = lab.size(64, 8)
    dataset = made_arrays(lab, num, 40, 32)
    settings = ("--method", "datadam", "--dataset", dataset, "--ipc", 1, "--steps", lab.size(30, 10))
    whole = _distilled(lab, "whole", (*settings, "--set", _SMALL))
    run_dir = lab.folder / "runs" / "killed"
    shutil.rmtree(run_dir, ignore_errors=True)

    def is_due() -> bool:
        return (run_dir / "ledger").is_dir() and len(Ledger(run_dir).rows()) >= num // 8

    begin = time.perf_counter()
    artifact = _on_fake_gpus(lab.home, settings, run_dir, num, is_due)
    seconds = time.perf_counter() - begin
    rows = shard_rows(run_dir)
    if len(rows) != num or digest(artifact) != digest(whole.out["artifact"]):
        raise SystemExit(f"{len(rows)} of {num} shards, or other bytes than without a killed node")
    tries = [event["event"] for event in Ledger(run_dir).events()]
    run = {"wall_s": seconds, "shards": len(rows), "starts": tries.count("start"), "same_bytes": True}
    lab.record("killed_node", "64", f"python -m reports.scale killed_node: {typed(settings)}", [run])


def _plan(settings: Sequence[object]) -> Plan:
    """Return the plan of options as they are typed."""
    from ddray.jobs.options import PlanOptions
    from ddray.jobs.plan import plan_of

    names = [str(name).removeprefix("--") for name in settings[::2]]
    options = dict(zip(names, map(str, settings[1::2]), strict=True))
    return plan_of(PlanOptions.pick({**options, "sets": ("compile=off", _SMALL)}))


def _on_fake_gpus(
    home: Path, settings: Sequence[object], run_dir: Path, num_shards: int, is_due: Callable[[], bool]
) -> str:
    """Distil on a cluster of 4 nodes, with workers that reserve a fake GPU; kill a node when it is due."""
    from ray.cluster_utils import Cluster

    from ddray.cluster.executor import RayExecutor
    from ddray.cluster.runtime import ray_runtime
    from ddray.jobs import shards
    from ddray.jobs.options import DistillOptions, ShardOptions

    os.environ |= {"DDRAY_HOME": str(home), "OMP_NUM_THREADS": "1"}
    workers = int(os.environ.get("DDRAY_SIMULATED_WORKERS", "8"))
    plan = _plan(settings)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0})
    nodes = [cluster.add_node(num_cpus=1, num_gpus=max(1, workers // 4)) for _ in range(4)]

    def kill() -> None:
        while not is_due():
            time.sleep(0.1)
        cluster.remove_node(nodes[0], allow_graceful=False)

    how, cut = DistillOptions(run_dir=run_dir), ShardOptions(shards=num_shards)
    executor = RayExecutor(0.01, 1.0, workers, cluster.address, "shard")
    try:
        with ray_runtime(cluster.address):
            threading.Thread(target=kill, daemon=True).start()
            return shards.distill_shards(plan, how, cut, executor, device="cpu", more_steps=False).artifact
    finally:
        cluster.shutdown()


def evaluation(lab: Lab) -> None:
    """Measure four networks one after another and two at a time."""
    dataset = made_arrays(lab, 10, lab.size(5000, 30), 32)
    epochs = lab.size(120, 2)
    target = _distilled(lab, "random", ("--method", "random", "--dataset", dataset, "--ipc", 10))
    base = ("evaluate", target.out["artifact"], "--seeds", 4, "--epochs", epochs)
    for workers in (1, 2):
        if ("evaluation", f"{workers}") in lab.measured():
            continue
        arguments = (*base, *(("--max-concurrent", workers) if workers > 1 else ()))
        runs = []
        for index in range(lab.repeats):
            folder = lab.folder / "runs" / f"scores{workers}-{index}"
            shutil.rmtree(folder, ignore_errors=True)
            ran = ddray(lab, *arguments, *(("--run-dir", folder) if workers > 1 else ()))
            runs.append({"wall_s": ran.seconds, "per_seed": ran.out["results"][0]["per_seed"]})
        lab.record("evaluation", f"{workers}", typed(arguments), runs)


def data_on_disk(lab: Lab) -> None:
    """Measure decoding into a map of 2 GB against torchvision's loader, and the memory of a run from it."""
    size = lab.size(224, 64)
    per_class = lab.size(2 * GB, GB // 1000) // (10 * 3 * size * size)
    folder = made_folder(lab, 10, per_class, size)
    if ("data_on_disk", "ImageFolder") not in lab.measured():
        runs = [_image_folder(folder / "train") for _ in range(lab.repeats)]
        lab.record("data_on_disk", "ImageFolder", "DataLoader(ImageFolder(...), num_workers=2)", runs)
    if ("data_on_disk", "decode") not in lab.measured():
        runs = [_packed(lab, folder / "train") for _ in range(lab.repeats)]
        lab.record("data_on_disk", "decode", "packed(image_source(...)), two threads, a new map", runs)
    if ("data_on_disk", "distil") not in lab.measured():
        arguments = (
            *("--method", "dm", "--dataset", folder, "--ipc", 1, "--steps", lab.size(20, 2)),
            *("--set", "arch=convnet3_w8", "--set", "method.batch_real=16"),
        )
        _distilled(lab, "packed", arguments)  # decodes
        rans = [_distilled(lab, "packed", arguments) for _ in range(lab.repeats)]
        runs = [{"wall_s": ran.seconds, "anonymous_bytes": ran.anonymous_bytes} for ran in rans]
        lab.record("data_on_disk", "distil", typed(("distill", *arguments)), runs)


def _packed(lab: Lab, folder: Path) -> dict[str, Any]:
    """Return the rate of decoding a folder into a map by all cores, with an empty home."""
    from ddray.data.folders import image_source
    from ddray.data.packing import packed
    from ddray.data.pictures import Geometry

    home, size = lab.folder / "empty-home", lab.size(224, 64)
    shutil.rmtree(home, ignore_errors=True)
    before = os.environ.get("DDRAY_HOME")
    os.environ["DDRAY_HOME"] = str(home)
    labelled = [(path, int(path.parent.name[-2:])) for path in sorted(folder.rglob("*.jpg"))]
    begin = time.perf_counter()
    split, _ = packed(image_source(labelled), "decode", partial(Geometry, (3, size, size), resize=True))
    seconds = time.perf_counter() - begin
    num = len(split.images)
    shutil.rmtree(home)
    os.environ |= {} if before is None else {"DDRAY_HOME": before}
    return {"images_per_s": num / seconds, "images": num, "wall_s": seconds}


def _image_folder(folder: Path) -> dict[str, Any]:
    """Return the rate of torchvision's loader: two processes that decode to uint8 tensors, in batches."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import PILToTensor

    images: Any = ImageFolder(folder, transform=PILToTensor())
    loader = DataLoader(images, batch_size=64, num_workers=2)
    begin = time.perf_counter()
    num = sum(len(labels) for _, labels in loader)
    seconds = time.perf_counter() - begin
    return {"images_per_s": num / seconds, "images": num, "wall_s": seconds}


PARTS: Final[Mapping[str, Callable[[Lab], None]]] = {
    "two_shards": two_shards,
    "many_classes": many_classes,
    "killed_node": killed_node,
    "evaluation": evaluation,
    "data_on_disk": data_on_disk,
}
