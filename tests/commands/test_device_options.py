"""Options that name a device or a share of one: refused in one line, and a driver that starts no CUDA."""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ddray.cli import _run
from ddray.cluster import resources
from ddray.jobs import distill as distill_job
from ddray.jobs.context import declared_specs
from ddray.methods import method_names
from ddray.runs import recovery
from ddray.testing import plan_method

TUNE = ("tune", "--method", "dm", "--num-samples", "1", "--steps", "2")
DISTIL = ("distill", "--method", "dm", "--ipc", "1", "--steps", "4")
NAS = ("nas", "--proxy", "some.pt")
BENCH = ("bench", "table.yaml")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert _run(list(arguments), False) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    table = {"name": "t", "dataset": "digits", "methods": ["random"], "ipc": 1, "evaluate": {"seeds": 1}}
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(table))
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "option"),
    [(TUNE, "--gpus-per-trial"), (BENCH, "--gpus-per-unit"), (NAS, "--gpus-per-worker")],
)
def test_gpus_that_cannot_be_used_are_refused_before_anything_is_done(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    table: Path,
    arguments: tuple[str, ...],
    option: str,
) -> None:
    monkeypatch.setattr(resources, "_visible_gpus", lambda options: 0)
    assert "must be <= 1" in refused(capsys, *arguments, option, "2")
    assert refused(capsys, *arguments, option, "1") == (
        f"error: {option} must be 0 where there is no GPU that torch can use, got 1"
    )
    assert not (table / "runs").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("distill", "--method", "dm", "--ipc", "1"),
        ("evaluate", "some.pt"),
        ("pool", "train", "--kind", "supervised"),
    ],
)
def test_cuda_that_is_not_there_is_refused(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    table: Path,
    arguments: tuple[str, ...],
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    line = refused(capsys, *arguments, "--device", "cuda")
    assert line == "error: --device cuda: torch sees 0 CUDA devices; use --device cpu"
    assert not (table / "runs").exists()


def test_a_distillation_that_runs_out_of_memory_goes_on_with_less(
    run_command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real, starts = distill_job.run_distillation, []

    def run(*arguments: Any, **options: Any) -> Any:
        starts.append(arguments[0])
        if len(starts) == 1:
            real(*arguments, **{**options, "until": 2})
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(*arguments, **options)

    halvings: list[None] = []

    def halved() -> AbstractContextManager[None]:
        halvings.append(None)
        return nullcontext()

    monkeypatch.setattr(recovery, "halved_budget", halved)
    monkeypatch.setattr(distill_job, "run_distillation", run)
    settings = ("--set", "arch=convnet1_w8", "--set", "method.batch_real=4")
    result = run_command(*DISTIL, *settings, "--run-dir", str(tmp_path / "run"))
    assert (len(starts), result["steps"], result["resumed_from_step"]) == (2, 4, 2)
    assert starts[0] is not starts[1], "a method object is set up once"
    assert len(halvings) == 1


def test_one_that_runs_out_twice_ends_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(*arguments: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB.")

    monkeypatch.setattr(distill_job, "run_distillation", run)
    assert _run([*DISTIL, "--run-dir", str(tmp_path / "run")], False) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line == (
        f"error: {platform.node()}: out of memory: CUDA out of memory. Tried to allocate 8.00 GiB."
    )


@pytest.mark.parametrize("method", method_names())
def test_a_driver_knows_what_a_search_trains_first_without_cuda(
    method: str, toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the driver started CUDA")

    monkeypatch.setattr(torch.cuda, "_lazy_init", refuse)
    monkeypatch.setattr(torch.cuda, "is_available", refuse)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    plan, ctx, _ = plan_method(method, toy())
    specs = declared_specs(plan, replace(ctx, device=torch.device("cuda")))
    assert all(spec.device == "cuda" for spec in specs)
