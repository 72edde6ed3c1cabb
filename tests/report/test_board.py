"""The leaderboard's matrix and table, and the result in a page's title."""

from __future__ import annotations

import base64
import csv
import io
from typing import Any

from ddray.report.board import matrix_of, of_most_sets, table_of
from ddray.report.headline import of_cells


def cell(method: str, mean: float | None, **changes: Any) -> dict[str, Any]:
    values = {
        "method": method,
        "dataset": "digits",
        "ipc": 1,
        "protocol": "hard",
        "arch": "convnet3",
        "accuracy_mean": mean,
        "accuracy_std": 0.01,
        "standard_error": 0.01,
        "n": 4,
        "num_sets": 2,
    }
    return {**values, **changes}


def marked(cells: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Each row of the matrix: accuracies in percent, the best with a star."""
    return {
        method: [
            "-" if mark is None else f"{100 * mark.entry['accuracy_mean']:.0f}" + "*" * mark.is_best
            for mark in marks
        ]
        for method, marks in matrix_of(cells).rows
    }


def test_the_best_of_a_column_and_what_is_within_its_error_are_marked_and_lead() -> None:
    cells = [
        *(cell("a", 0.50), cell("b", 0.513), cell("c", 0.40)),
        *(cell("a", 0.80, ipc=10), cell("c", 0.95, ipc=10), cell("c", None, ipc=50)),
    ]

    # The error of the difference of a and b is 0.014.
    assert marked(cells) == {"c": ["40", "95*"], "a": ["50*", "80"], "b": ["51*", "-"]}
    assert [*marked(cells)] == ["c", "a", "b"], "less behind first, fewer columns last"
    assert matrix_of(cells).heads == ("ipc 1", "ipc 10")
    assert matrix_of(cells).leaders() == ["b", "c"]


def test_without_an_error_only_the_best_is_marked() -> None:
    alone = {"accuracy_std": None, "standard_error": None}

    assert marked([cell("a", 0.50, **alone), cell("b", 0.501, **alone)]) == {"b": ["50*"], "a": ["50"]}


def test_columns_are_told_apart_by_what_differs_within_a_dataset_and_size() -> None:
    by_dataset = [cell("a", 0.5), cell("a", 0.4, dataset="cifar10", arch="convnet3_w64")]
    assert matrix_of(by_dataset).heads == ("digits", "cifar10"), "the network follows from the dataset"

    by_arch = [cell("a", 0.5), cell("a", 0.4, arch="resnet18"), cell("b", 0.3, target="mnist")]
    assert matrix_of(by_arch).heads == ("convnet3", "resnet18", "on mnist, convnet3")
    assert matrix_of([by_arch[0], by_arch[2]]).heads == ("on digits", "on mnist")
    assert marked(by_arch) == {"a": ["50*", "40*", "-"], "b": ["-", "-", "30*"]}

    by_settings = [cell("a", 0.5, settings="epochs=5"), cell("a", 0.4)]
    assert matrix_of(by_settings).heads == ("epochs=5", "default settings")
    assert matrix_of([cell("a", 0.5), cell("b", 0.4)]).heads == ("accuracy",)


def test_a_table_tells_once_what_all_rows_share_and_has_its_csv() -> None:
    table = table_of([cell("a", 0.5, augment="dsa"), cell("b, c", 0.4, augment="dsa", arch="resnet18")])

    assert [column.header for column in table["columns"]] == ["method", "accuracy %", "arch"]
    assert table["shared"] == "dataset digits; size ipc 1; augmentation dsa; n (sets) 4 (2)"
    kind, _, encoded = table["csv"].partition("base64,")
    assert kind == "data:text/csv;charset=utf-8;"
    lines = list(csv.DictReader(io.StringIO(base64.b64decode(encoded).decode())))
    assert [(line["method"], line["accuracy_mean"], line["ipc"]) for line in lines] == [
        ("a", "0.5", "1"),
        ("b, c", "0.4", "1"),
    ]
    (alone,) = [table_of([cell("a", 0.5)])]
    assert "dataset" in [column.header for column in alone["columns"]], "a single row shares nothing"


def test_a_title_is_the_best_of_one_column_or_who_leads_most() -> None:
    assert of_cells([cell("dm", 0.7123)], "bench mini") == "dm on digits, ipc 1: 71.2 % (convnet3)"
    beside = [cell("random", 0.5), cell("dm", 0.7123)]
    assert of_cells(beside, "bench mini") == "dm on digits, ipc 1: 71.2 % (next: random 50.0)"
    soft = cell("dm", 0.5, protocol="soft", target="mnist")
    assert of_cells([soft], "bench mini") == "dm on digits, ipc 1, soft on mnist: 50.0 % (convnet3)"
    columns = [
        cell(name, mean, ipc=ipc) for name, mean, ipc in (("a", 0.5, 1), ("b", 0.6, 1), ("b", 0.7, 10))
    ]
    assert of_cells(columns, "bench mini") == "b leads in 2 of 2 columns (bench mini)"
    assert of_cells([cell("a", None)], "bench mini") == "bench mini"
    assert of_cells([], "2 runs") == "2 runs"


def test_a_title_tells_ties() -> None:
    def at(ipc: int, **means: float) -> list[dict[str, Any]]:
        return [cell(name, mean, ipc=ipc) for name, mean in means.items()]

    assert of_cells([*at(1, a=0.5, b=0.6), *at(10, a=0.8, b=0.7)], "t") == "b and a lead in 1 column each (t)"
    assert (
        of_cells([*at(1, a=0.6, b=0.6), *at(10, a=0.8, b=0.8)], "t") == "a and b lead in 2 columns each (t)"
    )
    assert of_cells([*at(1, a=0.6, b=0.6), *at(10, a=0.8, b=0.7)], "t") == "a leads in 2 of 2 columns (t)"
    four = [*at(1, a=0.6, b=0.6, c=0.6, d=0.6), *at(10, a=0.8, b=0.8, c=0.8, d=0.8)]
    assert of_cells(four, "t") == "4 methods lead in 2 columns each (t)"
    assert of_cells(at(1, a=0.5, b=0.5), "t") == "a on digits, ipc 1: 50.0 % (tied: b 50.0)"


def test_a_title_tells_cuts_beside_the_scores_they_belong_to() -> None:
    cut = {"cut": "steps 3 of 150"}
    assert (
        of_cells([cell("dm", 0.5, **cut)], "t")
        == "dm on digits, ipc 1: 50.0 % (cut: steps 3 of 150; convnet3)"
    )
    beside = [cell("dm", 0.5, **cut), cell("random", 0.4), cell("dm", 0.7, ipc=10, **cut)]
    assert of_cells(beside[:2], "t") == "dm on digits, ipc 1: 50.0 % (cut: steps 3 of 150; next: random 40.0)"
    below = [cell("dm", 0.3, **cut), cell("random", 0.4)]
    assert of_cells(below, "t") == "random on digits, ipc 1: 40.0 % (next: dm 30.0, cut: steps 3 of 150)"
    assert of_cells(beside, "t") == "dm (cut) leads in 2 of 2 columns (t)"
    assert (matrix_of(beside).has_cuts, matrix_of(beside[1:2]).has_cuts) == (True, False)


def ranked(method: str, spearman: float | None, **changes: Any) -> dict[str, Any]:
    """A cell of a NAS sweep: the less it ranks well, the better the architecture that it finds."""
    figures = {"protocol": "nas", "arch": "convnet720", "spearman": spearman, "num_archs": 20}
    return cell(method, 0.5 - (spearman or 0.0) / 10, **{**figures, **changes})


def test_the_title_of_a_nas_table_is_by_its_ranking() -> None:
    sweep = [ranked("random", 0.2), ranked("dm", 0.613, cut="steps 3 of 150"), ranked("dc", None)]
    assert (
        of_cells(sweep, "t")
        == "dm (cut) ranks 20 architectures of convnet720 on digits at ipc 1 with Spearman 0.61"
    )
    assert of_cells([ranked("dm", 1.0, num_archs=3)], "t").endswith("ipc 1: too few for a correlation")
    several = [
        *sweep,
        ranked("random", 0.9, ipc=10),
        ranked("dm", -0.2, ipc=10),
        ranked("random", 0.4, ipc=50),
    ]
    assert of_cells(several, "t") == "random leads in 2 of 3 sweeps by Spearman (t)"
    assert of_cells([ranked("dm", None), ranked("dm", None, ipc=10)], "t") == "t"


def test_a_set_of_a_table_that_was_scored_again_does_not_stand_for_its_row() -> None:
    table = [cell("a", 0.50), cell("b", 0.60)]
    again = [cell("a", 0.70, num_sets=1, n=2), cell("a", 0.90, num_sets=1, settings="epochs=9")]

    assert of_most_sets([*table, *again]) == [*table, again[1]]
    assert marked([*table, again[0]]) == {"b": ["60*"], "a": ["50"]}
