"""The page of `ddray report`: what it shows, that it needs no network, and its t-SNE planes."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

from ddray.artifact import distilled_set as artifact
from ddray.artifact.reading import load
from ddray.data import open_dataset
from ddray.drawing.images import data_uri, grid, png
from ddray.errors import InputError
from ddray.jobs.plan import resolve
from ddray.report import page as page_module
from ddray.report.figures import accuracy_bars
from ddray.report.page import default_out, write_page
from ddray.report.plane import embedding_net, make_plane, project
from ddray.report.runs import read_run
from ddray.runs.ledger import Ledger, Row, Unit
from ddray.tables.run import BenchOptions, prepare, run_bench, run_local
from ddray.tables.spec import BenchSpec
from ddray.tuning import report as tune_page

SPEC: dict[str, Any] = {
    "name": "<b>mini</b>",
    "dataset": "digits",
    "methods": [
        "random",
        {"name": "dm", "label": "dm & co", "steps": 3, "set": {"method.batch_real": 4}},
        {"name": "dm", "label": "wild", "steps": 2, "set": {"method.lr_img": 1e30, "method.batch_real": 4}},
    ],
    "ipc": [1, 2],
    "set": {"arch": "convnet1_w8", "compile": "off"},
    "evaluate": {"archs": ["convnet1_w8", "convnet1_w8_bn"], "epochs": 1, "seeds": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bench with two rows that worked and one that diverged."""
    temporary = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDRAY_HOME", str(temporary / "home"))
        prepared = prepare(BenchSpec.parse(SPEC), BenchOptions(executor="local"))
        run_bench(prepared, run_local, run_dir=temporary / "run")
    return temporary / "run"


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    write_page([folder], folder / "report.html")
    return (folder / "report.html").read_text()


class Tables(HTMLParser):
    """Reads the text of every table's cells."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self._cell: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = []

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            self.tables[-1][-1].append(" ".join("".join(self._cell).split()))
            self._cell = None


def body(page: str) -> str:
    """Return the page without the bodies of its scripts."""
    return re.sub(r"(<script[^>]*>).*?(</script>)", r"\1\2", page, flags=re.S)


def tables(page: str) -> list[list[list[str]]]:
    parser = Tables()
    parser.feed(body(page))
    return parser.tables


def test_it_needs_no_network(page: str) -> None:
    outside = body(page)
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//""", outside)
    assert "@import" not in outside
    assert "url(http" not in outside
    assert "plotly" in page.lower()


def test_the_leaderboard_has_every_cell_best_first(page: str, folder: Path) -> None:
    board = tables(page)[0]
    head, lines = board[0], board[1:]
    cells = json.loads((folder / "cells.json").read_text())["cells"]
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
        assert line["n (sets)"] == "2 (1)"
        assert line["storage"] == f"{cell['ipc'] * 10 * 256:,}"
        assert float(line["seconds"]) >= 0
    groups: dict[tuple[str, str], list[float]] = {}
    for line in rows:
        groups.setdefault((line["size"], line["arch"]), []).append(float(line["accuracy %"].split()[0]))
    assert all(values == sorted(values, reverse=True) for values in groups.values())


def test_published_numbers_stand_beside_ours(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
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
    board = tables((copy / "report.html").read_text())[0]
    rows = [dict(zip(board[0], line, strict=True)) for line in board[1:]]
    (line,) = [line for line in rows if line["published %"] != "-"]
    assert (line["published %"], line["difference"], line["in SE"]) == ("32.00 ± 1.20", "-3.12", "-2.5")


def test_text_of_users_is_escaped(page: str) -> None:
    assert "<b>mini</b>" not in body(page)
    assert "&lt;b&gt;mini&lt;/b&gt;" in page
    assert "dm &amp; co" in body(page)


def test_methods_show_their_sets(page: str, folder: Path) -> None:
    run = read_run(folder)
    assert sorted({view.label for view in run.sets}) == ["dm & co", "random"]
    expected = {base64.b64encode(png(grid(load(view.path)))).decode() for view in run.sets}
    pictures = set(re.findall(r'src="data:image/png;base64,([^"]+)"', body(page)))
    assert pictures == expected
    for encoded in pictures:
        assert Image.open(io.BytesIO(base64.b64decode(encoded))).size[0] > 64
    assert "Random real images" in body(page) or "random" in body(page)
    assert "batch_real: 4" in body(page)


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


def test_curves_failures_and_provenance(page: str, folder: Path) -> None:
    text = body(page)
    assert "Loss: digits, ipc 2" in text
    failures = next(table for table in tables(page) if table[0][:2] == ["run", "unit"])
    assert [line[1] for line in failures[1:]] == [
        "wild digits ipc 2 seed 0",
        "wild digits ipc 1 seed 0",
    ] or len(failures) == 3
    assert "lower lr_img" in failures[1][3]
    assert "4 units could not run" in text
    environment = json.loads((folder / "environment.json").read_text())
    for word in (environment["date"], environment["processor"], f"torch {environment['versions']['torch']}"):
        assert word in text
    facts = {line[0]: line[1] for line in tables(page)[-1] if len(line) == 2}
    assert facts["seeds"].startswith("0")
    assert facts["units"].startswith(f"{len(Ledger(folder).rows())} rows; ")
    assert "name: &#39;&lt;b&gt;mini" in text or "name: &lt;b&gt;mini" in text


def test_a_run_that_has_not_ended_is_shown_as_far_as_it_got(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    (copy / "cells.json").unlink()
    gone = Ledger(copy).rows("evaluate")[0]
    (copy / "ledger" / f"{gone.key}.json").unlink()
    result = write_page([copy], copy / "report.html", planes=False)
    assert result["num_failed"] == 2
    board = tables((copy / "report.html").read_text())[0]
    assert len(board) - 1 in (7, 8)
    assert {line[0] for line in board[1:]} == {"random", "dm & co"}, "rows keep their labels"


def test_a_bench_that_has_not_ended_keeps_its_cells_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cells with different rows, settings, augmentations or epochs stay apart before the bench ends, too."""
    dm = {"name": "dm", "steps": 1, "set": {"method.batch_real": 4}}
    larger_batch = {**dm, "label": "dm, more", "set": {"method.batch_real": 8}}
    scored = [{"epochs": 1, "seeds": 1, "augment": "dsa"}, {"epochs": 1, "seeds": 1, "augment": "none"}]
    spec = {**SPEC, "methods": [dm, larger_batch], "ipc": 1, "evaluate": [*scored, {"epochs": 2, "seeds": 1}]}
    prepared = prepare(BenchSpec.parse(spec), BenchOptions(executor="local", scale="cpu"))
    run_bench(prepared, run_local, run_dir=tmp_path / "run")
    expected = json.loads((tmp_path / "run" / "cells.json").read_text())["cells"]
    (tmp_path / "run" / "cells.json").unlink()
    run = read_run(tmp_path / "run")
    assert len(expected) == 2 * 3
    assert [dict(cell) for cell in run.cells] == expected
    assert run.title == "bench <b>mini</b>, scale cpu"
    write_page([tmp_path / "run"], tmp_path / "page.html", planes=False)
    text = (tmp_path / "page.html").read_text()
    assert "says nothing about a reproduction" in body(text)
    (board,) = [table for table in tables(text) if table[0][0] == "method"]
    rows = [dict(zip(board[0], line, strict=True)) for line in board[1:]]
    assert {(line["augmentation"], line["settings"]) for line in rows} == {
        ("dsa", "epochs=1"),
        ("none", "epochs=1"),
        ("-", "epochs=2"),
    }


def test_a_page_is_a_file(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--out must be a file"):
        write_page([folder], tmp_path)


def test_what_every_row_shares_is_said_once(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    cells_file = json.loads((copy / "cells.json").read_text())
    first = {**cells_file["cells"][0], "settings": "recipe=vico", "augment": "dsa"}
    cells_file["cells"] = [first, {**first, "method": "other", "augment": "none"}]
    (copy / "cells.json").write_text(json.dumps(cells_file))
    write_page([copy], copy / "report.html", planes=False)
    text = (copy / "report.html").read_text()
    head, *lines = tables(text)[0]
    assert "All rows: settings recipe=vico." in body(text)
    assert "settings" not in head
    assert {line[head.index("augmentation")] for line in lines} == {"dsa", "none"}


def test_published_correlations_stand_beside_ours(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    cells_file = json.loads((copy / "cells.json").read_text())
    figures = {"protocol": "nas", "spearman": 0.61, "published_spearman": 0.72}
    figures |= {"search_time": 12.34, "published_search_time": 5168.9, "storage_images": 500.0}
    cells_file["cells"] = [{**cells_file["cells"][0], **figures}]
    (copy / "cells.json").write_text(json.dumps(cells_file))
    write_page([copy], copy / "report.html", planes=False)
    board = tables((copy / "report.html").read_text())[0]
    (line,) = [dict(zip(board[0], line, strict=True)) for line in board[1:]]
    assert (line["Spearman"], line["published Spearman"]) == ("0.61", "0.72")
    assert "Spearman, top 20 %" not in line
    assert (line["search, minutes"], line["published minutes"], line["images"]) == ("12.3", "5,169", "500")


def test_a_set_without_images_has_no_picture(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D3HR's store=statistics: the set generates its images on use."""
    view = read_run(folder).sets[0]
    distilled = view.load()
    assert distilled is not None
    assert page_module._picture(view) is not None
    empty = replace(distilled, images=distilled.images[:0], labels=distilled.labels[:0])
    monkeypatch.setattr(type(view), "load", lambda self: empty)
    assert page_module._picture(view) is None
    monkeypatch.setattr(artifact, "load", lambda path: empty)
    assert tune_page._picture(view.path) is None


def test_a_nas_run_has_a_page(folder: Path, tmp_path: Path) -> None:
    from ddray.ranking.command import NasRequest, rank_architectures
    from ddray.ranking.sweep import NasOptions, execute_locally, resolve_config

    options = NasOptions(sample=3, max_mflops=3, epochs=1, truth_epochs=1, executor="local")
    request = NasRequest(proxies=(read_run(folder).sets[0].path,), dataset="digits")
    rank_architectures(
        request, options, resolve_config(options), execute_locally, run_dir=tmp_path / "run", resume=False
    )
    write_page([tmp_path / "run"], tmp_path / "page.html", planes=False)
    text = body((tmp_path / "page.html").read_text())
    assert "Architectures ranked by proxies" in text
    assert "over 3 architectures" in text


def test_a_search_has_a_page(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "ledger").mkdir(parents=True)
    space = {"lr_img": {"loguniform": [0.01, 10.0]}, "init": {"choice": ["random", "noise"]}}
    config = {"command": "tune", "method_name": "dm", "dataset": "digits", "ipc": 1, "space": space}
    (run / "config.yaml").write_text(json.dumps(config))
    environment = {
        "date": "2026-01-01",
        "processor": "CPU",
        "cpu_count": 2,
        "devices": [],
        "versions": {"ddray": "0", "torch": "2"},
        "git_commit": None,
        "command": ["ddray", "tune"],
        "platform": "Linux",
    }
    (run / "environment.json").write_text(json.dumps(environment))
    ledger = Ledger(run)
    epoch = ledger.open_epoch()
    for trial_id in range(3):
        params = {"lr_img": 0.1 * (trial_id + 1), "init": "random"}
        unit = Unit(kind="trial", spec={"number": trial_id, "params": params})
        result = {
            "number": trial_id,
            "val_accuracy": 0.2 + trial_id / 10,
            "rungs": {"1": 0.1, "2": 0.2},
            "stopped_early": False,
        }
        ledger.publish(
            unit,
            Row(key=unit.key, kind="trial", spec=unit.spec, status="done", result=result, wall_s=1),
            epoch=epoch,
        )
    spec = {"schedule": [{"until": 1, "params": {}}], "method": "dm", "seed": 0, "ipc": 1, "arch": "convnet3"}
    unit = Unit(kind="evaluate", spec=spec)
    scored = {"arch": "convnet3", "per_seed": [0.5, 0.7]}
    row = Row(key=unit.key, kind="evaluate", spec=unit.spec, status="done", result=scored, wall_s=1)
    ledger.publish(unit, row, epoch=epoch)
    assert [cell["dataset"] for cell in read_run(run).cells] == ["digits"], "rows of a search leave it out"
    summary = write_page([run], tmp_path / "page.html", planes=False)
    assert summary["num_failed"] == 0
    text = (tmp_path / "page.html").read_text()
    for colour in ("rgb(138, 148, 163)", "rgb(213, 94, 0)"):
        assert f'"color":"{colour}"' in text, "the worst and the best trial, seen on light and dark"
    (trials,) = [table for table in tables(text) if table[0][0] == "trial"]
    assert [line[:3] for line in trials[1:]] == [
        ["0", "done", "0.2000"],
        ["1", "done", "0.3000"],
        ["2", "done", "0.4000"],
    ]
    assert "Val accuracy: " in body(text)


def test_several_runs_stand_on_one_page(folder: Path, tmp_path: Path, digits: Any) -> None:
    from ddray.jobs.distill import distill

    plan = resolve("random", digits, ipc=1, layers=[{"arch": "convnet1_w8"}])
    distill(plan, device=torch.device("cpu"), run_dir=tmp_path / "one")
    result = write_page([folder, tmp_path / "one"], tmp_path / "page.html", planes=False)
    assert len(result["runs"]) == 2
    text = (tmp_path / "page.html").read_text()
    assert "distill random digits" in text
    assert text.count('alt="distilled images of random') == 3 or text.count("distilled images of random") >= 2


def test_a_distillation_shows_its_curve_wherever_its_set_lies(tmp_path: Path, digits: Any) -> None:
    from ddray.jobs.distill import distill

    plan = resolve("dm", digits, ipc=1, layers=[{"arch": "convnet1_w8", "steps": 3}])
    distill(plan, device=torch.device("cpu"), run_dir=tmp_path / "run", out=tmp_path / "elsewhere.pt")
    (view,) = read_run(tmp_path / "run").sets
    assert [step for step, _ in view.losses] == [1, 2, 3]
    write_page([tmp_path / "run"], tmp_path / "page.html", planes=False)
    assert "Loss: digits, ipc 1" in (tmp_path / "page.html").read_text()


def test_runs_that_share_a_row_are_told_apart_by_name(folder: Path, tmp_path: Path) -> None:
    for name, wall_s in (("one", 1.0), ("two", 9.0)):
        shutil.copytree(folder, tmp_path / name)
        for row in Ledger(tmp_path / name).rows("distill"):
            changed = row.model_copy(update={"wall_s": wall_s})
            (tmp_path / name / "ledger" / f"{row.key}.json").write_text(changed.model_dump_json())
    runs = [tmp_path / "one", tmp_path / "two", tmp_path / "one"]
    result = write_page(runs, tmp_path / "page.html", planes=False)
    assert result["runs"] == [str(path.resolve()) for path in runs[:2]], "each once"
    board = tables((tmp_path / "page.html").read_text())[0]
    seconds = {line[0]: line[-1] for line in board[1:]}
    assert seconds == {
        "random (one)": "1",
        "random (two)": "9",
        "dm & co (one)": "1",
        "dm & co (two)": "9",
    }


def test_damaged_files_are_named_and_cost_no_more_than_what_they_held(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    (copy / "cells.json").write_text("{")
    curves = sorted((copy / "artifacts").glob("*.json"))
    curves[0].write_text("")
    result = write_page([copy], tmp_path / "page.html", planes=False)
    assert result["num_cells"] > 0
    assert str(curves[0]) in caplog.text
    assert "cells.json must hold JSON" in caplog.text
    (copy / "environment.json").write_text("{")
    with pytest.raises(InputError, match=r"environment\.json must hold JSON"):
        write_page([copy], tmp_path / "page.html", planes=False)


def test_what_a_run_was_continued_with_is_said(tmp_path: Path, digits: Any) -> None:
    from ddray.jobs.distill import distill

    plan = resolve("random", digits, ipc=1, layers=[{"arch": "convnet1_w8"}])
    options: dict[str, Any] = {"device": torch.device("cpu"), "run_dir": tmp_path / "run"}
    distill(plan, **options)
    first = tmp_path / "run" / "environment.json"
    recorded = json.loads(first.read_text())
    first.write_text(json.dumps({**recorded, "git_commit": "0" * 40}))
    distill(plan, resume=True, **options)
    (later,) = read_run(tmp_path / "run").continued
    assert later["git_commit"] == recorded["git_commit"]
    write_page([tmp_path / "run"], tmp_path / "page.html", planes=False)
    text = (tmp_path / "page.html").read_text()
    assert "0" * 40 in text
    assert f"{later['date']}: commit {recorded['git_commit'] or 'unknown'}" in text


def test_machines_are_named_where_there_are_several(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    (host,) = read_run(copy).hosts
    write_page([copy], tmp_path / "page.html", planes=False)
    assert "<td>machines</td>" not in (tmp_path / "page.html").read_text()
    lines = (copy / "events.jsonl").read_text()
    (copy / "events.jsonl").write_text(lines.replace(json.dumps(host), '"elsewhere"', 1))
    write_page([copy], tmp_path / "page.html", planes=False)
    assert "elsewhere: 1 units" in (tmp_path / "page.html").read_text()


def test_what_is_not_drawn_is_counted(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "_MAX_CURVES", 0)
    write_page([folder], tmp_path / "page.html", planes=False)
    assert (
        "The losses of 2 more pairs of dataset and size are not drawn" in (tmp_path / "page.html").read_text()
    )


def test_a_run_without_a_finished_unit_is_said(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    (copy / "cells.json").unlink()
    shutil.rmtree(copy / "ledger")
    result = write_page([copy], copy / "report.html", planes=False)
    assert result["num_sets"] == 0
    assert "has finished no unit yet" in caplog.text
    caplog.clear()
    write_page([folder], tmp_path / "page.html", planes=False)
    assert "no unit yet" not in caplog.text


def test_folders_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="takes run folders"):
        write_page([tmp_path], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
    with pytest.raises(InputError, match="at least one run folder"):
        default_out([])


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
    html = accuracy_bars([cell, {**cell, "method": "datadam", "published": published}])
    assert "convnet3, published" in html
    assert '"y":[26.0]' in html


class TestPlane:
    def test_clusters_stay_together_and_the_same_seed_gives_the_same_points(self) -> None:
        generator = torch.Generator().manual_seed(0)
        centres = 20 * torch.eye(3).repeat_interleave(30, 0)
        features = torch.cat([centres, torch.zeros(90, 5)], 1) + torch.randn(90, 8, generator=generator)
        points = project(features, seed=0)
        assert points.shape == (90, 2)
        assert torch.equal(points, project(features, seed=0))
        groups = points.view(3, 30, 2)
        spread = (groups - groups.mean(1, keepdim=True)).norm(dim=2).max()
        apart = torch.pdist(groups.mean(1)).min()
        assert apart > spread

    def test_points_are_of_the_right_images(self, folder: Path) -> None:
        run = read_run(folder)
        sets = [view for view in run.sets if view.size == "ipc 2"]
        plane = make_plane(open_dataset("digits"), sets)
        assert plane is not None
        assert plane.real.shape == (len(plane.real_labels), 2)
        assert plane.real_labels.bincount().tolist() == [60] * 10
        assert [label for label, _, _ in plane.distilled] == [view.label for view in sets]
        for _, points, classes in plane.distilled:
            assert points.shape == (20, 2)
            assert classes.tolist() == torch.arange(10).repeat_interleave(2).tolist()
        assert plane.network == "convnet3, untrained"

    def test_the_pools_longest_trained_network_is_taken(self, toy: Callable[..., Any], planned: Any) -> None:
        dataset = toy(name="toy")
        assert embedding_net(dataset)[1].endswith("untrained")
        for epochs in (2, 1):
            _, ctx, method = planned("kcenter", dataset, method={"feature_epochs": epochs})
            method.setup(ctx)
        net, name = embedding_net(dataset)
        assert name == "convnet2_w8, trained on the real images for 2 epochs"
        assert not net.training

    def test_a_missing_dataset_is_said(self, folder: Path, tmp_path: Path) -> None:
        copy = tmp_path / "run"
        shutil.copytree(folder, copy)
        cells_file = json.loads((copy / "cells.json").read_text())
        for path in (copy / "ledger").glob("*.json"):
            path.write_text(path.read_text().replace('"dataset":"digits"', '"dataset":"cifar10"'))
        cells_file["cells"] = [{**cell, "dataset": "cifar10"} for cell in cells_file["cells"]]
        (copy / "cells.json").write_text(json.dumps(cells_file))
        write_page([copy], copy / "report.html")
        assert "Not drawn: dataset cifar10 needs a data directory" in (copy / "report.html").read_text()
