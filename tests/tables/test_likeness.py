"""Cells are set beside published numbers only like with like, and say what differs otherwise."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from ddray.data.catalog import KNOWN
from ddray.evaluation.published import conditions_of, read_numbers
from ddray.runs.ledger import Row
from ddray.system.shipped import shipped
from ddray.tables.likeness import Likeness, likeness
from ddray.tables.spec import PublishedSource
from ddray.tables.table import cells_of, planned_cell
from tests.tables.benches import table_cell

TABLE3 = PublishedSource(paper="datadam", table="Table 3")
FACTS: dict[str, Any] = {"image_size": 32, "distilled_in": "convnet3"}
SOFT: dict[str, Any] = {
    **{"method": "rded", "name": "rded", "size": ("ipc", 10), "protocol": "soft", "arch": "resnet18"},
    **{"teacher": "resnet18", "source": PublishedSource(paper="d3hr", table="Table 1"), "image_size": 32},
    **{"distilled_in": "convnet3", "distilled_with": "resnet18"},
}
LARGE: dict[str, Any] = {
    **SOFT,
    **{"dataset": "imagenet?image_size=224", "target": "imagenet?image_size=224", "num_classes": 1000},
    **{"source": PublishedSource(paper="d3hr", table="Table 2"), "image_size": 224},
}
PROBED: dict[str, Any] = {
    **{"method": "random_ssl", "name": "random_ssl", "size": ("budget", 100), "protocol": "linear"},
    **{"dataset": "cifar100", "target": "cifar100", "num_classes": 100, "image_size": 32},
    **{"arch": "convnet3_x2_bn", "distilled_in": "convnet3_x2_bn", "num_images": 100},
    "source": PublishedSource(paper="boost_ssdd", table="Table 1"),
}
DD: dict[str, Any] = {
    **{"method": "dd", "name": "dd", "size": ("ipc", 10), "source": PublishedSource(paper="dd")},
    **{"arch": "alexcifar", "distilled_in": "alexcifar"},
}


def judged(**changes: Any) -> Likeness:
    return likeness(read_numbers(), table_cell(**{"source": TABLE3, **FACTS, **changes}))


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ({}, 32.0),
        ({"dataset": "cifar10?can_flip=true", "target": "cifar10?can_flip=true"}, 32.0),
        ({"arch": "convnet3_bn", "distilled_in": "convnet3_bn"}, 32.0),  # the preset `repo`
        ({"protocol": "robust"}, 32.0),
        ({"source": PublishedSource()}, 32.0),
        (SOFT, 37.1),
        (LARGE, 42.3),
        ({**LARGE, "teacher": "vgg11", "distilled_with": "vgg11"}, 36.6),
        ({**LARGE, "name": "d3hr", "teacher": "vgg11", "distilled_with": None}, 38.3),
        (PROBED, 43.66),
        ({**PROBED, "name": "boost_ssdd", "num_images": 114}, 52.41),
        ({**DD, "protocol": "steps"}, 36.8),
        ({**DD, "protocol": "steps", "source": PublishedSource(paper="dsdm", table="Table 1")}, 36.8),
    ],
)
def test_like_is_compared_with_like(cell: dict[str, Any], value: float) -> None:
    result = judged(**cell)
    assert result.differs == ()
    assert result.compared is not None
    assert result.compared.value == value


@pytest.mark.parametrize(
    ("cell", "reason", "has_number"),
    [
        ({"image_size": 64}, "resolution 64 px, theirs 32 px", True),
        ({**LARGE, "image_size": 64}, "resolution 64 px, theirs 224 px", True),
        ({"arch": "alexnet"}, "network alexnet, theirs convnet3", False),
        ({"arch": "convnet4"}, "network convnet4, theirs convnet3", False),
        ({**DD, "protocol": "steps", "arch": "alexnet"}, "network alexnet, theirs alexcifar", False),
        (
            {**PROBED, "arch": "alexcifar"},
            "network alexcifar, theirs convnet3, vgg11, resnet18, alexnet, mobilenet, vit",
            False,
        ),
        ({"arch": "convnet3_bn"}, "network convnet3_bn, theirs convnet3 with instance norm", True),
        ({"size": ("ipc", 2)}, "ipc 2, theirs ipc 1, ipc 10, ipc 50", False),
        ({"dataset": "mnist", "target": "mnist"}, "dataset mnist, theirs cifar10", False),
        ({"protocol": "soft"}, "protocol soft, theirs hard", True),
        ({"protocol": "steps"}, "protocol steps, theirs hard", True),
        (DD, "protocol hard, theirs steps", True),
        ({**DD, "source": PublishedSource(paper="dsdm")}, "protocol hard, theirs steps", True),
        ({**DD, "protocol": "robust"}, "protocol robust, theirs steps", True),
        ({"protocol": "linear"}, "protocol linear, theirs hard", False),
        ({"changes": ("steps 3, the preset's 8000",)}, "steps 3, the preset's 8000", True),
        ({**SOFT, "teacher": "convnet3_bn"}, "teacher convnet3_bn, theirs resnet18", False),
        ({**SOFT, "protocol": "hard"}, "protocol hard, theirs soft", True),
        ({**LARGE, "teacher": "vgg11"}, "distilled with resnet18, theirs with vgg11", True),
        ({**PROBED, "num_images": 85}, "85 images, theirs 100", True),
        (
            {**PROBED, "arch": "convnet3_bn"},
            "network convnet3_bn, theirs convnet3 with batch norm, 512 channels at last",
            True,
        ),
        (
            {
                **SOFT,
                "name": "d3hr",
                "source": PublishedSource(paper="d3hr", table="Table A10", setting=None),
            },
            "not stated in the paper: the network",
            True,
        ),
    ],
)
def test_what_differs_is_said(cell: dict[str, Any], reason: str, has_number: bool) -> None:
    result = judged(**cell)
    assert result.differs == (reason,)
    assert result.compared is None
    assert (result.number is not None) == has_number


def test_what_no_table_is_near_to_is_neither() -> None:
    changes = ("steps 3, the preset's 8000",)
    for cell in (
        {"dataset": "digits", "target": "digits", "source": PublishedSource(), "changes": changes},
        {"source": PublishedSource(table="none"), "changes": changes},
        {"name": "dc", "changes": changes},
        {"arch": "alexnet", "source": PublishedSource()},
    ):
        assert judged(**cell) == Likeness(None, ())


def test_a_cell_that_differs_keeps_the_number_and_loses_the_difference() -> None:
    result = {"arch": "convnet3", "accuracy_mean": 0.3, "per_seed": [0.3, 0.31]}
    row = Row(key="a", kind="evaluate", spec={}, status="done", result=result, wall_s=1.0)
    cells = [
        table_cell(source=TABLE3, keys=("a",), **FACTS, **changed) for changed in ({}, {"changes": ("x",)})
    ]

    same, other = cells_of(cells, {"a": row}.get)

    assert "differs" not in same
    assert (same["compared"]["value"], same["compared"]["std"], same["compared"]["unit"]) == (
        32,
        1.2,
        "percent",
    )
    assert same["published"]["difference"] == pytest.approx(0.305 - 0.32)
    assert same["published"]["difference_se"] is not None
    assert (other["differs"], "compared" in other) == (["x"], False)
    assert other["published"]["accuracy_mean"] == 0.32
    assert (other["published"]["difference"], other["published"]["difference_se"]) == (None, None)
    planned = [planned_cell(cell) for cell in cells]
    assert planned[0]["compared"] == planned[1]["published"] == same["compared"]
    assert planned[1]["differs"] == ["x"]


def test_cells_of_runs_from_before_their_facts_are_compared_as_then() -> None:
    assert likeness(read_numbers(), table_cell(source=TABLE3)).compared is not None


def test_conditions_are_of_tables_and_datasets_that_exist() -> None:
    with Path(shipped("reports", "published.csv")).open(encoding="utf-8", newline="") as file:
        tables = {(row["paper"], row["table"]) for row in csv.DictReader(file)}
    stated = {(n.paper, n.table): conditions_of(n) for n in read_numbers()}
    assert stated.keys() == tables
    for (paper, _), conditions in stated.items():
        assert set(conditions.pixels) <= set(KNOWN)
        assert conditions.protocol == {"dsdm": "hard", "boost_ssdd": "linear"}.get(paper, conditions.protocol)
    # D3HR 5.1 and 6.4; Boost-SSDD 4 and A.6; DataDAM 1.1; DSDM 5.3.
    sides = [
        *(("d3hr", "Table 1", "imagenet", 224), ("d3hr", "Table 5", "imagewoof", 224)),
        *(("boost_ssdd", "Table 8", "imagenet", 64), ("boost_ssdd", "Table 10", "imagenet", 224)),
        *(("boost_ssdd", "Table 9", "imagenette", 128), ("datadam", "Table 3", "imagenet", 64)),
        ("dsdm", "Table 2", "speech_commands_mini", 64),
    ]
    for paper, table, dataset, side in sides:
        assert stated[paper, table].pixels[dataset] == side
    assert [stated["datadam", f"Table {n}"].protocol for n in (3, 4, 5)] == ["hard", "nas", "nas"]
    assert [stated["d3hr", f"Table {n}"].protocol for n in (1, 5)] == ["soft", "hard"]
