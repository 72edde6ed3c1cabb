"""`ddray evaluate`: fresh networks trained on a distilled set."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ddray.commands import display
from ddray.commands.options import Arch, DataDir, Device, Download, Json, Seed, absolute, output


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
    with output(as_json) as emit:
        from ddray.evaluation.options import EvaluateOptions
        from ddray.jobs import score as scoring
        from ddray.jobs.context import pick_device

        options = EvaluateOptions.parse(
            {
                "dataset": dataset,
                "protocol": protocol,
                "archs": arch or (),
                "seeds": seeds,
                "epochs": epochs,
                "split": split,
                "augment": augment,
                "recipe": recipe,
                "train_limit": train_limit,
                "num_tasks": num_tasks,
                "full_epochs": full_epochs,
                "finetune": finetune,
                "pixel_space": pixel_space,
                "seed": seed,
                "teachers": teacher or (),
                "sets": set_ or (),
                "ipc": ipc,
                "data_dir": absolute(data_dir),
                "download": download,
            },
            prefix="--",
        )
        result = scoring.evaluate(Path(os.path.abspath(file)), options, device=pick_device(device))
        title = f"{file.name}: {protocol}, {split}"
        emit(result, lambda: display.evaluate_tables(title, protocol, result["results"]))
