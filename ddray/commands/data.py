"""`ddray data`: the datasets."""

from typing import Any

from ddray.commands import display
from ddray.commands.options import Emit, command, retyped
from ddray.config import Config
from ddray.system.options import ContentOptions, DataFolder, DataOptions


class DatasetArgument(Config):
    """The dataset to describe."""

    name: str
    """Dataset name, or a folder."""


@command(DatasetArgument, DataOptions, example="ddray data info cifar10", arguments=("name",))
def data_info(emit: Emit, name: str, **options: Any) -> None:
    """Say what a dataset holds."""
    from ddray.data.loaders import data_info as describe_dataset

    result = describe_dataset(name, **DataOptions.pick(options).opening())
    lines = {**result.dump(), "warnings": "\n".join(result.warnings)}
    reading = retyped(options, DataFolder, ContentOptions)
    next_step = display.next_step("distill", "--method", "dm", "--dataset", name, "--ipc", 1, *reading)
    emit(result, lambda: [display.table_of(name, lines), next_step])


@command(DataFolder, example="ddray data list --data-dir ~/datasets")
def data_list(emit: Emit, **options: Any) -> None:
    """List the known datasets, and which of them are there."""
    from ddray.data.loaders import list_datasets

    result = list_datasets(data_dir=DataFolder.pick(options).data_dir)
    lines = {entry["name"]: "found" if entry["found"] else "-" for entry in result.datasets}
    emit(result, lambda: [display.table_of("datasets", lines), display.next_step("data", "info", "digits")])
