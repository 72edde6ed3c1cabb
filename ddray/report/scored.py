"""Cells of what `ddray evaluate` measured of a run's sets later, from the run's record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

from ddray.artifact.distilled_set import RESULT
from ddray.drawing.text import settings_text
from ddray.runs.ledger import Row
from ddray.runs.scores import read_scores
from ddray.system.files import file_sha256
from ddray.tables.table import accuracy_of, standard_error

_NOT_SETTINGS: Final = (
    *("archs", "seeds", "seed", "ipc", "protocol", "teachers", "augment", "device", "cpus"),
)
"""Options that a cell has fields for, or that change no condition."""
EARLIER: Final = "an earlier set"


class SetsOfRun:
    """The sets of a run as scores name them: by a file's name and content.

    Attributes:
        rows: of its distillations that are done, by key.
        cells: that its sets belong to, by the sets' keys.
    """

    def __init__(self, folder: Path, rows: Iterable[Row], cells: Sequence[Mapping[str, Any]]) -> None:
        self._folder = folder
        self._sha256 = cache(file_sha256)
        self.rows = {row.key: row for row in rows if row.kind == "distill" and row.status == "done"}
        self.cells: dict[str, list[Mapping[str, Any]]] = {}
        for cell in cells:
            for key in cell.get("sets", ()):
                self.cells.setdefault(key, []).append(cell)

    def key_of(self, name: str) -> str | None:
        """Return the key of the set that a file of this name is of; None if the run has no row for it."""
        stem = Path(name).stem
        if stem in self.rows or stem in self.cells:
            return stem
        return next(iter(self.rows)) if len(self.rows) == 1 else None

    def stage_of(self, name: str, sha256: str) -> str:
        """Return what a scored file is if it is not the set that is there now, such as `step 2`; else ``.

        Where no set is there any more, only a set along the steps is told from it.
        """
        key = self.key_of(name)
        row = self.rows.get(key or "")
        file = file_of(self._folder, key, row)
        expected = self._sha256(file) if file.is_file() else None
        names = {RESULT, file.name, *([] if row is None else [Path(row.result.get("artifact", "")).name])}
        if sha256 == expected:
            return ""
        if Path(name).stem.isdecimal() and name not in names:
            return f"step {int(Path(name).stem)}"
        if expected is None:
            return ""
        return name if row is not None and name not in names else EARLIER

    def departure(self, name: str, stage: str) -> dict[str, Any]:
        """Return what a set's run changed of its preset, as a cell has it: `cut`, `overridden`, `generator`.

        That is what all cells of the set have: one's evaluation may have changed more. The cut is that of the
        set which is there now.
        """
        key = self.key_of(name) or ""
        sources = self.cells.get(key) or ([self.rows[key].result] if key in self.rows else [])
        cut = _in_all([str(source.get("cut", "")).split("; ") for source in sources])
        fields = {
            "cut": "" if stage else "; ".join(cut),
            "overridden": _in_all([source.get("overridden", ()) for source in sources]),
            "generator": next((source.get("generator") for source in sources), None),
        }
        return {field: value for field, value in fields.items() if value}


def _in_all(lists: Sequence[Sequence[str]]) -> list[str]:
    return [item for item in lists[0] if all(item in other for other in lists)] if lists else []


def file_of(folder: Path, key: str | None, row: Row | None) -> Path:
    """Return the file of a run's set, wherever the run was moved; None: it is the run's only set."""
    if row is not None and "artifact" in row.result:
        path = folder / row.result["artifact"]
        return path if path.is_file() else folder / RESULT
    return folder / RESULT if key is None else folder / "artifacts" / f"{key}.pt"


def score_cells(
    folder: Path, rows: Iterable[Row], cells: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return a cell per network and evaluation on record; of equal conditions the last.

    A set of a table has its row's label, from `cells`; another one its method's name. What was scored along
    the steps, or replaced since, has a `stage`, which is one of its settings.
    """
    sets = SetsOfRun(folder, rows, cells)
    scored: dict[tuple[Any, ...], dict[str, Any]] = {}
    for score in read_scores(folder):
        file = score["artifact"]
        key, stage = sets.key_of(file), sets.stage_of(file, score["artifact_sha256"])
        dataset = sets.rows[key].spec.get("dataset") if key in sets.rows else score["dataset"]
        name = {
            "method": str(sets.cells[key][0]["method"]) if key in sets.cells else score["method"],
            "dataset": str(dataset),
            **size_fields(score),
            "protocol": score["protocol"],
            **conditions_of(score["options"], score["split"], stage),
            **({} if score["dataset"] == dataset else {"target": score["dataset"]}),
        }
        for result in score["results"]:
            scored[(key, *name.items(), result["arch"])] = {
                **name,
                "arch": result["arch"],
                **accuracy_of(result["per_seed"]),
                "num_sets": 1,
                "standard_error": standard_error([result["per_seed"]]),
                "sets": [] if key is None or stage else [key],
                **sets.departure(file, stage),
                **({"stage": stage} if stage else {}),
            }
    return list(scored.values())


def without_stages(cells: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the cells of the sets that are there now: no others stand for a run."""
    return [cell for cell in cells if "stage" not in cell]


def size_fields(values: Mapping[str, Any]) -> dict[str, int]:
    """Return a set's size as a cell has it: `budget` where there is one, else `ipc`."""
    name = next((name for name in ("budget", "ipc") if values.get(name) is not None), None)
    return {} if name is None else {name: values[name]}


def conditions_of(options: Mapping[str, Any], split: str, stage: str = "") -> dict[str, str]:
    """Return how an evaluation differs from its protocol's defaults, by a cell's fields."""
    names = [name for name in ("recipe", "epochs", *options) if name not in _NOT_SETTINGS]  # as in a table
    settings = {name: options[name] for name in names if name in options}
    parts = (settings_text(settings), f"split={split}" if split != "test" else "", stage)
    fields = {
        "teacher": ", ".join(options.get("teachers", ())),
        "augment": options.get("augment", ""),
        "settings": ", ".join(filter(None, parts)),
    }
    return {name: text for name, text in fields.items() if text}
