"""ddray as a library: the commands as functions on objects, with a run folder only on request."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from ddray.artifact.distilled_set import DistilledSet
from ddray.artifact.export import export_folder, export_parquet
from ddray.artifact.reading import load as load_set
from ddray.config import merge, nest
from ddray.data import Dataset, open_dataset
from ddray.distillation.loop import run_distillation
from ddray.errors import unknown
from ddray.evaluation.options import EvaluateOptions
from ddray.jobs import distill as api
from ddray.jobs import score as scoring
from ddray.jobs.context import make_context, make_distiller, pick_device
from ddray.jobs.plan import resolve

Form = Literal["folder", "parquet"]

__all__ = ["distill", "evaluate", "export", "load"]


def distill(
    method: str,
    dataset: str | Path | Dataset = "digits",
    *,
    ipc: int | None = None,
    budget: int | None = None,
    preset: str = "paper",
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str = "auto",
    run_dir: str | Path | None = None,
    data_dir: str | Path | None = None,
    download: bool = False,
) -> DistilledSet:
    """Distil a dataset and return the set.

    Args:
        method: its name; built in, or from an installed package.
        dataset: a name, a folder, or an open dataset.
        ipc: images per class (self-supervised methods: storage of as many images per class). Default 1.
        budget: storage in images, for self-supervised methods; instead of `ipc`.
        preset: `paper` or `repo`.
        settings: overrides as for --set, such as `{"steps": 50, "method.lr_img": 0.5}`.
        seed: all randomness derives from it.
        device: `auto`, `cpu`, `cuda` or `cuda:<n>`.
        run_dir: folder for checkpoints, ledger and the set; an existing run is resumed. None writes nothing.
        data_dir: where datasets are; default $DDRAY_DATA.
        download: let torchvision download what is missing.

    Raises:
        InputError: a name or a value is invalid.
        DivergedError: the loss became NaN.
    """
    opened = dataset if isinstance(dataset, Dataset) else _open(dataset, data_dir, download)
    plan = resolve(
        method,
        opened,
        ipc=1 if ipc is None and budget is None else ipc,
        budget=budget,
        seed=seed,
        preset=preset,
        layers=[merge(*(nest(name, value) for name, value in (settings or {}).items()))],
    )
    torch_device = pick_device(device)
    if run_dir is not None:
        result = api.distill(plan, device=torch_device, run_dir=Path(run_dir).absolute(), resume=True)
        return load_set(Path(result["artifact"]))
    ctx = make_context(plan, plan.dataset.train(), split_name="train", device=torch_device)
    return run_distillation(make_distiller(plan), ctx).distilled


def _open(name: str | Path, data_dir: str | Path | None = None, download: bool = False) -> Dataset:
    where = None if data_dir is None else Path(data_dir).absolute()
    return open_dataset(str(name), data_dir=where, download=download)


def load(path: str | Path, *, dataset: str | Path | None = None) -> DistilledSet:
    """Read a distilled set: ours, or another project's, whose dataset must be named.

    Args:
        path: the file.
        dataset: for another project's file: name or folder of what it was distilled from.

    Raises:
        InputError: the file is not a distilled set.
    """
    opened = None if dataset is None else _open(dataset)
    return load_set(Path(path).absolute(), dataset=opened)


def evaluate(
    distilled: DistilledSet | str | Path,
    *,
    archs: str | Sequence[str] = (),
    protocol: str = "hard",
    seeds: int | None = None,
    epochs: int | None = None,
    dataset: str | Path | Dataset | None = None,
    seed: int = 0,
    device: str = "auto",
    data_dir: str | Path | None = None,
    **other_options: Any,
) -> dict[str, Any]:
    """Train fresh networks on a set and score them on test.

    Args:
        distilled: the set, or its file.
        archs: one or several networks; default the one used for distillation.
        protocol: how they are trained.
        seeds: networks per architecture; default from the set.
        epochs: training epochs; default from the set.
        dataset: what to test on: a name, a folder, or an open dataset; default the set's dataset.
        seed: seed of the first network.
        device: `auto`, `cpu`, `cuda` or `cuda:<n>`.
        data_dir: where datasets are; default $DDRAY_DATA.
        other_options: other fields of `ddray.evaluation.options.EvaluateOptions`, such as `augment`,
            `recipe`, `train_limit`, `teachers`, `finetune`, `split` or `sets` (`["probe.epochs=10"]`).

    Returns:
        The JSON of `ddray evaluate`; accuracies are fractions.

    Raises:
        InputError: a name or a value is invalid.
    """
    for name in other_options:
        if name not in EvaluateOptions.model_fields:
            raise unknown("an option of ddray.evaluate", name, EvaluateOptions.model_fields)
    other_fields: dict[str, Any] = {
        k: _listed(v) if k in ("sets", "teachers") else v for k, v in other_options.items()
    }
    opened = dataset if isinstance(dataset, Dataset) else None
    options = EvaluateOptions.parse(
        {
            "dataset": None if dataset is None or opened is not None else str(dataset),
            "protocol": protocol,
            "archs": _listed(archs),
            "seeds": seeds,
            "epochs": epochs,
            "seed": seed,
            "data_dir": None if data_dir is None else Path(data_dir).absolute(),
            **other_fields,
        },
        prefix="--",
    )
    torch_device = pick_device(device)
    if not isinstance(distilled, DistilledSet):
        return scoring.evaluate(Path(distilled).absolute(), options, device=torch_device, dataset=opened)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "distilled.pt"
        distilled.save(path)
        return scoring.evaluate(path, options, device=torch_device, dataset=opened)


def _listed(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def export(distilled: DistilledSet | str | Path, out: str | Path, *, form: Form | None = None) -> Path:
    """Write a set for other tools: PNG files by class, or one parquet file.

    Args:
        distilled: the set, or its file.
        out: a new folder, or the parquet file.
        form: default `parquet` if `out` ends in `.parquet`, else `folder`.

    Returns:
        The path that was written.

    Raises:
        InputError: the form is unknown, `out` exists, or the set can't be shown as pictures.
        StorageError: it can't be written.
    """
    if form not in (None, *get_args(Form)):
        raise unknown("form", str(form), get_args(Form))
    loaded = distilled if isinstance(distilled, DistilledSet) else load(distilled)
    target = Path(out).absolute()
    output_form = form or ("parquet" if target.suffix == ".parquet" else "folder")
    (export_parquet if output_form == "parquet" else export_folder)(loaded, target)
    return target
