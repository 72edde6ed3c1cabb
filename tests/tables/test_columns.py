from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ddray.tables.columns import columns_of, csv_row
from ddray.tables.table import write_table


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


def test_a_protocol_brings_its_columns() -> None:
    columns = texts(cell(protocol="robust", lrs=0.2689, ars=0.3, hlr=0.1), cell())
    assert (columns["LRS"], columns["ARS"]) == (["0.269", "-"], ["0.3", "-"])
    assert "hlr" not in columns
    assert "LRS" not in texts(cell(lrs=0.3))  # of another protocol


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
