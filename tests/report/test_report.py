from __future__ import annotations

import csv
import html
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ddray.artifact.distilled_set import DistilledSet
from ddray.config import flatten
from ddray.data import fit_zca
from ddray.drawing.images import grid, images_along, png, save_grid
from ddray.runs.ledger import Row
from ddray.runs.results import write_results
from ddray.tuning.plots import history_plot, slice_plots
from tests.report.pages import SPACE, heading, traces, trial_row, write_search

leaves = st.integers() | st.none() | st.lists(st.integers(), max_size=2)
nested = st.recursive(
    st.dictionaries(st.sampled_from("abc"), leaves, max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner | leaves, max_size=3),
    max_leaves=8,
)


@given(nested)
def test_flatten_names_every_leaf_by_its_path(value: dict[str, Any]) -> None:
    leaves_by_path = flatten(value, "x.")

    for name, leaf in leaves_by_path.items():
        node: Any = value
        for part in name.removeprefix("x.").split("."):
            node = node[part]
        assert node is leaf

    def count(node: Any) -> int:
        return sum(map(count, node.values())) if isinstance(node, dict) else 1

    assert len(leaves_by_path) == count(value)


def test_results_are_one_line_per_row(tmp_path: Path) -> None:
    rows = [
        Row(
            key="a" * 64,
            kind="distill",
            spec={"ipc": 1, "method": {"lr": 0.5}},
            status="done",
            result={"accuracy": 0.25, "note": 'a, "b"\nc'},
            wall_s=1.23456,
        ),
        Row(key="b", kind="trial", spec={}, status="failed", result={}, wall_s=0, error="NaN loss"),
    ]
    write_results(tmp_path / "results.csv", rows)

    lines = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))

    assert [line["key"] for line in lines] == ["a" * 64, "b"]
    assert lines[0] | {"accuracy": "0.25", "spec.method.lr": "0.5", "wall_s": "1.235"} == lines[0]
    assert lines[0]["note"] == 'a, "b"\nc'
    assert (lines[1]["status"], lines[1]["error"], lines[1]["accuracy"]) == ("failed", "NaN loss", "")


def test_no_rows_give_an_empty_table(tmp_path: Path) -> None:
    write_results(tmp_path / "results.csv", [])

    assert (tmp_path / "results.csv").read_text().strip() == ""


def a_set(toy: Any, planned: Any, *, ipc: int = 2, **layers: Any) -> DistilledSet:
    _, ctx, method = planned("random", toy(), ipc=ipc, **layers)
    method.setup(ctx)
    distilled: DistilledSet = method.snapshot()
    return distilled


def cells(picture: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Undo the grid: names on the left, 2 px padding, 16 px images magnified four times.

    Returns [rows, columns, 3, 16, 16].
    """
    side = 64 + 2
    names = picture.shape[2] - columns * side - 2
    assert picture.shape[1] == rows * side + 2
    assert names > 0
    assert all(float(row[:, :, :names].min()) < 0.5 for row in picture.split(side, dim=1)[:rows])
    picture = picture[:, :, names:]
    tiles = [
        picture[:, 2 + r * side : 66 + r * side : 4, 2 + c * side : 66 + c * side : 4]
        for r in range(rows)
        for c in range(columns)
    ]
    return torch.stack(tiles).view(rows, columns, 3, 16, 16)


def test_a_grid_has_a_class_per_row_in_raw_pixels(toy: Any, planned: Any) -> None:
    distilled = a_set(toy, planned)

    tiles = cells(grid(distilled), 3, 2)

    split = toy().train()
    for label in range(3):
        for column in range(2):
            pixels = (tiles[label, column] * 255).round()
            class_images = split.images[split.labels == label].float()
            assert min(float((pixels - image).abs().max()) for image in class_images) <= 1


def test_a_class_with_fewer_images_leaves_white_and_never_more_than_ten_are_shown(
    toy: Any, planned: Any
) -> None:
    distilled = a_set(toy, planned, ipc=2)
    uneven = DistilledSet(distilled.images[:5], distilled.labels[:5], distilled.meta)
    assert float(cells(grid(uneven), 3, 2)[2, 1].min()) == 1.0

    many = DistilledSet(
        distilled.images[:1].repeat(12, 1, 1, 1), distilled.labels[:1].repeat(12), distilled.meta
    )
    cells(grid(many), 1, 10)


def test_the_names_of_classes_stand_below_one_image_each(toy: Any, planned: Any) -> None:
    one = a_set(toy, planned, ipc=1)
    names = ("a\nb", "", "a name that is wider than an image")

    picture = grid(replace(one, meta=one.meta.model_copy(update={"class_names": names})))

    assert picture.shape == (3, 2 + 64 + 16 + 2, 2 + 3 * 66)
    strip = picture[0, 66:82, 2:].split(66, dim=1)
    assert [float(part.min()) < 0.5 for part in strip[:3]] == [True, False, True]


def test_a_whitened_sets_images_fill_the_range(toy: Any, planned: Any) -> None:
    distilled = a_set(toy, planned, pixel_space="zca")
    assert distilled.meta.pixel_space == "zca"
    wild = DistilledSet(distilled.images * 5, distilled.labels, distilled.meta, distilled.zca)

    tiles = cells(grid(wild), 3, 2).flatten(0, 1).flatten(1)

    assert torch.isfinite(tiles).all()
    assert (tiles.min(1).values == 0).all()
    assert (tiles.max(1).values == 1).all()
    assert ((tiles == 0).float().mean(1) < 0.02).all()
    assert fit_zca(toy().train()).zca_matrix is not None


def test_the_same_images_stand_in_a_row_along_the_steps(toy: Any, planned: Any) -> None:
    first = a_set(toy, planned, ipc=3)
    second = replace(first, images=first.images * 0)

    images = images_along([first, second])

    assert images is not None
    pixels = first.space().decode(first.images).clamp(0, 1)
    assert torch.allclose(images[:, 0], pixels[[0, 1, 3, 4, 6, 7]]), "two of the three images of each class"
    assert torch.allclose(images[:, 1], second.space().decode(second.images)[:6])
    assert images_along([]) is None


def test_a_set_without_images_has_no_picture(toy: Any, planned: Any, tmp_path: Path) -> None:
    distilled = a_set(toy, planned)
    empty = replace(distilled, images=distilled.images[:0], labels=distilled.labels[:0])

    assert grid(empty) is None
    assert not save_grid(empty, tmp_path / "b.png")
    assert not list(tmp_path.glob("*.png"))
    assert Image.open(io.BytesIO(png(grid(empty)))).size == (1, 1)  # so a page stays valid


def test_the_png_holds_the_picture(toy: Any, planned: Any, tmp_path: Path) -> None:
    distilled = a_set(toy, planned)
    assert save_grid(distilled, tmp_path / "a.png")

    picture = Image.open(io.BytesIO((tmp_path / "a.png").read_bytes()))

    assert picture.size[0] > 134  # two images and the names of their classes
    assert picture.size[1] == 200
    values = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    expected = grid(distilled).permute(1, 2, 0).flatten()
    assert float((values / 255 - expected).abs().max()) < 1 / 255
    assert png(grid(distilled)) == (tmp_path / "a.png").read_bytes()


class TestTunePage:
    def page(self, rows: list[Row], toy: Any, planned: Any, folder: Path) -> str:
        a_set(toy, planned).save(folder / "distilled.pt")
        return write_search(folder, rows)

    def test_it_shows_every_trial_and_needs_no_network(self, toy: Any, planned: Any, tmp_path: Path) -> None:
        failed = {"status": "failed", "error": "loss <i>NaN</i>", "result": {"number": 2}}
        rows = [trial_row(0), trial_row(1), trial_row(2, **failed), trial_row(3)]

        page = self.page(rows, toy, planned, tmp_path)

        body = page[page.index("</script>") :]
        table = body[body.index("<h3>Trials</h3>") :]
        assert re.findall(r"<td>(done|stopped early|failed)</td>", table) == [
            *("done", "stopped early", "failed", "done")
        ]
        assert ">15.34 %</td>" in table  # percent for people
        assert "<td>0.1235</td>" in table
        assert re.search(r'<tr class="best"><td>3</td>', table)
        assert "loss &lt;i&gt;NaN&lt;/i&gt;" in table
        assert "&lt;b&gt;bold&lt;/b&gt;" in table
        assert "11.00 &plusmn; - %" in body
        assert "data:image/png;base64," in body
        assert not re.findall(
            r'(?:src|href)\s*=\s*["\']?(?:https?:)?//', page[: page.index("<script>")] + body
        )
        assert "@import" not in body

    def test_its_title_is_the_result_and_the_preset_has_its_name(
        self, toy: Any, planned: Any, tmp_path: Path
    ) -> None:
        page = self.page([trial_row(0), trial_row(3)], toy, planned, tmp_path)

        assert heading(page) == "dm on digits, ipc 1: 14.0 % (preset 11.0)"
        assert "paper's point" not in html.unescape(page)
        assert "better than the preset by 3.00 points" in page
        assert "cut to steps 3 of 300" in page

    def test_trials_that_were_stopped_or_failed_are_drawn(self) -> None:
        failed = {"status": "failed", "error": "loss NaN", "result": {"number": 2}}
        rows = [trial_row(0), trial_row(1), trial_row(2, **failed), trial_row(3)]

        by_name = {trace["name"]: trace for trace in traces(history_plot(rows))}

        assert by_name["done"]["x"] == [0, 3]
        assert by_name["done"]["y"] == pytest.approx([12.34, 15.34]), "percent"
        assert by_name["stopped early"]["x"] == [1]
        assert by_name["best so far"]["y"] == pytest.approx([12.34, 15.34])
        assert by_name["failed"]["text"] == ["loss NaN"]
        lr_img, init = slice_plots(SPACE, rows)
        assert [trace["name"] for trace in traces(lr_img["html"])] == ["done", "stopped early"]
        assert traces(lr_img["html"])[1]["x"] == pytest.approx([0.246912])
        assert '"type":"log"' in lr_img["html"]
        assert traces(init["html"])[0]["x"] == ["random", "random"]

    def test_figures_that_cannot_be_drawn_give_their_reason(
        self, toy: Any, planned: Any, tmp_path: Path
    ) -> None:
        page = self.page([trial_row(3)], toy, planned, tmp_path)

        assert page.count("Not drawn:") >= 1
        assert "Hyperparameter importances" in page


@pytest.mark.parametrize("name", ["title", "result", "search", "picture", "config", "environment"])
def test_the_template_uses_what_it_is_given(name: str) -> None:
    import ddray.drawing

    template = Path(ddray.drawing.__file__).parent / "templates" / "tune.html"
    assert re.search(rf"{{[{{%][^}}]*\b{name}\b", template.read_text())
