"""WebDataset tars, by the extra `webdataset`: a sample's files share a name, as `0001.jpg` and `0001.cls`.

A label is the text of `.cls`, `.label` or `.class`, or that field of `.json`: a number or a name. Numbers are
named by `classnames.txt` or `classes.txt` beside the tars, one name a line, else by themselves.
"""

import functools
import json
import logging
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from ddray.data import arrays, cache
from ddray.data.listing import IMAGE_SUFFIXES, Skipped, files_below, halves_of, part_in
from ddray.data.pictures import Item
from ddray.data.sources import Layout, Source, from_one_source, from_sources
from ddray.errors import InputError, one_line
from ddray.system.files import reading_error

log = logging.getLogger(__name__)

_BATCH: Final = 256
_LABELS: Final = ("cls", "label", "class")
_NAMES: Final = ("classnames.txt", "classes.txt")


def layout_of_tars(path: Path, label_column: str | None = None) -> Layout | None:
    """Return the layout of a tar, or of a folder's tars; None if there are none.

    A name with `train`, `test` or `val` in it, of the file or of a folder, says what half a tar belongs to.
    Without a test half the validation half is test, without either 20% are.

    Args:
        path: the tar or folder.
        label_column: the ending of the files, or the field of `.json`, with the labels; None: see above.

    Raises:
        InputError: a train tar can't be read, has no labelled images, or needs the extra `webdataset`.
    """
    root = path if path.is_dir() else path.parent
    files = list(files_below(root, (".tar",))) if path.is_dir() else [path] * (path.suffix.lower() == ".tar")
    if not files:
        return None
    parts: dict[str, list[Path]] = {}
    for file in files:
        parts.setdefault(part_in(file.relative_to(root)), []).append(file)
    names_file = next((root / name for name in _NAMES if (root / name).is_file()), None)
    skipped = Skipped(path, (".tar",), covered=[*files, *([names_file] if names_file else [])])
    train_kind, test_kind = halves_of(
        parts, skipped, "tars", lambda kind: _Tars(parts[kind], label_column).is_labelled()
    )
    train, test = _Tars(parts[train_kind], label_column), None if test_kind is None else parts[test_kind]
    names = arrays.class_names(train.values) if names_file is None else _lines(names_file)

    def source(tars: _Tars) -> Source:
        where = str(tars.files[0])
        indices = arrays.to_indices(tars.values, names, where, numbered=names_file is not None)
        return Source(
            tars.files, lambda: len(indices), lambda: tars.batches(indices), f"tars {label_column} {names}"
        )

    if test is None:
        layout = from_one_source(names, source(train))
    else:
        layout = from_sources(names, source(train), lambda: source(_Tars(test, label_column)))
    return replace(layout, options=("label_column",), skipped=skipped)


def _lines(file: Path) -> tuple[str, ...]:
    """Return the lines of a text file that are not empty."""
    try:
        return tuple(filter(None, map(str.strip, file.read_text(encoding="utf-8").splitlines())))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"class names must be readable, got {file}: {one_line(error)}") from error


@dataclass(frozen=True)
class _Tars:
    """The samples of tars; a sample without image or label counts as skipped."""

    files: Sequence[Path]
    label_column: str | None

    @functools.cached_property
    def values(self) -> arrays.Array:
        """The labels, int64 or str [N], cached; says how many samples are left out.

        Raises:
            InputError: a tar can't be read, or no sample has an image and a label.
        """
        split, facts = cache.fetch(self.files, f"labels of tars v1 {self.label_column}", self._read_labels)
        for note in facts["notes"]:
            log.warning("%s", note)
        names = np.array(facts["labels"])
        with suppress(ValueError, OverflowError):  # names
            names = names.astype(np.int64)
        return arrays.to_values(names[split.labels.numpy()], len(split), str(self.files[0]))

    def _read_labels(self, folder: Path) -> dict[str, Any]:
        """Write the labels into a folder of the cache, with images of no pixels."""
        values: list[str] = []
        skipped: list[str] = []
        several: list[str] = []
        for where, sample in self._samples():
            images, label = _images(sample), self._label(sample, where)
            place = f"{where} ({' '.join(_endings(sample))})"
            if not images or label is None:
                skipped.append(place)
                continue
            values.append(label)
            if len(images) > 1:
                several.append(place)
        if not values:
            raise InputError(
                f"tars must hold samples of an image and a label (0001.jpg and 0001.cls), got "
                f"{skipped[0] if skipped else 'none'} in {self.files[0]}; unpack other archives"
            )
        num = len(skipped) + len(values)
        notes = [
            f"{len(places)} of {num} samples have {what}, such as {places[0]}"
            for places, what in (
                (skipped, "no image or no label and are left out"),
                (several, "several images, of which the first is read"),
            )
            if places
        ]
        labels, indices = np.unique(values, return_inverse=True)
        np.save(folder / cache.IMAGES, np.empty((len(values), 0, 0, 0), dtype=np.uint8))
        np.save(folder / cache.LABELS, indices)
        return {"labels": labels.tolist(), "notes": notes}

    def is_labelled(self) -> bool:
        """Return whether a sample has a label; tars that can't be read are named when test is."""
        try:
            return any(self._label(sample, where) not in (None, "-1") for where, sample in self._samples())
        except InputError:
            return True

    def batches(self, indices: arrays.Array) -> Iterator[list[Item]]:
        """Yield the images with their labels."""
        batch: list[Item] = []
        row = 0
        for where, sample in self._samples():
            images = _images(sample)
            if not images or self._label(sample, where) is None:
                continue
            batch.append(Item(where, int(indices[row]), images[0]))
            row += 1
            if len(batch) == _BATCH:
                yield batch
                batch = []
        yield batch

    def _samples(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield each sample with its place, for messages."""
        try:
            from webdataset.tariterators import group_by_keys, tar_file_expander
        except ImportError as error:
            raise InputError(
                f"tars need the extra webdataset: pip install 'ddray[webdataset]', got {self.files[0]}"
            ) from error
        for file in self.files:
            try:
                with file.open("rb") as stream:
                    opened = [{"url": str(file), "stream": stream}]
                    for sample in group_by_keys(tar_file_expander(opened)):
                        yield f"{sample['__key__']} in {file}", sample
            except (OSError, tarfile.TarError, ValueError, EOFError, zlib.error) as error:
                message = f"tar must be readable, got {file}: {one_line(error)}"
                raise reading_error(message, error) from error

    def _label(self, sample: dict[str, Any], where: str) -> str | None:
        """Return a sample's label as text, or None if it has none."""
        columns = _LABELS if self.label_column is None else (self.label_column,)
        text = next((sample[column] for column in columns if column in sample), None)
        try:
            if text is not None:
                return str(text, "utf-8").strip() or None
            fields = json.loads(sample.get("json", b"{}"))
        except (ValueError, RecursionError) as error:  # also of the encoding
            raise InputError(f"label must be text or JSON, got {where}: {one_line(error)}") from error
        if not isinstance(fields, dict):
            raise InputError(f"label must be in a JSON object, got {type(fields).__name__}, {where}")
        field = next((fields[column] for column in columns if column in fields), None)
        return None if field is None else str(field)


def _endings(sample: dict[str, Any]) -> list[str]:
    """Return the endings of a sample's files."""
    return [f".{name}" for name in sample if not name.startswith("__")]


def _images(sample: dict[str, Any]) -> list[bytes]:
    """Return the encoded images of a sample."""
    return [sample[name[1:]] for name in _endings(sample) if name in IMAGE_SUFFIXES]
