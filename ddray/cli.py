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

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")
]
Method = Annotated[str, typer.Option("--method", help="Method or baseline, such as datadam, dm, random.")]
DatasetOption = Annotated[
    str, typer.Option("--dataset", help="Dataset name, or a folder (see `ddray data list`).")
]
Ipc = Annotated[int, typer.Option("--ipc", help="Images per class.")]
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
    ipc: Ipc,
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
    protocol: Annotated[str, typer.Option("--protocol", help="hard: train on hard labels.")] = "hard",
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
            pixel_space=pixel_space,  # type: ignore[arg-type]
            seed=seed,
            data_dir=_absolute(data_dir),
            download=download,
        )
        result = api.evaluate(Path(os.path.abspath(file)), options, device=plan.pick_device(device))
        emit(result, lambda: display.accuracy_table(f"{file.name}: {protocol}, {split}", result["results"]))


@app.command()
def tune(
    method: Method,
    dataset: DatasetOption = "digits",
    ipc: Ipc = 1,
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
            ipc=ipc,
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
                "final_sets": final_sets,
                "address": address,
            },
            prefix="--",
        )
        result = cluster_tune.tune(
            resolved, options, space_file=_absolute(space), run_dir=_absolute(run_dir), resume=resume
        )
        emit(result, lambda: display.tune_tables(result))


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


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 bad input of any kind, 1 anything else."""
    # Before torch is loaded: OpenMP threads that wait by spinning fight over the cores of a shared machine.
    # Two DataDAM runs at once on 2 cores took 1.1 to 8.8 s a step; with short spins 0.9 to 1.1 s (alone: 0.6,
    # both ways).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
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
        return _fail("interrupted; run again with --resume and the same --run-dir to continue", 1)
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
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int) -> int:
    """Print the one line."""
    sys.stderr.write("error: " + " ".join(message.split()) + "\n")
    return code


if __name__ == "__main__":
    main()
