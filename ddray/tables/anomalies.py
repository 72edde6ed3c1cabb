"""What looks wrong in a table, one sentence each: its reader should not have to find it."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Final

from ddray.drawing.text import listed, percent, size_of
from ddray.system.grouping import grouped
from ddray.tables.columns import Entry

_SCORED_AS: Final = ("dataset", "target", "protocol", "teacher", "augment", "settings", "arch")
_SIZES: Final = ("ipc", "budget")
_RANDOM: Final = ("random", "random_ssl")


def anomalies(cells: Iterable[Entry]) -> list[str]:
    """Return a sentence for each method below random, fall with the size, tie, and lack of spread.

    Cells are compared with those that were scored alike. A NAS sweep's are left out: their accuracies are of
    architectures.
    """
    scored = [
        cell for cell in cells if cell.get("accuracy_mean") is not None and cell.get("protocol") != "nas"
    ]
    sentences: list[str] = []
    for alike in grouped(scored, lambda cell: (_alike(cell), size_of(cell))).values():
        sentences += (*_below_random(alike), *_ties(alike))
    for alike in grouped(scored, lambda cell: (_alike(cell), cell["method"])).values():
        sentences += _falls(alike)
    sentences += map(_without_spread, filter(_has_no_spread, scored))
    return sentences


def _alike(cell: Entry) -> tuple[Any, ...]:
    return tuple(cell.get(name) for name in _SCORED_AS)


def _below_random(cells: list[Entry]) -> Iterator[str]:
    """Yield which rows score less than real images drawn at random."""
    reference = next((cell for cell in cells if cell["method"] in _RANDOM), None)
    if reference is None:
        return
    for cell in cells:
        if cell["accuracy_mean"] < reference["accuracy_mean"] and cell["method"] not in _RANDOM:
            yield (
                f"{cell['method']} is below {reference['method']} {_where(cell)}: "
                f"{_score(cell)} against {_score(reference)}{_within_error(cell, reference)}."
            )


def _ties(cells: list[Entry]) -> Iterator[str]:
    """Yield which rows score exactly the same."""
    for score, tied in itertools.groupby(
        sorted(cells, key=lambda cell: cell["accuracy_mean"]), key=lambda cell: cell["accuracy_mean"]
    ):
        rows = [str(cell["method"]) for cell in tied]
        if len(rows) > 1:
            yield f"{listed(rows)} tie {_where(cells[0])}: each scores {percent(score)} %."


def _falls(cells: list[Entry]) -> Iterator[str]:
    """Yield between which sizes a row falls."""
    for name in _SIZES:
        in_order = sorted((cell for cell in cells if cell.get(name)), key=lambda cell: int(cell[name]))
        for smaller, larger in itertools.pairwise(in_order):
            if larger["accuracy_mean"] >= smaller["accuracy_mean"]:
                continue
            yield (
                f"{larger['method']} falls from {size_of(smaller)} to {size_of(larger)} on "
                f"{_scored_on(larger)}: "
                f"{_score(smaller)} to {_score(larger)}{_within_error(smaller, larger)}."
            )


def _has_no_spread(cell: Entry) -> bool:
    return cell.get("n", 0) > 1 and cell.get("accuracy_std") == 0


def _without_spread(cell: Entry) -> str:
    return f"{cell['method']} has no spread {_where(cell)}: all {cell['n']} networks score {_score(cell)}."


def _where(cell: Entry) -> str:
    size = size_of(cell)
    return f"on {_scored_on(cell)}" + (f" at {size}" if size else "")


def _scored_on(cell: Entry) -> str:
    details = ", ".join(str(cell[name]) for name in _SCORED_AS[1:] if cell.get(name))
    return f"{cell['dataset']} ({details})"


def _score(cell: Entry) -> str:
    return f"{percent(cell['accuracy_mean'], cell.get('accuracy_std'))} %"


def _within_error(one: Entry, other: Entry) -> str:
    """Return that a difference is within two standard errors, if both are known."""
    errors = [cell.get("standard_error") for cell in (one, other)]
    if None in errors:
        return ""
    error = sum(float(value or 0.0) ** 2 for value in errors) ** 0.5
    is_small = abs(one["accuracy_mean"] - other["accuracy_mean"]) <= 2 * error
    return ", within two standard errors" if is_small else ""
