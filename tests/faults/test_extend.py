"""A search that is extended by trials, and one that starts from the user's points."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from ddray.config import read_yaml
from ddray.errors import InputError
from ddray.runs.folder import Run
from ddray.runs.ledger import Ledger
from tests.faults.processes import count, stamps
from tests.faults.search import search, trials

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_here")]

RANGE = "lr_img: {loguniform: [0.1, 1.0]}"


class Killed(BaseException):
    """Ends the driver, as far as a test can."""


def numbers(run: Path) -> list[int]:
    return [int(row.spec["number"]) for row in trials(run)]


def settings(run: Path) -> list[float]:
    return [row.spec["params"]["lr_img"] for row in trials(run)]


def test_more_samples_continue_the_same_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trials of one long search, each run once, also if the driver dies while config.yaml changes.

    A former winner's scores are not averaged with the new one's, in results.csv or in a report.
    """
    run, options = tmp_path / "run", {"strategy": "random"}
    monkeypatch.setattr("ddray.cluster.tune.best_trial", lambda rows: rows[1])
    first = search(run, RANGE, num_samples=2, **options)
    assert "earlier_tests" not in first
    before = stamps(run)

    def killed(self: Run) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_config", killed)
        with pytest.raises(Killed):
            search(run, RANGE, num_samples=4, resume=True, **options)
    assert stamps(run) == before
    monkeypatch.setattr("ddray.cluster.tune.best_trial", lambda rows: rows[2])
    out = search(run, RANGE, num_samples=4, resume=True, **options)

    assert (out["num_trials"], list(out["earlier_tests"])) == (4, [2])
    assert numbers(run) == [0, 1, 2, 3]
    (former,) = (key for key in before if stamps(run).get(key) != before[key])
    assert [path.stem for path in (run / "ledger").glob("*.extended")] == [former]
    assert all(count(run, "start", row.key) == 1 for row in trials(run))
    assert read_yaml(run / "config.yaml")["num_samples"] == 4
    assert "after 2 trials" in " ".join((run / "report.html").read_text().split())
    results = (run / "results.csv").read_text()
    assert all(row.key in results for row in trials(run))
    assert sum(",evaluate," in line for line in results.splitlines()) == 2
    tested = [row.spec["schedule"][-1]["params"]["lr_img"] for row in Ledger(run).rows("evaluate")]
    assert sorted(tested) == sorted([1.0, out["best"]["config"]["lr_img"]])
    whole = tmp_path / "whole"
    search(whole, RANGE, num_samples=4, **options)
    assert settings(run) == settings(whole)
    scores = [[row.result["val_accuracy"] for row in trials(folder)] for folder in (run, whole)]
    assert scores[0] == scores[1]
    after = stamps(run)
    again = search(run, RANGE, num_samples=4, resume=True, **options)
    assert (again["num_trials"], stamps(run)) == (4, after)
    with pytest.raises(InputError, match="changed: num_samples: 4 -> 3; use the old values, or"):
        search(run, RANGE, num_samples=3, resume=True, **options)


def test_start_points_are_tried_after_the_presets_and_the_study_sees_them(tmp_path: Path) -> None:
    run, options = tmp_path / "run [v2]", {"strategy": "tpe"}
    points = [{"lr_img": value} for value in (0.25, 0.5, 0.75)]
    out = search(run, RANGE, num_samples=3, start_points=points[:2], **options)
    assert out["num_trials"] == 3
    assert settings(run) == [1.0, 0.25, 0.5]

    search(run, RANGE, num_samples=6, resume=True, start_points=[points[0], points[2]], **options)

    assert numbers(run) == [0, 1, 2, 3, 4, 5]
    assert settings(run)[:4] == [1.0, 0.25, 0.5, 0.75]
    config = read_yaml(run / "config.yaml")
    assert config["start_points"] == {"1": points[0], "2": points[1], "3": points[2]}
    storage = JournalStorage(JournalFileBackend(str(run / "optuna.journal")))
    study = optuna.load_study(study_name=None, storage=storage)
    assert [trial.user_attrs["number"] for trial in study.trials] == [0, 1, 2, 3, 4, 5]
    before = stamps(run)
    search(run, RANGE, num_samples=6, resume=True, **options)  # they need not be named again
    assert stamps(run) == before


def test_pb2_starts_from_them_and_its_population_cannot_grow(tmp_path: Path) -> None:
    layers: dict[str, Any] = {"arch": "convnet2_w8", "steps": 4, "method": {"batch_real": 4}}
    layers["evaluate"] = {"epochs": 1, "seeds": 1}
    run, options = tmp_path / "run", {"strategy": "pb2", "layers": layers}

    search(run, RANGE, num_samples=3, start_points={"lr_img": 0.25}, **options)

    assert settings(run)[1] == 0.25
    segment = json.loads((run / "pb2" / "0001-generation0.json").read_text())
    assert segment["params"]["lr_img"] == 0.25
    with pytest.raises(InputError, match="pb2's population, which can't grow from 3 to 5"):
        search(run, RANGE, num_samples=5, resume=True, **options)


def test_a_grid_takes_no_start_points(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="strategy grid tries every combination"):
        search(tmp_path / "run", "lr_img: {choice: [1.0]}", strategy="grid", start_points={"lr_img": 1.0})
    assert not (tmp_path / "run").exists()
