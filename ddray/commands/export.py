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
    """Distilled set: ours, another project's file, or what `ddray export` wrote."""
    out: AbsolutePath
    """A new folder, or a .parquet file; `ddray evaluate` and `nas` read both."""
    form: str | None = named("format", "form", None)
    """folder, parquet or ddranking (images.pt, labels.pt, lr.pt); default by the name of OUT."""
    dataset: str | None = None
    """Of another project's file: what it was distilled from."""


class ExportResult(Result):
    """What `ddray export` prints."""

    out: str
    num_images: int
    card: str | None = None
    """The dataset card, a README.md; absent for DD-Ranking's tensors."""


@command(ExportOptions, example="ddray export digits.pt digits.parquet", arguments=("file", "out"))
def export(emit: Emit, file: Path, out: Path, form: Any = None, **foreign: Any) -> None:
    """Write a distilled set for other tools: pictures by class, one parquet file, or DD-Ranking's tensors.

    Pictures and parquet files come with a dataset card, and a whitened set's with its whitening.
    """
    from ddray import api
    from ddray.artifact.export import FORMS, export_set
    from ddray.errors import unknown

    if form not in (None, *FORMS):
        raise unknown("--format", form, FORMS)
    distilled = api.load(file, **foreign)
    out = out.absolute()
    card = export_set(distilled, out, form)
    facts = {"out": str(out), "num_images": len(distilled.decode().images)}
    result = ExportResult.parse(facts if card is None else {**facts, "card": str(card)})
    space = ("--pixel-space", "zca") if card is None and distilled.zca else ()
    next_step = display.next_step("evaluate", out, "--dataset", distilled.meta.dataset, *space)
    emit(result, lambda: [display.table_of("exported", result.dump()), next_step])
