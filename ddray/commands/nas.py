"""`ddray nas`: architectures ranked on distilled sets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ddray.commands import display
from ddray.commands.options import (
    DataDir,
    Download,
    Json,
    Resume,
    RunDir,
    Seed,
    Sets,
    absolute,
    output,
    refuse,
)
from ddray.errors import InputError


def nas(
    proxy: Annotated[
        list[Path] | None, typer.Option("--proxy", help="Distilled set to train on; repeatable.")
    ] = None,
    space: Annotated[str, typer.Option("--space", help="convnet720 or nasbench201.")] = "convnet720",
    sample: Annotated[
        int | None, typer.Option("--sample", help="Architectures, stratified by cost; default all.")
    ] = None,
    max_mflops: Annotated[
        float | None,
        typer.Option("--max-mflops", help="Leave out architectures of more million FLOPs an image."),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="Networks per architecture and proxy.")] = 1,
    epochs: Annotated[
        int | None, typer.Option("--epochs", help="Epochs on a proxy; default 200 (nasbench201: 50).")
    ] = None,
    truth: Annotated[
        str, typer.Option("--truth", help="whole (train on the full set), table, api:FILE or a CSV file.")
    ] = "whole",
    truth_epochs: Annotated[
        int | None, typer.Option("--truth-epochs", help="Epochs on the full set; default as --epochs.")
    ] = None,
    truth_seeds: Annotated[
        int, typer.Option("--truth-seeds", help="Networks per architecture on the full set.")
    ] = 1,
    truth_column: Annotated[
        str | None,
        typer.Option(
            "--truth-column", help="Of the table or CSV; the table's default is cifar10_test_200_mean."
        ),
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option("--baseline", help="early-stopping, whole, random, kcenter, ...; repeatable."),
    ] = None,
    compat: Annotated[
        str | None, typer.Option("--compat", help="dcbench: each bug of its harness as a further proxy.")
    ] = None,
    describe: Annotated[
        str | None, typer.Option("--describe", help="all, or indices: list architectures, train nothing.")
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option("--scores", help="CSV (index,score) to rank against --truth, training nothing."),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", help="Real data; default the first artifact's.")
    ] = None,
    pixel_space: Annotated[
        str, typer.Option("--pixel-space", help="Of another project's file: normalized, zca or raw.")
    ] = "normalized",
    executor: Annotated[
        str, typer.Option("--executor", help="ray, or local: one after another in this process.")
    ] = "ray",
    num_workers: Annotated[
        int | None, typer.Option("--num-workers", help="Ray workers; default all.")
    ] = None,
    cpus_per_worker: Annotated[float, typer.Option("--cpus-per-worker", help="CPU cores per worker.")] = 1.0,
    gpus_per_worker: Annotated[
        float | None,
        typer.Option("--gpus-per-worker", help="GPUs per worker; default 1 where this machine has one."),
    ] = None,
    unit_timeout: Annotated[
        float | None,
        typer.Option("--unit-timeout", help="Seconds after which a unit counts as hung; default by cost."),
    ] = None,
    address: Annotated[
        str | None, typer.Option("--address", help="Ray cluster to connect to; default a local one.")
    ] = None,
    set_: Sets = None,
    seed: Seed = 0,
    run_dir: RunDir = None,
    resume: Resume = False,
    data_dir: DataDir = None,
    download: Download = False,
    as_json: Json = False,
) -> None:
    """Rank architectures on distilled sets, and compare with their ranking on the full set."""
    with output(as_json) as emit:
        from ddray.config import parse_overrides
        from ddray.errors import unknown
        from ddray.ranking import command as rank
        from ddray.ranking.spaces import get_space
        from ddray.ranking.sweep import NasOptions, execute_locally, resolve_config

        get_space(space)
        if describe is not None:
            listed = rank.describe(space, describe)
            emit(listed, lambda: display.archs_table(space, listed["archs"]))
            return
        if executor not in ("ray", "local"):
            raise unknown("--executor", executor, ("ray", "local"))
        if pixel_space not in ("normalized", "zca", "raw"):
            raise unknown("--pixel-space", pixel_space, ("normalized", "zca", "raw"))
        rayless = {"--unit-timeout": unit_timeout, "--num-workers": num_workers, "--address": address}
        if executor == "local":
            refuse(rayless, "with --executor local, which runs unit after unit and waits for each")
        if scores is not None:
            trained = {"--proxy": proxy, "--baseline": baseline, "--compat": compat, "--set": set_}
            refuse(trained, "with --scores, which trains nothing")
        if gpus_per_worker is None:
            gpus_per_worker = float(scores is None and _has_cuda())
        options = NasOptions.parse(
            {
                "space": space,
                "sample": sample,
                "max_mflops": max_mflops,
                "seeds": seeds,
                "epochs": epochs,
                "truth": truth,
                "truth_epochs": truth_epochs,
                "truth_seeds": truth_seeds,
                "truth_column": truth_column,
                "seed": seed,
                "executor": executor,
                "cpus_per_worker": cpus_per_worker,
                "gpus_per_worker": gpus_per_worker,
                "num_workers": num_workers,
                "unit_timeout": unit_timeout,
                "address": address,
            },
            prefix="--",
        )
        if scores is not None:
            result = rank.compare_scores(Path(os.path.abspath(scores)), options)
        else:
            if not proxy:
                raise InputError("ddray nas needs --proxy FILE (or --describe, or --scores FILE.csv)")
            request = rank.NasRequest(
                proxies=tuple(Path(os.path.abspath(path)) for path in proxy),
                baselines=tuple(baseline or ()),
                dataset=dataset,
                pixel_space=pixel_space,  # type: ignore[arg-type]
                compat=compat,
                data_dir=absolute(data_dir),
                download=download,
            )
            if executor == "ray":
                from ddray.cluster.nas import RayExecutor

                execute: Any = RayExecutor(options)
            else:
                execute = execute_locally
            result = rank.run_nas(
                request,
                options,
                resolve_config(options, (parse_overrides(set_ or []),)),
                execute,
                run_dir=absolute(run_dir),
                resume=resume,
            )
        emit(result, lambda: display.nas_tables(result))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
