"""What a worker does for a sharded distillation: prepare it, train a pool entry, distil a shard."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from ddray.artifact.reading import has_whitening, load
from ddray.data import Dataset, PixelSpace, Split, SplitName, open_dataset
from ddray.distillation.loop import Distillation, run_distillation
from ddray.distillation.method import DistillContext
from ddray.distillation.shards import Shard, join_sets, shard_classes
from ddray.errors import DdrayError, InputError
from ddray.jobs.context import declared_specs, make_context, make_distiller
from ddray.jobs.plan import Plan, RunConfig
from ddray.methods import get_method
from ddray.pool.files import DamagedEntryError, PoolFiles
from ddray.pool.local import LocalPool
from ddray.pool.spec import PoolSpec
from ddray.runs.folder import Run
from ddray.runs.ledger import Ledger, Row, Unit
from ddray.system.files import file_sha256, home, write_text
from ddray.system.memory import memory_budget
from ddray.system.worker import worker_device


@dataclass(frozen=True)
class ShardJob:
    """What the units of a sharded run share: a plan in plain values, and where it is run.

    Attributes:
        run_dir: absolute path of the run.
        epoch: run epoch to publish under.
        device: kind of device of the workers.
        split: what is distilled.
        plan: the plan, without its configuration and its dataset.
        config: its configuration.
        dataset: name that the dataset is opened by.
        data_dir: where datasets are.
        fingerprint: of the driver's copy of the dataset.
        opened: the dataset, for units that run in the driver's process.
    """

    run_dir: str
    epoch: int
    device: str
    split: SplitName
    plan: Mapping[str, Any]
    config: Mapping[str, Any]
    dataset: str
    data_dir: Path | None
    fingerprint: str
    opened: Dataset | None = None

    def resolved(self) -> Plan:
        """Return the plan on this process's copy of the dataset.

        Raises:
            InputError: it is not the driver's.
        """
        dataset = self.opened or open_dataset(self.dataset, data_dir=self.data_dir)
        if dataset.fingerprint != self.fingerprint:
            raise InputError(
                f"{self.dataset} must be the same on every node, this one has {dataset.fingerprint[:12]}, "
                f"the driver {self.fingerprint[:12]}; give all nodes the same --data-dir"
            )
        config_type = get_method(self.plan["method"]).config_type
        config = RunConfig[config_type].parse(self.config)  # type: ignore[valid-type]
        return Plan(dataset=dataset, config=config, **self.plan)


def shard_job(
    plan: Plan, split: SplitName, run: Run, *, device: str, data_dir: Path | None, here: bool
) -> ShardJob:
    """Return the job of a plan; `here`: its units run in this process."""
    return ShardJob(
        run_dir=str(run.folder),
        epoch=run.epoch,
        device=device,
        split=split,
        plan={"method": plan.method, "ipc": plan.ipc, "seed": plan.seed, "budget": plan.budget},
        config=plan.config.dump(),
        dataset=plan.dataset.name,
        data_dir=data_dir,
        fingerprint=plan.dataset.fingerprint,
        opened=plan.dataset if here else None,
    )


@dataclass(frozen=True)
class Prepared:
    """What all shards need of the whole split, computed once.

    Attributes:
        zca: mean [D] and matrix [D, D] of whitened pixels, as NumPy arrays (docs/ray.md, 11), or empty.
        memory_budget: bytes of a part of a step: the parts of all shards are those of one unsharded run.
        minimum: the smallest pixel of spectrograms.
        missing: specs of pool entries that are still to be trained.
    """

    zca: Mapping[str, np.ndarray[Any, Any]]
    memory_budget: int
    minimum: float | None
    missing: tuple[dict[str, Any], ...]


def prepare(job: ShardJob) -> Prepared:
    """Fit the pixel space, and find out which pool entries are missing.

    Raises:
        InputError: the plan does not fit, or this node's dataset is not the driver's.
    """
    return prepared_from(*_whole_context(job))


def prepared_from(ctx: DistillContext, plan: Plan) -> Prepared:
    """Return what shards need of the context of their whole split."""
    space, images = ctx.space, ctx.split.images
    zca = {"zca_mean": space.zca_mean, "zca_matrix": space.zca_matrix} if space.kind == "zca" else {}
    return Prepared(
        zca={name: value.numpy() for name, value in zca.items() if value is not None},
        memory_budget=memory_budget(ctx.device, plan.config.memory_budget),
        minimum=float(images.min()) if images.is_floating_point() else None,
        missing=tuple(spec.dump() for spec in declared_specs(plan, ctx) if not _has_entry(spec)),
    )


def train_entry(job: ShardJob, spec: Mapping[str, Any]) -> None:
    """Train a pool entry on the whole split, unless another process has."""
    _whole_context(job)[0].pool.get([PoolSpec.parse(spec)])


def _whole_context(job: ShardJob) -> tuple[DistillContext, Plan]:
    plan = job.resolved()
    split, _ = job.split.carve(plan.dataset.train())
    device = worker_device(job.device)
    return make_context(plan, split, split_name=str(job.split), device=device), plan


def _has_entry(spec: PoolSpec) -> bool:
    try:
        return PoolFiles(home() / "pool").read(spec.key) is not None
    except DamagedEntryError:  # the next `get` repairs it
        return False


def shard_units(unit: Unit, num_classes: int, num_shards: int) -> list[Unit]:
    """Return the ledger units of the shards of a distillation."""
    return [
        Unit(kind="shard", spec={**unit.spec, "classes": [classes.start, classes.stop]})
        for classes in shard_classes(num_classes, num_shards)
    ]


def run_shard(job: ShardJob, prepared: Prepared, unit: Unit) -> None:
    """Distil a shard from where its checkpoint is, write its set, and publish its row.

    Raises:
        DivergedError: the loss became NaN.
        StorageError: a file can't be written.
    """
    begin = time.perf_counter()
    ledger = Ledger(Path(job.run_dir))
    if ledger.row(unit.key) is not None:
        return
    plan, ctx = shard_context(
        job.resolved(),
        job.split,
        range(*unit.spec["classes"]),
        prepared,
        device=job.device,
        fingerprint=job.fingerprint,
    )
    result = distil_shard(plan, ctx, ledger.run_dir, unit)
    ledger.publish(unit, Row.done(unit, result, time.perf_counter() - begin), epoch=job.epoch)


def distil_shard(plan: Plan, ctx: DistillContext, run_dir: Path, unit: Unit) -> dict[str, Any]:
    """Distil a shard from where its checkpoint is, write its set, and return its row's result.

    Raises:
        DivergedError: the loss became NaN.
        StorageError: a file can't be written.
    """
    checkpoint = run_dir / "checkpoints" / f"{unit.key}.pt"
    distillation = run_distillation(make_distiller(plan), ctx, checkpoint=checkpoint)
    # Of a late worker's files and these, either are the unit's: both have the same bytes.
    path = shard_file(run_dir, unit.key)
    distillation.distilled.save(path, shared=run_dir)
    write_text(path.with_suffix(".json"), json.dumps(distillation.losses.tolist()))
    first, final = distillation.edge_losses()
    return {
        "artifact": str(path.relative_to(run_dir)),
        "sha256": _digests(path),
        "steps": len(distillation.losses),
        "resumed_from_step": distillation.resumed_from_step,
        "seconds_per_step": distillation.seconds_per_step,
        "first_loss": first,
        "final_loss": final,
        "pool_s": distillation.pool_s,
        "measures": dict(distillation.measures),
        **distillation.costs(),
    }


def shard_file(run_dir: Path, key: str) -> Path:
    """Return the file of a shard's set."""
    return run_dir / "shards" / f"{key}.pt"


def shard_context(
    plan: Plan, split_name: SplitName, classes: range, prepared: Prepared, *, device: str, fingerprint: str
) -> tuple[Plan, DistillContext]:
    """Return plan and context of a shard of `split_name`, without the dataset's other images.

    `fingerprint` is the dataset's: of a shard alone it can't be computed.
    """
    train = plan.dataset.train()
    rows = torch.arange(len(train)).view(-1, 1, 1, 1)
    whole, _ = split_name.carve(Split(rows, train.labels))
    shard = Shard(classes, whole.labels, prepared.minimum)
    split = train.select(whole.images.flatten()[shard.rows])
    del train
    dataset = replace(plan.dataset, load_train=_no_more, load_test=_no_more)
    dataset.__dict__["fingerprint"] = fingerprint
    plan = replace(plan, dataset=dataset)
    zca: dict[str, Any] = {name: torch.tensor(part) for name, part in prepared.zca.items()}
    ctx = make_context(
        plan,
        split,
        split_name=str(split_name),
        device=worker_device(device),
        space=PixelSpace(plan.config.pixel_space, dataset.mean, dataset.std, **zca),
        pool=LocalPool(_no_more),
        shard=shard,
    )
    return plan, replace(ctx, memory_budget=prepared.memory_budget)


def _no_more(*_: Any) -> Any:
    raise InputError("a shard has its own classes' images alone, and its pool entries are trained before it")


def _digests(path: Path) -> list[str]:
    """Return the hashes of a shard's set and of its losses; without those of files that are missing."""
    return [file_sha256(file) for file in (path, path.with_suffix(".json")) if file.is_file()]


def drop_unsound(ledger: Ledger, units: Iterable[Unit]) -> list[Unit]:
    """Return the units that are still to be run; rows whose files are gone or changed are set aside."""
    missing = [unit for unit in units if not has_shard(ledger, unit)]
    for unit in missing:
        ledger.withdraw(unit.key, "damaged")
    return missing


def has_shard(ledger: Ledger, unit: Unit) -> bool:
    """Return whether a shard is done and its file is there, unchanged, with its whitening."""
    row, path = ledger.row(unit.key), shard_file(ledger.run_dir, unit.key)
    is_there = row is not None and _digests(path) == row.result.get("sha256")
    return is_there and has_its_whitening(path, unit.spec)


def has_its_whitening(path: Path, spec: Mapping[str, Any]) -> bool:
    """Return whether the whitening of a unit's set is there, if the unit's spec says that it has one."""
    return spec.get("config", spec)["pixel_space"] != "zca" or has_whitening(path)


def joined(ledger: Ledger, units: Sequence[Unit], wall_s: float, *, takes_steps: bool) -> Distillation:
    """Return the distillation of all classes from the rows and files of its shards.

    Its losses are the sums of the shards', in float64; without `takes_steps`, where steps are those of
    classes (D3HR), one shard's follow the other's.

    Raises:
        DdrayError: a row is not there, for another process has resumed the run.
    """
    rows = [row for unit in units if (row := ledger.row(unit.key)) is not None]
    if len(rows) < len(units):
        raise DdrayError(f"another process has resumed {ledger.run_dir}: this one ends")
    files = [shard_file(ledger.run_dir, unit.key) for unit in units]
    parts = [_part(row.result, path) for row, path in zip(rows, files, strict=True)]
    return join_distillations(parts, takes_steps=takes_steps, wall_s=wall_s)


def _part(result: Mapping[str, Any], path: Path) -> Distillation:
    """Return a shard's distillation from its row's result and its file."""
    losses = json.loads(path.with_suffix(".json").read_text("utf-8"))
    measured: dict[str, Any] = {n: result.get(n) for n in ("seconds", "peak_memory_bytes", "precision")}
    return Distillation(
        distilled=load(path),
        losses=torch.tensor(losses, dtype=torch.float64),
        resumed_from_step=result["resumed_from_step"],
        wall_s=0.0,
        seconds_per_step=result["seconds_per_step"],
        pool_s=result["pool_s"],
        measures=result["measures"],
        half_memory_budget=bool(result.get("half_memory_budget")),
        **measured,
    )


def join_distillations(parts: Sequence[Distillation], *, takes_steps: bool, wall_s: float) -> Distillation:
    """Return the distillation of all classes from those of its shards.

    Its losses are the sums of the shards', in float64; where steps are those of classes (D3HR), one shard's
    follow the other's. Its seconds are those of all devices, its peak memory the largest.
    """
    losses = [part.losses.double() for part in parts]
    names = dict.fromkeys(name for part in parts for name in part.measures)
    measures = {name: fmean(part.measures[name] for part in parts if name in part.measures) for name in names}
    return Distillation(
        distilled=join_sets([part.distilled for part in parts]),
        losses=torch.stack(losses).sum(0) if takes_steps else torch.cat(losses),
        resumed_from_step=min(part.resumed_from_step for part in parts),
        wall_s=wall_s,
        seconds_per_step=_over(max, [part.seconds_per_step for part in parts]),
        seconds=_over(sum, [part.seconds for part in parts]),
        pool_s=max(part.pool_s for part in parts),
        peak_memory_bytes=_over(max, [part.peak_memory_bytes for part in parts]),
        precision=parts[0].precision,
        half_memory_budget=any(part.half_memory_budget for part in parts),
        measures=measures,
    )


def _over(combine: Any, values: Sequence[Any]) -> Any:
    """Return the sum or the maximum of the shards' values; None if one is not known."""
    return None if None in values else combine(values)
