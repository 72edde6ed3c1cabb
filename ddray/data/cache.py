"""The cache of decoded datasets: `$DDRAY_HOME/datasets/<key>/{images,labels}.npy`, complete or absent.

An entry is written to a temporary folder and renamed, so a reader never sees a partial one and of two writers
the first wins. Its key covers name, size and modification time of every source file: a changed file makes a
new entry. Returned arrays never share writable memory with the files.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from ddray.data.dataset import Split
from ddray.errors import InputError, StorageError
from ddray.system.files import home

IMAGES: Final = "images.npy"
LABELS: Final = "labels.npy"
_FACTS: Final = "facts.json"
_IN_MEMORY_BYTES: Final = 1 << 30  # bigger arrays stay on disk, mapped copy-on-write


def fetch(
    files: Sequence[Path], settings: str, build: Callable[[Path], dict[str, Any]]
) -> tuple[Split, dict[str, Any]]:
    """Return the arrays that `build` makes from `files`, now or earlier.

    Args:
        files: the source files.
        settings: everything else that determines the result.
        build: writes `IMAGES` and `LABELS` into a folder and returns facts to store with them (JSON types).

    Raises:
        InputError: a source file cannot be read.
        StorageError: the cache cannot be written.
    """
    entry = home() / "datasets" / file_key(files, settings)
    if (cached := _load(entry)) is not None:
        return cached
    with writing(entry.parent, "you can write"):
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=entry.name[:16] + "-", suffix=".tmp", dir=entry.parent))
    try:
        with writing(temporary, "with free space"):
            facts = build(temporary)
            (temporary / _FACTS).write_text(json.dumps(facts), encoding="utf-8")
            _publish(temporary, entry)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if (cached := _load(entry)) is None:
        raise StorageError(f"a decoded dataset must be readable after it was written, got {entry}")
    return cached


@contextmanager
def writing(path: Path, fix: str) -> Iterator[None]:
    """Turn an OSError into a StorageError that asks for a folder as in `fix`."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"the cache of decoded datasets must be writable, got {path}: {error.strerror or error}; "
            f"set $DDRAY_HOME to a folder {fix}"
        ) from error


def _publish(temporary: Path, entry: Path) -> None:
    """Rename `temporary` to `entry`; an unreadable entry is replaced, a good one wins."""
    if entry.exists() and _load(entry) is None:
        shutil.rmtree(entry, ignore_errors=True)
    try:
        os.replace(temporary, entry)
    except OSError:
        if _load(entry) is None:  # otherwise another process was first
            raise


def file_key(files: Sequence[Path], settings: str) -> str:
    """Return the hash of the files' names, sizes and times, and of `settings`."""
    digest = hashlib.sha256(settings.encode())
    for file in files:
        try:
            stat = file.stat()
        except OSError as error:
            raise InputError(f"dataset file must be readable, got {file}: {error.strerror}") from error
        digest.update(f"\n{file.absolute()}\t{stat.st_size}\t{stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]


def _load(entry: Path) -> tuple[Split, dict[str, Any]] | None:
    """Return an entry's arrays and facts; None if it is absent or damaged."""
    try:
        facts = json.loads((entry / _FACTS).read_text(encoding="utf-8"))
        big = (entry / IMAGES).stat().st_size > _IN_MEMORY_BYTES
        # Copy-on-write: a write to the tensor stays in this process's memory.
        images = np.load(entry / IMAGES, mmap_mode="c" if big else None)
        labels = np.load(entry / LABELS)
    except (OSError, ValueError, EOFError):
        return None
    return Split(torch.from_numpy(images), torch.from_numpy(labels)), facts
