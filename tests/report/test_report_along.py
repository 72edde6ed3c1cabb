"""The page over a bench that keeps sets along the steps."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from ddray.report.figures import along_curves
from ddray.report.page import write_page
from ddray.report.runs import read_run
from ddray.tables.along import group_of
from ddray.tables.spec import BenchSpec
from tests.report.pages import SPEC, body, traces
from tests.tables.benches import run

ALONG: dict[str, Any] = {
    **SPEC,
    "name": "along",
    "ipc": 1,
    "methods": [{"name": "dm", "steps": 20, "set": {"method.batch_real": 4, "evaluate.every": 2}}, "random"],
    "evaluate": {"archs": ["convnet1_w8"], "epochs": 1, "seeds": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    temporary = tmp_path_factory.mktemp("along")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDRAY_HOME", str(temporary / "home"))
        run(temporary / "run", BenchSpec.parse(ALONG))
    return temporary / "run"


def test_the_page_draws_accuracies_and_pictures_along_the_steps(folder: Path, tmp_path: Path) -> None:
    write_page([folder], tmp_path / "page.html", planes=False)
    page = body((tmp_path / "page.html").read_text())
    part = page[page.index('id="along"') : page.index('id="curves"')]
    assert "digits, ipc 1, hard" in part
    (steps,) = re.findall(r"<figcaption>steps ([\d, ]+)</figcaption>", part)
    assert steps == "2, 6, 8, 12, 14, 18, 20", (
        "six kept sets, the first and the last among them, and the result"
    )
    assert len(read_run(folder).sets[0].snapshots()) == 9


def test_a_curve_has_the_points_of_its_cell_and_a_band_of_a_deviation() -> None:
    cells = [
        {
            "method": method,
            "dataset": "digits",
            "ipc": 1,
            "protocol": "hard",
            "arch": "a",
            "along": [
                {"step": 5, "accuracy_mean": 0.25, "accuracy_std": 0.125, "n": 2},
                {"step": 10, "accuracy_mean": 0.5, "accuracy_std": None, "n": 1},
            ],
        }
        for method in ("dm", "datadam")
    ]
    band, line, *others = traces(along_curves(cells))
    assert (line["name"], line["x"], line["y"]) == ("dm", [5, 10], [25.0, 50.0])
    assert (band["x"], band["y"]) == ([5, 10, 10, 5], [37.5, 50.0, 50.0, 12.5])
    assert others[1]["name"] == "datadam"


def test_rows_of_a_group_that_share_a_label_are_told_apart() -> None:
    cell = {"method": "dm", "dataset": "cifar10", "ipc": 1, "protocol": "hard", "along": []}
    names = [
        trace["name"] for trace in traces(along_curves([{**cell, "arch": "a"}, {**cell, "arch": "b"}]))[1::2]
    ]
    assert names == ["dm, a", "dm, b"]


def test_a_row_without_a_size_is_a_group_of_its_own() -> None:
    assert group_of({"dataset": "cifar10", "protocol": "hard"}) == "cifar10, hard"
    linear = {"dataset": "cifar100", "budget": 100, "protocol": "linear", "target": "cifar10"}
    assert group_of(linear) == "cifar100, 100 images, linear on cifar10"


def test_a_run_whose_kept_sets_are_gone_has_its_curve(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "run")
    for steps in (copy / "artifacts").glob("*-steps"):
        shutil.rmtree(steps)
    write_page([copy], tmp_path / "page.html", planes=False)
    page = body((tmp_path / "page.html").read_text())
    assert 'id="along"' in page
    assert "figcaption>steps" not in page
