"""Pages of every kind of run, unfinished, damaged and several at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ddray.errors import InputError
from ddray.jobs.plan import resolve
from ddray.report.page import default_out, write_page
from ddray.report.runs import read_run
from ddray.runs.executor import LocalExecutor
from ddray.runs.ledger import Ledger, Row, Unit
from ddray.runs.scores import append_score
from ddray.system.files import file_sha256
from ddray.tables.columns import MEASURED
from ddray.tables.options import BenchOptions
from ddray.tables.run import prepare, run_bench
from ddray.tables.spec import BenchSpec
from tests.report.pages import ENVIRONMENT, SPEC, board, body, heading, tables


def test_a_run_that_has_not_ended_is_shown_as_far_as_it_got(bench_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(bench_folder, copy)
    (copy / "cells.json").unlink()
    gone = Ledger(copy).rows("evaluate")[0]
    (copy / "ledger" / f"{gone.key}.json").unlink()
    result = write_page([copy], copy / "report.html", planes=False)
    assert result["num_failed"] == 2
    _, *lines = board((copy / "report.html").read_text())
    assert len(lines) in (7, 8)
    assert {line[0] for line in lines} == {"random", "dm & co"}, "rows keep their labels"


def test_a_bench_that_has_not_ended_keeps_its_cells_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cells with different rows, settings, augmentations or epochs stay apart before the bench ends, too."""
    dm = {"name": "dm", "steps": 1, "set": {"method.batch_real": 4}}
    larger_batch = {**dm, "label": "dm, more", "set": {"method.batch_real": 8}}
    scored = [{"epochs": 1, "seeds": 1, "augment": "dsa"}, {"epochs": 1, "seeds": 1, "augment": "none"}]
    spec = {**SPEC, "methods": [dm, larger_batch], "ipc": 1, "evaluate": [*scored, {"epochs": 2, "seeds": 1}]}
    prepared = prepare(BenchSpec.parse(spec), BenchOptions(executor="local", scale="cpu"))
    run_bench(prepared, LocalExecutor(), run_dir=tmp_path / "run")
    expected = json.loads((tmp_path / "run" / "cells.json").read_text())["cells"]
    (tmp_path / "run" / "cells.json").unlink()
    run = read_run(tmp_path / "run")
    assert len(expected) == 2 * 3
    assert [dict(cell) for cell in run.cells] == expected
    assert run.title == "bench <b>mini</b>, scale cpu"
    write_page([tmp_path / "run"], tmp_path / "page.html", planes=False)
    text = (tmp_path / "page.html").read_text()
    assert "None of its cells is compared with a published number" in body(text)
    head, *lines = board(text)
    rows = [dict(zip(head, line, strict=True)) for line in lines]
    assert {(line["augmentation"], line["settings"]) for line in rows} == {
        ("dsa", "epochs=1"),
        ("none", "epochs=1"),
        ("-", "epochs=2"),
    }


def test_a_nas_run_has_a_page(bench_folder: Path, tmp_path: Path) -> None:
    from ddray.ranking.command import run_nas
    from ddray.ranking.options import NasRequest
    from ddray.ranking.sweep import NasOptions, resolve_config

    options = NasOptions(sample=3, max_mflops=3, epochs=1, truth_epochs=1, executor="local")
    request = NasRequest(proxies=(read_run(bench_folder).sets[0].path,), dataset="digits")
    run_nas(
        request, options, resolve_config(options), LocalExecutor(), run_dir=tmp_path / "run", resume=False
    )
    write_page([tmp_path / "run"], tmp_path / "page.html", planes=False)
    text = body((tmp_path / "page.html").read_text())
    assert "Architectures ranked by proxies" in text
    assert "3 architectures: too few for a correlation" in text
    assert "Spearman" not in text[text.index("Architectures ranked by proxies") :]


@pytest.mark.parametrize("num", [7, 8])
def test_a_page_tells_a_correlation_of_eight_architectures(tmp_path: Path, num: int) -> None:
    (tmp_path / "run" / "ledger").mkdir(parents=True)
    config = {"command": "nas", "space": "convnet720", "dataset": "digits"}
    (tmp_path / "run" / "config.yaml").write_text(json.dumps(config))
    (tmp_path / "run" / "environment.json").write_text(json.dumps(ENVIRONMENT))
    lines = [f"dm,{i},net{i},0.{i + 1},0.{i + 1},{i},{i}" for i in range(num)]
    few = [f"few,{i},net{i},0.{i + 1},0.{i + 1},{i},{i}" for i in range(3)]
    names = "proxy,index,name,proxy_accuracy,truth_accuracy,proxy_rank,truth_rank"
    (tmp_path / "run" / "results.csv").write_text("\n".join([names, *few, *lines]))
    write_page([tmp_path / "run"], tmp_path / "page.html", planes=False)
    text = body((tmp_path / "page.html").read_text())
    told = f"Spearman 1 over {num} architectures" in text
    assert (told, heading(text).startswith("dm ranks 8 ")) == (num == 8, num == 8)
    assert f"{7 if num == 7 else 3} architectures: too few for a correlation" in text


def test_a_search_has_a_page(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "ledger").mkdir(parents=True)
    space = {"lr_img": {"loguniform": [0.01, 10.0]}, "init": {"choice": ["random", "noise"]}}
    config = {"command": "tune", "method_name": "dm", "dataset": "digits", "ipc": 1, "space": space}
    (run / "config.yaml").write_text(json.dumps(config))
    (run / "environment.json").write_text(json.dumps(ENVIRONMENT))
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
        ["0", "20.00 %", "done"],
        ["1", "30.00 %", "done"],
        ["2", "40.00 %", "done"],
    ]
    assert "Val accuracy: " in body(text)
    assert heading(text) == "dm on digits, ipc 1: 60.0 %"


def test_several_runs_stand_on_one_page(bench_folder: Path, tmp_path: Path, digits: Any) -> None:
    from ddray.jobs.distill import distill

    plan = resolve("random", digits, ipc=1, layers=[{"arch": "convnet1_w8"}])
    distill(plan, device=torch.device("cpu"), run_dir=tmp_path / "one")
    result = write_page([bench_folder, tmp_path / "one"], tmp_path / "page.html", planes=False)
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


def test_later_evaluations_of_a_runs_set_are_cells_and_its_title(tmp_path: Path, digits: Any) -> None:
    from ddray.jobs.distill import distill

    plan = resolve("random", digits, ipc=1, layers=[{"arch": "convnet1_w8"}])
    distill(plan, device=torch.device("cpu"), run_dir=tmp_path / "run")
    write_page([tmp_path / "run"], tmp_path / "page.html", planes=False)
    assert (
        heading((tmp_path / "page.html").read_text()) == "random on digits, ipc 1: distilled, not evaluated"
    )
    score = {
        "artifact": "distilled.pt",
        "artifact_sha256": file_sha256(tmp_path / "run" / "distilled.pt"),
        "method": "random",
        "dataset": "digits",
        "ipc": 1,
        "protocol": "hard",
        "split": "test",
        "recipe": None,
        "options": {"seeds": 2, "epochs": 20},
        "results": [{"arch": "convnet1_w8", "per_seed": [0.4, 0.45]}],
    }
    for changes in ({}, {"results": [{"arch": "convnet1_w8", "per_seed": [0.5, 0.54]}]}, {"split": "val"}):
        append_score(tmp_path / "run", {**score, **changes})

    write_page([tmp_path / "run"], tmp_path / "page.html", planes=False)

    text = (tmp_path / "page.html").read_text()
    assert heading(text) == "random on digits, ipc 1: 52.0 % (convnet1_w8)"
    head, *lines = board(text)
    assert [line[1] for line in lines] == ["52.00 ± 2.83", "42.50 ± 3.54"]
    settings = [line[head.index("settings")] for line in lines]
    assert settings == ["epochs=20", "epochs=20, split=val"]


def test_runs_that_share_a_row_are_told_apart_by_name(bench_folder: Path, tmp_path: Path) -> None:
    for name, wall_s in (("one", 1.0), ("two", 9.0)):
        shutil.copytree(bench_folder, tmp_path / name)
        for row in Ledger(tmp_path / name).rows("distill"):
            changed = row.model_copy(update={"wall_s": wall_s})
            (tmp_path / name / "ledger" / f"{row.key}.json").write_text(changed.model_dump_json())
        # As runs are whose rows have no seconds of their own.
        cells_file = json.loads((tmp_path / name / "cells.json").read_text())
        cells_file["cells"] = [
            {k: v for k, v in cell.items() if k not in MEASURED} for cell in cells_file["cells"]
        ]
        (tmp_path / name / "cells.json").write_text(json.dumps(cells_file))
    runs = [tmp_path / "one", tmp_path / "two", tmp_path / "one"]
    result = write_page(runs, tmp_path / "page.html", planes=False)
    assert result["runs"] == [str(path.resolve()) for path in runs[:2]], "each once"
    head, *lines = board((tmp_path / "page.html").read_text())
    seconds = {line[0]: line[head.index("seconds (with pool and whitening)")] for line in lines}
    assert seconds == {
        "random (one)": "1",
        "random (two)": "9",
        "dm & co (one)": "1",
        "dm & co (two)": "9",
    }


def test_damaged_files_are_named_and_cost_no_more_than_what_they_held(
    bench_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(bench_folder, copy)
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


def test_machines_are_named_where_there_are_several(bench_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(bench_folder, copy)
    (host,) = read_run(copy).hosts
    write_page([copy], tmp_path / "page.html", planes=False)
    assert "<td>machines</td>" not in (tmp_path / "page.html").read_text()
    lines = (copy / "events.jsonl").read_text()
    (copy / "events.jsonl").write_text(lines.replace(json.dumps(host), '"elsewhere"', 1))
    write_page([copy], tmp_path / "page.html", planes=False)
    assert "elsewhere: 1 units" in (tmp_path / "page.html").read_text()


def test_a_run_without_a_finished_unit_is_said(
    bench_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(bench_folder, copy)
    (copy / "cells.json").unlink()
    shutil.rmtree(copy / "ledger")
    result = write_page([copy], copy / "report.html", planes=False)
    assert result["num_sets"] == 0
    assert "has finished no unit yet" in caplog.text
    caplog.clear()
    write_page([bench_folder], tmp_path / "page.html", planes=False)
    assert "no unit yet" not in caplog.text


def test_folders_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="takes run folders"):
        write_page([tmp_path], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
    with pytest.raises(InputError, match="at least one run folder"):
        default_out([])
