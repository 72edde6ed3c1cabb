"""results.csv: a run's ledger as one flat table."""

from collections.abc import Sequence
from pathlib import Path

from ddray.config import flatten
from ddray.runs.ledger import Row
from ddray.system.files import write_text


def write_results(path: Path, rows: Sequence[Row]) -> None:
    """Write one line per row, nested values under dotted names; StorageError if the file can't be written."""
    import pandas as pd

    flat = [
        {"key": row.key, "kind": row.kind, "status": row.status, **flatten(row.result)}
        | {**flatten(row.spec, "spec."), "wall_s": round(row.wall_s, 3), "error": row.error}
        for row in rows
    ]
    write_text(path, pd.DataFrame(flat).convert_dtypes().to_csv(index=False))
