"""`ddray export`: a distilled set for other tools."""

from pathlib import Path
from typing import Any

from ddray.commands import display
from ddray.commands.options import Emit, command
from ddray.config import AbsolutePath, Config, Result, named


class ExportOptions(Config):
    """What is exported, and where to."""

    file: AbsolutePath
    """Distilled set."""
    out: AbsolutePath
    """A new folder, or a .parquet file."""
    form: str | None = named("format", "form", None)
    """folder or parquet; default by the name of OUT."""
    dataset: str | None = None
    """Of another project's file: what it was distilled from."""


class ExportResult(Result):
    """What `ddray export` prints."""

    out: str
    num_images: int


@command(ExportOptions, example="ddray export digits.pt digits.parquet", arguments=("file", "out"))
def export(emit: Emit, file: Path, out: Path, dataset: str | None = None, form: Any = None) -> None:
    """Write a distilled set for other tools: pictures by class, or one parquet file."""
    from ddray import api
    from ddray.errors import unknown

    if form not in (None, "folder", "parquet"):
        raise unknown("--format", form, ("folder", "parquet"))
    distilled = api.load(file, dataset=dataset)
    written = api.export(distilled, out, form=form)
    result = ExportResult(out=str(written), num_images=len(distilled.decode().images))
    emit(result, display.table_of("exported", result.dump()))
