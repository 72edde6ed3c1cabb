"""What the commands do, as functions: distil into a run directory, evaluate a file, describe a dataset."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ddray import artifact
from ddray.artifact import DistilledSet
from ddray.data import Dataset, PixelSpace, Split, carve_val, fit_zca, open_dataset
from ddray.distill import DistillResult, run_distillation
from ddray.errors import DdrayError, InputError, unknown
from ddray.evaluate import EvalContext, evaluate_archs
from ddray.evaluate.hard import Hard
from ddray.evaluate.training import Augment, Recipe
from ddray.ledger import Row, Unit
from ddray.plan import EvaluateConfig, Plan, make_context, make_distiller, resolve_arch
from ddray.progress import progress
from ddray.report.images import save_grid
from ddray.report.table import write_results
from ddray.run import open_run

log = logging.getLogger(__name__)

PROTOCOLS = ("hard",)
SplitName = Literal["val", "test"]


def distill_unit(plan: Plan, split_name: str) -> Unit:
    """Return the ledger unit of one distillation."""
    return Unit(kind="distill", spec={**_result_config(plan), "split": split_name})


def _result_config(plan: Plan) -> dict[str, Any]:
    """Return the settings that decide the distilled bytes: how often a checkpoint is kept does not."""
    return {k: v for k, v in plan.describe().items() if k not in ("checkpoint_every", "evaluate")}


def distill(
    plan: Plan,
    *,
    device: torch.device,
    run_dir: Path | None = None,
    resume: bool = False,
    out: Path | None = None,
) -> dict[str, Any]:
    """Distil on all of train, in a run directory that can be resumed.

    Args:
        plan: the resolved run.
        device: where to compute.
        run_dir: the run's folder; None makes a numbered one under `runs/`.
        resume: continue what the folder holds.
        out: where the artifact goes; default `<run>/distilled.pt`. Replaced only after success.

    Returns:
        The command's JSON (DESIGN: commands).

    Raises:
        InputError: the plan does not fit the dataset, or the folder can't be used.
        DivergedError: the loss became NaN.
        StorageError: a file can't be written.
    """
    # Everything that can be refused is refused before a folder is made.
    if out is not None:
        _check_out(out)
    distiller = make_distiller(plan)
    ctx = make_context(plan, plan.dataset.train(), split_name="train", device=device)
    config = {**plan.describe(), "device": device.type}
    run = open_run(run_dir, config, command="distill", resume=resume)
    unit = distill_unit(plan, "train")
    checkpoint = run.checkpoint(unit.key)
    run.ledger.begin(unit, epoch=run.epoch)
    with progress(f"{plan.method} on {plan.dataset.name}", plan.config.steps) as show:
        try:
            made = run_distillation(
                distiller,
                ctx,
                checkpoint=checkpoint if plan.config.steps else None,
                checkpoint_every=plan.config.checkpoint_every,
                on_step=lambda step, loss: show(step, f"loss {loss:.4g}"),
            )
        except DdrayError as error:
            # Not a row: a person who reruns with --resume should get another try.
            run.ledger.event("fail", unit.key, run.epoch, error=str(error))
            raise
    target = (out or run.folder / "distilled.pt").absolute()
    made.distilled.save(target)
    save_grid(made.distilled, target.with_suffix(".png"))
    result = _distill_result(plan, made, target)
    row = Row(key=unit.key, kind="distill", spec=unit.spec, status="done", result=result, wall_s=made.wall_s)
    run.ledger.publish(unit, row, epoch=run.epoch)
    write_results(run.folder / "results.csv", run.ledger.rows())
    return {**result, "run_dir": str(run.folder)}


def _check_out(out: Path) -> None:
    """Refuse an --out that can't become the artifact, before the work and not after it.

    Raises:
        InputError: a folder, a picture's name, or a place that can't be written.
    """
    if out.is_dir():
        raise InputError(f"--out must be a file, {out} is a folder")
    if out.suffix == ".png":
        raise InputError(f"--out is the artifact, whose picture stands beside it as .png; got {out}; use .pt")
    parent = next(path for path in out.parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"--out must be in a folder that can be written, got {out}")


def _distill_result(plan: Plan, made: DistillResult, target: Path) -> dict[str, Any]:
    first, final = made.edge_losses()
    return {
        "artifact": str(target),
        "method": plan.method,
        "dataset": plan.dataset.name,
        "ipc": plan.ipc,
        "steps": plan.config.steps,
        "resumed_from_step": made.resumed_from_step,
        "wall_s": made.wall_s,
        "seconds_per_step": made.seconds_per_step,
        "first_loss": first,
        "final_loss": final,
    }


@dataclass(frozen=True)
class EvaluateOptions:
    """What `ddray evaluate` was asked for; None means: as the artifact says.

    Attributes:
        dataset: target; default the artifact's own.
        protocol: the protocol's name.
        archs: networks to train; default the artifact's own.
        seeds: networks per architecture.
        epochs: of training.
        split: `test` or `val`.
        augment: default the method's.
        pixel_space: space of a foreign file's pixels.
        seed: first network's seed.
        data_dir: where datasets are looked for.
        download: let torchvision download.
    """

    dataset: str | None = None
    protocol: str = "hard"
    archs: tuple[str, ...] = ()
    seeds: int | None = None
    epochs: int | None = None
    split: SplitName = "test"
    augment: Augment | None = None
    pixel_space: Literal["normalized", "raw", "zca"] = "normalized"
    seed: int = 0
    data_dir: Path | None = None
    download: bool = False


def evaluate(path: Path, options: EvaluateOptions, *, device: torch.device) -> dict[str, Any]:
    """Score a distilled set.

    Args:
        path: the artifact, ours or another project's.
        options: what to do.
        device: where to compute.

    Returns:
        The command's JSON (DESIGN: commands).

    Raises:
        InputError: the file, the dataset or an option is bad, or the set does not fit the dataset.
    """
    if options.protocol not in PROTOCOLS:
        raise unknown("protocol", options.protocol, PROTOCOLS)
    if options.split not in ("val", "test"):
        raise unknown("split", options.split, ("val", "test"))
    dataset = _target(options.dataset, options)
    space = _foreign_space(dataset, options)
    held = artifact.load(path, dataset=dataset, pixel_space=space)
    target = dataset or _target(held.meta.dataset, options)
    if target is None:
        raise InputError(f"{path} does not say which dataset it is of: add --dataset NAME")
    _check_fits(held, target, path)
    config = evaluation_config(held, options)
    archs = tuple(resolve_arch(arch, held.meta.image_shape) for arch in options.archs) or (held.meta.arch,)
    ctx = EvalContext(target, _held_out(target, options.split, held), held.space(), device)
    recipe = Recipe.parse({name: getattr(config, name) for name in Recipe.model_fields})
    with progress(f"evaluating {path.name}", len(archs) * config.seeds) as show:
        done = 0

        def note(result: Any) -> None:
            nonlocal done
            done += 1
            show(done, f"{result.arch}: {result.accuracy:.1%}")

        results = evaluate_archs(
            Hard(recipe),
            held.decode(),
            ctx,
            archs=archs,
            num_seeds=config.seeds,
            seed=options.seed,
            on_result=note,
        )
    return {"protocol": options.protocol, "split": options.split, "results": results}


def _target(name: str | None, options: EvaluateOptions) -> Dataset | None:
    return None if name is None else open_dataset(name, data_dir=options.data_dir, download=options.download)


def _foreign_space(dataset: Dataset | None, options: EvaluateOptions) -> PixelSpace | None:
    """Return the space that a foreign file's pixels are said to be in."""
    if dataset is None or options.pixel_space == "normalized":
        return None
    if options.pixel_space == "zca":
        return fit_zca(dataset.train())
    return PixelSpace("raw", dataset.mean, dataset.std)


def evaluation_config(held: DistilledSet, options: EvaluateOptions) -> EvaluateConfig:
    """Return the evaluation settings: the artifact's own, overridden by the options."""
    asked = {"seeds": options.seeds, "epochs": options.epochs, "augment": options.augment}
    own = held.meta.config.get("evaluate", {})
    if not isinstance(own, dict):
        raise InputError(f"meta.config.evaluate must be a mapping, got {own!r}")
    if options.augment == "none" and options.epochs is None:
        own = {**own, "epochs": min(300, own.get("epochs", 300))}  # the peers' length without augmentation
    return EvaluateConfig.parse(
        {**own, **{k: v for k, v in asked.items() if v is not None}}, prefix="evaluate."
    )


def _check_fits(held: DistilledSet, target: Dataset, path: Path) -> None:
    """Refuse to score a set on a dataset with other classes or another image shape."""
    if held.meta.image_shape != target.image_shape:
        raise InputError(
            f"{path} holds images of shape {held.meta.image_shape}, {target.name} has {target.image_shape}: "
            "evaluate it on the dataset it was distilled from"
        )
    if held.meta.class_names != target.class_names:
        raise InputError(
            f"{path} has {len(held.meta.class_names)} classes of {held.meta.dataset}, {target.name} has "
            f"{target.num_classes} other ones: evaluate it on the dataset it was distilled from"
        )
    if int(held.labels.max()) >= target.num_classes:
        raise InputError(f"{path}: labels must be < {target.num_classes} for {target.name}")
    if held.meta.dataset == target.name and held.meta.fingerprint != target.fingerprint:
        log.warning("%s was distilled from another copy of %s (fingerprints differ)", path, target.name)


def _held_out(target: Dataset, split: str, held: DistilledSet) -> Split:
    """Return the split to score on; val is what a search with the artifact's seed keeps back of train."""
    if split == "test":
        return target.test()
    log.warning("val is a tenth of train: a set that was distilled from all of train has seen it")
    return carve_val(target.train(), seed=held.meta.seed or 0)[1]


def data_info(name: str, *, data_dir: Path | None = None, download: bool = False) -> dict[str, Any]:
    """Return a dataset's facts (DESIGN: `ddray data info`)."""
    dataset = open_dataset(name, data_dir=data_dir, download=download)
    return {
        "name": dataset.name,
        "num_classes": dataset.num_classes,
        "num_train": len(dataset.train()),
        "num_test": len(dataset.test()),
        "image_shape": list(dataset.image_shape),
        "fingerprint": dataset.fingerprint,
        "class_names": list(dataset.class_names),
    }


def to_json(value: Any) -> str:
    """Return one JSON object; an undefined number is null."""
    return json.dumps(_defined(value), allow_nan=False)


def _defined(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {key: _defined(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_defined(item) for item in value]
    return value
