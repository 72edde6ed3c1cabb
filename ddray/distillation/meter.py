"""What a distillation takes: seconds and peak memory, its shared networks apart."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ddray.pool.files import DamagedEntryError, PoolFiles
from ddray.pool.spec import ModelPool, PoolEntry, PoolSpec
from ddray.system.files import home
from ddray.system.memory import peak_bytes, reset_peak


class Meter:
    """Counts seconds and the peak of memory (`peak_bytes`) from now on, over all processes of a run."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: float | None = 0.0
        self._peak = 0
        self._start()

    def continue_from(self, earlier: Mapping[str, Any] | None) -> None:
        """Add what the interrupted process had `spent`; without its numbers, the seconds become unknown."""
        if earlier is None or earlier["seconds"] is None:
            self._seconds = None
            return
        if self._seconds is not None:
            self._seconds += float(earlier["seconds"])
        self._peak = max(self._peak, int(earlier["peak_memory_bytes"]))

    def spent(self) -> dict[str, Any]:
        """Return `seconds`, None if an earlier process did not count them, and `peak_memory_bytes`."""
        self._stop()
        self._begin = time.perf_counter()
        return {"seconds": self._seconds, "peak_memory_bytes": self._peak}

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Leave out what the block takes."""
        self._stop()
        try:
            yield
        finally:
            self._start()

    def _start(self) -> None:
        reset_peak(self._device)
        self._begin = time.perf_counter()

    def _stop(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if self._seconds is not None:
            self._seconds += time.perf_counter() - self._begin
        self._peak = max(self._peak, peak_bytes(self._device))


@dataclass
class MeteredPool:
    """A pool whose work `meter` leaves out; it notes how long the entries it returns were trained."""

    pool: ModelPool
    meter: Meter
    trained_s: dict[str, float] = field(default_factory=dict)  # by key, with what each was trained from

    def get(self, specs: Sequence[PoolSpec]) -> list[PoolEntry]:
        """Return the entries of `specs`, in order."""
        with self.meter.excluded():
            entries = self.pool.get(specs)
        for spec, entry in zip(specs, entries, strict=True):
            self._note(spec.key, spec.parents, entry.meta)
        return entries

    def _note(self, key: str, parents: Sequence[str], meta: Mapping[str, Any]) -> None:
        """Note an entry's seconds and its parents', unless they are known."""
        if key in self.trained_s:
            return
        self.trained_s[key] = float(meta.get("wall_s", 0.0))
        for parent in parents:
            try:
                described = PoolFiles(home() / "pool").describe(parent)
            except DamagedEntryError:  # not in the pool: somebody's own generator, or gone
                continue
            self._note(parent, described["spec"].get("parents", ()), described)
