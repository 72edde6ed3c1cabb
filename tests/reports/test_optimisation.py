"""reports/optimisation: what is recorded is not measured again; the page says whether the anchor is met."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reports import optimisation
from reports.scale.lab import Lab, run_parts


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path, tmp_path / "optimisation.jsonl", repeats=2, is_tiny=True)


def test_a_figure_has_its_seeds_and_is_measured_once(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def run(lab: Lab, name: str, figure: Any, seed: int) -> dict[str, Any]:
        seeds.append(seed)
        return {"accuracy": 0.46 + 0.01 * seed, "at_100": 0.42, "seconds": 3.0, "seed": seed}

    monkeypatch.setattr(optimisation, "_run", run)
    figures = {"kip_cifar10": ("kip", "random", "kip")}
    run_parts(lab, figures, optimisation.measure, optimisation.verdict, optimisation.page)

    assert seeds == [0, 1, 0, 1]
    row = lab.measured()["kip_cifar10", "kip"]
    assert row["n"] == 2
    assert row["mean"]["accuracy"] == pytest.approx(0.465)
    assert "ddray distill --method kip --preset repo --dataset cifar10 --ipc 10 --steps 300" in row["command"]
    assert optimisation.verdict(lab.measured()) == [
        "kip_cifar10, at_100: 42.00% against the notebook's 45.4%, NOT within a point",
        "kip_cifar10, accuracy: 46.50% against the notebook's 46.7%, within a point",
        "kip_cifar10: kip is +0.0 points from random",
    ]
    text = "\n".join(optimisation.page(lab.measured()))
    assert "| kip_cifar10 | kip | 2 | 46.50% +- 0.71% | step 100: 42.00% | 3, 3 |" in text


def test_every_command_is_one_that_distils(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's sets along its steps are scored beside its last one."""
    commands: list[tuple[object, ...]] = []

    def ddray(lab: Lab, *arguments: object) -> Any:
        commands.append(arguments)
        if arguments[0] == "distill":
            steps = lab.folder / "runs" / "digits-kip-0" / "distilled-steps"
            steps.mkdir(parents=True)
            (steps / "0000100.pt").touch()
            return SimpleNamespace(out={"artifact": str(lab.folder / "set.pt")}, seconds=1.0)
        return SimpleNamespace(out={"results": [{"accuracy_mean": 0.5}]})

    monkeypatch.setattr(optimisation, "ddray", ddray)
    run = optimisation._run(lab, "digits-kip-0", optimisation.PARTS["kip_digits"]["kip"], 0)

    assert run == {"accuracy": 0.5, "at_100": 0.5, "seconds": 1.0, "seed": 0}
    assert [arguments[0] for arguments in commands] == ["distill", "evaluate", "evaluate"]


def test_steps_fill_the_time_of_another_figure(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Any] = []
    pace = {"seconds_per_step": 0.5}

    def run(lab: Lab, name: str, figure: Any, seed: int) -> dict[str, Any]:
        steps.append(figure.distil[-1])
        return {"accuracy": 0.25, "seconds": 80.0 if "dm" in name else 100.0, "seed": seed}

    monkeypatch.setattr(optimisation, "ddray", lambda *arguments: SimpleNamespace(out=pace))
    monkeypatch.setattr(optimisation, "_run", run)
    for figure in ("mtt", "dm"):
        optimisation.measure(lab, "mtt_cifar10", figure)

    assert steps[2:] == [200, 200], "of .5 seconds each"
    assert "--steps 200" in lab.measured()["mtt_cifar10", "dm"]["command"]
    assert optimisation.verdict(lab.measured()) == [
        "mtt_cifar10, mtt: 25.00%, NOT above the expected 32%",
        "mtt_cifar10: mtt is +0.0 points from dm, in x1.25 of its time",
    ]
