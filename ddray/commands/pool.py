"""`ddray pool`: networks that many runs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ddray.commands import display
from ddray.commands.options import DataDir, DatasetOption, Device, Download, Json, absolute, output
from ddray.pool.listing import list_pool, show_entry


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
    with output(as_json) as emit:
        from ddray.config import parse_overrides
        from ddray.data import open_dataset
        from ddray.jobs import pool_training as pool_api
        from ddray.jobs.context import pick_device

        options = {"--arch": arch, "--num-models": num_models, "--seed": seed}
        pool_api.check_kind(kind, [name for name, value in options.items() if value is not None])
        recipe = parse_overrides(set_ or []) | ({} if epochs is None else {"epochs": epochs})
        opened = open_dataset(dataset, data_dir=absolute(data_dir), download=download)
        folder, torch_device = absolute(out), pick_device(device)
        settings: dict[str, Any] = {
            "arch": arch or "auto",
            "recipe": recipe,
            "seed": seed or 0,
            "device": torch_device,
        }
        if kind == "diffusion":
            result = pool_api.train_diffusion(opened, recipe=recipe, device=torch_device, out=folder)
        elif kind == "ssl":
            result = pool_api.train_teacher(opened, **settings, folder=folder)
        else:
            num = 1 if num_models is None else num_models
            result = pool_api.train_pool(opened, **settings, num_models=num, folder=folder)
        emit(result, display.table_of("pool", {**result, "keys": "\n".join(result["keys"])}))


def pool_list(as_json: Json = False) -> None:
    """List what the pool under $DDRAY_HOME holds."""
    with output(as_json) as emit:
        result = list_pool()
        emit(result, lambda: display.pool_table(result["models"]))


def pool_show(
    key: Annotated[str, typer.Argument(help="Key of an entry, or its first characters.")],
    as_json: Json = False,
) -> None:
    """Say what an entry is and which tensors it holds."""
    with output(as_json) as emit:
        result = show_entry(key)
        emit(result, lambda: display.entry_tables(result))
