"""Commands end with a picture, a table, and what to type next."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ddray.cli import _run
from ddray.commands.display import bench_tables, nas_tables, next_step
from ddray.commands.endings import distill_tables, evaluation, tune_tables
from ddray.evaluation.options import EvaluateResult
from ddray.jobs.distill import DistillResult
from ddray.ranking.result import NasResult
from ddray.system.progress import plain_console
from ddray.tables.result import BenchResult
from ddray.tuning.result import TuneResult

TINY = ("--set", "arch=convnet1_w8", "--set", "compile=off")


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    capsys.readouterr()
    code = _run([str(argument) for argument in arguments], debug=True)
    output = capsys.readouterr()
    assert code == 0, output.err
    return output.out.splitlines()


def text_of(parts: list[Any]) -> str:
    console = plain_console()
    console.width = 200
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    return capture.get()


def test_each_command_names_the_next_which_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a narrow terminal, from a folder with a space: the line is whole, and can be typed."""
    monkeypatch.setenv("COLUMNS", "40")
    folder = tmp_path / "a rather long name of a folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    distil = ("distill", "--method", "random", "--dataset", "digits", "--ipc", "1", *TINY)

    *table, last = printed(capsys, *distil, "--run-dir", "run", "--out", "set of mine.pt")
    assert last == "next: ddray evaluate 'set of mine.pt'"
    assert any("random-digits-ipc1-seed0" in line for line in table)
    assert any("picture" in line for line in table)

    words = shlex.split(last.removeprefix("next: ddray "))
    first, *table, last = printed(capsys, *words, "--seeds", 2, "--epochs", 1)
    assert first == "picture: set of mine.png"
    assert "set of mine: hard, test" in " ".join(" ".join(table).split())
    assert last == "next: ddray report run"

    words = shlex.split(last.removeprefix("next: ddray "))
    printed(capsys, *words, "--no-tsne")
    assert (folder / "run" / "report.html").is_file()


def test_an_evaluation_in_a_folder_of_its_own_suggests_its_own_page() -> None:
    one = {"arch": "convnet1_w8", "accuracy_mean": 0.5, "accuracy_std": None, "per_seed": [0.5]}
    values = {"protocol": "hard", "split": "test", "results": [{**one, "num_images": 10, "wall_s": 1.0}]}
    result = EvaluateResult.parse(values).model_copy(update={"recorded_in": "/sets/run"})

    def last(result: EvaluateResult) -> Any:
        return evaluation(Path("/elsewhere/set.pt"), result)[-1]

    assert last(result) == "next: ddray report /sets/run"
    in_folder = result.model_copy(update={"run_dir": "/own/run", "num_failed": 0})
    assert last(in_folder) == "next: ddray report /own/run"


def test_the_command_after_a_self_supervised_set_names_its_protocol_and_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    distil = ("distill", "--method", "random_ssl", "--dataset", "digits", "--budget", "10", *TINY)
    teacher = ("--set", "teacher.arch=convnet1_w8", "--set", "teacher.epochs=1", "--data-dir", tmp_path)

    *_, last = printed(capsys, *distil, *teacher, "--run-dir", "a run")
    assert last == "next: ddray evaluate 'a run/distilled.pt' --protocol linear --data-dir ."

    words = shlex.split(last.removeprefix("next: ddray "))
    quick = ("--seeds", 1, "--epochs", 1, "--set", "probe.steps=1")
    *_, last = printed(capsys, *words, *quick)
    assert last == "next: ddray report 'a run' --data-dir ."


@pytest.mark.parametrize(
    ("method", "end"),
    [("dm", ""), ("sre2l", " --protocol soft"), ("kip", " --protocol kernel"), ("dd", " --protocol steps")],
)
def test_the_next_step_scores_a_set_as_its_authors_do(method: str, end: str) -> None:
    values = {"method": method, "dataset": "cifar10", "ipc": 1, "run_dir": "/r", "steps": 10, "wall_s": 3.0}
    values |= {"artifact": "/r/distilled.pt", "resumed_from_step": 0, "seconds_per_step": None}
    result = DistillResult.parse({**values, "first_loss": None, "final_loss": None})

    *_, last = distill_tables(result, ["--data-dir", "/d"])

    assert last == f"next: ddray evaluate /r/distilled.pt{end} --data-dir /d"


def test_how_a_dataset_is_read_goes_into_the_next_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "dog"):
        (tmp_path / "my pets" / name).mkdir(parents=True)
        for index in range(4):
            pixels = torch.randint(256, (24, 24, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / "my pets" / name / f"{index}.png")
    reading = ("--data-dir", "elsewhere", "--image-size", 16, "--no-can-flip")

    *_, last = printed(capsys, "data", "info", "my pets", *reading)

    assert last.startswith("next: ddray distill --method dm --dataset 'my pets' --ipc 1")
    assert last.endswith(" --data-dir elsewhere --image-size 16 --no-can-flip")


def test_a_word_that_a_shell_would_split_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        next_step("evaluate", tmp_path / "a b.pt", "--seeds", 2) == "next: ddray evaluate 'a b.pt' --seeds 2"
    )
    assert next_step("report", Path("/elsewhere/run")) == "next: ddray report /elsewhere/run"


def test_a_distillation_says_what_its_losses_and_seconds_are_and_what_was_cut() -> None:
    values: dict[str, Any] = {"method": "dm", "dataset": "cifar10", "ipc": 1, "run_dir": "/r", "steps": 10}
    values |= {"artifact": "/r/distilled.pt", "name": "dm-cifar10-ipc1-seed0", "resumed_from_step": 0}
    values |= {"wall_s": 3.0, "seconds_per_step": 0.1, "first_loss": 2.0, "final_loss": 0.5, "seconds": 3.0}
    values |= {"seconds_with_pool": 63.0, "cut": "steps 10 of 8,000", "overridden": ["method.lr_img"]}

    text = text_of(distill_tables(DistillResult.parse(values)))

    assert "resumed" not in text
    assert "_" not in text.replace("method.lr_img", "")
    assert "2 in the first tenth of the steps, 0.5 in the last" in text
    assert "3 (0.1 per step; beside it: pool 60)" in text
    assert "steps 10 of 8,000" in text
    assert "method.lr_img" in text
    assert text.rstrip().endswith("next: ddray evaluate /r/distilled.pt")


def test_a_distillation_in_words_on_80_columns() -> None:
    values: dict[str, Any] = {"method": "krr_st", "dataset": "digits", "ipc": 1, "budget": 10, "steps": 10}
    values |= {"run_dir": "/r", "artifact": "/r/distilled.pt", "name": "krr_st-digits", "wall_s": 20.0}
    values |= {"resumed_from_step": 5, "seconds_per_step": 0.1, "first_loss": None, "final_loss": None}
    values |= {"seconds": 40.0, "peak_memory_bytes": 931_049_472, "storage_floats": 25_600}
    values |= {"half_memory_budget": True, "shards": 2, "cosine_to_real": 0.51234, "snapshots": "/r/s"}

    table, _ = distill_tables(DistillResult.parse(values))

    console = plain_console()
    console.width = 80
    with console.capture() as capture:
        console.print(table)
    rows = {
        first.strip(): second.strip()
        for _, first, second, _ in (line.split("│") for line in capture.get().splitlines() if "│" in line)
    }
    assert rows["resumed from step"] == "5"
    assert rows["seconds"] == "40 (0.1 per step; 20 since this start)"
    assert rows["peak memory"] == "931.0 MB"
    assert rows["values stored"] == "25,600"
    assert rows["half memory budget"] == "yes: memory had run out"
    assert rows["cosine to real"] == "0.5123"
    assert (rows["shards"], rows["sets along the steps"], rows["budget"]) == ("2", "/r/s", "10")


def search_result(**values: Any) -> TuneResult:
    point = {"val_accuracy": 0.5, "test_accuracy_mean": 0.4, "test_accuracy_std": 0.01}
    return TuneResult.parse(
        {
            "run_dir": "/r",
            "objective": "val_accuracy",
            "num_trials": 3,
            "num_failed": 0,
            "num_stopped_early": 1,
            "best": {"config": {"lr_img": 2.0}, "val_accuracy": 0.6, "trial": 2},
            "paper_point": point,
            "verdict": "no improvement over the preset",
            "artifact": "/r/distilled.pt",
            "test_accuracy_mean": 0.45,
            "test_accuracy_std": 0.02,
            "test_num_networks": 6,
            "wall_s": 3.0,
            **values,
        }
    )


def test_the_next_step_of_a_search_scores_as_it_did(tmp_path: Path) -> None:
    artifact = tmp_path / "distilled.pt"
    result = search_result(protocol="soft", artifact=str(artifact))
    scoring = ["--teacher", "convnet3", "--data-dir", "/d"]

    assert "picture" not in text_of(tune_tables(result, scoring))
    artifact.with_suffix(".png").touch()
    assert "distilled.png" in text_of(tune_tables(result, scoring))
    *_, last = tune_tables(result, scoring)
    assert last == f"next: ddray evaluate {artifact} --protocol soft --teacher convnet3 --data-dir /d"


def test_a_search_speaks_of_the_preset_and_of_best_yaml() -> None:
    text = text_of(tune_tables(search_result(cut="steps 6 of 150", overridden=["evaluate.lr"])))

    for words in (
        "60.00 (preset 50.00)",
        "45.00 +- 2.00 (preset 40.00 +- 1.00)",
        "no improvement over the preset",
        "/r/best.yaml",
        "steps 6 of 150",
        "evaluate.lr",
        "lr_img: 2",
    ):
        assert words in text, words
    assert "paper" not in text


@pytest.mark.parametrize(
    ("num_archs", "few", "few_on_top"), [(5, True, True), (12, False, True), (40, False, False)]
)
def test_few_architectures_have_no_correlation(num_archs: int, few: bool, few_on_top: bool) -> None:
    proxy = {
        "proxy": "dm",
        "spearman": 0.91,
        "spearman_ci95": [0.5, 0.97],
        "spearman_top20": 0.33,
        "num_tied": 0,
    }
    proxy |= {"kendall": 0.5, "top1_truth_accuracy": 0.7, "best_truth_accuracy": 0.8, "storage_images": 10}
    proxy |= {"wall_s": 1.0, "num_archs": num_archs}
    result = NasResult.parse({"space": "convnet720", "num_archs": num_archs, "proxies": [proxy]})

    text = text_of(nas_tables(result))

    assert ("0.91" in text, "0.33" in text) == (not few, not few_on_top)
    assert text.count("too few") == few_on_top + 2 * few
    assert (f"{num_archs} architectures are too few for a correlation" in text) == few


def test_a_bench_tells_its_anomalies_below_the_table() -> None:
    cell = {"method": "dm", "dataset": "digits", "ipc": 1, "protocol": "hard", "arch": "convnet3", "n": 2}
    cell |= {"accuracy_mean": 0.5, "accuracy_std": 0.01, "num_sets": 1, "cut": "steps 5 of 150"}
    values = {"name": "t", "run_dir": "/r", "cells": [cell], "num_failed": 0, "failures": [], "skipped": []}
    result = BenchResult.parse({**values, "anomalies": ["dm is below random."], "wall_s": 1.0})

    text = text_of(bench_tables(result))

    assert "note: dm is below random." in text
    assert "steps 5 of 150" in text
    assert text.rstrip().endswith("next: ddray report /r")
