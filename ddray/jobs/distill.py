"""`ddray distill` as a function: a run folder with its checkpoints, its set and its results."""

import json
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import ConfigDict
from torch import Tensor

from ddray.artifact.distilled_set import RESULT, save_result
from ddray.config import Result
from ddray.data import SplitName
from ddray.distillation.loop import Distillation, run_distillation
from ddray.distillation.method import DistillContext, Distiller
from ddray.distillation.snapshots import Snapshots, snapshot_steps
from ddray.drawing.images import save_pictures
from ddray.errors import DdrayError, InputError, StorageError
from ddray.jobs.context import check_longer, make_context, make_distiller
from ddray.jobs.plan import Plan
from ddray.jobs.preset import plan_departure
from ddray.runs.costs import record_costs
from ddray.runs.folder import Run, extended_from, open_run, read_config
from ddray.runs.ledger import Row, Unit
from ddray.runs.recovery import recovering
from ddray.runs.results import write_results
from ddray.runs.scores import remember_run
from ddray.system.files import storage_errors, write_text

log = logging.getLogger(__name__)
SNAPSHOTS: Final = "distilled-steps"
"""Folder of a run with the sets along its steps (`evaluate.every`)."""


class DistillResult(Result):
    """What `ddray distill` returns, with what the method measured itself."""

    model_config = ConfigDict(extra="allow")

    artifact: str
    """The set's file."""
    name: str | None = None
    """What people call the set, such as `datadam-cifar10-ipc1-seed0`."""
    run_dir: str
    method: str
    dataset: str
    ipc: int
    budget: int | None = None
    """Storage in images, of methods that count it."""
    steps: int
    cut: str | None = None
    """What was lowered of the preset's budget, such as `steps 10 of 8,000`."""
    overridden: list[str] | None = None
    """Names of the other settings that are not the preset's."""
    resumed_from_step: int
    wall_s: float
    seconds_per_step: float | None
    """Median after warm-up."""
    first_loss: float | None
    """Mean over the first tenth of the steps; `final_loss`: over the last."""
    final_loss: float | None
    seconds: float | None = None
    """Of the distillation in all processes that worked on it, without the pool's."""
    seconds_with_pool: float | None = None
    """With the training of the pool's networks that it used, whenever that was."""
    whitening_s: float | None = None
    """Seconds that fitting the whitening took, whenever that was; in neither of the two above."""
    size_bytes: int | None = None
    """Of the set's file."""
    made_of: dict[str, int] | None = None
    """Bytes of what is in it: images, labels, whitening, ..."""
    peak_memory_bytes: int | None = None
    """GPU: of its tensors; CPU: of the process, with Python, libraries and dataset. Without the training of
    the pool."""
    storage_floats: int | None = None
    """Values that the set stores, labels not counted."""
    precision: str | None = None
    """In which it was computed: fp32, tf32 or bf16."""
    half_memory_budget: bool | None = None
    """True: memory had run out, and this is of a second try with half the budget (other last digits)."""
    approximation_mse: float | None = None
    """Boost-SSDD: mean squared error of the approximated shifts, in coefficients."""
    shards: int | None = None
    """Of a sharded run: how many; `seconds` are then those of all devices together."""
    snapshots: str | None = None
    """Folder of the sets along the steps, with `evaluate.every`."""


def edition_of(plan: Plan) -> dict[str, int]:
    """Return the edition of a plan's method settings for the spec of a unit; empty for the first."""
    edition = getattr(plan.config.method, "edition", 0)
    return {"edition": edition} if edition else {}


def distill_unit(plan: Plan, split_name: str) -> Unit:
    """Return the ledger unit of one distillation."""
    # Only the settings that affect the distilled bytes.
    settings = {k: v for k, v in plan.describe().items() if k not in ("checkpoint_every", "evaluate")}
    return Unit(kind="distill", spec={**settings, "split": split_name, **edition_of(plan)})


def distill(
    plan: Plan,
    *,
    device: torch.device,
    run_dir: Path | None = None,
    resume: bool = False,
    out: Path | None = None,
    val_seed: int | None = None,
    val_images: int | None = None,
    more_steps: bool = False,
) -> DistillResult:
    """Distil all of train, or all but val, in a run directory that can be resumed.

    Without `run_dir`, the run gets a numbered folder under `runs/`. The artifact `out`, by default
    `<run>/distilled.pt`, is replaced only after success. `val_seed` excludes the val tenth that `tune` and
    `nas` score on with this seed, with `val_images` that many images. With `more_steps`, a run of fewer steps
    than the plan's is continued to the same bytes as one run of all; its row is set aside as
    `<key>.extended`.

    Raises:
        InputError: the plan does not fit the dataset, the folder can't be used, or its run can't be extended.
        DivergedError: the loss became NaN.
        StorageError: a file can't be written.
    """
    # Reject everything that can be rejected before creating a folder.
    if out is not None:
        check_out(out)
    make_distiller(plan)
    name = SplitName(val_seed, val_images)
    split, split_name = name.carve(plan.dataset.train())[0], str(name)
    ctx = make_context(plan, split, split_name=split_name, device=device)
    config = {**plan.describe(), "device": device.type, "split": split_name}
    run, (unit,) = start_run(
        plan,
        config,
        lambda plan: [distill_unit(plan, split_name)],
        run_dir=run_dir,
        resume=resume,
        more_steps=more_steps,
    )
    is_new = run.ledger.row(unit.key) is None
    run.ledger.begin(unit, epoch=run.epoch)
    with run.continued("the run"):
        distiller, distillation = recovering(_run, plan, ctx, run, unit)
    result = finish_run(plan, run, unit, distillation, out, getattr(distiller, "representations", None))
    if is_new:
        _record_cost(plan, run.ledger.row(unit.key), distillation.seconds, device.type)
    return result


def _record_cost(plan: Plan, row: Row | None, seconds: float | None, device: str) -> None:
    """Store what a set took, for forecasts; without its pool, whose entries have costs of their own."""
    if row is not None and seconds is not None:
        signature = {"kind": "distill", "what": plan.method, "which": plan.dataset.name}
        with suppress(StorageError):  # forecasts lack it; the run is done
            record_costs(signature, [(row.model_copy(update={"wall_s": seconds}), plan.work)], device)


def start_run(
    plan: Plan,
    config: Mapping[str, Any],
    units_of: Callable[[Plan], list[Unit]],
    *,
    run_dir: Path | None,
    resume: bool,
    more_steps: bool,
) -> tuple[Run, list[Unit]]:
    """Open the folder of a run, and return the units of its plan; those of a shorter run go on from there.

    Of several units the last joins the others, and has no checkpoint.
    """
    shorter = _shorter(plan, run_dir) if resume and more_steps else None
    extended = None if shorter is None else {"steps": shorter.config.steps}
    run = open_run(run_dir, config, command="distill", resume=resume, extended=extended)
    units = units_of(plan)
    if shorter is not None:
        for before, unit in zip(units_of(shorter), units, strict=True):
            _extend(run, before, unit, has_checkpoint=unit is not units[-1] or len(units) == 1)
        run.write_config()
    return run, units


def finish_run(
    plan: Plan,
    run: Run,
    unit: Unit,
    distillation: Distillation,
    out: Path | None,
    representations: Tensor | None = None,
    shards: int | None = None,
) -> DistillResult:
    """Write a run's set with its pictures, losses, row and table, and return its result."""
    target = (out or run.folder / RESULT).absolute()
    distilled = distillation.distilled
    save_result(distilled, target)
    if target.parent != run.folder:
        remember_run(target, run.folder)
    if len(distilled.images):
        save_pictures(distilled, target, representations=representations)
    write_text(run.folder / "distilled.json", json.dumps({"losses": distillation.curve()}))
    result = _distill_result(plan, distillation, target, run.folder / SNAPSHOTS)
    result |= {} if shards is None else {"shards": shards}
    run.ledger.publish(unit, Row.done(unit, result, distillation.wall_s), epoch=run.epoch)
    write_results(run.folder / "results.csv", run.ledger.rows())
    return DistillResult.parse({**result, "run_dir": str(run.folder)})


def _shorter(plan: Plan, run_dir: Path | None) -> Plan | None:
    """Return the plan of a folder's run of fewer steps, None if there is none; InputError: `check_longer`."""
    steps = extended_from(read_config(run_dir), "steps", plan.config.steps)
    if steps is None:
        return None
    shorter = replace(plan, config=plan.config.model_copy(update={"steps": steps}))
    check_longer(shorter, plan)
    return shorter


def _extend(run: Run, shorter: Unit, unit: Unit, *, has_checkpoint: bool) -> None:
    """Let a unit go on from the checkpoint of one with fewer steps, in an order that a kill can't harm."""
    before, checkpoint = run.checkpoint(shorter.key), run.checkpoint(unit.key)
    steps = shorter.spec["steps"]
    if before.exists():
        with storage_errors(checkpoint):
            before.replace(checkpoint)
    elif steps and has_checkpoint and not checkpoint.exists():
        log.warning("there is no checkpoint %s: the first %d steps are run again", before, steps)
    run.ledger.withdraw(shorter.key, "extended")


def _run(plan: Plan, ctx: DistillContext, run: Run, unit: Unit) -> tuple[Distiller, Distillation]:
    """Run the steps that are missing; a run that the method's setup rejects leaves no folder."""
    distiller = make_distiller(plan)
    checkpoint, config = run.checkpoint(unit.key), plan.config
    steps = snapshot_steps(config.evaluate.every, config.steps)
    snapshots = Snapshots(run.folder / SNAPSHOTS, steps, run.folder)
    try:
        distillation = run_distillation(distiller, ctx, checkpoint=checkpoint, snapshots=snapshots)
    except DdrayError as error:
        if isinstance(error, InputError) and not run.resumed and not checkpoint.exists():
            run.discard()  # nothing was written
        else:  # no row, so that a rerun with --resume tries again
            run.ledger.event("fail", unit.key, run.epoch, error=str(error))
        raise
    return distiller, distillation


def check_out(out: Path) -> None:
    """Reject an --out that is a folder, has a picture's name, or is in a folder that can't be written."""
    if out.is_dir():
        raise InputError(f"--out must be a file, {out} is a folder")
    if out.suffix == ".png":
        raise InputError(f"--out is the artifact, whose picture stands beside it as .png; got {out}; use .pt")
    parent = next(path for path in out.parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"--out must be in a folder that can be written, got {out}")


def _distill_result(plan: Plan, distillation: Distillation, target: Path, snapshots: Path) -> dict[str, Any]:
    first, final = distillation.edge_losses()
    return {
        "artifact": str(target),
        "name": distillation.distilled.meta.name,
        "method": plan.method,
        "dataset": plan.dataset.name,
        "ipc": plan.ipc,
        **({} if plan.budget is None else {"budget": plan.budget}),
        "steps": len(distillation.losses),
        **plan_departure(plan),
        "resumed_from_step": distillation.resumed_from_step,
        "wall_s": distillation.wall_s,
        "seconds_per_step": distillation.seconds_per_step,
        "first_loss": first,
        "final_loss": final,
        **distillation.costs(),
        "size_bytes": target.stat().st_size,
        "made_of": distillation.distilled.made_of(),
        **({"snapshots": str(snapshots)} if snapshots.is_dir() else {}),
    }
