"""reports/decoupled: what is recorded is not measured again; every row of a part has its equals."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ddray.data import open_dataset
from ddray.jobs.options import PlanOptions
from ddray.jobs.plan import plan_of
from ddray.methods import method_names
from reports import decoupled
from reports.scale.lab import Lab, run_parts


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path, tmp_path / "decoupled.jsonl", repeats=2, is_tiny=True)


def test_a_figure_has_its_seeds_and_is_measured_once(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def run(lab: Lab, name: str, figure: Any, scores: Any, seed: int) -> dict[str, Any]:
        seeds.append(seed)
        gain = 0.1 * seed if "dwa-" in name and "sre2l" not in name else 0
        return {"soft": 0.5 + gain, "teacher": 0.98, "seconds": 3.0, "seed": seed}

    monkeypatch.setattr(decoupled, "_run", run)
    figures = {"dwa_digits": ("sre2l, real start, r_var", "dwa", "dwa")}
    run_parts(lab, figures, decoupled.measure, decoupled.verdict, decoupled.page)

    assert seeds == [0, 1, 0, 1]
    row = lab.measured()["dwa_digits", "dwa"]
    assert row["n"] == 2
    assert "ddray distill --method dwa --dataset digits --ipc 10 --steps 3000" in row["command"]
    assert "evaluate SET --protocol soft --recipe rd3 --teacher convnet3_w64_bn" in row["command"]
    assert decoupled.verdict(lab.measured()) == [
        "dwa_digits, soft: dwa is +5.0 points from sre2l, real start, r_var, above it with 1 of 2 seeds"
    ]
    text = "\n".join(decoupled.page(lab.measured()))
    assert "| dwa_digits | dwa | 2 |  | 55.00% +- 7.07% | teacher 0.98 | 3, 3 |" in text


def test_dwas_parts_are_added_one_by_one_and_other_rows_stand_beside_their_base() -> None:
    assert decoupled.PARTS["dwa_digits"].pairs() == [
        ("sre2l, real start", "sre2l"),
        ("sre2l, real start, r_var", "sre2l, real start"),
        ("dwa", "sre2l, real start, r_var"),
    ]
    assert decoupled.PARTS["diffusion_digits"].pairs() == [
        *(("minimax", "dit"), ("minimax", "random")),
        ("dit", "random"),
    ]
    assert decoupled.PARTS["esfr_mnist"].pairs() == [("esfr", "its base, dm")]
    assert {base for _, base in decoupled.PARTS["generators_digits"].pairs()} == {"random"}


def sets(figure: decoupled.Figure, brief: bool = False) -> list[str]:
    """Return the settings of a command, its steps among them."""
    words = list(map(str, [*figure.distil, *(figure.brief if brief else ())]))
    pairs = [words[index + 1] for index, word in enumerate(words) if word == "--set"]
    steps = [f"steps={words[index + 1]}" for index, word in enumerate(words) if word == "--steps"]
    return [*pairs, *steps]


@pytest.mark.parametrize("figure", decoupled.PARTS["dwa_digits"].figures)
def test_the_rows_of_dwa_share_teacher_rates_and_iterations(figure: str) -> None:
    what = decoupled.PARTS["dwa_digits"].figures[figure]
    words = list(map(str, what.distil))
    digits, method = open_dataset("digits"), words[words.index("--method") + 1]
    config = plan_of(
        PlanOptions(method=method, dataset="digits", ipc=10, sets=tuple(sets(what))), digits
    ).config

    assert config.steps == (3000 if method == "dwa" else 300)
    assert (config.method.teacher_arch, config.method.teacher_epochs) == ("convnet3_w64_bn", 20)
    assert (config.method.lr, config.method.bn_weight, config.method.jitter) == (0.25, 0.01, 4)
    assert config.method.squeeze == "dsa"
    assert config.method.init == ("noise" if figure == "sre2l" else "random")
    assert config.method.r_var == (11.0 if figure in ("dwa", "sre2l, real start, r_var") else 1.0)


@pytest.mark.parametrize("part", decoupled.PARTS)
def test_settings_of_a_row_and_of_its_brief_run_are_settings_of_the_method(part: str) -> None:
    checked = 0
    for figure in decoupled.PARTS[part].figures.values():
        words = list(map(str, figure.distil))
        method, name = (words[words.index(option) + 1] for option in ("--method", "--dataset"))
        dataset = open_dataset("digits")  # the settings' names and rules are those of every dataset
        for brief in (False, True):
            options = PlanOptions(method=method, dataset=name, ipc=10, sets=tuple(sets(figure, brief)))
            assert method in method_names()
            assert plan_of(options, dataset).method == method
            checked += 1

    assert checked == 2 * len(decoupled.PARTS[part].figures)


def test_a_run_is_distilled_and_scored_by_every_score(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[tuple[object, ...]] = []

    def ddray(lab: Lab, *arguments: object) -> Any:
        commands.append(arguments)
        if arguments[0] == "distill":
            out = {"artifact": str(lab.folder / "set.pt"), "cosine_to_real": 0.7}
            return SimpleNamespace(out=out, seconds=1.0)
        teacher = {"teacher": {"accuracy": 0.9}} if "soft" in arguments else {}
        return SimpleNamespace(out={"results": [{"accuracy_mean": 0.5}], **teacher})

    monkeypatch.setattr(decoupled, "ddray", ddray)
    part = decoupled.PARTS["diffusion_digits"]
    run = decoupled._run(lab, "digits-dit-0", part.figures["dit"], part.scores, 0)

    measures = {"cosine_to_real": 0.7, "teacher": 0.9}
    assert run == {"hard": 0.5, "soft": 0.5, **measures, "seconds": 1.0, "seed": 0}
    assert [arguments[0] for arguments in commands] == ["distill", "evaluate", "evaluate"]
    assert "method.generator.vae_epochs=1" in commands[0]
