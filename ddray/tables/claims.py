"""Claims of a table, and whether they hold: a paired test over the sets of two rows."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

from ddray.config import Config, Names, Result
from ddray.drawing.text import listed, size_of
from ddray.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from ddray.runs.ledger import Row
    from ddray.tables.units import Cell

LEVEL: Final = 0.05
"""A claim is decided where its adjusted p is below this."""
TEST: Final = "paired t-test over sets (each the mean of its networks), two-sided, Holm over the file"
_FILTERS: Final = ("dataset", "target", "ipc", "budget", "protocol", "arch", "teacher", "settings")
_CONDITIONS: Final = ("dataset", "target", "size", "protocol", "arch", "teacher", "augment", "settings")


class Claim(Config):
    """A statement of a bench file: the row `better` scores more than each of the rows `worse`.

    What a table has several of (datasets, sizes, protocols, networks) says which of its cells are compared.
    """

    say: str
    """The statement in words."""
    better: str
    """The row's label."""
    worse: Names
    """Labels of one or more rows; each is compared and decided for itself."""
    dataset: str | None = None
    target: str | None = None
    ipc: int | None = None
    budget: int | None = None
    protocol: str | None = None
    arch: str | None = None
    teacher: str | None = None
    settings: str | None = None
    paper: str | None = None
    """The paper that says so, as in published.csv: datadam, dsdm, boost_ssdd, d3hr."""
    where: str | None = None
    """The place in the paper, such as `Table 3`."""


class Verdict(Result):
    """One comparison of a claim; accuracies are fractions."""

    say: str
    better: str
    worse: str
    dataset: str
    size: str
    protocol: str
    arch: str
    verdict: Literal["holds", "fails", "undecided"]
    """`holds` or `fails` where the adjusted p is below .05, by the sign of the effect."""
    effect: float | None
    """Mean over sets of the difference in accuracy, better minus worse; None without a pair of sets."""
    ci95: tuple[float, float] | None
    """The effect's 95 % interval (Student's t, not adjusted)."""
    p: float | None
    """Of the test, adjusted by Holm's method over the file; None where no test is possible."""
    p_unadjusted: float | None
    n: int
    """Pairs of sets: the same seed, scored by the same networks."""
    networks: int
    """Networks of each set."""
    accuracy: tuple[float | None, float | None]
    """Means of the two rows over the pairs."""
    budget: dict[str, str]
    """Of each row what was cut of its preset's budget, or `preset`, with its steps if it has any."""
    device_hours: float
    """Hours of one device for the sets and scores of both rows, without networks that runs share."""
    paper: str | None
    where: str | None


Pair = tuple["Cell", "Cell"]


def pairs_of(claims: Sequence[Claim], cells: Sequence[Cell]) -> list[tuple[Claim, Pair]]:
    """Return the two cells of each comparison: scored alike, but for the row.

    Raises:
        InputError: a row is not in the table, or a claim fits no cells or several.
    """
    return [(claim, _pair(claim, worse, cells)) for claim in claims for worse in claim.worse]


def _pair(claim: Claim, worse: str, cells: Sequence[Cell]) -> Pair:
    rows = list(dict.fromkeys(cell.method for cell in cells))
    for label in (claim.better, worse):
        if label not in rows:
            raise InputError(
                f"claim {claim.say!r}: better and worse must be rows that are scored, got {label!r}"
                f"{did_you_mean(label, rows)}; there are {', '.join(rows)}"
            )
    by_conditions = {_conditions(cell): cell for cell in cells if cell.method == worse}
    pairs = [
        (cell, by_conditions[_conditions(cell)])
        for cell in cells
        if cell.method == claim.better and _conditions(cell) in by_conditions
    ]
    fitting = [pair for pair in pairs if _fits(claim, pair[0])]
    if len(fitting) == 1:
        return fitting[0]
    there_are = "; ".join(dict.fromkeys(_described(cell) for cell, _ in pairs)) or "none"
    raise InputError(
        f"claim {claim.say!r}: exactly one cell of {claim.better} and {worse} must fit, got {len(fitting)}; "
        f"name {listed(_FILTERS)} of one of these: {there_are}"
    )


def _conditions(cell: Cell) -> tuple[Any, ...]:
    return tuple(getattr(cell, name) for name in _CONDITIONS)


def _fits(claim: Claim, cell: Cell) -> bool:
    there = {name: getattr(cell, name, None) for name in _FILTERS}
    there[cell.size[0]] = cell.size[1]
    return all(getattr(claim, name) in (None, there[name]) for name in _FILTERS)


def _described(cell: Cell) -> str:
    values = {name: getattr(cell, name) for name in _CONDITIONS if name not in ("size", "augment")}
    values = {"dataset": values.pop("dataset"), cell.size[0]: cell.size[1], **values}
    return ", ".join(f"{name}: {value}" for name, value in values.items() if value is not None)


def verdicts(
    claims: Sequence[Claim], cells: Sequence[Cell], row_of: Callable[[str], Row | None]
) -> list[Verdict]:
    """Return a verdict for each comparison of the claims, in their order.

    `row_of` returns the ledger's row of a key. Sets that failed are left out with their pairs.
    """
    pairs = pairs_of(claims, cells)
    compared = [_compared(better, worse, row_of) for _, (better, worse) in pairs]
    adjusted = holm([one["p_unadjusted"] for one in compared])
    return [
        Verdict(
            say=claim.say,
            better=better.method,
            worse=worse.method,
            dataset=better.dataset,
            size=size_of({better.size[0]: better.size[1]}),
            protocol=better.protocol,
            arch=better.arch,
            verdict=_verdict(p, facts["effect"]),
            p=p,
            **facts,
            budget={cell.method: _budget_of(cell, row_of) for cell in (better, worse)},
            paper=claim.paper,
            where=claim.where,
        )
        for (claim, (better, worse)), facts, p in zip(pairs, compared, adjusted, strict=True)
    ]


def _budget_of(cell: Cell, row_of: Callable[[str], Row | None]) -> str:
    if cell.cut is not None:
        return cell.cut
    row = row_of(cell.sets[0]) if cell.sets else None
    steps = row.result.get("steps") if row is not None else None
    return f"preset, {steps:,} steps" if steps else "preset"


def _verdict(p: float | None, effect: float | None) -> Literal["holds", "fails", "undecided"]:
    if p is None or effect is None or p >= LEVEL:
        return "undecided"
    return "holds" if effect > 0 else "fails"


def _compared(better: Cell, worse: Cell, row_of: Callable[[str], Row | None]) -> dict[str, Any]:
    """Return the figures of a comparison, before p is adjusted."""
    scored = list(_scored(better, worse, row_of))
    means = [(statistics.fmean(one), statistics.fmean(other)) for one, other in scored]
    keys = {*better.keys, *worse.keys, *better.sets, *worse.sets}
    seconds = [row.wall_s for key in keys if (row := row_of(key)) is not None]
    p, interval = _tested([one - other for one, other in means])
    accuracies = [statistics.fmean(column) for column in zip(*means, strict=True)]
    return {
        "effect": statistics.fmean(one - other for one, other in means) if means else None,
        "ci95": interval,
        "p_unadjusted": p,
        "n": len(means),
        "networks": min((len(values) for pair in scored for values in pair), default=0),
        "accuracy": tuple(accuracies) if accuracies else (None, None),
        "device_hours": math.fsum(seconds) / 3600,
    }


def _scored(
    better: Cell, worse: Cell, row_of: Callable[[str], Row | None]
) -> Iterator[tuple[list[float], list[float]]]:
    """Yield the accuracies of each pair of sets that are both scored."""
    for keys in zip(better.keys, worse.keys, strict=True):
        rows = [row for key in keys if (row := row_of(key)) is not None and row.status == "done"]
        if len(rows) == len(keys):
            one, other = (list(row.result["per_seed"]) for row in rows)
            yield one, other


def _tested(differences: Sequence[float]) -> tuple[float | None, tuple[float, float] | None]:
    """Return p and the 95 % interval of a paired t-test; None of a single pair, p None without spread."""
    from scipy.stats import ttest_1samp

    if len(differences) < 2:
        return None, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # differences that are all but equal
        test = ttest_1samp(differences, 0.0)
        low, high = test.confidence_interval(1 - LEVEL)
    if len(set(differences)) == 1:
        return None, (differences[0], differences[0])
    return float(test.pvalue), (float(low), float(high))


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Return p-values adjusted for their number (Holm, 1979); those that are None don't count."""
    tests = sorted((p, index) for index, p in enumerate(values) if p is not None)
    adjusted: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, (p, index) in enumerate(tests):
        largest = max(largest, min(1.0, (len(tests) - rank) * p))
        adjusted[index] = largest
    return adjusted


def claims_table(claims: Sequence[Verdict]) -> tuple[str, list[dict[str, str]]]:
    """Return verdicts as people read them, by column, and before them what all of them share."""
    lines = [verdict_line(verdict) for verdict in claims]
    shared = [name for name in ("on", "n") if len({line[name] for line in lines}) == 1 < len(lines)]
    text = ", ".join(f"{name} {lines[0][name]}" for name in shared)
    without = [{name: value for name, value in line.items() if name not in shared} for line in lines]
    return f"All {text}." if text else "", without


def verdict_line(verdict: Verdict) -> dict[str, str]:
    """Return a verdict as people read it, by column."""
    low, high = verdict.ci95 or (None, None)
    interval = "" if low is None or high is None else f" [{100 * low:+.1f}, {100 * high:+.1f}]"
    return {
        "claim": verdict.say,
        "verdict": verdict.verdict,
        "effect": "-" if verdict.effect is None else f"{100 * verdict.effect:+.1f}{interval}",
        "p": "-" if verdict.p is None else f"{verdict.p:.2g}",
        "n": f"{verdict.n} x {verdict.networks}",
        "rows": f"{verdict.better} over {verdict.worse}",
        "on": f"{verdict.dataset}, {verdict.size}, {verdict.protocol}, {verdict.arch}",
        "budget": "; ".join(_budget(verdict.budget)) or "preset",
        "hours": f"{verdict.device_hours:.2f}",
        "from": " ".join(filter(None, (verdict.paper, verdict.where))) or "-",
    }


def _budget(budget: dict[str, str]) -> Iterator[str]:
    """Yield what was cut of both rows' budgets, then of each."""
    cuts = {label: [] if text == "preset" else text.split("; ") for label, text in budget.items()}
    both = [cut for cut in next(iter(cuts.values())) if all(cut in others for others in cuts.values())]
    if both:
        yield f"both: {', '.join(both)}"
    for label, texts in cuts.items():
        if alone := [text for text in texts if text not in both]:
            yield f"{label}: {', '.join(alone)}"
