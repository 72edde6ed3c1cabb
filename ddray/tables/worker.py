"""What a worker does with a bench unit: train a pool entry, distil or score a set; publish its row."""

import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Final

from ddray.artifact.distilled_set import DistilledSet, TrainSet
from ddray.data import Dataset, PixelSpace, Split, SplitName, open_dataset
from ddray.data.pixels import pixel_space
from ddray.distillation.loop import Distillation, run_distillation
from ddray.distillation.method import DistillContext
from ddray.distillation.snapshots import Snapshots, snapshot_file, snapshot_steps
from ddray.errors import DivergedError, InputError
from ddray.evaluation.options import EvaluateOptions
from ddray.evaluation.subsets import limited
from ddray.jobs import score as scoring
from ddray.jobs.context import make_context, make_distiller
from ddray.jobs.plan import Plan, RunConfig
from ddray.jobs.shard_worker import (
    Prepared,
    distil_shard,
    has_its_whitening,
    has_shard,
    joined,
    prepared_from,
    shard_context,
)
from ddray.methods import get_method
from ddray.pool.files import DamagedEntryError, PoolFiles
from ddray.pool.spec import ModelPool, PoolEntry, PoolSpec
from ddray.runs.ledger import Ledger, Row
from ddray.system.files import file_sha256, home, write_text
from ddray.system.memory import peak_bytes, reset_peak
from ddray.system.worker import worker_device
from ddray.tables.units import BenchUnit, shards_of


@dataclass(frozen=True)
class BenchJob:
    """What every unit of a bench shares."""

    run_dir: Path  # absolute path of the run
    epoch: int  # run epoch to publish under
    data_dir: Path | None  # where datasets are; None is $DDRAY_DATA
    device: str  # `cpu` or `cuda`


@dataclass(frozen=True)
class Needs:
    """Returned by a unit that lacks pool networks: run it again once these are trained."""

    specs: tuple[PoolSpec, ...]


@dataclass(frozen=True)
class Sharded:
    """Returned by a distillation whose shards are not all done: run it again once they are."""

    prepared: Any  # `Prepared`, or what `WorkerPool.share` returned for it
    units: tuple[BenchUnit, ...]  # the shards without a sound set


@dataclass(frozen=True)
class Damaged:
    """Returned by an evaluation whose set is missing, or not the one in the ledger: distil it again."""


class _MissingError(Exception):
    """Raised inside a unit that can't run yet; `missing` is what `run_unit` returns for it."""

    def __init__(self, missing: Needs | Sharded | Damaged) -> None:
        super().__init__(missing)
        self.missing = missing


@dataclass
class StoredPool:
    """A pool that trains nothing: it returns existing entries, and raises naming the missing ones."""

    pool: ModelPool  # where the entries come from
    used: list[str] = field(default_factory=list)  # keys of the returned entries, in order

    def get(self, specs: Sequence[PoolSpec]) -> list[PoolEntry]:
        """Return the entries of `specs`, in order."""
        missing = [spec for spec in specs if not has_entry(spec)]
        if missing:
            raise _MissingError(Needs(tuple(missing)))
        self.used += [spec.key for spec in specs]
        return self.pool.get(specs)


def has_entry(spec: PoolSpec) -> bool:
    """Return whether this machine's pool holds a sound entry."""
    try:
        return PoolFiles(home() / "pool").read(spec.key) is not None
    except DamagedEntryError:  # the next `get` repairs it
        return False


def run_unit(job: BenchJob, unit: BenchUnit, *shared: Prepared) -> Needs | Sharded | Damaged | None:
    """Run a unit and publish its row (if it diverges, a failed one); return what it lacks, or None.

    `shared` is for shards, one for all of a set.

    Raises:
        Exception: a crash, or no memory or disk space; the caller retries.
    """
    ledger = Ledger(job.run_dir)
    if ledger.row(unit.key) is not None:
        return None
    reason = {"reason": f"its {unit.waited_for} are there"} if unit.waited_for else {}
    ledger.begin(unit.identity, epoch=job.epoch, title=unit.title, **reason)
    begin, device = time.perf_counter(), worker_device(job.device)
    reset_peak(device)
    try:
        result = _TASKS[unit.kind](job, unit, *shared)
        result.setdefault("peak_memory_bytes", peak_bytes(device))  # a distillation counts its own
    except _MissingError as error:
        return error.missing
    except DivergedError as error:
        publish(ledger, job, unit, {}, time.perf_counter() - begin, error=str(error))
        return None
    try:
        publish(ledger, job, unit, result, time.perf_counter() - begin)
    finally:
        _draft(job, unit).unlink(missing_ok=True)
    _checkpoint(job, unit).unlink(missing_ok=True)
    if ledger.row(unit.key) is not None:  # another process's, if this one was late
        shutil.rmtree(_snapshots(job, unit), ignore_errors=True)
    return None


def publish(
    ledger: Ledger,
    job: BenchJob,
    unit: BenchUnit,
    result: Mapping[str, Any],
    wall_s: float,
    *,
    error: str | None = None,
) -> None:
    """Publish a unit's row: done, with its set in place; or failed with the reason."""
    move: Callable[[], object] | None = None
    if error is not None:
        row = Row.failed(unit.identity, error, result=result, wall_s=wall_s)
    else:
        row = Row.done(unit.identity, result, wall_s)
        if unit.kind == "distill":
            move = partial(_place, job, unit)
    ledger.publish(unit.identity, row, epoch=job.epoch, move_artifact=move)


def artifact_name(key: str, step: int | None = None) -> str:
    """Return the path, below the run's folder, of a distilled set or of the one that was kept at a step."""
    if step is None:
        return f"artifacts/{key}.pt"
    return str(snapshot_file(Path(f"artifacts/{key}-steps"), step))


def _place(job: BenchJob, unit: BenchUnit) -> None:
    """Move a distillation's set, and those along its steps, to their final paths."""
    path, snapshots = job.run_dir / artifact_name(unit.key), _snapshots(job, unit)
    if snapshots.is_dir():
        target = path.with_name(f"{unit.key}-steps")
        shutil.rmtree(target, ignore_errors=True)  # of a set that was damaged
        snapshots.replace(target)
    _draft(job, unit).replace(path)


def _snapshots(job: BenchJob, unit: BenchUnit) -> Path:
    """Return the folder where a distillation keeps the sets along its steps until its row is published."""
    return job.run_dir / "checkpoints" / f"{unit.key}-steps"


def _checkpoint(job: BenchJob, unit: BenchUnit) -> Path:
    """Return where a distillation writes its checkpoints; methods without steps write none."""
    return job.run_dir / "checkpoints" / f"{unit.key}.pt"


def _draft(job: BenchJob, unit: BenchUnit) -> Path:
    """Return where this process writes a set before its row is published: late workers replace nothing."""
    path = job.run_dir / artifact_name(unit.key)
    return path.with_name(f".{path.name}.{job.epoch}-{socket.gethostname()}-{os.getpid()}.tmp")


def is_sound(run_dir: Path, row: Row) -> bool:
    """Return whether the sets of a distillation's row are in its run, unchanged, with their whitening."""
    digests = {artifact_name(row.key): row.result["sha256"]}
    for step, digest in row.result.get("snapshots", {}).items():
        digests[artifact_name(row.key, int(step))] = digest
    files = ((run_dir / name, digest) for name, digest in digests.items())
    return all(
        path.is_file() and file_sha256(path) == digest and has_its_whitening(path, row.spec)
        for path, digest in files
    )


# Opened, carved and fitted once per worker: ZCA's eigenvectors take seconds.
@lru_cache(maxsize=2)
def _opened(name: str, data_dir: Path | None) -> Dataset:
    return open_dataset(name, data_dir=data_dir)


@lru_cache(maxsize=2)
def _split(name: str, data_dir: Path | None, split_name: SplitName) -> Split:
    return split_name.carve(_opened(name, data_dir).train())[0]


@lru_cache(maxsize=2)
def _space(kind: str, name: str, data_dir: Path | None, split_name: SplitName) -> PixelSpace:
    return pixel_space(kind, _opened(name, data_dir), _split(name, data_dir, split_name))


def _plan(job: BenchJob, unit: BenchUnit) -> Plan:
    """Return the unit's plan on this node's copy of the dataset.

    Raises:
        InputError: this copy differs from the driver's.
    """
    dataset = _opened(unit.dataset, job.data_dir)
    driver_fingerprint = unit.identity.spec.get("fingerprint")
    if driver_fingerprint is not None and driver_fingerprint != dataset.fingerprint:
        raise InputError(
            f"{dataset.name} must be the same on every node, this one has {dataset.fingerprint[:12]}, "
            f"the driver {str(driver_fingerprint)[:12]}; give all nodes the same --data-dir"
        )
    config_type = get_method(unit.method).config_type
    config = RunConfig[config_type].parse(unit.config)  # type: ignore[valid-type]
    return Plan(unit.method, dataset, unit.ipc, unit.seed, config, unit.budget)


def _context(job: BenchJob, unit: BenchUnit, plan: Plan) -> DistillContext:
    split = _split(unit.dataset, job.data_dir, unit.split)
    space = _space(plan.config.pixel_space, unit.dataset, job.data_dir, unit.split)
    device = worker_device(job.device)
    return make_context(plan, split, split_name=str(unit.split), device=device, space=space)


def _train_pool(job: BenchJob, unit: BenchUnit) -> dict[str, Any]:
    if unit.pool is None:
        raise ValueError("a pool unit must have the spec of its entry")
    entry = _context(job, unit, _plan(job, unit)).pool.get([unit.pool])[0]
    return {"final_loss": entry.meta.get("final_loss")}


def _distil(job: BenchJob, unit: BenchUnit) -> dict[str, Any]:
    plan = _plan(job, unit)
    if unit.shards > 1:
        return _join(job, unit, plan)
    ctx = _context(job, unit, plan)
    pool = StoredPool(ctx.pool)
    steps = snapshot_steps(plan.config.evaluate.every, plan.config.steps)
    snapshots = Snapshots(_snapshots(job, unit), steps, job.run_dir)
    distillation = run_distillation(
        make_distiller(plan),
        replace(ctx, pool=pool),
        checkpoint=_checkpoint(job, unit),
        snapshots=snapshots,
    )
    digests = {str(step): file_sha256(snapshots.path(step)) for step in steps}
    further = {"snapshots": digests} if digests else {}
    return {**_written(job, unit, distillation, pool.used), **further}


def _join(job: BenchJob, unit: BenchUnit, plan: Plan) -> dict[str, Any]:
    """Join the shards of a set; _MissingError if one is not done, with what all need."""
    begin, ledger = time.perf_counter(), Ledger(job.run_dir)
    shards = shards_of(unit, plan.dataset.num_classes)
    missing = tuple(shard for shard in shards if not has_shard(ledger, shard.identity))
    if missing:
        prepared = prepared_from(_context(job, unit, plan), plan)
        specs = tuple(map(PoolSpec.parse, prepared.missing))
        raise _MissingError(Needs(specs) if specs else Sharded(prepared, missing))
    units, takes_steps = [shard.identity for shard in shards], plan.config.steps > 0
    distillation = joined(ledger, units, time.perf_counter() - begin, takes_steps=takes_steps)
    rows = [row for shard in units if (row := ledger.row(shard.key)) is not None]
    networks = [key for row in rows for key in row.result["pool"]]
    further = {"shards": unit.shards, "device_seconds": time.perf_counter() - begin}
    return {**_written(job, unit, distillation, networks), **further}


def _distil_shard(job: BenchJob, unit: BenchUnit, prepared: Prepared) -> dict[str, Any]:
    plan = _plan(job, unit)
    classes, fingerprint = range(*unit.identity.spec["classes"]), plan.dataset.fingerprint
    plan, ctx = shard_context(plan, unit.split, classes, prepared, device=job.device, fingerprint=fingerprint)
    pool = StoredPool(ctx.pool)
    result = distil_shard(plan, replace(ctx, pool=pool), job.run_dir, unit.identity)
    return {**result, "pool": list(dict.fromkeys(pool.used))}


def _written(
    job: BenchJob, unit: BenchUnit, distillation: Distillation, networks: Sequence[str]
) -> dict[str, Any]:
    """Write a set's draft and its losses, and return its row's result; `networks` are keys of the pool's."""
    draft = _draft(job, unit)
    distillation.distilled.save(draft, shared=job.run_dir)
    curve_file = (job.run_dir / artifact_name(unit.key)).with_suffix(".json")
    write_text(curve_file, json.dumps({"losses": distillation.curve()}))
    first, final = distillation.edge_losses()
    return {
        "artifact": artifact_name(unit.key),
        "sha256": file_sha256(draft),
        "pool": list(dict.fromkeys(networks)),
        "steps": unit.config["steps"],
        "resumed_from_step": distillation.resumed_from_step,
        "seconds_per_step": distillation.seconds_per_step,
        "first_loss": first,
        "final_loss": final,
        "ipc_decoded": distillation.distilled.meta.ipc_decoded,
        **distillation.costs(),
    }


def _evaluate(job: BenchJob, unit: BenchUnit) -> dict[str, Any]:
    """Score one set, or all real images, with one architecture."""
    options = EvaluateOptions.parse({**unit.options, "data_dir": job.data_dir})
    dataset, device = _opened(options.dataset or unit.dataset, job.data_dir), worker_device(job.device)
    if unit.is_whole:
        sets, path = [_whole_set(job, unit)], Path("all real images")
    else:
        source = unit.identity.inputs[0]
        set_row = Ledger(job.run_dir).row(source)
        if set_row is None or not is_sound(job.run_dir, set_row):
            raise _MissingError(Damaged())
        path = job.run_dir / artifact_name(source, unit.step)
        sets, dataset = scoring.read_sets(path, options, dataset)
    values = scoring.score_sets(path, sets, dataset, options, device=device).dump()
    shared_fields = {k: v for k, v in values.items() if k not in ("protocol", "split", "results")}
    return {**values["results"][0], **shared_fields}


def _whole_set(job: BenchJob, unit: BenchUnit) -> DistilledSet:
    """Return all real images that a set would be distilled from, or `unit.limit` of them, as a set."""
    ctx = _context(job, unit, _plan(job, unit))
    split = ctx.split
    if unit.limit is not None:
        generator = ctx.generator("bench", "whole")
        images = limited(TrainSet(split.images, split.labels), unit.limit, generator)
        split = Split(images.images, images.labels)
    per_class = max(1, len(split) // ctx.dataset.num_classes)
    return replace(ctx, ipc=per_class).make_set(ctx.space.encode(split.images), split.labels)


_TASKS: Final[dict[str, Callable[..., dict[str, Any]]]] = {
    "pool": _train_pool,
    "distill": _distil,
    "shard": _distil_shard,
    "evaluate": _evaluate,
}
