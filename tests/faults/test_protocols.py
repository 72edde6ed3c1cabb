"""A search by another protocol, over dotted, conditional and stepped names; a resume keeps both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ddray
from ddray.config import read_yaml
from ddray.runs.ledger import Ledger
from ddray.tuning.space import read_space
from ddray.tuning.study import study_of
from tests.faults.processes import stamps
from tests.faults.search import trials

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_here")]

TEACHER = "convnet2_w8_bn"
SPACE = {
    "evaluate.lr": {"choice": [0.01, 0.02]},
    "init": {"choice": ["random", "noise"]},
    "momentum": {"uniform": [0.0, 0.9], "step": 0.1, "when": {"init": "noise"}},
    "steps": {"choice": [2, 4]},
}
SETTINGS = {
    "steps": 4,
    "arch": "convnet2_w8",
    "evaluate.epochs": 2,
    "evaluate.seeds": 1,
    "evaluate.teacher.epochs": 8,
    "evaluate.lr": 0.01,
    "method.batch_real": 4,
}


def tune(run: Path, **options: Any) -> Any:
    return ddray.tune(
        "dm",
        strategy="tpe",
        final_sets=1,
        max_concurrent=1,
        run_dir=run,
        settings=SETTINGS,
        **options,
    )


def test_soft_over_names_conditions_and_steps(tmp_path: Path) -> None:
    run = tmp_path / "run"
    out = tune(run, num_samples=4, space=SPACE, protocol="soft", teacher=TEACHER)

    assert (out.num_trials, out.num_failed, out.protocol) == (4, 0, "soft")
    config = read_yaml(run / "config.yaml")
    assert (config["protocol"], config["teachers"]) == ("soft", [TEACHER])
    assert config["evaluate"]["teacher"]["epochs"] == 8
    rows = trials(run)
    assert rows[0].spec["params"] == {"evaluate.lr": 0.01, "init": "random", "steps": 4}
    for row in rows:
        params, settings = row.spec["params"], row.spec["config"]
        assert ("momentum" in params) == (params["init"] == "noise")
        assert settings["method"]["momentum"] == params.get("momentum", 0.5)
        assert round(10 * settings["method"]["momentum"], 9) % 1 == 0
        assert settings["evaluate"]["lr"] == params["evaluate.lr"]
        assert settings["steps"] == params["steps"]
    final = next(
        row for row in Ledger(run).rows("evaluate") if row.spec["schedule"][0]["params"] == out.best.config
    )
    assert (final.spec["scored_on"], final.spec["options"]["protocol"]) == ("test", "soft")
    assert final.spec["schedule"][0]["until"] == out.best.config["steps"]
    assert len(study_of(read_space(config["space"]), rows).trials) == 4

    before = stamps(run)
    again = tune(run, num_samples=4, resume=True)  # names neither space nor protocol

    assert (again.num_trials, again.protocol) == (4, "soft")
    assert stamps(run) == before
