"""Hugging Face style parquet shards: columns img|image {bytes, path} and label|fine_label."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from ddray.data.sources import Item, Layout, Source, from_one_source, from_sources
from ddray.errors import InputError

_BATCH: Final = 1024
_IMAGE_COLUMNS: Final = ("img", "image")
_LABEL_COLUMNS: Final = ("label", "fine_label")
_TEST_PREFIXES: Final = ("test", "validation", "valid", "val")


def shards(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the (train, test) shards in `folder` or its `data/`; empty if there are none.

    Test shards are `test*`, or else `validation*`, `valid*`, `val*`. Train shards are `train*`, or else all
    that are not test.
    """
    files = sorted(folder.glob("*.parquet")) or sorted((folder / "data").glob("*.parquet"))
    train = [file for file in files if file.name.startswith("train")]
    train = train or [file for file in files if not file.name.startswith(_TEST_PREFIXES)]
    tests = ([file for file in files if file.name.startswith(prefix)] for prefix in _TEST_PREFIXES)
    return train, next(filter(None, tests), [])


def layout_of_parquet(folder: Path, names: tuple[str, ...] = ()) -> Layout | None:
    """Return the layout of a folder of shards, or None; without test shards, test is a fixed 20%.

    `names` are the class names to use where the shards name none.

    Raises:
        InputError: there are test shards only, or a train shard cannot be read.
    """
    train, test = shards(folder)
    if not train:
        if test:
            raise InputError(
                f"a parquet folder must have train-*.parquet shards, got only {test[0].name} in {folder}"
            )
        return None
    class_names = _class_names(train, names)
    if not test:
        return from_one_source(class_names, _source(train))
    return from_sources(class_names, _source(train), lambda: _source(test))


def _class_names(files: Sequence[Path], default: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names in the first shard's metadata, else the default, else a number per label."""
    schema = _opened(files[0]).schema_arrow
    _, column = _columns(files[0], schema.names)
    named = _names_in((schema.metadata or {}).get(b"huggingface", b"{}"), column) or default
    if named:
        return named
    largest = -1
    for file in files:
        for labels in _read(file, [column]):
            largest = max([largest, *_labels(file, labels[0])])
    return tuple(str(label) for label in range(largest + 1))


def _source(files: Sequence[Path]) -> Source:
    """Return the images of shards, in order."""
    return Source(
        files, lambda: sum(_opened(file).metadata.num_rows for file in files), lambda: _batches(files)
    )


def _names_in(metadata: bytes, column: str) -> tuple[str, ...]:
    """Return the names of the ClassLabel feature `column` in Hugging Face's metadata, if it is there."""
    try:
        names = json.loads(metadata)["info"]["features"][column]["names"]
    except (ValueError, KeyError, TypeError):
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turn what pyarrow raises for a broken shard into an InputError."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"parquet shard must be readable, got {file}: {reason}") from error


def _opened(file: Path) -> Any:
    import pyarrow.parquet

    with _readable(file):
        return pyarrow.parquet.ParquetFile(file)


def _columns(file: Path, names: Sequence[str]) -> list[str]:
    """Return the names of the image and the label column."""
    columns = []
    for kind, accepted in (("an image", _IMAGE_COLUMNS), ("a label", _LABEL_COLUMNS)):
        column = next((name for name in accepted if name in names), None)
        if column is None:
            raise InputError(
                f"parquet shard must have {kind} column named {' or '.join(accepted)}, "
                f"got {', '.join(names)} in {file}"
            )
        columns.append(column)
    return columns


def _read(file: Path, columns: list[str]) -> Iterator[list[Any]]:
    """Yield the columns' values, a batch of rows at a time."""
    shard = _opened(file)
    with _readable(file):
        for batch in shard.iter_batches(batch_size=_BATCH, columns=columns):
            yield [batch.column(name).to_pylist() for name in columns]


def _labels(file: Path, values: Sequence[Any]) -> list[int]:
    for value in values:
        if not isinstance(value, int) or value < 0:
            raise InputError(f"labels must be integers from 0 on, got {value!r} in {file}")
    return list(values)


def _batches(files: Sequence[Path]) -> Iterator[list[Item]]:
    """Yield the images of shards with their labels."""
    for file in files:
        row = 0
        for images, labels in _read(file, _columns(file, _opened(file).schema_arrow.names)):
            batch = []
            for image, label in zip(images, _labels(file, labels), strict=True):
                where = f"{file}, row {row}"
                data = image.get("bytes") if isinstance(image, dict) else image
                if not isinstance(data, bytes):
                    raise InputError(f"parquet shard must hold encoded image bytes, got none in {where}")
                batch.append(Item(where, label, data))
                row += 1
            yield batch
