"""Folders that `datasets.save_to_disk` wrote: Arrow streams, listed by `state.json`, read by pyarrow."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from ddray.data.listing import find_parts
from ddray.errors import InputError, one_line

STATE: Final = "state.json"
SPLITS: Final = "dataset_dict.json"
ABOUT: Final = (STATE, SPLITS, "dataset_info.json")


def saved_files(folder: Path) -> dict[str, list[Path]]:
    """Return the train, test and val files of a saved DatasetDict; those of a saved Dataset are no part.

    Without files if the folder is neither.

    Raises:
        InputError: a list can't be read, or no split is train.
    """
    if (folder / STATE).is_file():
        return {"": _listed(folder)}
    if not (folder / SPLITS).is_file():
        return {}
    splits = _names(folder / SPLITS, "splits")
    parts = find_parts(folder, splits)
    if "train" not in parts:
        raise InputError(f"a saved DatasetDict must have a train split, got {', '.join(splits)} in {folder}")
    return {part: _listed(folder / split) for part, split in parts.items()}


def _listed(folder: Path) -> list[Path]:
    return [folder / name for name in _names(folder / STATE, "_data_files", "filename")]


def _names(file: Path, field: str, key: str | None = None) -> list[str]:
    """Return the names in a field of a JSON file that `datasets` wrote; each must lie in its folder."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))[field]
        names = [str(entry if key is None else entry[key]) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{field} must be readable, got {file}: {one_line(error)}") from error
    outside = [name for name in names if Path(name).name != name]
    if outside or not names:
        raise InputError(f"{field} must name what is in its folder, got {outside or 'nothing'} in {file}")
    return names


class ArrowFile:
    """A stream of Arrow's, mapped into memory, with what `pyarrow.parquet.ParquetFile` offers."""

    def __init__(self, file: Path) -> None:
        import pyarrow as pa

        self._table = pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
        self.schema_arrow = self._table.schema
        self.metadata = self._table  # has `num_rows` too

    def iter_batches(self, batch_size: int, columns: Sequence[str]) -> Iterator[Any]:
        """Yield the columns, so many rows at a time."""
        yield from self._table.select(list(columns)).to_batches(max_chunksize=batch_size)
