"""The files of a pool: one folder per entry, moved into place once complete, and a lock file next to it.

`<key>/entry.json` describes the entry, `<key>/tensors.safetensors` has its tensors. `<key>.lock` is locked
while a process trains the entry, and counts how often it was trained. A damaged entry is set aside as
`<key>.corrupt-<n>`. `.<key>.<host>-<pid>.<random>.tmp` is a draft of that process, which need not own the
lock itself: for a cluster's client, the pool service does.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from ddray.errors import DdrayError, InputError
from ddray.system.files import file_sha256, storage_errors

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

log = logging.getLogger(__name__)

ENTRY: Final = "entry.json"
TENSORS: Final = "tensors.safetensors"
_MAX_SHARED: Final = 64 * 2**20
"""Larger tensors, in bytes, stay memory-mapped in their file (features of a whole dataset)."""
_MAPPED_KINDS: Final = ("trajectory",)
"""Kinds whose tensors, of any size, stay memory-mapped: a hundred experts would fill an object store."""
_ABANDONED_S: Final = 3600.0
"""Seconds without a change after which a draft from another machine counts as abandoned."""
_BYTES: Final = {"F64": 8, "F32": 4, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

_sound: set[tuple[str, int, int]] = set()
"""Tensor files whose hash this process has checked: path, size, modification time (ns)."""


class DamagedEntryError(DdrayError):
    """An entry's files are missing, torn or changed; the owner of its lock sets it aside."""


class EntryLock:
    """Exclusive right to train one entry: a locked file, which the kernel releases when the process dies."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    @property
    def times_trained(self) -> int:
        """How often the entry was trained, including lost and damaged ones."""
        content = os.pread(self._handle, 32, 0).strip()
        return int(content) if content.isdigit() else 0

    def note(self, times_trained: int) -> None:
        """Store the count if it is higher than the stored one."""
        if times_trained > self.times_trained:
            os.pwrite(self._handle, f"{times_trained}\n".encode(), 0)

    def release(self) -> None:
        """Release the lock."""
        os.close(self._handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class PoolFiles:
    """Entries in a folder that many processes share; it is created with the first entry."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def list_keys(self) -> list[str]:
        """Return the keys of all entries, sorted."""
        if not self.folder.is_dir():
            return []
        return sorted(path.name for path in self.folder.iterdir() if re.fullmatch("[0-9a-f]{64}", path.name))

    def tensors_path(self, key: str) -> Path:
        """Return the path of an entry's tensors."""
        return self.folder / key / TENSORS

    def describe(self, key: str) -> dict[str, Any]:
        """Return an entry's `entry.json` without checking its tensors.

        Raises:
            DamagedEntryError: `entry.json` is missing or torn.
            InputError: it can't be read.
        """
        with _damage(self.folder / key):
            return _described(self.folder / key)

    def read(self, key: str) -> dict[str, Any] | None:
        """Return an entry's `entry.json` after checking its files; None if there is no such entry.

        The size is always checked, header and hash once per process.

        Raises:
            DamagedEntryError: a file is missing, torn or changed.
            InputError: a file can't be read.
        """
        folder = self.folder / key
        if not folder.is_dir():
            return None
        with _damage(folder):
            meta = _described(folder)
            _check_tensors(folder / TENSORS, meta)
        return meta

    def find(self, key: str) -> dict[str, Any] | None:
        """Return an entry's `entry.json`, or None if it is missing or damaged."""
        try:
            return self.read(key)
        except DamagedEntryError:
            return None

    def lock(self, key: str) -> EntryLock:
        """Wait for an entry's lock and take it.

        Raises:
            StorageError: the lock file can't be created.
        """
        return self._locked(key, fcntl.LOCK_EX)

    def try_lock(self, key: str) -> EntryLock | None:
        """Take an entry's lock as `lock` does if it is free, else return None."""
        try:
            return self._locked(key, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None

    def _locked(self, key: str, operation: int) -> EntryLock:
        """Take the lock, then remove the drafts of killed processes."""
        path = self.folder / f"{key}.lock"
        with storage_errors(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, operation)
        except BaseException:
            os.close(handle)
            raise
        for draft in self.folder.glob(f".{key}.*.tmp"):
            if _is_abandoned(draft):
                shutil.rmtree(draft, ignore_errors=True)
        return EntryLock(handle)

    def mend(self, key: str, lock: EntryLock) -> dict[str, Any] | None:
        """Return an entry's `entry.json`; set a damaged entry aside with a warning and return None.

        Raises:
            StorageError: it can't be renamed.
        """
        try:
            return self.read(key)
        except DamagedEntryError as error:
            reason = str(error)
        folder = self.folder / key
        lock.note(_times_trained(folder))
        asides = (self.folder / f"{key}.corrupt-{suffix}" for suffix in count(1))
        aside = next(path for path in asides if not path.exists())
        with storage_errors(aside):
            folder.rename(aside)
        log.warning(
            "pool entry %s is damaged (%s): set aside as %s, will be trained again",
            key[:12],
            reason,
            aside.name,
        )
        return None

    def draft(
        self, key: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], *, times_trained: int
    ) -> Path:
        """Write an entry to a draft folder; return the folder.

        `facts` are further contents of `entry.json`; `times_trained` includes this time.

        Raises:
            StorageError: the disk is full, or the folder can't be written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        final = self.folder / key
        with storage_errors(final):
            self.folder.mkdir(parents=True, exist_ok=True)
            draft = self.folder / f".{key}.{_host()}-{os.getpid()}.{uuid.uuid4().hex}.tmp"
            draft.mkdir()
            try:
                path = draft / TENSORS
                save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
                size, digest = path.stat().st_size, file_sha256(path)
                meta = {"key": key, "times_trained": times_trained, "size_bytes": size, "sha256": digest}
                text = json.dumps({**facts, **meta}, indent=2, sort_keys=True)
                (draft / ENTRY).write_text(text + "\n", encoding="utf-8")
            except BaseException as error:
                shutil.rmtree(draft, ignore_errors=True)
                if isinstance(error, SafetensorError):  # its Rust side wraps the OSError
                    raise OSError(errno.EIO, f"{error}") from error
                raise
        return draft

    def publish(self, key: str, draft: Path, lock: EntryLock) -> None:
        """Move a draft into place and count it; if locks do not work, an earlier entry stays, uncounted.

        Raises:
            StorageError: the folder can't be written.
        """
        final = self.folder / key
        with storage_errors(final):
            try:
                draft.rename(final)
                lock.note(lock.times_trained + 1)
            except OSError:
                if not final.exists():
                    raise
            finally:
                shutil.rmtree(draft, ignore_errors=True)


def small_arrays(path: Path, kind: str = "") -> tuple[dict[str, np.ndarray[Any, Any]], bool]:
    """Return an entry's tensors of up to 64 MiB as arrays, and whether those are all its tensors.

    None of an entry of a `kind` that is always read from its file.
    """
    from safetensors import safe_open

    if kind in _MAPPED_KINDS:
        return {}, False
    arrays = {}
    with safe_open(path, framework="numpy") as file:
        names = list(file.keys())
        for name in names:
            tensor_slice = file.get_slice(name)
            size = _BYTES.get(tensor_slice.get_dtype())  # NumPy has no bfloat16
            if size is not None and size * math.prod(tensor_slice.get_shape()) <= _MAX_SHARED:
                arrays[name] = file.get_tensor(name)
    return arrays, len(arrays) == len(names)


def _host() -> str:
    """Return this machine's name without the separators of draft names."""
    return re.sub("[^0-9A-Za-z]", "_", socket.gethostname()) or "_"


def _is_abandoned(draft: Path) -> bool:
    """Return whether a draft's process is dead or, on another machine, has long not written to it."""
    owner, _, pid = draft.name.split(".")[2].rpartition("-")
    if owner == _host() and pid.isdigit():
        try:
            os.kill(int(pid), 0)
        except OSError as error:  # PermissionError: another user's, alive
            return isinstance(error, ProcessLookupError)
        return False
    try:
        changed = max(path.stat().st_mtime for path in (draft, *draft.iterdir()))
    except OSError:  # moved into place meanwhile
        return False
    return time.time() - changed > _ABANDONED_S


@contextmanager
def _damage(folder: Path) -> Iterator[None]:
    """Turn errors while reading an entry into DamagedEntryError or InputError."""
    from safetensors import SafetensorError

    try:
        yield
    except PermissionError as error:
        raise InputError(
            f"pool entry {folder} must be readable: {error.strerror}; check its permissions"
        ) from error
    except (OSError, ValueError, SafetensorError) as error:
        raise DamagedEntryError(" ".join(str(error).split())) from error


def _described(folder: Path) -> dict[str, Any]:
    """Return an entry's `entry.json`; ValueError if it is torn, or of another entry."""
    meta = json.loads((folder / ENTRY).read_text(encoding="utf-8"))
    if not isinstance(meta, dict) or meta.get("key") != folder.name or not isinstance(meta.get("spec"), dict):
        raise ValueError(f"{ENTRY} is of another entry")
    return meta


def _check_tensors(path: Path, meta: Mapping[str, Any]) -> None:
    """Raise ValueError unless an entry's tensors have the size and hash in `entry.json`."""
    from safetensors import safe_open

    status = path.stat()
    size = meta.get("size_bytes", status.st_size)
    if size != status.st_size:
        raise ValueError(f"{TENSORS} has {status.st_size} bytes instead of {size}")
    identity = (str(path), status.st_size, status.st_mtime_ns)
    if identity not in _sound:
        with safe_open(path, framework="numpy"):  # compares the header with the file's length
            pass
        if meta.get("sha256", digest := file_sha256(path)) != digest:
            raise ValueError(f"{TENSORS} has changed: its hash is not the one in {ENTRY}")
        _sound.add(identity)


def _times_trained(folder: Path) -> int:
    """Return the count of an entry that may be damaged; at least 1."""
    try:
        return int(json.loads((folder / ENTRY).read_text(encoding="utf-8"))["times_trained"])
    except (OSError, ValueError, KeyError, TypeError):
        return 1
