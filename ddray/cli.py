"""The `ddray` command. One function per command; torch, Ray and the rest are imported inside them."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ddray import display
from ddray.errors import DdrayError, InputError, InterruptedRunError
from ddray.memory import reuse_freed_memory

app = typer.Typer(
    name="ddray",
    help="Distil datasets, tune the distillation over a cluster, and score what comes out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(
    help="Datasets: what is known, what is there.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(data_app, name="data")
pool_app = typer.Typer(
    help="Model pools: networks that many runs share, trained once.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(pool_app, name="pool")

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")
]
Method = Annotated[str, typer.Option("--method", help="Method or baseline, such as datadam, dm, random.")]
DatasetOption = Annotated[
    str, typer.Option("--dataset", help="Dataset name, or a folder (see `ddray data list`).")
]
Ipc = Annotated[
    int | None, typer.Option("--ipc", help="Images per class (self-supervised methods: --budget).")
]
Budget = Annotated[
    int | None, typer.Option("--budget", help="Images of storage, for self-supervised methods.")
]
Preset = Annotated[str, typer.Option("--preset", help="paper: as printed; repo: as in the authors' code.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML that overrides preset and shipped config.")
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="key=value, such as method.lr_img=0.5; repeatable.")
]
Seed = Annotated[int, typer.Option("--seed", help="Every draw is derived from it.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:<n>.")]
RunDir = Annotated[
    Path | None, typer.Option("--run-dir", help="Folder of the run; default runs/<command>-<number>.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --run-dir.")]
DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Where datasets are; default $DDRAY_DATA.")]
Download = Annotated[bool, typer.Option("--download", help="Let torchvision download what is missing.")]
Arch = Annotated[list[str] | None, typer.Option("--arch", help="Network to train; repeatable.")]


@app.command()
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
    with _output(as_json) as emit:
        from ddray import api, plan
        from ddray.data import open_dataset
        from ddray.methods import get_method

        get_method(method)
        opened = open_dataset(dataset, data_dir=_absolute(data_dir), download=download)
        resolved = plan.resolve(
            method,
            opened,
            ipc=ipc,
            budget=budget,
            seed=seed,
            preset=preset,
            config_file=_absolute(config),
            layers=plan.override_layers(set_ or [], steps),
        )
        result = api.distill(
            resolved,
            device=plan.pick_device(device),
            run_dir=_absolute(run_dir),
            resume=resume,
            out=_absolute(out),
            val_seed=val_seed,
        )
        emit(result, display.table_of("distilled", result))


@app.command()
def evaluate(
    file: Annotated[
        Path, typer.Argument(help="Distilled set: ours, DC family's res_*.pt, MTT's images_best.pt.")
    ],
    dataset: Annotated[
        str | None, typer.Option("--dataset", help="Target; default the artifact's own.")
    ] = None,
    protocol: Annotated[
        str,
        typer.Option(
            "--protocol",
            help="hard: train on hard labels; soft: on a teacher's; linear: pre-train, freeze, probe; "
            "robust: LRS and ARS; continual: class by class, as a memory.",
        ),
    ] = "hard",
    arch: Arch = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", help="Networks per architecture; default 5.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", help="Epochs of training; default the method's.")
    ] = None,
    split: Annotated[
        str, typer.Option("--split", help="test, or val: the tenth of train a search keeps back.")
    ] = "test",
    augment: Annotated[
        str | None,
        typer.Option(
            "--augment", help="dsa, dsa_idc, autoaugment, randaugment or none; default the method's."
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            help="hard: vico, idc or table5 (D3HR's); soft: paper or repo. How all sets are trained on.",
        ),
    ] = None,
    train_limit: Annotated[
        int | None,
        typer.Option("--train-limit", help="Train on at most so many images (linear: of the target)."),
    ] = None,
    num_tasks: Annotated[
        int | None, typer.Option("--num-tasks", help="continual: tasks the classes come in; default 5.")
    ] = None,
    full_epochs: Annotated[
        int | None,
        typer.Option("--full-epochs", help="robust: epochs on the whole dataset; default as --epochs."),
    ] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option("--teacher", help="soft: who labels; several are averaged; default resnet18."),
    ] = None,
    ipc: Annotated[
        int | None, typer.Option("--ipc", help="Images per class, for sets that generate them.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value of the protocol, such as teacher.epochs=30; repeatable."),
    ] = None,
    finetune: Annotated[
        bool, typer.Option("--finetune", help="linear: fine-tune the whole network instead of probing.")
    ] = False,
    pixel_space: Annotated[
        str, typer.Option("--pixel-space", help="Of another project's file: normalized, zca or raw.")
    ] = "normalized",
    seed: Seed = 0,
    device: Device = "auto",
    data_dir: DataDir = None,
    download: Download = False,
    as_json: Json = False,
) -> None:
    """Train fresh networks on a distilled set and report their accuracy."""
    with _output(as_json) as emit:
        from ddray import api, plan
        from ddray.errors import unknown

        if pixel_space not in ("normalized", "zca", "raw"):
            raise unknown("--pixel-space", pixel_space, ("normalized", "zca", "raw"))
        options = api.EvaluateOptions(
            dataset=dataset,
            protocol=protocol,
            archs=tuple(arch or ()),
            seeds=seeds,
            epochs=epochs,
            split=split,  # type: ignore[arg-type]
            augment=augment,  # type: ignore[arg-type]
            recipe=recipe,
            train_limit=train_limit,
            num_tasks=num_tasks,
            full_epochs=full_epochs,
            finetune=finetune,
            pixel_space=pixel_space,  # type: ignore[arg-type]
            seed=seed,
            teachers=tuple(teacher or ()),
            sets=tuple(set_ or ()),
            ipc=ipc,
            data_dir=_absolute(data_dir),
            download=download,
        )
        result = api.evaluate(Path(os.path.abspath(file)), options, device=plan.pick_device(device))
        emit(result, lambda: display.evaluate_tables(f"{file.name}: {protocol}, {split}", result["results"]))


@app.command()
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
    with _output(as_json) as emit:
        from ddray import plan
        from ddray.cluster import tune as cluster_tune
        from ddray.data import open_dataset
        from ddray.methods import get_method

        get_method(method)
        opened = open_dataset(dataset, data_dir=_absolute(data_dir), download=download)
        resolved = plan.resolve(
            method,
            opened,
            ipc=1 if ipc is None and budget is None else ipc,
            budget=budget,
            seed=seed,
            preset=preset,
            config_file=_absolute(config),
            layers=plan.override_layers(set_ or [], steps),
        )
        options = cluster_tune.TuneOptions.parse(
            {
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
        result = cluster_tune.tune(
            resolved, options, space_file=_absolute(space), run_dir=_absolute(run_dir), resume=resume
        )
        emit(result, lambda: display.tune_tables(result))


@app.command()
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
    with _output(as_json) as emit:
        from ddray.config import parse_overrides
        from ddray.errors import unknown
        from ddray.nas import rank
        from ddray.nas.spaces import get_space
        from ddray.nas.sweep import NasOptions, execute_locally, resolve_config

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
            _refuse(rayless, "with --executor local, which runs unit after unit and waits for each")
        if scores is not None:
            trained = {"--proxy": proxy, "--baseline": baseline, "--compat": compat, "--set": set_}
            _refuse(trained, "with --scores, which trains nothing")
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
            result = rank.rank_scores(Path(os.path.abspath(scores)), options)
        else:
            if not proxy:
                raise InputError("ddray nas needs --proxy FILE (or --describe, or --scores FILE.csv)")
            request = rank.NasRequest(
                proxies=tuple(Path(os.path.abspath(path)) for path in proxy),
                baselines=tuple(baseline or ()),
                dataset=dataset,
                pixel_space=pixel_space,  # type: ignore[arg-type]
                compat=compat,
                data_dir=_absolute(data_dir),
                download=download,
            )
            if executor == "ray":
                from ddray.cluster.nas import RayExecutor

                execute: Any = RayExecutor(options)
            else:
                execute = execute_locally
            result = rank.rank_architectures(
                request,
                options,
                resolve_config(options, (parse_overrides(set_ or []),)),
                execute,
                run_dir=_absolute(run_dir),
                resume=resume,
            )
        emit(result, lambda: display.nas_tables(result))


@app.command()
def bench(
    file: Annotated[Path, typer.Argument(help="YAML of the table, such as configs/bench/<name>.yaml.")],
    scale: Annotated[
        str, typer.Option("--scale", help="paper: as written; cpu: minutes to hours; smoke: does it run.")
    ] = "paper",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the unit graph and its expected cost; run nothing.")
    ] = False,
    executor: Annotated[
        str, typer.Option("--executor", help="ray, or local: one after another in this process.")
    ] = "ray",
    cpus_per_unit: Annotated[float, typer.Option("--cpus-per-unit", help="CPU cores per unit.")] = 1.0,
    gpus_per_unit: Annotated[
        float, typer.Option("--gpus-per-unit", help="GPUs per unit; fractions share one.")
    ] = 0.0,
    max_concurrent: Annotated[int | None, typer.Option("--max-concurrent", help="Units at a time.")] = None,
    address: Annotated[
        str | None, typer.Option("--address", help="Ray cluster to connect to; default a local one.")
    ] = None,
    unit_timeout: Annotated[
        float | None, typer.Option("--unit-timeout", help="Seconds after which a unit counts as hung.")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="With --resume: run crashed units again.")
    ] = False,
    run_dir: RunDir = None,
    resume: Resume = False,
    data_dir: DataDir = None,
    download: Download = False,
    as_json: Json = False,
) -> None:
    """Run a table, methods x datasets x sizes x seeds, and set its numbers beside the published ones."""
    with _output(as_json) as emit:
        from ddray.bench.display import bench_tables, forecast_tables
        from ddray.bench.run import BenchOptions
        from ddray.bench.run import dry_run as forecast
        from ddray.bench.spec import read_spec
        from ddray.cluster import bench as cluster_bench

        spec = read_spec(Path(os.path.abspath(file)), scale)
        options = BenchOptions.parse(
            {
                "scale": scale,
                "executor": executor,
                "cpus_per_unit": cpus_per_unit,
                "gpus_per_unit": gpus_per_unit,
                "max_concurrent": max_concurrent,
                "unit_timeout": unit_timeout,
                "address": address,
                "retry_failed": retry_failed,
                "data_dir": _absolute(data_dir),
                "download": download,
            },
            prefix="--",
        )
        if dry_run:
            found = forecast(spec, options, run_dir=_absolute(run_dir))
            emit(found, lambda: forecast_tables(found))
            return
        result = cluster_bench.bench(spec, options, run_dir=_absolute(run_dir), resume=resume)
        emit(result, lambda: bench_tables(spec.name, result))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders of distill, tune, nas or bench.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The page; default <run>/report.html, report.html of several."),
    ] = None,
    tsne: Annotated[
        bool, typer.Option("--tsne/--no-tsne", help="Draw t-SNE planes; they need the datasets.")
    ] = True,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Write runs as one self-contained HTML page: leaderboard, methods, sets, curves, failures."""
    with _output(as_json) as emit:
        from ddray.report.page import default_out, write_page

        folders = [Path(os.path.abspath(run)) for run in runs]
        target = _absolute(out) or default_out(folders)
        result = write_page(folders, target, planes=tsne, data_dir=_absolute(data_dir))
        emit(result, display.table_of("report", result))


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="Distilled set.")],
    out: Annotated[Path, typer.Argument(help="A new folder, or a .parquet file.")],
    form: Annotated[
        str | None, typer.Option("--format", help="folder or parquet; default by the name of OUT.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", help="Of another project's file: what it was distilled from.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a distilled set for other tools: pictures by class, or one parquet file."""
    with _output(as_json) as emit:
        from ddray import library
        from ddray.errors import unknown

        if form not in (None, "folder", "parquet"):
            raise unknown("--format", form, ("folder", "parquet"))
        held = library.load(file, dataset=dataset)
        written = library.export(held, out, form=form)  # type: ignore[arg-type]
        result = {"out": str(written), "num_images": len(held.decode().images)}
        emit(result, display.table_of("exported", result))


@data_app.command("info")
def data_info(
    name: Annotated[str, typer.Argument(help="Dataset name, or a folder.")],
    data_dir: DataDir = None,
    download: Download = False,
    as_json: Json = False,
) -> None:
    """Say what a dataset holds."""
    with _output(as_json) as emit:
        from ddray import api

        result = api.data_info(name, data_dir=_absolute(data_dir), download=download)
        emit(result, display.table_of(name, result))


@data_app.command("list")
def data_list(data_dir: DataDir = None, as_json: Json = False) -> None:
    """List the known datasets, and which of them are there."""
    with _output(as_json) as emit:
        from ddray.data import dataset_names, open_dataset

        found: list[dict[str, Any]] = []
        for name in dataset_names():
            try:
                open_dataset(name, data_dir=_absolute(data_dir))
            except InputError:
                found.append({"name": name, "found": False})
            else:
                found.append({"name": name, "found": True})
        emit(
            {"datasets": found},
            display.table_of("datasets", {d["name"]: "found" if d["found"] else "-" for d in found}),
        )


@pool_app.command("train")
def pool_train(
    kind: Annotated[
        str,
        typer.Option(
            "--kind",
            help="supervised: networks trained on labels; ssl: the self-supervised methods' teacher; "
            "diffusion: D3HR's generator.",
        ),
    ],
    dataset: DatasetOption = "digits",
    arch: Annotated[
        str | None,
        typer.Option("--arch", help="supervised: default auto, the field's ConvNet; ssl: default resnet18."),
    ] = None,
    num_models: Annotated[
        int | None,
        typer.Option("--num-models", help="supervised: networks, on seeds that count up; default 1."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", help="Epochs of training; supervised: default 20.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value of the recipe, such as batch=64; repeatable."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", help="supervised: the first network's, ssl: the teacher's; default 0."),
    ] = None,
    device: Device = "auto",
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Pool folder, default $DDRAY_HOME/pool; diffusion: DiTPipeline folder."),
    ] = None,
    data_dir: DataDir = None,
    download: Download = False,
    as_json: Json = False,
) -> None:
    """Train the networks of a pool that are not there yet."""
    with _output(as_json) as emit:
        from ddray import plan, pool_api
        from ddray.config import parse_overrides
        from ddray.data import open_dataset

        options = {"--arch": arch, "--num-models": num_models, "--seed": seed}
        pool_api.check_kind(kind, [name for name, value in options.items() if value is not None])
        recipe = parse_overrides(set_ or []) | ({} if epochs is None else {"epochs": epochs})
        opened = open_dataset(dataset, data_dir=_absolute(data_dir), download=download)
        place, picked = _absolute(out), plan.pick_device(device)
        own: dict[str, Any] = {"arch": arch or "auto", "recipe": recipe, "seed": seed or 0, "device": picked}
        if kind == "diffusion":
            result = pool_api.train_diffusion(opened, recipe=recipe, device=picked, out=place)
        elif kind == "ssl":
            result = pool_api.train_teacher(opened, **own, folder=place)
        else:
            num = 1 if num_models is None else num_models
            result = pool_api.train_pool(opened, **own, num_models=num, folder=place)
        emit(result, display.table_of("pool", {**result, "keys": "\n".join(result["keys"])}))


@pool_app.command("list")
def pool_list(as_json: Json = False) -> None:
    """List what the pool under $DDRAY_HOME holds."""
    with _output(as_json) as emit:
        from ddray import pool_api

        result = pool_api.list_pool()
        emit(result, lambda: display.pool_table(result["models"]))


@pool_app.command("show")
def pool_show(
    key: Annotated[str, typer.Argument(help="Key of an entry, or its first characters.")],
    as_json: Json = False,
) -> None:
    """Say what an entry is and which tensors it holds."""
    with _output(as_json) as emit:
        from ddray import pool_api

        result = pool_api.show_entry(key)
        emit(result, lambda: display.entry_tables(result))


@app.command()
def doctor(
    address: Annotated[
        str | None, typer.Option("--address", help="Ray cluster to look at; default a local one.")
    ] = None,
    run_dir: Annotated[Path, typer.Option("--run-dir", help="Folder that all nodes must share.")] = Path(
        "runs"
    ),
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Check versions, devices, Ray, the data folder and a shared-storage write."""
    with _output(as_json) as emit:
        from ddray.cluster.doctor import examine

        result = examine(
            address=address, run_dir=Path(os.path.abspath(run_dir)), data_dir=_absolute(data_dir)
        )
        emit(
            result,
            display.table_of(
                "doctor", {c["check"]: f"{c['status']}: {c['detail']}" for c in result["checks"]}
            ),
        )
        if not result["ok"]:
            failed = [c["check"] for c in result["checks"] if c["status"] == "failed"]
            raise DdrayError(f"failed checks: {', '.join(failed)}; see above")


def _refuse(given: dict[str, Any], where: str) -> None:
    """Refuse options that would be ignored.

    Raises:
        InputError: with the first one that has a value.
    """
    for option, value in given.items():
        if value not in (None, []):
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            raise InputError(f"{option} must be left out {where}, got {shown}")


def _has_cuda() -> bool:
    """Return whether torch sees a GPU."""
    import torch

    return torch.cuda.is_available()


def _absolute(path: Path | None) -> Path | None:
    """Make a path absolute at the edge: Ray's workers have other working directories."""
    return None if path is None else Path(os.path.abspath(path.expanduser()))


Emit = Callable[[dict[str, Any], Any], None]


@contextlib.contextmanager
def _output(as_json: bool) -> Iterator[Emit]:
    """Give the function that prints a command's result.

    With --json everything that libraries print on stdout while the command works is sent to stderr, on the
    level of the file descriptor, so that the one JSON object is alone there.
    """
    if not as_json:
        yield lambda result, table: display.show(table() if callable(table) else table)
        return
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(2, 1)
    try:

        def emit(result: dict[str, Any], table: Any) -> None:
            from ddray.api import to_json

            sys.stdout.flush()
            os.write(real, (to_json(result) + "\n").encode())

        yield emit
    finally:
        sys.stdout.flush()
        os.dup2(real, 1)
        os.close(real)


# Newer versions of Typer carry a copy of click, older ones use click: its own error's base is right in both.
_USAGE_ERROR: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
_INTERRUPTED = 130  # what Typer returns after Ctrl-C
_CONTINUE = "interrupted; run again with --resume and the same --run-dir to continue"


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 bad input of any kind, 1 anything else."""
    # Before torch is loaded: OpenMP threads that wait by spinning fight over the cores of a shared machine.
    # Two DataDAM runs at once on 2 cores took 1.1 to 8.8 s a step; with short spins 0.9 to 1.1 s (alone: 0.6,
    # both ways).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    reuse_freed_memory()
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr
    )
    for name in ("matplotlib", "torch", "filelock", "fsspec", "PIL", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)
    sys.exit(_run(arguments, debug))


def _run(arguments: list[str], debug: bool) -> int:
    """Run one command; return the exit code, after one line on stderr for any failure."""
    try:
        code = typer.main.get_command(app).main(arguments, prog_name="ddray", standalone_mode=False)
    except _USAGE_ERROR as error:
        return _fail(error.format_message(), 2)
    except (typer.Abort, KeyboardInterrupt):
        return _fail(_CONTINUE, 1)
    except InterruptedRunError as error:
        return _fail(str(error), 1)
    except DdrayError as error:
        if debug:
            raise
        return _fail(str(error), error.exit_code)
    except OSError as error:
        if debug:
            raise
        return _fail(f"{error.filename or 'a file'}: {error.strerror or error}", 1)
    except Exception as error:  # the last line of defence: one line, the traceback with --debug
        if debug:
            raise
        text = " ".join(str(error).split())[:300]
        return _fail(f"{type(error).__name__}: {text} (--debug shows the traceback)", 1)
    if code == _INTERRUPTED:
        return _fail(_CONTINUE, 1)
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int) -> int:
    """Print the one line."""
    sys.stderr.write("error: " + " ".join(message.split()) + "\n")
    return code


if __name__ == "__main__":
    main()
