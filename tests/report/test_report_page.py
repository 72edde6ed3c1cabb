"""The page of `ddray report`: what it shows of a bench, and that it needs no network."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
import torch
from PIL import Image
from plotly.offline import get_plotlyjs, get_plotlyjs_version
from torchvision.transforms.functional import to_tensor

from ddray.artifact.reading import load
from ddray.drawing import html
from ddray.drawing.images import data_uri, page_picture, png
from ddray.errors import InputError
from ddray.report import page as page_module
from ddray.report.figures import accuracy_bars
from ddray.report.page import write_page
from ddray.report.runs import read_run
from ddray.runs.ledger import Ledger
from ddray.tables.anomalies import anomalies
from tests.report.pages import board, body, figures_of, heading, tables


def test_it_needs_no_network(page: str) -> None:
    outside = body(page)
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//""", outside)
    assert "@import" not in outside
    assert "url(http" not in outside
    assert "plotly" in page.lower()


def test_figures_have_no_traces_but_those_of_the_bundle_which_is_as_new_as_plotly(page: str) -> None:
    kinds = {trace["type"] for figure in figures_of(page) for trace in figure}
    assert kinds == {"bar", "scatter"}
    bundle = Path(html.__file__).with_name(html.BUNDLE)
    version = get_plotlyjs_version()
    renew = f"npm pack plotly.js-basic-dist-min@{version} has the file"
    assert f"plotly.js (basic - minified) v{version}\n" in bundle.read_text(encoding="utf-8")[:200], renew
    assert bundle.stat().st_size < len(get_plotlyjs()) / 3


def test_what_stands_out_is_told(bench_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(bench_folder, copy)
    cells_file = json.loads((copy / "cells.json").read_text())
    for cell in cells_file["cells"]:
        cell["accuracy_mean"] = (0.5 if cell["method"] == "random" else 0.3) + cell["ipc"] / 100
    (copy / "cells.json").write_text(json.dumps(cells_file))
    write_page([copy], copy / "report.html", planes=False)
    page = (copy / "report.html").read_text()
    told = re.findall("<li>([^<]*)</li>", page[page.index("What stands out") :])
    expected = {text.replace("+-", "±") for text in anomalies(cells_file["cells"])}
    assert sum("dm & co is below random" in text for text in expected) == 4
    assert {unescape(text) for text in told} >= expected


def test_the_leaderboard_has_every_cell_best_first(page: str, bench_folder: Path) -> None:
    head, *lines = board(page)
    cells = json.loads((bench_folder / "cells.json").read_text())["cells"]
    assert len(lines) == len(cells) == 2 * 2 * 2
    assert all(len(line) == len(head) for line in lines)
    rows = [dict(zip(head, line, strict=True)) for line in lines]
    for cell in cells:
        (line,) = [
            line
            for line in rows
            if (line["method"], line["size"], line["arch"])
            == (cell["method"], f"ipc {cell['ipc']}", cell["arch"])
        ]
        mean, std = (f"{100 * cell[name]:.2f}" for name in ("accuracy_mean", "accuracy_std"))
        assert line["accuracy %"] == f"{mean} ± {std}"
        assert line["storage"] == f"{cell['ipc'] * 10 * 256:,}"
        assert float(line["seconds (with pool and whitening)"]) == pytest.approx(cell["seconds"], rel=0.01)
        assert line["peak MB"] == f"{cell['peak_memory_bytes'] / 1e6:,.0f}"
    assert head[:2] == ["method", "accuracy %"]
    (shared,) = re.findall("All rows: (.*?)[.]<", body(page))
    assert {"dataset digits", "n (sets) 2 (1)"} <= set(shared.split("; ")), "told once"
    assert not {"dataset", "n (sets)"} & set(head)
    groups: dict[tuple[str, str], list[float]] = {}
    for line in rows:
        groups.setdefault((line["size"], line["arch"]), []).append(float(line["accuracy %"].split()[0]))
    assert all(values == sorted(values, reverse=True) for values in groups.values())


def test_published_numbers_stand_beside_ours(bench_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(bench_folder, copy)
    cells_file = json.loads((copy / "cells.json").read_text())
    cells_file["cells"][0]["published"] = {
        "accuracy_mean": 0.32,
        "accuracy_std": 0.012,
        "paper": "datadam",
        "table": "Table 3",
        "difference": -0.0312,
        "difference_se": -2.46,
    }
    (copy / "cells.json").write_text(json.dumps(cells_file))
    write_page([copy], copy / "report.html", planes=False)
    head, *lines = board((copy / "report.html").read_text())
    rows = [dict(zip(head, line, strict=True)) for line in lines]
    (line,) = [line for line in rows if line["published %"] != "-"]
    assert (line["published %"], line["difference"], line["in SE"]) == ("32.00 ± 1.20", "-3.12", "-2.5")


def test_text_of_users_is_escaped(page: str) -> None:
    assert "<b>mini</b>" not in body(page)
    assert "&lt;b&gt;mini&lt;/b&gt;" in page
    assert "dm &amp; co" in body(page)


def test_methods_show_their_sets(page: str, bench_folder: Path) -> None:
    run = read_run(bench_folder)
    assert sorted({view.label for view in run.sets}) == ["dm & co", "random"]
    expected = {page_picture(load(view.path)).uri for view in run.sets}
    assert set(re.findall(r'src="(data:image/[^"]+)"', body(page))) == expected
    assert len(expected) == 4
    assert "Random real images" in body(page) or "random" in body(page)
    assert "batch_real: 4" in body(page)


def test_pictures_say_what_their_sets_have_learned(bench_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bench"
    shutil.copytree(bench_folder, folder)
    for path in (folder / "artifacts").glob("*.pt"):
        distilled = load(path)
        changes = {"learned_lr": 0.0213, "label_kind": "values"}
        meta = distilled.meta.model_copy(update=changes)
        replace(distilled, meta=meta, soft_labels=torch.eye(10)[distilled.labels]).save(path)

    write_page([folder], tmp_path / "page.html", planes=False)

    page = (tmp_path / "page.html").read_text()
    captions = re.findall("<figcaption>(.*?)</figcaption>", page)
    assert captions
    assert all(caption.endswith("; soft labels: values; learned rate 0.0213") for caption in captions)


def test_a_picture_has_a_row_per_class_with_its_name_and_no_more_pixels_than_shown(
    bench_folder: Path,
) -> None:
    view = next(view for view in read_run(bench_folder).sets if view.size == "ipc 2")
    distilled = load(view.path)
    names = tuple(f"class {label}" for label in range(10))
    distilled = replace(distilled, meta=distilled.meta.model_copy(update={"class_names": names}))

    picture = page_picture(distilled)

    assert picture is not None
    assert picture.names == names
    pixels = Image.open(io.BytesIO(base64.b64decode(picture.uri.partition("base64,")[2])))
    assert pixels.size == (2 * 17 + 1, 10 * 17 + 1), "16 pixels an image, one between"
    assert picture.width == 2 * pixels.size[0], "browsers enlarge them"
    large = replace(
        distilled, images=torch.rand(20, 1, 16, 16).repeat_interleave(16, 2).repeat_interleave(16, 3)
    )
    shrunk = page_picture(large)
    assert shrunk is not None
    assert shrunk.width == 2 * 65 + 1


def test_a_large_picture_is_compressed() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.nn.functional.interpolate(torch.rand(1, 3, 64, 64, generator=generator), scale_factor=5)[0]
    smooth = torch.nn.functional.avg_pool2d(noise, 9, stride=1)
    head, _, encoded = data_uri(smooth).partition("base64,")
    assert head == "data:image/webp;"
    assert len(encoded) < len(base64.b64encode(png(smooth))) / 2
    read = to_tensor(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"))
    assert read.shape == smooth.shape
    assert (read - smooth).abs().mean() < 0.02
    assert data_uri(noise[:, :34, :34]).startswith("data:image/png;base64,")


def test_the_cost_of_every_unit(page: str, bench_folder: Path) -> None:
    done = [row for row in Ledger(bench_folder).rows() if row.status == "done"]
    kinds, units = (
        table for table in tables(page) if "device-seconds" in table[0] and table[0][0] in ("kind", "unit")
    )
    assert {line[0]: int(line[1]) for line in kinds[1:]} == {
        kind: sum(row.kind == kind for row in done) for kind in {row.kind for row in done}
    }
    assert len(units) - 1 == len(done)
    assert all(line[3] not in ("", "-") for line in units[1:]), "every unit's peak memory"
    assert any("seed 0" in line[0] for line in units[1:])


def test_curves_failures_and_provenance(page: str, bench_folder: Path) -> None:
    text = body(page)
    assert "Loss: digits, ipc 2" in text
    failures = next(table for table in tables(page) if table[0][:2] == ["run", "unit"])
    assert [line[1] for line in failures[1:]] == [
        "wild digits ipc 2 seed 0",
        "wild digits ipc 1 seed 0",
    ] or len(failures) == 3
    assert "lower lr_img" in failures[1][3]
    assert "4 units could not run" in text
    environment = json.loads((bench_folder / "environment.json").read_text())
    for word in (environment["date"], environment["processor"], f"torch {environment['versions']['torch']}"):
        assert word in text
    facts = {line[0]: line[1] for line in tables(page)[-1] if len(line) == 2}
    assert facts["seeds"].startswith("0")
    assert facts["units"].startswith(f"{len(Ledger(bench_folder).rows())} rows; ")
    assert "name: &#39;&lt;b&gt;mini" in text or "name: &lt;b&gt;mini" in text


def test_a_page_is_a_file(bench_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--out must be a file"):
        write_page([bench_folder], tmp_path)


def test_what_every_row_shares_is_said_once(bench_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(bench_folder, copy)
    cells_file = json.loads((copy / "cells.json").read_text())
    first = {**cells_file["cells"][0], "settings": "recipe=vico", "augment": "dsa"}
    cells_file["cells"] = [first, {**first, "method": "other", "augment": "none"}]
    (copy / "cells.json").write_text(json.dumps(cells_file))
    write_page([copy], copy / "report.html", planes=False)
    text = (copy / "report.html").read_text()
    head, *lines = board(text)
    assert "settings recipe=vico" in re.findall("All rows: (.*?)[.]<", body(text))[0]
    assert "settings" not in head
    assert {line[head.index("augmentation")] for line in lines} == {"dsa", "none"}


def test_published_correlations_stand_beside_ours(bench_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(bench_folder, copy)
    cells_file = json.loads((copy / "cells.json").read_text())
    figures = {"protocol": "nas", "spearman": 0.61, "published_spearman": 0.72}
    figures |= {"search_time": 12.34, "published_search_time": 5168.9, "storage_images": 500.0}
    cells_file["cells"] = [{**cells_file["cells"][0], **figures}]
    (copy / "cells.json").write_text(json.dumps(cells_file))
    write_page([copy], copy / "report.html", planes=False)
    head, *lines = board((copy / "report.html").read_text())
    (line,) = [dict(zip(head, line, strict=True)) for line in lines]
    assert (line["Spearman"], line["published Spearman"]) == ("0.61", "0.72")
    assert "Spearman, top 20 %" not in line
    assert (line["search, minutes"], line["published minutes"], line["images"]) == ("12.3", "5,169", "500")


def test_cuts_are_marked_in_the_matrix(bench_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(bench_folder, copy)
    cells_file = json.loads((copy / "cells.json").read_text())
    for cell in cells_file["cells"]:
        cell["cut"] = "steps 3 of 150" if cell["method"] == "dm & co" else None
    (copy / "cells.json").write_text(json.dumps(cells_file))
    write_page([copy], copy / "report.html", planes=False)
    text = (copy / "report.html").read_text()
    rows = {row[0]: row[1:] for row in tables(text)[0][1:]}
    assert {method: [score.endswith("\u2020") for score in scores] for method, scores in rows.items()} == {
        "dm & co": [True] * 4,
        "random": [False] * 4,
    }
    legend = "\u2020 Cut to less than the preset's budget"
    assert legend in unescape(body(text))
    for cell in cells_file["cells"]:
        cell["cut"] = None
    (copy / "cells.json").write_text(json.dumps(cells_file))
    write_page([copy], copy / "report.html", planes=False)
    assert legend not in unescape(body((copy / "report.html").read_text()))


def test_a_nas_table_is_by_ranking(bench_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(bench_folder, copy)
    cells_file = json.loads((copy / "cells.json").read_text())
    first, figures = cells_file["cells"][0], {"protocol": "nas", "arch": "convnet720", "num_archs": 20}
    cells_file["cells"] = [
        {**first, **figures, "ipc": ipc, "method": method, "accuracy_mean": mean, "spearman": rho}
        for ipc in (1, 2)
        for method, mean, rho in (("a", 0.9, -0.1), ("b", 0.5, 0.6), ("c", 0.7, None))
    ]
    (copy / "cells.json").write_text(json.dumps(cells_file))
    write_page([copy], copy / "report.html", planes=False)
    text = (copy / "report.html").read_text()
    assert heading(text).startswith("b (cut) leads in 2 of 2 sweeps by Spearman")
    assert '<table class="sortable matrix">' not in text
    assert [line[0] for line in board(text)[1:]] == ["b", "a", "c"] * 2
    assert "best 90.00 %" not in text


def test_a_set_without_images_has_no_picture(bench_folder: Path) -> None:
    """D3HR's store=statistics: the set generates its images on use."""
    view = read_run(bench_folder).sets[0]
    distilled = view.load()
    assert distilled is not None
    assert page_picture(distilled) is not None
    empty = replace(distilled, images=distilled.images[:0], labels=distilled.labels[:0])
    assert page_picture(empty) is None


def test_what_is_not_drawn_is_counted(
    bench_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_module, "_MAX_CURVES", 0)
    write_page([bench_folder], tmp_path / "page.html", planes=False)
    assert (
        "The losses of 2 more pairs of dataset and size are not drawn" in (tmp_path / "page.html").read_text()
    )


def test_bars_of_published_numbers_are_markers() -> None:
    cell = {
        "method": "dm",
        "dataset": "cifar10",
        "ipc": 1,
        "protocol": "hard",
        "arch": "convnet3",
        "accuracy_mean": 0.25,
        "accuracy_std": None,
    }
    published = {"accuracy_mean": 0.26}
    figure = accuracy_bars([cell, {**cell, "method": "datadam", "published": published}])
    assert "convnet3, published" in figure
    assert '"x":[26.0]' in figure
