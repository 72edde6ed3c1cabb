"""Results of a sweep's rows: figures and table agree, and counts are of architectures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ddray.data import Dataset, carve_val
from ddray.ranking.command import collect
from ddray.ranking.options import NasOptions
from ddray.ranking.proxies import Proxy
from ddray.ranking.spaces import resolve_config
from ddray.ranking.sweep import Sweep
from ddray.ranking.worker import real_set
from ddray.runs.ledger import Row

NUM_ARCHS = 4


@pytest.fixture
def sweep(toy: Callable[..., Dataset]) -> Sweep:
    """A sweep of 4 architectures on data with three quarters in one class."""
    dataset = toy((90, 10, 20))
    train, val = carve_val(dataset.train(), seed=0)
    proxy = Proxy("some", "some", real_set(train, dataset), 12.0)
    options = NasOptions(seeds=3)
    return Sweep(
        options, resolve_config(options), dataset, train, val, (proxy,), tuple(range(NUM_ARCHS)), "cpu"
    )


def test_performance_is_on_test_of_the_choice_by_val(sweep: Sweep) -> None:
    rows = rows_of("nas", [[0.1] * 3, [0.9] * 3, [0.5] * 3, [0.4] * 3], set())
    for row, test in zip(
        rows_of("truth", [[0.3], [0.4], [0.8], [0.2]], set()), (0.9, 0.35, 0.7, 0.1), strict=True
    ):
        rows.append(row.model_copy(update={"result": {**row.result, "test_accuracy": test}}))
    ranking = collect(sweep, rows, None)
    figures = ranking.proxies[0]
    assert (figures["top1_truth_accuracy"], figures["top1_test_accuracy"]) == (0.4, 0.35)
    assert ranking.truth_facts["top1_test_accuracy"] == 0.7, "the whole set's choice, by its own val"


def rows_of(kind: Any, accuracies: list[list[float]], diverged: set[tuple[int, int]]) -> list[Row]:
    """Return rows of accuracies [A][S]; `diverged` contains pairs of architecture and seed."""
    return [
        Row(
            key=f"{kind} {index} {seed}",
            kind=kind,
            spec={"proxy": "some", "index": index, "seed": seed},
            status="done",
            result={"val_accuracy": accuracy, "diverged": (index, seed) in diverged},
            wall_s=1.0,
        )
        for index, seed_accuracies in enumerate(accuracies)
        for seed, accuracy in enumerate(seed_accuracies)
    ]


def test_ranks_of_the_table_and_figures_agree_on_ties(sweep: Sweep) -> None:
    """(.1 + .2) + .3 and (.3 + .2) + .1 differ in the last bit, but the means count as equal."""
    scores = [[0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.9, 0.9, 0.9], [0.0, 0.0, 0.0]]
    truth = [[0.2, 0.2, 0.2], [0.4, 0.4, 0.4], [0.3, 0.2, 0.1], [0.1, 0.2, 0.3]]
    ranking = collect(sweep, [*rows_of("nas", scores, set()), *rows_of("truth", truth, set())], None)
    table = ranking.table.set_index("index")
    assert ranking.proxies[0]["num_tied"] == 2
    assert table["proxy_rank"].to_dict() == {0: 2, 1: 2, 2: 1, 3: 4}
    assert table["truth_rank"].to_dict() == {0: 2, 1: 1, 2: 2, 3: 2}


def test_counts_are_of_architectures(sweep: Sweep) -> None:
    scores = [[0.9] * 3, [0.8] * 3, [0.7] * 3, [0.6] * 3]
    rows = [*rows_of("nas", scores, {(0, 0), (0, 2), (3, 1)}), *rows_of("truth", scores, {(1, 0), (1, 1)})]
    ranking = collect(sweep, rows, None)
    assert ranking.proxies[0]["num_diverged"] == 2
    assert ranking.truth_facts["num_diverged"] == 1


def test_chance_is_the_share_of_vals_largest_class(sweep: Sweep) -> None:
    """A constant guess scores .75 where three quarters are in one class; the tolerance is .125."""
    assert (sweep.val.labels == 0).sum() * 4 == len(sweep.val) * 3 == 36
    scores = [[0.75] * 3, [0.87] * 3, [0.88] * 3, [0.5] * 3]
    ranking = collect(sweep, [*rows_of("nas", scores, set()), *rows_of("truth", scores, set())], None)
    assert ranking.proxies[0]["num_at_chance"] == 3
