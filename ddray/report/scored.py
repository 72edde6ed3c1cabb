"""Cells of what `ddray evaluate` measured of a run's sets later, from the run's record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ddray.runs.ledger import Row
from ddray.runs.scores import read_scores
from ddray.tables.table import accuracy_of, standard_error

_NOT_SETTINGS: Final = ("archs", "seeds", "seed", "ipc", "teachers", "augment", "device", "cpus")
"""Options that a cell has fields for, or that change no condition."""


def score_cells(
    folder: Path, rows: Iterable[Row], cells: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return a cell per network and evaluation on record; of equal conditions the last.

    A set of a table has its row's label, from `cells`; another one its method's name.
    """
    labels = {key: str(cell["method"]) for cell in cells for key in cell.get("sets", ())}
    sets = {row.key: row for row in rows if row.kind == "distill" and row.status == "done"}
    scored: dict[tuple[Any, ...], dict[str, Any]] = {}
    for score in read_scores(folder):
        stem = Path(score["artifact"]).stem
        keys = [stem] if stem in sets or stem in labels else [*sets]
        dataset = sets[keys[0]].spec.get("dataset") if keys and keys[0] in sets else score["dataset"]
        for result in score["results"]:
            cell = {
                "method": labels.get(stem, score["method"]),
                "dataset": str(dataset),
                "ipc": score["ipc"],
                "protocol": score["protocol"],
                "arch": result["arch"],
                **_conditions(score),
                **accuracy_of(result["per_seed"]),
                "num_sets": 1,
                "standard_error": standard_error([result["per_seed"]]),
                "sets": keys,
                **_departure(sets, keys),
            }
            if score["dataset"] != cell["dataset"]:
                cell["target"] = score["dataset"]
            scored[(*keys, cell.get("target"), cell["protocol"], cell["arch"], str(_conditions(score)))] = (
                cell
            )
    return list(scored.values())


def _departure(sets: Mapping[str, Row], keys: Sequence[str]) -> dict[str, Any]:
    """Return what a set's run changed of its preset, `cut` and `overridden`, as its row has it."""
    results = [sets[key].result for key in keys if key in sets]
    return {name: result[name] for result in results[:1] for name in ("cut", "overridden") if name in result}


def _conditions(score: Mapping[str, Any]) -> dict[str, str]:
    """Return how an evaluation differs from its protocol's defaults, by a cell's fields."""
    options = score["options"]
    settings = [f"{name}={value}" for name, value in options.items() if name not in _NOT_SETTINGS]
    settings += [f"split={score['split']}"] if score["split"] != "test" else []
    fields = {
        "teacher": ", ".join(options.get("teachers", ())),
        "augment": options.get("augment", ""),
        "settings": ", ".join(settings),
    }
    return {name: text for name, text in fields.items() if text}
