"""What `ddray evaluate` noted of a run's sets stands for the set that is there now, and for no other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ddray.evaluation.options import EvaluateOptions, EvaluateRunOptions
from ddray.jobs.distill import distill
from ddray.jobs.plan import resolve
from ddray.jobs.score_run import evaluate_in_run
from ddray.report.headline import headline
from ddray.report.page import write_page
from ddray.report.runs import read_run
from ddray.runs.executor import LocalExecutor
from ddray.runs.ledger import Ledger, Row, Unit
from ddray.runs.scores import append_score
from ddray.system.files import file_sha256
from tests.report.pages import ENVIRONMENT, body, heading

SMALL = {"arch": "convnet1_w8", "compile": "off", "evaluate": {"every": 2}, "method": {"batch_real": 4}}


@pytest.fixture
def run_dir(digits: Any, tmp_path: Path) -> Path:
    run(digits, tmp_path / "run", 4)
    return tmp_path / "run"


def run(digits: Any, folder: Path, steps: int) -> None:
    """Distil in so many steps, with the sets along them; the folder's shorter run is extended."""
    plan = resolve("dm", digits, ipc=1, layers=[{**SMALL, "steps": steps}])
    distill(plan, device=torch.device("cpu"), run_dir=folder, resume=True, more_steps=True)


def note(folder: Path, file: Path, accuracy: float, **changes: Any) -> None:
    """Append a score of a file to a run's record."""
    score = {
        "artifact": file.name,
        "artifact_sha256": file_sha256(file),
        "method": "dm",
        "dataset": "digits",
        "ipc": 1,
        "budget": None,
        "protocol": "hard",
        "split": "test",
        "recipe": None,
        "options": {"epochs": 20},
        "results": [{"arch": "convnet1_w8", "per_seed": [accuracy]}],
    }
    append_score(folder, {**score, **changes})


def scored(folder: Path) -> list[tuple[str, float]]:
    """Settings and accuracy of each cell."""
    return [(cell.get("settings", ""), cell["accuracy_mean"]) for cell in read_run(folder).cells]


def test_a_set_along_the_steps_does_not_stand_for_the_last(run_dir: Path) -> None:
    note(run_dir, run_dir / "distilled-steps" / "0000002.pt", 0.9)
    assert headline(read_run(run_dir)).endswith("not evaluated")
    note(run_dir, run_dir / "distilled.pt", 0.862)
    note(run_dir, run_dir / "distilled-steps" / "0000002.pt", 0.809)

    assert scored(run_dir) == [("epochs=20, step 2", 0.809), ("epochs=20", 0.862)]
    write_page([run_dir], run_dir / "report.html", planes=False)
    page = (run_dir / "report.html").read_text()
    assert heading(page).startswith("dm on digits, ipc 1: 86.2 % (")
    assert "best 86.20 %" in body(page)


def test_a_set_that_was_replaced_since_does_not_stand_for_the_one_that_is_there(
    digits: Any, run_dir: Path
) -> None:
    note(run_dir, run_dir / "distilled.pt", 0.9)
    run(digits, run_dir, 6)

    assert scored(run_dir) == [("epochs=20, an earlier set", 0.9)]
    assert headline(read_run(run_dir)).startswith("dm on digits, ipc 1: 6 steps, loss ")
    (cell,) = read_run(run_dir).cells
    assert cell["sets"] == []
    assert "cut" not in cell, "that of the longer run is not its"

    note(run_dir, run_dir / "distilled.pt", 0.8)
    assert headline(read_run(run_dir)).startswith("dm on digits, ipc 1: 80.0 % (")
    assert read_run(run_dir).cells[1]["cut"] == "steps 6 of 150"


def test_a_file_of_another_name_is_named_and_a_set_that_is_gone_keeps_its_score(
    run_dir: Path, tmp_path: Path
) -> None:
    shutil.copy(run_dir / "distilled.pt", run_dir / "same.pt")
    (run_dir / "other.pt").write_bytes(b"another set")
    for name, accuracy in (("distilled.pt", 0.5), ("same.pt", 0.6), ("other.pt", 0.7)):
        note(run_dir, run_dir / name, accuracy)
    assert scored(run_dir) == [("epochs=20", 0.6), ("epochs=20, other.pt", 0.7)]

    note(run_dir, run_dir / "distilled-steps" / "0000002.pt", 0.9)
    (run_dir / "distilled.pt").unlink()
    assert scored(run_dir) == [("epochs=20", 0.7), ("epochs=20, step 2", 0.9)]


def test_a_runs_sets_are_read_only_if_they_were_scored(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def counted(path: Path) -> str:
        read.append(path.name)
        return file_sha256(path)

    monkeypatch.setattr("ddray.report.scored.file_sha256", counted)
    read_run(run_dir)
    assert read == []
    for accuracy in (0.5, 0.6):
        note(run_dir, run_dir / "distilled.pt", accuracy)
    read_run(run_dir)
    assert read == ["distilled.pt"], "once"


def test_a_searchs_title_is_of_its_own_scores(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "ledger").mkdir(parents=True)
    (folder / "artifacts").mkdir()
    config = {"command": "tune", "method_name": "dm", "dataset": "digits", "ipc": 1}
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    ledger = Ledger(folder)
    spec = {"schedule": [{"until": 1, "params": {}}], "method": "dm", "seed": 0, "ipc": 1}
    unit = Unit(kind="evaluate", spec=spec)
    result = {"arch": "convnet1_w8", "per_seed": [0.5, 0.7]}
    ledger.publish(unit, Row.done(unit, result, 1.0), epoch=ledger.open_epoch())
    of_winner = folder / "artifacts" / f"{unit.key}.pt"
    files = {folder / "distilled.pt": 0.8, of_winner: 0.9, folder / "artifacts" / f"{'a' * 64}.pt": 0.95}
    for file, accuracy in files.items():
        file.write_bytes(str(accuracy).encode())
        note(folder, file, accuracy)

    assert headline(read_run(folder)) == "dm on digits, ipc 1: 60.0 %"
    cells = [
        (cell["method"], cell.get("stage", ""), cell["accuracy_mean"]) for cell in read_run(folder).cells
    ]
    label = "dm, searched"
    assert cells == [(label, "", 0.6), ("dm", "", 0.8), (label, "", 0.9), ("dm", "an earlier set", 0.95)]

    (folder / "distilled.pt").write_bytes(b"the next winner's")
    assert [cell.get("stage") for cell in read_run(folder).cells][1] == "an earlier set"


def test_a_benchs_set_that_is_scored_again_is_as_its_row(bench_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(bench_folder, folder)
    content = json.loads((folder / "cells.json").read_text())
    departure = {"cut": "steps 3 of 20,000", "overridden": ["method.batch_real"], "generator": "dit"}
    for cell in content["cells"]:
        cell |= departure if cell["method"] == "dm & co" else {}
    (key,) = next(cell["sets"] for cell in content["cells"] if cell["method"] == "dm & co")
    one = next(cell for cell in content["cells"] if key in cell["sets"])
    one["cut"] += "; epochs 1 of 300"  # of its evaluation
    (folder / "cells.json").write_text(json.dumps(content))
    note(folder, folder / "artifacts" / f"{key}.pt", 0.5, ipc=2)

    *_, again = read_run(folder).cells
    assert {name: again.get(name) for name in departure} == departure
    assert (again["method"], again["sets"], "stage" in again) == ("dm & co", [key], False)


def test_a_set_with_a_budget_is_matched_by_it(run_dir: Path) -> None:
    note(run_dir, run_dir / "distilled.pt", 0.5, ipc=20, budget=200)

    (cell,) = read_run(run_dir).cells
    assert (cell["budget"], "ipc" in cell) == (200, False)
    assert headline(read_run(run_dir)).startswith("dm on digits, 200 images: 50.0 %")


def test_settings_are_as_they_were_typed(run_dir: Path) -> None:
    options = {"epochs": 2, "seeds": 3, "augment": "none", "recipe": "idc"}
    options |= {"sets": ["teacher.epochs=30", "lr=0.1"]}
    note(run_dir, run_dir / "distilled.pt", 0.5, options=options, split="val")

    (cell,) = read_run(run_dir).cells
    assert cell["settings"] == "recipe=idc, epochs=2, teacher.epochs=30, lr=0.1, split=val"
    assert cell["augment"] == "none"


def evaluated(run_dir: Path, file: Path) -> dict[str, Any]:
    """The cell of an evaluation in a folder of its own: two networks, two epochs."""
    folder = run_dir.with_name(f"{file.stem}-evaluation")
    options, where = EvaluateOptions(seeds=2, epochs=2), EvaluateRunOptions(run_dir=folder)
    evaluate_in_run(file, options, where, LocalExecutor(), device="cpu")
    (cell,) = read_run(folder).cells
    return dict(cell)


def test_an_evaluation_of_its_own_has_one_set_its_settings_and_its_cut(run_dir: Path) -> None:
    cell = evaluated(run_dir, run_dir / "distilled.pt")

    assert (cell["n"], cell["num_sets"]) == (2, 1)
    assert (cell["settings"], cell["cut"]) == ("epochs=2", "steps 4 of 150")
    assert cell["overridden"] == ["method.batch_real", "arch"]
    assert cell["standard_error"] == pytest.approx(cell["accuracy_std"] / 2**0.5), "over networks"
    (again,) = read_run(run_dir).cells
    assert {name: again[name] for name in again if name != "sets"} == {
        name: cell[name] for name in cell if name != "sets"
    }, "as in the record of the set's run"

    of_step = evaluated(run_dir, run_dir / "distilled-steps" / "0000002.pt")
    assert (of_step["settings"], "cut" in of_step, "stage" in of_step) == ("epochs=2, step 2", False, False)
    shutil.rmtree(run_dir)
    (cell,) = read_run(run_dir.with_name("distilled-evaluation")).cells
    assert (cell["settings"], "cut" in cell) == ("epochs=2", False)
