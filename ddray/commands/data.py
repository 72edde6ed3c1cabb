"""`ddray data`: the datasets."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ddray.commands import display
from ddray.commands.options import DataDir, Download, Json, absolute, output
from ddray.errors import InputError


def data_info(
    name: Annotated[str, typer.Argument(help="Dataset name, or a folder.")],
    data_dir: DataDir = None,
    download: Download = False,
    as_json: Json = False,
) -> None:
    """Say what a dataset holds."""
    with output(as_json) as emit:
        from ddray.data.loaders import data_info as describe_dataset

        result = describe_dataset(name, data_dir=absolute(data_dir), download=download)
        emit(result, display.table_of(name, result))


def data_list(data_dir: DataDir = None, as_json: Json = False) -> None:
    """List the known datasets, and which of them are there."""
    with output(as_json) as emit:
        from ddray.data import dataset_names, open_dataset

        datasets: list[dict[str, Any]] = []
        for name in dataset_names():
            try:
                open_dataset(name, data_dir=absolute(data_dir))
            except InputError:
                datasets.append({"name": name, "found": False})
            else:
                datasets.append({"name": name, "found": True})
        emit(
            {"datasets": datasets},
            display.table_of("datasets", {d["name"]: "found" if d["found"] else "-" for d in datasets}),
        )
