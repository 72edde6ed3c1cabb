"""results.csv: a run's ledger as one flat table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to one level with dotted names."""
    leaves: dict[str, Any] = {}
    for name, child in value.items():
        path = f"{prefix}{name}"
        leaves |= flatten(child, f"{path}.") if isinstance(child, dict) else {path: child}
    return leaves
