"""`ddray nas` and `ddray tune --objective nas-spearman` as commands: rejected options and defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ddray.cli import _run
from ddray.cluster import resources
from ddray.errors import InputError
from ddray.ranking import command as rank
from ddray.ranking.options import NasModes, NasOptions, NasRequest
from ddray.ranking.result import NasResult

RANK = ("nas", "--proxy", "some.pt")


@pytest.fixture
def csvs(tmp_path: Path) -> dict[str, str]:
    """Scores and truth of 4 architectures; `outside` has one that is not among the 720."""
    paths = {}
    for name, column, last in (("scores", "score", 3), ("outside", "score", 5000), ("truth", "accuracy", 3)):
        path = tmp_path / f"{name}.csv"
        path.write_text("\n".join([f"index,{column}", *(f"{n},0.{n}5" for n in range(3)), f"{last},0.9", ""]))
        paths[name] = str(path)
    return paths


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must exit with 2; return its one line of stderr."""
    assert _run(list(arguments), False) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--truth-column", "accuracy"), ["--truth-column needs --truth table", "got accuracy"]),
        (("--set", "cells.channels=8"), ["cells.*", "nasbench201", "convnet720"]),
        (("--executor", "local", "--unit-timeout", "60"), ["--unit-timeout", "local", "got 60"]),
        (("--executor", "local", "--num-workers", "2"), ["--num-workers", "local", "got 2"]),
    ],
)
def test_options_that_would_be_ignored(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: list[str]
) -> None:
    line = refused(capsys, *RANK, *arguments)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    "arguments",
    [
        *(("--proxy", "some.pt"), ("--baseline", "random"), ("--set", "recipe.lr=1"), ("--compat", "x")),
        *(("--sample", "10"), ("--run-dir", "/nowhere"), ("--seeds", "9"), ("--epochs", "7")),
        *(("--max-mflops", "1.0"), ("--dataset", "no_such"), ("--val-images", "9"), ("--num-workers", "2")),
    ],
)
def test_given_scores_are_of_no_training(
    capsys: pytest.CaptureFixture[str], csvs: dict[str, str], arguments: tuple[str, str]
) -> None:
    line = refused(capsys, "nas", "--scores", csvs["scores"], "--truth", csvs["truth"], *arguments)
    assert (
        line
        == f"error: {arguments[0]} must be left out with --scores, which trains nothing, got {arguments[1]}"
    )


def test_every_option_that_scores_do_not_use_is_refused(
    capsys: pytest.CaptureFixture[str], csvs: dict[str, str]
) -> None:
    line = refused(capsys, "nas", "--scores", csvs["scores"], "--truth", csvs["truth"], "--resume")
    assert line == "error: --resume must be left out with --scores, which trains nothing, got True"
    line = refused(capsys, "nas", "--describe", "all", "--sample", "3")
    assert line == "error: --sample must be left out with --describe, which lists a space, got 3"
    every = {*NasRequest.model_fields, *NasModes.model_fields, *NasOptions.model_fields}
    for name in every - {"scores", "space", "truth", "truth_column", "seed", "proxies", "executor"}:
        with pytest.raises(InputError, match="must be left out with --scores"):
            rank.check_modes({"scores": csvs["scores"], name: "x"})


@pytest.mark.parametrize(("scores", "truth"), [("outside", "truth"), ("scores", "wrong")])
def test_files_hold_architectures_of_the_space(
    capsys: pytest.CaptureFixture[str], csvs: dict[str, str], tmp_path: Path, scores: str, truth: str
) -> None:
    assert _run(["nas", "--scores", csvs["scores"], "--truth", csvs["truth"]], False) == 0
    capsys.readouterr()
    wrong = tmp_path / "wrong.csv"
    wrong.write_text(Path(csvs["truth"]).read_text() + "5000,0.5\n")
    line = refused(capsys, "nas", "--scores", csvs[scores], "--truth", {**csvs, "wrong": str(wrong)}[truth])
    assert "indices of convnet720 must be in 0..719, got 5000" in line
    assert "--space" in line


@pytest.mark.ray
@pytest.mark.parametrize(
    ("num", "arguments", "gpus"), [(2, (), 1), (2, ("--gpus-per-worker", "0"), 0), (0, (), 0)]
)
def test_a_gpu_that_is_there_is_used(
    monkeypatch: pytest.MonkeyPatch, num: int, arguments: tuple[str, ...], gpus: float
) -> None:
    seen: list[NasOptions] = []

    def record_options(request: Any, options: NasOptions, *rest: Any, **kwargs: Any) -> NasResult:
        seen.append(options)
        return NasResult(space=options.space, num_archs=0, proxies=[])

    monkeypatch.setattr(resources, "_visible_gpus", lambda options: num)
    monkeypatch.setattr(rank, "run_nas", record_options)
    for executor in ("ray", "local"):
        assert _run([*RANK, "--executor", executor, *arguments, "--json"], False) == 0
    assert [options.gpus_per_worker for options in seen] == [gpus, gpus]


@pytest.mark.ray
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--method", "random", "--nas-sample", "721"), ["--nas-sample must be in 3..720, got 721"]),
        (
            ("--method", "random", "--nas-space", "nasbench201", "--nas-sample", "15626"),
            ["--nas-sample must be in 3..15625, got 15626"],
        ),
        (("--method", "random", "--nas-space", "nasbench"), ["--nas-space", "did you mean 'nasbench201'"]),
        (("--method", "krr_st", "--budget", "10"), ["nas-spearman", "labels", "got krr_st", "val-accuracy"]),
    ],
)
def test_a_search_that_cannot_be_is_refused_before_its_folder_is_made(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[str, ...], words: list[str]
) -> None:
    run = tmp_path / "run"
    line = refused(capsys, "tune", *arguments, "--objective", "nas-spearman", "--run-dir", str(run))
    assert all(word in line for word in words), line
    assert not run.exists()
