"""Hugging Face style parquet shards: a column of images {bytes, path} and one of labels."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from ddray.data import arrays
from ddray.data.listing import Skipped, halves_of, loose_files, part_in, part_of, subfolders
from ddray.data.lists import LABEL_COLUMNS
from ddray.data.pictures import Item
from ddray.data.saved import ABOUT, ArrowFile, saved_files
from ddray.data.sources import Layout, Source, from_one_source, from_sources
from ddray.errors import InputError, one_line
from ddray.system.files import reading_error

log = logging.getLogger(__name__)

_BATCH: Final = 1024
_IMAGE_COLUMNS: Final = ("img", "image")


def shards(folder: Path) -> dict[str, list[Path]]:
    """Return the shards of a folder by part: train, test, val, or "" if nothing says it; empty without any.

    They lie in the folder itself, in `data/`, or in the folder of a configuration, such as `plain_text/`. The
    name of a shard, or of its folder, says its part.

    Raises:
        InputError: there are several configurations.
    """
    files = _files(folder)
    configs: dict[str, None] = {}
    parts: dict[str, list[Path]] = {}
    for file in files:
        relative = file.relative_to(folder)
        configs["/".join(n for n in relative.parts[:-1] if n != "data" and part_of(n) is None)] = None
        parts.setdefault(part_in(relative), []).append(file)
    if len(configs) > 1:
        raise InputError(
            f"a dataset must be one configuration, got {', '.join(configs)} in {folder}; name one's folder"
        )
    return parts


def _files(folder: Path) -> list[Path]:
    """Return the shards of a folder, or else of its `data/`, or else those one level down."""
    inner = [folder / name for name in subfolders(folder)]
    of_parts = [path / name for path in inner for name in subfolders(path) if part_of(name)]
    for folders in ([folder], [folder / "data"], inner, of_parts):
        if files := sorted(file for path in folders for file in loose_files(path, (".parquet",))):
            return files
    return []


def layout_of_parquet(
    folder: Path, names: tuple[str, ...] = (), label_column: str | None = None
) -> Layout | None:
    """Return the layout of a folder of shards, or None; without labelled test shards, test is a fixed 20%.

    Shards that order the names of their classes differently are matched by name.

    Args:
        folder: where they are.
        names: class names to use where the shards name none.
        label_column: the column with the classes; None: the first of `LABEL_COLUMNS`.

    Raises:
        InputError: there are no train shards, or one can't be read.
    """
    parts = saved_files(folder) or shards(folder)
    if not parts:
        return None
    by_part = {kind: [Shard(file, label_column) for file in files] for kind, files in parts.items()}
    skipped = Skipped(folder, (".parquet", ".arrow"), "shards that aren't read")
    train, test = halves_of(parts, skipped, "shards", lambda kind: _has_labels(by_part[kind]))
    of_parts = {file.parent for files in parts.values() for file in files}
    skipped.covered = [
        *(file for kind in (train, test) if kind is not None for file in parts[kind]),
        *(path / name for path in {folder, *of_parts} for name in ABOUT),
    ]
    class_names, numbered = _class_names(by_part[train], () if label_column else names)
    source = _source(by_part[train], class_names, numbered=numbered)
    if test is None:
        layout = from_one_source(class_names, source)
    else:
        held_out = by_part[test]
        layout = from_sources(class_names, source, lambda: _source(held_out, class_names, numbered=numbered))
    return replace(layout, options=("label_column",), skipped=skipped)


@dataclass(frozen=True)
class Shard:
    """A parquet file, and the column of its classes if it is set."""

    file: Path
    label_column: str | None = None

    @cached_property
    def schema(self) -> Any:
        """The columns, as pyarrow describes them."""
        return self.opened().schema_arrow

    @cached_property
    def label(self) -> str | None:
        """The column of the labels; None if there is none."""
        accepted = LABEL_COLUMNS if self.label_column is None else (self.label_column,)
        return next((name for name in accepted if name in self.schema.names), None)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the labels in Hugging Face's metadata, in its order; empty if there are none."""
        metadata = (self.schema.metadata or {}).get(b"huggingface", b"{}")
        try:
            names = json.loads(metadata)["info"]["features"][self.label]["names"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return ()
        return tuple(map(str, names)) if isinstance(names, list) else ()

    def columns(self) -> tuple[str, str]:
        """Return the columns of the images and of the labels.

        Raises:
            InputError: there is none for one of them.
        """
        image = next((name for name in _IMAGE_COLUMNS if name in self.schema.names), None)
        listed = ", ".join(self.schema.names)
        if image is None:
            raise InputError(
                f"parquet shard must have an image column named {' or '.join(_IMAGE_COLUMNS)}, got {listed} "
                f"in {self.file}"
            )
        if self.label is None:
            accepted = self.label_column or " or ".join(LABEL_COLUMNS)
            raise InputError(
                f"parquet shard must have a label column named {accepted}, got {listed} in {self.file}; "
                "--label-column names it"
            )
        return image, self.label

    def opened(self) -> Any:
        """Return pyarrow's reader of the file; InputError if it can't be read."""
        import pyarrow.parquet

        with _readable(self.file):
            return (ArrowFile if self.file.suffix == ".arrow" else pyarrow.parquet.ParquetFile)(self.file)

    def read(self, *columns: str) -> Iterator[list[Any]]:
        """Yield the columns' values, a batch of rows at a time."""
        opened = self.opened()
        with _readable(self.file):
            for batch in opened.iter_batches(batch_size=_BATCH, columns=list(columns)):
                yield [batch.column(name).to_pylist() for name in columns]

    def labels(self) -> Iterator[Any]:
        """Yield the labels, as the file has them."""
        for (values,) in self.read(self.columns()[1]):
            yield from values

    def batches(self, class_names: tuple[str, ...], *, numbered: bool) -> Iterator[list[Item]]:
        """Yield the images, with labels that count `class_names`; `numbered`: as `arrays.to_indices`."""
        by_name = {name: label for label, name in enumerate(class_names)}
        renumbered = [by_name.get(name) for name in self.names] if self.names != class_names else []
        row = 0
        for images, labels in self.read(*self.columns()):
            batch = []
            for image, value in zip(images, labels, strict=True):
                where = f"{self.file}, row {row}"
                data = image.get("bytes") if isinstance(image, dict) else image
                if not isinstance(data, bytes):
                    raise InputError(f"parquet shard must hold encoded image bytes, got none in {where}")
                label: Any = value
                if isinstance(value, str):
                    label = by_name.get(value)
                elif isinstance(value, int) and not numbered and not self.names:
                    label = by_name.get(str(int(value)))
                elif renumbered and isinstance(value, int) and value >= 0:
                    label = renumbered[value] if value < len(renumbered) else None
                if not isinstance(label, int) or label < 0:
                    raise InputError(
                        f"labels must be integers from 0 on, or names of train's classes, got {value!r} in "
                        f"{where}"
                    )
                batch.append(Item(where, label, data))
                row += 1
            yield batch


def _class_names(train: Sequence[Shard], default: tuple[str, ...]) -> tuple[tuple[str, ...], bool]:
    """Return the names in the shards' metadata, else the default, else what the labels are.

    Also whether labels are numbered by them (`arrays.to_indices`).

    Raises:
        InputError: there is no column of labels, a label is no class, or shards name classes twice.
    """
    if orders := dict.fromkeys(shard.names for shard in train if shard.names):
        merged = tuple(dict.fromkeys(name for names in orders for name in names))
        if len(orders) > 1 and any(len(set(names)) < len(names) for names in orders):
            raise InputError(
                f"shards that order their classes differently must name each once, got {train[0].file.parent}"
            )
        return (merged if len(orders) > 1 else next(iter(orders))), True
    is_text = "string" in str(train[0].schema.field(train[0].columns()[1]).type)
    if default and not is_text:
        return default, True
    labels = [value for shard in train for value in shard.labels()]
    names = arrays.class_names(arrays.to_values(labels, len(labels), str(train[0].file.parent)))
    return (default if default and {*names} <= {*default} else names), False


def _has_labels(test_shards: Sequence[Shard]) -> bool:
    """Return whether a row of the shards has a class; a broken shard is named when test is read."""
    try:
        labels = (label for s in test_shards if s.label is not None for label in s.labels())
        return any(label not in (None, "", -1) for label in labels)
    except InputError:
        return True


def _source(train_or_test: Sequence[Shard], class_names: tuple[str, ...], *, numbered: bool) -> Source:
    """Return the images of shards, in order."""
    files = [shard.file for shard in train_or_test]
    others = [shard.file for shard in train_or_test if shard.names not in ((), class_names)]
    if others:
        log.warning(
            "%d of %d shards, such as %s, name or order their classes otherwise than train: matched by name",
            *(len(others), len(files), others[0]),
        )
    return Source(
        files,
        lambda: sum(shard.opened().metadata.num_rows for shard in train_or_test),
        lambda: (batch for shard in train_or_test for batch in shard.batches(class_names, numbered=numbered)),
        json.dumps([train_or_test[0].label_column, class_names]),
    )


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turn what pyarrow raises for a broken shard into an InputError, for a failing disk a StorageError."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        message = f"parquet shard must be readable, got {file}: {one_line(error)}"
        raise reading_error(message, error) from error
