"""best.yaml repeats a search's winner; the verdict says whether it is better than the preset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ddray.config import read_yaml
from ddray.jobs.options import PlanOptions
from ddray.jobs.plan import Plan, plan_of
from ddray.runs.ledger import Row
from ddray.tuning.best import last_settings, verdict, write_best
from ddray.tuning.settings import Settings


def plan(**options: Any) -> Plan:
    return plan_of(PlanOptions.parse({"method": "dm", "ipc": 1, **options}))


@pytest.mark.parametrize(
    ("sets", "params", "changed"),
    [
        ((), {"lr_img": 2.0}, {"method": {"lr_img": 2.0}}),
        ((), {}, {"method": {}}),
        (
            ("steps=6", "evaluate.epochs=5", "method.batch_real=8", "compile=off"),
            {"lr_img": 2.0, "evaluate.lr": 0.5},
            {
                "method": {"lr_img": 2.0, "batch_real": 8},
                "steps": 6,
                "evaluate": {"epochs": 5, "lr": 0.5},
            },
        ),
        ((), {"arch": "convnet1_w8", "lr_img": 1.0}, {"method": {}, "arch": "convnet1_w8"}),
    ],
)
def test_best_yaml_has_what_the_winner_changes_and_config_takes_it(
    sets: tuple[str, ...], params: dict[str, Any], changed: dict[str, Any], tmp_path: Path
) -> None:
    searched = plan(sets=sets)
    settings = Settings.of(searched, "hard")

    write_best(tmp_path, searched, settings, params, "no improvement over the preset")

    assert read_yaml(tmp_path / "best.yaml") == changed
    again = plan(config=tmp_path / "best.yaml", sets=[one for one in sets if "compile" in one])
    assert again.config == settings.configs(params)[0]
    first, second = (tmp_path / "best.yaml").read_text().splitlines()[:2]
    assert first == "# no improvement over the preset"
    assert second == "# ddray distill --method dm --dataset digits --ipc 1 --config best.yaml"


def test_another_preset_is_written_out(tmp_path: Path) -> None:
    searched = plan(method="datadam", preset="repo")
    settings = Settings.of(searched, "hard")

    write_best(tmp_path, searched, settings, {}, "")

    assert searched.config != plan(method="datadam").config
    assert plan(method="datadam", config=tmp_path / "best.yaml").config == searched.config


def test_a_protocols_own_settings_are_a_comment(tmp_path: Path) -> None:
    searched = plan_of(PlanOptions(method="dm", ipc=1, sets=("evaluate.epochs=7",)), protocol="soft")
    settings = Settings.of(searched, "soft")

    write_best(tmp_path, searched, settings, {"evaluate.lr": 0.1}, "")

    assert read_yaml(tmp_path / "best.yaml") == {"method": {}}
    assert "# ddray evaluate SET --protocol soft --set epochs=7 --set lr=0.1\n" in (
        tmp_path / "best.yaml"
    ).read_text(encoding="utf-8")


def scores(mean: float | None, std: float | None = 0.01) -> dict[str, Any]:
    return {"test_accuracy_mean": mean, "test_accuracy_std": std}


@pytest.mark.parametrize(
    ("best", "preset", "trial", "words"),
    [
        (scores(0.5), scores(0.4), 0, "no improvement over the preset: it scored best on val itself"),
        (scores(0.4), scores(0.4), 2, "no improvement over the preset: test 40.00 % against 40.00 %"),
        (scores(0.5), scores(0.4), 2, "10.00 points better than the preset: test 50.00 % against 40.00 %"),
        (
            scores(0.405),
            scores(0.4, 0.02),
            2,
            "0.50 points better than the preset: test 40.50 % against 40.00 %, within the standard deviation "
            "of the networks",
        ),
        (
            scores(0.5, None),
            scores(0.4, None),
            2,
            "10.00 points better than the preset: test 50.00 % against 40.00 %",
        ),
        (scores(0.5), scores(None, None), 2, "not compared with the preset, which has no test accuracy"),
    ],
)
def test_the_verdict(best: dict[str, Any], preset: dict[str, Any], trial: int, words: str) -> None:
    assert verdict(best, preset, trial) == words


def test_the_settings_of_a_schedule_are_its_last() -> None:
    row = Row(key="a", kind="trial", spec={"params": {"lr": 1}}, status="done", result={}, wall_s=0.0)
    schedule = [{"until": 3, "params": {"lr": 1}}, {"until": 9, "params": {"lr": 2}}]
    assert last_settings(row) == {"lr": 1}
    assert last_settings(row.model_copy(update={"result": {"schedule": schedule}})) == {"lr": 2}
