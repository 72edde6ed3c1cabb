"""Facts of a table's cells: what a table changes of presets, whose teachers and generators made its sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ddray import api
from ddray.commands.display import bench_tables, forecast_tables
from ddray.data import open_dataset
from ddray.errors import InputError
from ddray.evaluation.soft_recipes import recipe_teachers
from ddray.tables.columns import columns_of
from ddray.tables.graph import build_graph
from ddray.tables.result import BenchResult
from ddray.tables.spec import BenchSpec, read_spec
from ddray.tables.table import scored_cell
from ddray.tables.units import Cell
from tests.tables.benches import spec, table_cell

HARD: dict[str, Any] = {"protocol": "hard", "seeds": 1}
SOFT: dict[str, Any] = {"protocol": "soft", "seeds": 1}
PLAIN: dict[str, Any] = {"set": {}, "seeds": 1, "evaluate": HARD}


def cells(**changes: Any) -> tuple[Cell, ...]:
    return build_graph(spec(**{**PLAIN, **changes}), open_dataset).cells


def changes_of(method: Any, evaluate: dict[str, Any] = HARD, **table: Any) -> tuple[str, ...]:
    (cell,) = cells(methods=[method], evaluate=evaluate, **table)
    return cell.changes


def test_a_recipe_with_several_teachers_has_them_where_the_table_names_none() -> None:
    """G-VBSM's five; another recipe has the protocol's one, a table its own."""
    five = recipe_teachers("gvbsm", 8)
    for evaluate, teacher in (
        ({**SOFT, "recipe": "gvbsm"}, "+".join(five)),
        ({**SOFT, "options": {"sets": ["recipe=gvbsm"]}}, "+".join(five)),
        ({**SOFT, "recipe": "gvbsm", "teacher": "convnet3_bn"}, "convnet3_bn"),
        ({**SOFT, "recipe": "rd3"}, None),
        (SOFT, None),
        (HARD, None),
    ):
        (cell,) = cells(methods=["random"], ipc=[1], evaluate=evaluate)
        assert cell.teacher == teacher
    limited = {"methods": ["random"], "ipc": [1], "limits": {"teachers": 1}}
    (cell,) = cells(**limited, evaluate={**SOFT, "recipe": "gvbsm"})
    assert cell.teacher is None, "the first of them is the protocol's own"


@pytest.mark.parametrize(
    ("method", "table", "changes"),
    [
        ("dm", {}, ()),
        ({"name": "dm", "set": {"checkpoint_every": 7, "compile": "off", "evaluate.seeds": 2}}, {}, ()),
        ({"name": "dm", "steps": 3}, {}, ("steps 3, the preset's 150",)),
        ("dm", {"set": {"method.lr_img": 2}}, ("method.lr_img 2.0, the preset's 1.0",)),
        ("dm", {"limits": {"epochs": 5}}, ("evaluate.epochs 5, the preset's 300",)),
        (
            "random",
            {"set": {"arch": "convnet1_w8"}},
            ("distilled in convnet1_w8, by the preset in convnet3",),
        ),
        ({"name": "dm", "set": {"can_flip": True}}, {}, ("can_flip true, the dataset's false",)),
        (
            {"name": "dm", "set": {"method.lr_img": 2}, "published": {"setting": "lr=2"}},
            {},
            (),
        ),  # the paper's row
        (
            {"name": "dm", "set": {"method.lr_img": 2}, "published": {"setting": "lr=2"}},
            {"limits": {"steps": 5}},
            ("steps 5, the preset's 150",),
        ),
    ],
)
def test_what_a_row_changes_of_its_preset_is_said(method: Any, table: dict[str, Any], changes: Any) -> None:
    assert changes_of(method, **table) == changes


@pytest.mark.parametrize(
    ("method", "table", "cut", "overridden"),
    [
        ("dm", {}, None, ()),
        ({"name": "dm", "steps": 3}, {}, "steps 3 of 150", ()),
        ({"name": "dm", "steps": 3, "set": {"method.lr_img": 2}}, {}, "steps 3 of 150", ("method.lr_img",)),
        ("dm", {"set": {"steps": 300}}, None, ("steps",)),  # more is no cut
        ("dm", {"limits": {"epochs": 5, "steps": 2}}, "epochs 5 of 300; steps 2 of 150", ()),
        ("dm", {"evaluate": {**HARD, "epochs": 5}}, "epochs 5 of 300", ()),
        ("dm", {"evaluate": {**HARD, "options": {"train_limit": 5}}}, "train_limit 5 of all", ()),
        ("dm", {"evaluate": {**HARD, "augment": "none"}}, None, ("evaluate.augment",)),
        (
            "random",
            {"evaluate": {**SOFT, "recipe": "rded", "epochs": 5}},
            "epochs 5 of 400",
            ("evaluate.recipe",),
        ),
        ("random", {"set": {"arch": "convnet1_w8"}}, None, ("arch",)),
        ({"name": "dm", "steps": 3, "published": {"setting": "3 steps"}}, {}, None, ()),  # the paper's row
    ],
)
def test_a_smaller_budget_is_a_cut_and_other_settings_are_overridden(
    method: Any, table: dict[str, Any], cut: str | None, overridden: tuple[str, ...]
) -> None:
    (cell,) = cells(**{"methods": [method], **table})
    assert (cell.cut, cell.overridden) == (cut, overridden)


def test_a_cut_row_carries_its_cut_and_no_difference_in_standard_errors() -> None:
    published: dict[str, Any] = {"dataset": "cifar10", "num_classes": 10, "name": "datadam"}
    for departure in ({}, {"cut": "steps 2 of 8,000"}, {"overridden": ("pixel_space",)}):
        cell = scored_cell(table_cell(**published, **departure), [[0.3, 0.31]], num_sets=1)
        assert (cell["published"]["difference_se"] is None) == bool(departure)
        assert {name: cell[name] for name in ("cut", "overridden") if name in cell} == {
            name: list(value) if isinstance(value, tuple) else value for name, value in departure.items()
        }
        header = "cut" if "cut" in departure else "overridden"
        columns = {column.header: column.text_of(cell) for column in columns_of([cell])}
        assert columns.get(header, "") == ("".join(departure.get(header, ())))


@pytest.mark.parametrize(
    ("evaluate", "changes"),
    [
        ({"epochs": 300}, ()),
        ({"epochs": 5}, ("evaluate.epochs 5, the preset's 300",)),
        ({"epochs": 5, "published": {"setting": "5-epoch evaluation"}}, ()),
        ({"augment": "none"}, ("evaluate.augment none, the preset's dsa",)),
        ({"recipe": "idc"}, ("evaluate.recipe idc, not the method's own",)),
        ({"options": {"sets": "lr=.5"}}, ("evaluate.lr 0.5, the preset's 0.01",)),
        ({"options": {"sets": "evaluate.lr=.5"}}, ("evaluate.lr 0.5, the preset's 0.01",)),
        ({"options": {"train_limit": 5}}, ("evaluate.train_limit 5",)),
        ({"protocol": "soft"}, ()),
        ({"protocol": "soft", "recipe": "repo"}, ("evaluate.recipe repo, not the method's own",)),
        ({"options": {"train_limit": 5}, "published": {"setting": "x"}}, ("evaluate.train_limit 5",)),
        ({"protocol": "soft", "epochs": 5}, ("evaluate.epochs 5, not the protocol's own",)),
    ],
)
def test_what_a_table_changes_of_an_evaluation_is_said(evaluate: dict[str, Any], changes: Any) -> None:
    assert changes_of("dm", {**HARD, **evaluate}) == changes


def test_settings_of_hard_labels_are_refused_where_labels_are_soft() -> None:
    with pytest.raises(InputError, match=r"set.evaluate.lr is not taken by soft.*options.sets: \[lr="):
        changes_of("dm", SOFT, set={"evaluate.lr": 5})
    with pytest.raises(
        InputError, match=r"set.evaluate.epochs is not taken by soft.* under evaluate.epochs$"
    ):
        changes_of("dm", SOFT, set={"evaluate.epochs": 5})


def test_a_row_that_nothing_scores_is_refused() -> None:
    with pytest.raises(InputError, match="no evaluation takes random"):
        build_graph(spec(methods=["dm", "random"], evaluate={**HARD, "rows": "dm"}), open_dataset)


def test_what_a_limit_lowers_is_said_also_of_the_papers_section() -> None:
    paper = {**HARD, "epochs": 5, "published": {"setting": "5-epoch evaluation"}}
    lowered = ("evaluate.epochs 2, the preset's 300", "evaluate.epochs 2 by a limit")
    assert changes_of("dm", paper, limits={"epochs": 2}) == lowered


def test_sets_are_scored_with_the_teacher_that_made_them() -> None:
    teachers = ["convnet1_w8_bn", "convnet2_w8_bn"]
    rows = [{"name": "rded", "sweep": {"method.teacher_arch": teachers}}, "random"]
    with_own = {**SOFT, "rows": "rded", "archs": "convnet1_w8", "teacher": "own"}
    both = {**SOFT, "rows": "random", "archs": "convnet1_w8", "teacher": teachers}
    graph = build_graph(spec(**{**PLAIN, "methods": rows, "evaluate": [with_own, both]}), open_dataset)
    assert [(cell.method, cell.teacher, cell.distilled_with) for cell in graph.cells] == [
        ("rded, teacher_arch=convnet1_w8_bn", "convnet1_w8_bn", "convnet1_w8_bn"),
        ("rded, teacher_arch=convnet2_w8_bn", "convnet2_w8_bn", "convnet2_w8_bn"),
        ("random", "convnet1_w8_bn", None),
        ("random", "convnet2_w8_bn", None),
    ]
    for unit in graph.evaluate.values():
        made_by = graph.plans[unit.identity.inputs[0]].config.method
        assert unit.options["teachers"] == [getattr(made_by, "teacher_arch", *unit.options["teachers"])]
    with pytest.raises(InputError, match=r"own needs rows whose sets are made with a teacher.*got random"):
        build_graph(spec(**{**PLAIN, "methods": rows, "evaluate": {**with_own, "rows": []}}), open_dataset)
    with pytest.raises(InputError, match=r"evaluate.rows must name rows, got 'rdde'; did you mean 'rded'"):
        spec(methods=rows, evaluate={**with_own, "rows": "rdde"})


def test_a_spec_without_rows_is_stored_as_before_there_were_any() -> None:
    assert "rows" not in spec().dump()["evaluate"][0]
    assert BenchSpec.parse(spec(evaluate={**SOFT, "rows": ["dm"]}).dump()).evaluate[0].rows == ("dm",)


def test_set_wins_over_the_file_and_a_row_over_both(tmp_path: Path) -> None:
    rows: list[Any] = ["dm", {"name": "dm", "label": "own", "set": {"method.lr_img": 4}}]
    table = {
        "name": "t",
        "dataset": "digits",
        "ipc": 1,
        "methods": rows,
        "set": {"method.lr_img": 2, "steps": 9},
    }
    overrides = {"method": {"lr_img": 3}}
    plans = build_graph(read_spec(table, overrides=overrides), open_dataset).plans.values()
    assert [(plan.config.steps, plan.config.method.lr_img) for plan in plans] == [(9, 3), (9, 4)]
    assert read_spec(table, overrides=overrides).set == {"method": {"lr_img": 3}, "steps": 9}
    table["published"] = {"paper": "dsdm", "table": "Table 1"}
    forecast = api.forecast({**table, "dataset": "mnist"}, sets=["method.lr_img=3"], executor="local")
    assert forecast.cells[0]["differs"] == [
        "method.lr_img 3.0, the preset's 1.0",
        "steps 9, the preset's 20000",
    ]


def test_one_line_points_a_table_to_a_generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = ["random", "d3hr", {"name": "d3hr", "label": "another", "set": {"method.diffusion": "other"}}]
    table = {**PLAIN, "name": "t", "dataset": "digits", "ipc": 1, "methods": rows}

    def generators(generator: Any, scale: str = "paper", **changes: Any) -> list[str | None]:
        bench_spec = read_spec({**table, "generator": generator, **changes}, scale)
        return [cell.generator for cell in build_graph(bench_spec, open_dataset).cells]

    assert generators(None) == [None, "trained here for 100 epochs", f"{tmp_path.name}/other"]
    assert generators("dit") == [None, f"{tmp_path.name}/dit", f"{tmp_path.name}/other"]
    assert generators({"digits": "dit"}, can_flip=True) == generators("dit")
    assert read_spec({**table, "generator": "dit"}).generator == str(tmp_path / "dit")
    small = generators({"mnist": "dit"}, "smoke", dataset="mnist")
    assert small[1] == "trained here for 2 epochs", "the folder is of other images"
    with pytest.raises(InputError, match=r"generator must be for datasets among \['digits'\], got 'mnist'"):
        generators({"mnist": "dit"})


def test_generators_stand_in_the_title_and_in_the_rows() -> None:
    scored = {"dataset": "digits", "ipc": 1, "protocol": "hard", "arch": "convnet3", "n": 1, "num_sets": 1}
    scored |= {"accuracy_mean": 0.5, "accuracy_std": None}
    result = BenchResult.parse(
        {
            **{
                "name": "t",
                "run_dir": "runs/t",
                "num_failed": 0,
                "failures": [],
                "skipped": [],
                "wall_s": 1.0,
            },
            "cells": [{**scored, "method": name, "generator": "dit"} for name in ("a", "b")],
        }
    )
    table, *_ = bench_tables(result)
    assert str(table.title).endswith(", generator dit")
    assert "generator" in [column.header for column in table.columns]
    forecast = api.forecast({"name": "t", "dataset": "digits", "ipc": 1, "methods": ["random"]})
    assert [str(table.title) for table in forecast_tables(forecast.dump())] == [
        "t, paper",
        "forecast",
        "comparisons",
    ]
