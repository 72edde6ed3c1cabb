"""`ddray export`: a distilled set for other tools."""

from pathlib import Path
from typing import Any

from ddray.artifact.options import ForeignOptions
from ddray.commands import display
from ddray.commands.options import Emit, command
from ddray.config import AbsolutePath, Result, named


class ExportOptions(ForeignOptions):
    """What is exported, and where to."""

    file: AbsolutePath
    """Distilled set."""
    out: AbsolutePath
    """A new folder, or a .parquet file."""
    form: str | None = named("format", "form", None)
    """folder, parquet or ddranking (images.pt, labels.pt, lr.pt); default by the name of OUT."""
    dataset: str | None = None
    """Of another project's file: what it was distilled from."""


class ExportResult(Result):
    """What `ddray export` prints."""

    out: str
    num_images: int


@command(ExportOptions, example="ddray export digits.pt digits.parquet", arguments=("file", "out"))
def export(emit: Emit, file: Path, out: Path, form: Any = None, **foreign: Any) -> None:
    """Write a distilled set for other tools: pictures by class, one parquet file, or DD-Ranking's tensors."""
    from ddray import api
    from ddray.artifact.export import FORMS
    from ddray.errors import unknown

    if form not in (None, *FORMS):
        raise unknown("--format", form, FORMS)
    distilled = api.load(file, **foreign)
    written = api.export(distilled, out, form=form)
    result = ExportResult(out=str(written), num_images=len(distilled.decode().images))
    next_step = display.next_step("evaluate", written, "--dataset", distilled.meta.dataset)
    emit(result, lambda: [display.table_of("exported", result.dump()), next_step])
