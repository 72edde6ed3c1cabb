"""Plots beside the bars: what they are drawn from, and when."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ddray.data import open_dataset
from ddray.errors import InputError
from ddray.report import charts
from ddray.report.page import write_page
from ddray.report.plane import make_plane, pool_net, under_networks
from ddray.report.runs import Scored, read_run
from ddray.runs.ledger import Row
from ddray.tables.spec import BenchSpec
from ddray.tables.units import Cell
from tests.report.pages import body, traces
from tests.tables.benches import run


def scored(method: str, per_set: list[list[float]], **changes: Any) -> Scored:
    values: dict[str, Any] = {
        "method": method,
        "name": "dsdm",
        "dataset": "cifar10",
        "num_classes": 10,
        "size": ("ipc", 50),
        "protocol": "hard",
        "arch": "convnet3",
        "target": "cifar10",
        "sets": tuple(f"{method}{seed}" for seed in range(len(per_set))),
    }
    result = changes.pop("result", {})
    rows = (
        Row(key=f"{method}{seed}", kind="evaluate", spec={"seed": seed}, status="done", wall_s=1, result=one)
        for seed, one in enumerate({"per_seed": accuracies, **result} for accuracies in per_set)
    )
    return Scored(Cell.parse({**values, **changes}), tuple(rows))


def run_of(cells: list[Scored], methods: Sequence[Any] = (), rows: Sequence[Row] = ()) -> Any:
    return SimpleNamespace(scored=cells, config={"command": "bench", "methods": methods}, rows=rows)


def test_three_sets_with_three_networks_each_give_nine_points_and_their_mean() -> None:
    cells = [scored(name, [[0.1, 0.2, 0.3]] * 3) for name in ("d3hr", "Base-RS")]

    (chart,) = charts.charts(run_of(cells))

    assert chart["title"] == "Spread over sets and networks: cifar10, ipc 50, hard"
    points, means = traces(chart["html"])
    assert points["y"] == pytest.approx([10, 20, 30] * 6)
    assert [round(x) for x in points["x"]] == [0] * 9 + [1] * 9, "each row's points beside each other"
    assert len(set(points["x"])) == 18
    assert means["y"] == pytest.approx([20, 20])
    assert means["error_y"]["array"] == pytest.approx([75**0.5] * 2)
    assert '"ticktext":["d3hr","Base-RS"]' in chart["html"]


def test_ten_sets_give_a_line_per_row_over_their_seeds_and_five_do_not() -> None:
    cells = [scored(name, [[0.1 + seed / 100] for seed in range(10)]) for name in ("d3hr", "d4m")]

    (chart,) = charts.charts(run_of(cells))

    lines = traces(chart["html"])
    assert [line["name"] for line in lines] == ["d3hr, convnet3", "d4m, convnet3"]
    assert lines[0]["x"] == list(range(10))
    assert lines[0]["y"] == pytest.approx([10 + seed for seed in range(10)])
    assert not list(charts.charts(run_of([scored("d3hr", [[0.1]] * 5)])))


def test_a_row_that_varies_a_number_gives_a_curve_over_it_and_one_that_varies_words_does_not() -> None:
    methods = [
        {"name": "dsdm", "sweep": {"method.lambda1": [0.01, 50, 10]}},
        {"name": "datadam", "sweep": {"method.loss": ["mse", "mae", "cosine"]}},
        {"name": "dm"},
    ]
    cells = [scored(f"dsdm, lambda1={value}", [[value / 100, value / 50]]) for value in (0.01, 50, 10)]
    cells += [scored(f"datadam, loss={loss}", [[0.5]]) for loss in ("mse", "mae", "cosine")]

    (chart,) = charts.charts(run_of([*cells, scored("dm", [[0.4]])], methods))

    (line,) = traces(chart["html"])
    assert chart["title"] == "dsdm, lambda1: cifar10, ipc 50, hard"
    assert line["x"] == [0.01, 10, 50]
    assert line["y"] == pytest.approx([0.015, 15, 75])
    assert line["error_y"]["array"][2] == pytest.approx(50 / 2**0.5)
    assert '"type":"log"' in chart["html"]


def test_storage_is_drawn_with_the_generator_where_a_set_needs_one() -> None:
    cells = [scored("images", [[0.1]]), scored("statistics", [[0.1]])]
    floats: list[dict[str, Any]] = [
        {"storage_floats": 2**20},
        {"storage_floats": 2**18, "storage_with_generator_floats": 2**18 + 2**22},
    ]
    rows = [
        Row(key=cell.cell.sets[0], kind="distill", spec={}, status="done", wall_s=1, result=result)
        for cell, result in zip(cells, floats, strict=True)
    ]

    html = charts.storage_bars(run_of(cells, rows=rows))

    assert html is not None
    of_sets, generator = traces(html)
    assert of_sets["x"] == ["images, ipc 50", "statistics, ipc 50"]
    assert of_sets["y"] == [4, 1]  # megabytes of four bytes a float
    assert generator["y"] == [0, 16]
    assert charts.storage_bars(run_of(cells, rows=rows[:1])) is None


SPEC: dict[str, Any] = {
    "name": "networks",
    "dataset": "digits",
    "methods": ["random", {"name": "dm", "steps": 1, "set": {"method.batch_real": 4}}],
    "ipc": 2,
    "set": {"arch": "convnet1_w8", "compile": "off"},
    "evaluate": {"protocol": "distribution", "archs": ["convnet1_w8"], "epochs": 1, "seeds": 3},
}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bench of sets compared with the real images under three networks; $DDRAY_HOME stands beside it."""
    temporary = tmp_path_factory.mktemp("networks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDRAY_HOME", str(temporary / "home"))
        run(temporary / "run", BenchSpec.parse(SPEC))
    return temporary / "run"


def test_a_set_is_drawn_under_each_network_and_planes_are_the_first_ones(
    compared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDRAY_HOME", str(compared.parent / "home"))
    write_page([compared], compared / "report.html")

    page = body((compared / "report.html").read_text())

    sections = re.split(r"<h2 id=", page)
    by_name = {re.findall(r'"(\w+)"', part)[0]: part for part in sections[1:]}
    assert "Distance under each network: digits, ipc 2, distribution" in by_name["charts"]
    assert "convnet1_w8, trained on the real images for 1 epochs" in by_name["plane"]
    assert by_name["networks"].count("<h3>") == 2  # a row each
    assert "prototype loss" in by_name["leaderboard"]


def test_points_under_networks_are_of_one_class_and_a_network_must_be_in_the_pool(
    compared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDRAY_HOME", str(compared.parent / "home"))
    run = read_run(compared)
    digits, view = open_dataset("digits"), run.sets[0]
    networks = run.scored[0].rows[0].result["networks"]["convnet1_w8"]

    points = under_networks(digits, view, networks)

    assert [part.shape for part in points] == [(2, 2)] * 3
    plane = make_plane(digits, [view], network=networks[1])
    assert plane is not None
    assert plane.network == pool_net(networks[1])[1]
    with pytest.raises(InputError, match="the pool must hold network 000000000000 of the run"):
        make_plane(digits, [view], network="0" * 64)
