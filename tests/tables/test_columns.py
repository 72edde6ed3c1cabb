from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ddray.runs.ledger import Row
from ddray.tables.columns import columns_of, comparisons_of, csv_row, generators_of
from ddray.tables.table import cells_of, write_table
from ddray.tables.units import Cell


def cell(**changes: Any) -> dict[str, Any]:
    return {
        "method": "dm",
        "dataset": "digits",
        "ipc": 1,
        "arch": "convnet3",
        "protocol": "hard",
        "accuracy_mean": 0.5,
        "accuracy_std": 0.0123,
        "n": 2,
        "num_sets": 1,
        "standard_error": 0.01,
        **changes,
    }


PUBLISHED = {
    "accuracy_mean": 0.6,
    "accuracy_std": None,
    "paper": "datadam",
    "table": "Table 3",
    "difference": -0.1,
    "difference_se": None,
}


def texts(*cells: dict[str, Any]) -> dict[str, list[str]]:
    return {column.header: [column.text_of(one) for one in cells] for column in columns_of(cells)}


def test_people_read_the_columns_that_have_a_value() -> None:
    assert texts(cell(), cell(budget=20, ipc=None, augment="dsa", published=PUBLISHED)) == {
        "method": ["dm", "dm"],
        "dataset": ["digits", "digits"],
        "size": ["ipc 1", "20 images"],
        "protocol": ["hard", "hard"],
        "augmentation": ["-", "dsa"],
        "arch": ["convnet3", "convnet3"],
        "accuracy %": ["50.00 +- 1.23", "50.00 +- 1.23"],
        "n (sets)": ["2 (1)", "2 (1)"],
        "published %": ["-", "60.00"],
        "difference": ["-", "-10.00"],
    }


def test_reasons_and_generators_have_columns(tmp_path: Path) -> None:
    number = {**PUBLISHED, "difference": None}
    reasons = ["resolution 64 px, theirs 32 px", "steps 3, the preset's 8000"]
    cells = [cell(published=number, differs=reasons, generator="DiT"), cell(compared={"value": 60.0})]
    columns = texts(*cells)
    assert columns["differs"] == ["; ".join(reasons), "-"]
    assert columns["generator"] == ["DiT", "-"]
    assert "difference" not in columns
    assert generators_of(cells) == ["generator DiT"]
    write_table(tmp_path / "table.csv", cells)
    table = pd.read_csv(tmp_path / "table.csv")
    assert table.differs.tolist()[0] == "; ".join(reasons)
    assert "compared" not in table


def test_people_read_what_is_set_beside_what() -> None:
    number = {"paper": "d3hr", "table": "Table 2", "value": 42.3}
    planned = {"method": "rded", "dataset": "imagenet", "ipc": 10, "protocol": "soft", "teacher": "vgg11"}
    cells = [
        {**planned, "arch": "resnet18", "compared": number},
        {**planned, "arch": "vgg11", "compared": {**number, "value": 23.5}},
        {**planned, "arch": "alexnet", "differs": ["network alexnet, theirs resnet18"]},
        {**planned, "arch": "resnet18", "target": "cub200", "published": number, "differs": ["a", "b"]},
        {**planned, "arch": "resnet18", "method": "dm"},
    ]
    assert list(comparisons_of(cells)) == [
        ("rded", "imagenet", "ipc 10", "resnet18, vgg11; teacher vgg11", "42.3, 23.5 (d3hr, Table 2)", "-"),
        ("rded", "imagenet", "ipc 10", "alexnet; teacher vgg11", "-", "network alexnet, theirs resnet18"),
        ("rded", "imagenet on cub200", "ipc 10", "resnet18; teacher vgg11", "42.3 (d3hr, Table 2)", "a; b"),
    ]


def test_a_protocol_brings_its_columns() -> None:
    columns = texts(cell(protocol="robust", lrs=0.2689, ars=0.3, hlr=0.1), cell())
    assert (columns["LRS %"], columns["ARS %"]) == (["26.89", "-"], ["30.00", "-"])
    assert "hlr" not in columns
    assert "LRS %" not in texts(cell(lrs=0.3))  # of another protocol


def test_balanced_accuracy_is_one_column_everywhere(tmp_path: Path) -> None:
    cells = [cell(balanced_accuracy_mean=0.25), cell()]
    assert texts(*cells)["balanced %"] == ["25.00", "-"]
    write_table(tmp_path / "table.csv", cells)
    assert pd.read_csv(tmp_path / "table.csv").balanced_accuracy_mean.tolist()[:1] == [0.25]


@pytest.mark.parametrize(("balanced", "is_there"), [(0.3, True), (0.499, False), (None, False)])
def test_balanced_accuracy_is_shown_where_it_differs(
    balanced: float | None, is_there: bool, tmp_path: Path
) -> None:
    place: Any = {"method": "dm", "name": "dm", "dataset": "digits", "num_classes": 10, "size": ("ipc", 1)}
    planned = [
        Cell(**place, protocol="hard", arch="convnet3", target="digits", keys=(key,)) for key in ("a", "b")
    ]
    result = {"arch": "convnet3", "accuracy_mean": 0.5, "per_seed": [0.5]}
    measured = {} if balanced is None else {"balanced_accuracy_mean": balanced, "per_class": [balanced]}
    row = Row(key="a", kind="evaluate", spec={}, status="done", result={**result, **measured}, wall_s=1.0)
    rows = {"a": row, "b": row.model_copy(update={"key": "b", "result": result})}

    first, second = cells_of(planned, rows.get)

    assert ("balanced_accuracy_mean" in first, "balanced_accuracy_mean" in second) == (is_there, False)
    write_table(
        tmp_path / "table.csv", [{k: v for k, v in one.items() if k != "sets"} for one in (first, second)]
    )
    assert ("balanced_accuracy_mean" in pd.read_csv(tmp_path / "table.csv")) == is_there


def test_the_file_has_fixed_columns_then_figures_by_name(tmp_path: Path) -> None:
    write_table(tmp_path / "table.csv", [cell(lrs=0.2, hlr=0.1, published=PUBLISHED)])
    table = pd.read_csv(tmp_path / "table.csv")
    assert list(table.columns) == [
        *("method", "dataset", "ipc", "protocol", "arch"),
        *("accuracy_mean", "accuracy_std", "n", "num_sets", "standard_error"),
        *("published", "published_source", "difference", "hlr", "lrs"),
    ]
    assert table.published_source.tolist() == ["datadam, Table 3"]
    assert csv_row(cell())["standard_error"] == pytest.approx(0.01)
