"""`ddray tune`: a search for hyperparameters."""

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


def tune(
    method: Method,
    dataset: DatasetOption = "digits",
    ipc: Ipc = None,
    budget: Budget = None,
    space: Annotated[
        Path | None, typer.Option("--space", help="YAML of ranges; default the method's shipped one.")
    ] = None,
    num_samples: Annotated[
        int, typer.Option("--num-samples", help="Trials, the paper's point among them.")
    ] = 16,
    strategy: Annotated[
        str, typer.Option("--strategy", help="asha-tpe, tpe, random, grid or pb2.")
    ] = "asha-tpe",
    cpus_per_trial: Annotated[float, typer.Option("--cpus-per-trial", help="CPU cores per trial.")] = 1.0,
    gpus_per_trial: Annotated[
        float, typer.Option("--gpus-per-trial", help="GPUs per trial; fractions share one.")
    ] = 0.0,
    max_concurrent: Annotated[int | None, typer.Option("--max-concurrent", help="Trials at a time.")] = None,
    time_budget: Annotated[
        float | None, typer.Option("--time-budget", help="Seconds after which no trial starts.")
    ] = None,
    objective: Annotated[
        str,
        typer.Option("--objective", help="val-accuracy, or nas-spearman: how sets rank architectures."),
    ] = "val-accuracy",
    nas_sample: Annotated[
        int, typer.Option("--nas-sample", help="Architectures that nas-spearman ranks.")
    ] = 16,
    nas_epochs: Annotated[int, typer.Option("--nas-epochs", help="Epochs of each of them.")] = 50,
    final_sets: Annotated[
        int, typer.Option("--final-sets", help="Fresh seeds on which the winner is scored on test.")
    ] = 3,
    address: Annotated[
        str | None, typer.Option("--address", help="Ray cluster to connect to; default a local one.")
    ] = None,
    preset: Preset = "paper",
    config: ConfigFile = None,
    set_: Sets = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Steps of a full trial.")] = None,
    seed: Seed = 0,
    run_dir: RunDir = None,
    resume: Resume = False,
    data_dir: DataDir = None,
    download: Download = False,
    as_json: Json = False,
) -> None:
    """Search a method's hyperparameters on val over a Ray cluster; score the winner on test once."""
    with output(as_json) as emit:
        from ddray.cluster import tune as cluster_tune
        from ddray.data import open_dataset
        from ddray.jobs import plan
        from ddray.methods import get_method
        from ddray.tuning.options import TuneOptions

        get_method(method)
        opened = open_dataset(dataset, data_dir=absolute(data_dir), download=download)
        resolved = plan.resolve(
            method,
            opened,
            ipc=1 if ipc is None and budget is None else ipc,
            budget=budget,
            seed=seed,
            preset=preset,
            config_file=absolute(config),
            layers=plan.override_layers(set_ or [], steps),
        )
        options = TuneOptions.parse(
            {
                "space": space,
                "num_samples": num_samples,
                "strategy": strategy,
                "cpus_per_trial": cpus_per_trial,
                "gpus_per_trial": gpus_per_trial,
                "max_concurrent": max_concurrent,
                "time_budget": time_budget,
                "objective": objective,
                "nas_sample": nas_sample,
                "nas_epochs": nas_epochs,
                "final_sets": final_sets,
                "address": address,
            },
            prefix="--",
        )
        result = cluster_tune.tune(resolved, options, run_dir=absolute(run_dir), resume=resume)
        emit(result, lambda: display.tune_tables(result))
