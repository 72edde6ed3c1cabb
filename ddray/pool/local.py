"""Model pools: networks that many trials share, trained once and stored under the hash of their spec.

The first process that needs an entry trains it. Others wait, and take over if the trainer dies. `pool.files`
has the layout on disk.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Final

from ddray.errors import DdrayError
from ddray.pool.files import DamagedEntryError, EntryLock, PoolFiles
from ddray.pool.spec import PoolEntry, PoolSpec, Trainer
from ddray.system.files import home
from ddray.system.progress import phase, progress

log = logging.getLogger(__name__)
_inner_s: Final[ContextVar[float]] = ContextVar("inner_s", default=0.0)
"""Seconds of the entries that were trained for the one in training, or waited for."""


def draft_entry(files: PoolFiles, spec: PoolSpec, trainer: Trainer, *, times_trained: int) -> Path:
    """Train a spec and write its entry to a draft folder, as `PoolFiles.draft` does; return the folder.

    Its `wall_s` is without the seconds of entries that had to be trained for it, here or elsewhere.
    """
    begin, outer = time.perf_counter(), _inner_s.set(0.0)
    try:
        tensors, measured = trainer(spec)
        wall_s, inner_s = time.perf_counter() - begin, _inner_s.get()
    finally:
        _inner_s.reset(outer)
    _inner_s.set(_inner_s.get() + wall_s)
    facts = {**measured, "spec": spec.dump(), "wall_s": wall_s - inner_s}
    return files.draft(spec.key, tensors, facts, times_trained=times_trained)


class LocalPool:
    """A pool in a folder that this machine's processes share, by default `$DDRAY_HOME/pool`."""

    def __init__(self, trainer: Trainer, folder: Path | None = None) -> None:
        self._trainer = trainer
        self._files = PoolFiles(folder or home() / "pool")

    def get(self, specs: Sequence[PoolSpec]) -> list[PoolEntry]:
        """Return the entries of `specs`, in order; missing and damaged ones are trained.

        Raises:
            InputError: an entry can't be read.
            StorageError: an entry can't be written.
        """
        missing = {spec.key: spec for spec in specs}
        entries: dict[str, PoolEntry] = {}
        for key in list(missing):
            if (entry := self._open(key)) is not None:
                entries[key] = entry
                del missing[key]
        if missing:
            self._train(missing, entries)
        return [entries[spec.key] for spec in specs]

    def _train(self, missing: dict[str, PoolSpec], entries: dict[str, PoolEntry]) -> None:
        """Move specs from `missing` to `entries`, starting with those that no other process is training."""
        total = len(missing)
        with progress("pool", total) as show:
            while missing:
                done = total - len(missing)
                key, lock = self._next(list(missing))
                spec = missing.pop(key)
                phase(f"pool network {done + 1} of {total} ({spec.kind}, {spec.arch})")
                show(done, spec.arch)
                with lock:
                    if self._files.mend(key, lock) is None:
                        times = lock.times_trained + 1
                        draft = draft_entry(self._files, spec, self._trainer, times_trained=times)
                        self._files.publish(key, draft, lock)
                if (entry := self._open(key)) is None:
                    raise DdrayError(f"pool entry {key} was removed while it was being trained; run again")
                entries[key] = entry
                show(done + 1, spec.arch)

    def _next(self, keys: Sequence[str]) -> tuple[str, EntryLock]:
        """Lock the first key that is free, or wait for the first key if none is."""
        for key in keys:
            if (lock := self._files.try_lock(key)) is not None:
                return key, lock
        log.info("pool: another process is training %s, waiting for it", keys[0][:12])
        begin = time.perf_counter()
        lock = self._files.lock(keys[0])
        _inner_s.set(_inner_s.get() + time.perf_counter() - begin)
        return keys[0], lock

    def _open(self, key: str) -> PoolEntry | None:
        """Return an entry, or None if it is missing or damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            meta = self._files.read(key)
            return None if meta is None else PoolEntry(meta, load_file(self._files.tensors_path(key)))
        except (DamagedEntryError, SafetensorError, FileNotFoundError):  # set aside meanwhile
            return None
