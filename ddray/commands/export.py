"""`ddray export`: a distilled set for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddray.commands import display
from ddray.commands.options import Json, output


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
    with output(as_json) as emit:
        from ddray import api as library
        from ddray.errors import unknown

        if form not in (None, "folder", "parquet"):
            raise unknown("--format", form, ("folder", "parquet"))
        distilled = library.load(file, dataset=dataset)
        written = library.export(distilled, out, form=form)  # type: ignore[arg-type]
        result = {"out": str(written), "num_images": len(distilled.decode().images)}
        emit(result, display.table_of("exported", result))
