"""`ddray claims`: a table, and which of its claims hold."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddray.commands import display
from ddray.commands.options import Emit, command, retyped
from ddray.config import AbsolutePath, Config
from ddray.system.options import DataFolder, RunOptions
from ddray.tables.options import BenchOptions
from ddray.tables.result import ClaimsResult


class ClaimsFile(Config):
    """The table with its claims."""

    file: AbsolutePath
    """YAML of a table with claims: [{say, better, worse}], such as configs/claims/<name>.yaml."""


@command(
    ClaimsFile,
    BenchOptions,
    RunOptions,
    example="ddray claims configs/claims/digits.yaml --run-dir runs/claims",
    arguments=("file",),
)
def claims(emit: Emit, file: Path, **options: Any) -> None:
    """Run a table and say which of its claims hold, by a paired test over its sets."""
    from ddray import api

    result = api.claims(file, **options)
    emit(result, lambda: claims_tables(result, retyped(options, DataFolder)))


def claims_tables(result: ClaimsResult, reading: Sequence[object] = ()) -> list[Any]:
    """Return what became of each claim, how it was decided, failures, and where the page is."""
    from ddray.tables.claims import claims_table

    shared, lines = claims_table(result.claims)
    columns = [
        name for name in ("claim", "rows", "verdict", "effect", "p", "n", "budget") if name in lines[0]
    ]
    title = f"{result.name}. {shared}" if shared else result.name
    summary = {"test": result.test, "failed units": result.num_failed, "report": result.report}
    return [
        display.table(title, columns, [[line[name] for name in columns] for line in lines]),
        *(f"failed: {one['unit']}: {one['reason']}" for one in result.failures),
        display.table_of("claims", summary),
        display.next_step("report", Path(result.run_dir), *reading),
    ]
