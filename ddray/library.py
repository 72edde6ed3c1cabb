"""ddray as a library: what the commands do, on objects and without a run folder unless one is asked for."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ddray import api, artifact, scoring
from ddray.artifact import DistilledSet
from ddray.config import merge, nest
from ddray.data import Dataset, open_dataset
from ddray.distill import run_distillation
from ddray.export import export_folder, export_parquet
from ddray.plan import Plan, make_context, make_distiller, pick_device, resolve

__all__ = ["distill", "evaluate", "export", "load"]


def distill(
    method: str,
    dataset: str | Path | Dataset = "digits",
    *,
    ipc: int = 1,
    preset: str = "paper",
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str = "auto",
    run_dir: str | Path | None = None,
) -> DistilledSet:
    """Distil a dataset and return the set.

    Args:
        method: its name, ours or that of an installed package.
        dataset: a name, a folder, or an open dataset.
        ipc: images per class; of a self-supervised method, the storage of so many.
        preset: `paper` or `repo`.
        settings: overrides as for --set, such as `{"steps": 50, "method.lr_img": 0.5}`.
        seed: every draw is derived from it.
        device: `auto`, `cpu`, `cuda` or `cuda:<n>`.
        run_dir: keeps checkpoints, ledger and the set, and continues what is there; None keeps nothing.

    Raises:
        InputError: a name or a value is bad.
        DivergedError: the loss became NaN.
    """
    plan = _plan(method, dataset, ipc=ipc, preset=preset, settings=settings or {}, seed=seed)
    chosen = pick_device(device)
    if run_dir is not None:
        found = api.distill(plan, device=chosen, run_dir=Path(run_dir).absolute(), resume=True)
        return artifact.load(Path(found["artifact"]))
    ctx = make_context(plan, plan.dataset.train(), split_name="train", device=chosen)
    return run_distillation(make_distiller(plan), ctx).distilled


def _plan(
    method: str,
    dataset: str | Path | Dataset,
    *,
    ipc: int,
    preset: str,
    settings: Mapping[str, Any],
    seed: int,
) -> Plan:
    opened = dataset if isinstance(dataset, Dataset) else open_dataset(str(dataset))
    layer = merge(*(nest(name, value) for name, value in settings.items()))
    return resolve(method, opened, ipc=ipc, seed=seed, preset=preset, layers=[layer])


def load(path: str | Path, *, dataset: str | Path | None = None) -> DistilledSet:
    """Read a distilled set: ours, or another project's, which does not say its dataset.

    Args:
        path: the file.
        dataset: name or folder of what another project's file was distilled from.

    Raises:
        InputError: the file is not a distilled set.
    """
    opened = None if dataset is None else open_dataset(str(dataset))
    return artifact.load(Path(path).absolute(), dataset=opened)


def evaluate(
    distilled: DistilledSet | str | Path,
    *,
    archs: Sequence[str] = (),
    protocol: str = "hard",
    seeds: int | None = None,
    epochs: int | None = None,
    dataset: str | None = None,
    seed: int = 0,
    device: str = "auto",
) -> dict[str, Any]:
    """Train fresh networks on a set and score them on test.

    Args:
        distilled: the set, or its file.
        archs: networks; default the one that the set was distilled in.
        protocol: how they are trained.
        seeds: networks per architecture; default the set's own.
        epochs: of training; default the set's own.
        dataset: the target; default the set's own.
        seed: of the first network.
        device: `auto`, `cpu`, `cuda` or `cuda:<n>`.

    Returns:
        The JSON of `ddray evaluate`; accuracies are fractions.

    Raises:
        InputError: a name or a value is bad.
    """
    options = scoring.EvaluateOptions(
        dataset=dataset, protocol=protocol, archs=tuple(archs), seeds=seeds, epochs=epochs, seed=seed
    )
    chosen = pick_device(device)
    if not isinstance(distilled, DistilledSet):
        return scoring.evaluate(Path(distilled).absolute(), options, device=chosen)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "distilled.pt"
        distilled.save(path)
        return scoring.evaluate(path, options, device=chosen)


def export(
    distilled: DistilledSet | str | Path, out: str | Path, *, form: Literal["folder", "parquet"] | None = None
) -> Path:
    """Write a set for other tools: PNG files by class, or one parquet file.

    Args:
        distilled: the set, or its file.
        out: a new folder, or the parquet file.
        form: default by the name of `out`: `.parquet` or a folder.

    Returns:
        Where it was written.

    Raises:
        InputError: the place is taken, or the set can't be shown as pictures.
        StorageError: it can't be written.
    """
    held = distilled if isinstance(distilled, DistilledSet) else load(distilled)
    target = Path(out).absolute()
    chosen = form or ("parquet" if target.suffix == ".parquet" else "folder")
    (export_parquet if chosen == "parquet" else export_folder)(held, target)
    return target
