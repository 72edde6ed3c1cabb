"""`ddray distill`: a dataset to a few images per class."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddray.commands import display
from ddray.commands.options import (
    Budget,
    ConfigFile,
    DataDir,
    DatasetOption,
    Device,
    Download,
    Ipc,
    Json,
    Method,
    Preset,
    Resume,
    RunDir,
    Seed,
    Sets,
    absolute,
    output,
)


def distill(
    method: Method,
    ipc: Ipc = None,
    budget: Budget = None,
    dataset: DatasetOption = "digits",
    preset: Preset = "paper",
    config: ConfigFile = None,
    set_: Sets = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Steps; 0 writes the initial images.")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    run_dir: RunDir = None,
    resume: Resume = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Artifact; default <run dir>/distilled.pt.")
    ] = None,
    val_seed: Annotated[
        int | None,
        typer.Option("--val-seed", help="Leave out the val tenth that tune and nas with this seed score on."),
    ] = None,
    data_dir: DataDir = None,
    download: Download = False,
    as_json: Json = False,
) -> None:
    """Distil a dataset to a few images per class."""
    with output(as_json) as emit:
        from ddray.data import open_dataset
        from ddray.jobs import distill as api
        from ddray.jobs import plan
        from ddray.jobs.context import pick_device
        from ddray.methods import get_method

        get_method(method)
        opened = open_dataset(dataset, data_dir=absolute(data_dir), download=download)
        resolved = plan.resolve(
            method,
            opened,
            ipc=ipc,
            budget=budget,
            seed=seed,
            preset=preset,
            config_file=absolute(config),
            layers=plan.override_layers(set_ or [], steps),
        )
        result = api.distill(
            resolved,
            device=pick_device(device),
            run_dir=absolute(run_dir),
            resume=resume,
            out=absolute(out),
            val_seed=val_seed,
        )
        emit(result, display.table_of("distilled", result))
