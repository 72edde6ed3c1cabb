"""The ledger: one finished unit of work is one atomic row, published exactly once.

A row is `<run>/ledger/<key>.json`; its key is the hash of the unit's description. The first writer wins
(os.link), and a worker left over from a killed driver is refused by the run's epoch (a fence).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ddray.config import Config
from ddray.errors import one_line
from ddray.system.files import append_line, locked, read_json_lines, storage_errors, write_atomically

log = logging.getLogger(__name__)

Kind = Literal["trial", "distill", "shard", "evaluate", "nas", "truth", "pool"]


class Unit(Config):
    """Description of a piece of work; equal units have equal keys."""

    kind: Kind
    spec: dict[str, Any]
    inputs: tuple[str, ...] = ()
    """Keys of the units whose results this one uses."""
    code_version: int = 1
    """Raised when the same spec would give a different result."""

    @property
    def key(self) -> str:
        """Sha256 (hex) of the unit's canonical JSON."""
        return hashlib.sha256(canonical_json(self.dump()).encode()).hexdigest()


class Row(Config):
    """A published result of a unit."""

    key: str
    kind: Kind
    spec: dict[str, Any]
    status: Literal["done", "failed"]
    result: dict[str, Any]
    wall_s: float = Field(ge=0)
    error: str | None = None
    epoch: int = 0

    @classmethod
    def done(cls, unit: Unit, result: Mapping[str, Any], wall_s: float) -> Row:
        """Return the row of a unit that has a result."""
        identity: dict[str, Any] = {"key": unit.key, "kind": unit.kind, "spec": unit.spec}
        return cls(**identity, status="done", result=dict(result), wall_s=wall_s)

    @classmethod
    def failed(
        cls, unit: Unit, error: object, *, result: Mapping[str, Any] | None = None, wall_s: float = 0.0
    ) -> Row:
        """Return the row of a unit that failed for good; the error is cut to one line of 300 characters."""
        values = cls.done(unit, result or {}, wall_s)
        return values.model_copy(update={"status": "failed", "error": one_line(error, 300)})


def classes_of(spec: Mapping[str, Any]) -> str:
    """Return which classes a shard's spec is of, such as `classes 0..4`."""
    start, stop = spec["classes"]
    return f"classes {start}..{stop - 1}"


def canonical_json(value: Any) -> str:
    """Return JSON with sorted keys and no spaces; NaN is refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


class Ledger:
    """The rows and events of one run directory (absolute); safe for many processes at once."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.folder = run_dir / "ledger"
        self._events = run_dir / "events.jsonl"
        self._epoch_file = run_dir / "epoch"

    def open_epoch(self) -> int:
        """Start a new run epoch; rows of every earlier epoch's workers are refused from now on."""
        with self._locked(exclusive=True):
            epoch = self._read_epoch() + 1
            write_atomically(self._epoch_file, lambda file: file.write(str(epoch).encode()))
        return epoch

    def publish(
        self, unit: Unit, row: Row, *, epoch: int, move_artifact: Callable[[], object] | None = None
    ) -> bool:
        """Publish a unit's row once, under the run epoch that the caller was started in.

        `move_artifact` moves the artifact that the row names to its final path; it is called just before the
        row is published, and only if it will be.

        Returns:
            Whether this call's row is the published one; False if another came first or the epoch is stale.

        Raises:
            ValueError: the row is of another unit.
            StorageError: the row can't be written.
        """
        if row.key != unit.key:
            raise ValueError(f"row key must be the unit's {unit.key}, got {row.key}")
        text = canonical_json({**row.dump(), "epoch": epoch})
        with self._locked(exclusive=move_artifact is not None):
            if epoch < self._read_epoch():
                key = unit.key[:12]
                log.warning("unit %s: row of run epoch %d refused, a newer run has begun", key, epoch)
                return False
            path = self._path(unit.key)
            if move_artifact is not None:
                if self.row(unit.key) is not None:
                    return False
                with storage_errors(path):
                    move_artifact()
            won = write_atomically(path, lambda file: file.write(text.encode()), only_if_absent=True)
        if won:
            self.event("finish" if row.status == "done" else "fail", unit.key, epoch, host=platform.node())
        return won

    def row(self, key: str) -> Row | None:
        """Return the published row of a key, or None; a torn row is set aside and counts as missing."""
        path = self._path(key)
        try:
            row = Row.model_validate_json(path.read_bytes())
            if row.key != key:
                raise ValueError(f"the row says it is {row.key}")
        except FileNotFoundError:
            return None
        except ValueError as error:
            aside = path.with_suffix(".corrupt")
            with contextlib.suppress(FileNotFoundError):  # another process has set it aside
                path.replace(aside)
            text = "ledger row %s is torn (%s): set aside as %s, will be recomputed"
            log.warning(text, path, str(error).splitlines()[0], aside.name)
            return None
        return row

    def rows(self, kind: Kind | None = None) -> list[Row]:
        """Return the published rows (of one kind), sorted by key."""
        rows = [self.row(path.stem) for path in sorted(self.folder.glob("*.json"))]
        return [row for row in rows if row is not None and kind in (None, row.kind)]

    def withdraw(self, key: str, why: str) -> None:
        """Set a row aside as `<key>.<why>`, so that its unit is run again."""
        path = self._path(key)
        with storage_errors(path), contextlib.suppress(FileNotFoundError):
            path.replace(path.with_suffix(f".{why}"))

    def event(
        self, event: Literal["start", "finish", "fail", "retry"], key: str, epoch: int, **fields: Any
    ) -> None:
        """Append one line to events.jsonl (see `append_line`)."""
        entry = {"event": event, "key": key, "epoch": epoch, "time": round(time.time(), 3), **fields}
        append_line(self._events, json.dumps(entry))

    def events(self) -> list[dict[str, Any]]:
        """Return the events so far; a torn one is left out."""
        return read_json_lines(self._events)

    def begin(self, unit: Unit, *, epoch: int, **fields: Any) -> int:
        """Record a unit's `start`, or a `retry`; return how often this epoch had started it before."""
        earlier: int = sum(
            event["key"] == unit.key and event["epoch"] == epoch and event["event"] in ("start", "retry")
            for event in self.events()
        )
        self.event("retry" if earlier else "start", unit.key, epoch, **fields)
        return earlier

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def _read_epoch(self) -> int:
        try:
            return int(self._epoch_file.read_text())
        except FileNotFoundError:
            return 0

    @contextmanager
    def _locked(self, *, exclusive: bool) -> Iterator[None]:
        """Hold the epoch lock, so that no stale row slips in between the check and the link."""
        with locked(self.run_dir / "epoch.lock", exclusive=exclusive):
            yield
