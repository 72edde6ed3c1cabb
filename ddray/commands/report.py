"""`ddray report`: one page over runs."""

from typing import Any

from ddray.commands import display
from ddray.commands.options import Emit, command
from ddray.config import AbsolutePath
from ddray.system.options import DataFolder


class ReportOptions(DataFolder):
    """Runs, and their page."""

    runs: tuple[AbsolutePath, ...]
    """Run folders of distill, tune, nas or bench."""
    out: AbsolutePath | None = None
    """The page; default <run>/report.html, report.html of several."""
    tsne: bool = True
    """Draw t-SNE planes; they need the datasets."""


@command(ReportOptions, example="ddray report runs/first runs/search --out page.html", arguments=("runs",))
def report(emit: Emit, **options: Any) -> None:
    """Write runs as one self-contained HTML page: leaderboard, methods, sets, curves, failures."""
    from ddray.report.page import default_out, write_page

    parsed = ReportOptions.pick(options)
    out = parsed.out or default_out(parsed.runs)
    result = write_page(parsed.runs, out, planes=parsed.tsne, data_dir=parsed.data_dir)
    emit(result, display.table_of("report", result.dump()))
