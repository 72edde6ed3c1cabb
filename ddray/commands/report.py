"""`ddray report`: one page over runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ddray.commands import display
from ddray.commands.options import DataDir, Json, absolute, output


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
    with output(as_json) as emit:
        from ddray.report.page import default_out, write_page

        folders = [Path(os.path.abspath(run)) for run in runs]
        target = absolute(out) or default_out(folders)
        result = write_page(folders, target, planes=tsne, data_dir=absolute(data_dir))
        emit(result, display.table_of("report", result))
