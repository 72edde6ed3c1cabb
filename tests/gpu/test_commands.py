"""Commands in this process on a fake GPU, and what they say where there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddray.artifact.reading import load
from ddray.cli import _run
from ddray.data import Dataset, SplitName, carve_val
from ddray.data.pixels import pixel_space
from ddray.jobs.plan import resolve
from ddray.runs.ledger import Ledger
from ddray.tuning.payload import pack
from ddray.tuning.trial import run_trial
from ddray.tuning.worker import SearchJob
from tests.gpu.fake_cuda import FakeCuda
from tests.tables.benches import run as run_bench

Command = Callable[..., dict[str, Any]]
DISTIL = ("distill", "--method", "dm", "--dataset", "digits", "--ipc", "1", "--steps", "2")
QUICK = ("--set", "arch=convnet2_w8", "--set", "method.batch_real=4")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where commands number their runs


@pytest.fixture
def set_file(tmp_path: Path, run_command: Command) -> Path:
    run_command(*DISTIL, *QUICK, "--device", "cpu", "--out", str(tmp_path / "set.pt"))
    return tmp_path / "set.pt"


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:1"])
def test_distil(device: str, run_command: Command, tmp_path: Path) -> None:
    with FakeCuda(devices=2) as gpu:
        run_command(*DISTIL, *QUICK, "--device", device, "--out", str(tmp_path / "set.pt"))
        used = [memory.peak > 0 for memory in gpu.memories]

    assert used == [device != "cuda:1", device == "cuda:1"]
    assert torch.isfinite(load(tmp_path / "set.pt").images).all(), "read without a GPU"


def test_distil_continues_a_run(run_command: Command, tmp_path: Path) -> None:
    arguments = (*DISTIL, *QUICK, "--device", "cuda", "--run-dir", str(tmp_path / "run"))
    with FakeCuda():
        run_command(*arguments)
        longer = run_command(*arguments[:8], "4", *arguments[9:], "--resume")

    assert longer["resumed_from_step"] == 2


def test_shards_give_the_set_of_a_run_without(run_command: Command, tmp_path: Path) -> None:
    images = []
    with FakeCuda() as gpu:
        for name, options in (("whole", ()), ("shards", ("--shards", "3", "--executor", "local"))):
            out = tmp_path / f"{name}.pt"
            run_command(*DISTIL, *QUICK, "--device", "cuda", "--deterministic", "--out", str(out), *options)
            images.append(load(out).images)
        assert gpu.memories[0].peak > 0

    assert torch.equal(*images)


@pytest.mark.parametrize("protocol", ["hard", "linear", "continual"])
def test_evaluate(protocol: str, run_command: Command, set_file: Path) -> None:
    quick = ("--epochs", "2", "--seeds", "1", "--protocol", protocol)
    extra = ("--set", "probe.steps=5", "--train-limit", "100") if protocol == "linear" else ()
    with FakeCuda() as gpu:
        result = run_command("evaluate", str(set_file), *quick, *extra, "--device", "cuda")

        assert gpu.kernels > 0
    assert 0 <= result["results"][0]["accuracy_mean"] <= 1


def test_nas(run_command: Command, set_file: Path, tmp_path: Path) -> None:
    options = ("--sample", "2", "--epochs", "1", "--truth-epochs", "1", "--val-images", "100")
    local = ("--executor", "local", "--gpus-per-worker", "1", "--run-dir", str(tmp_path / "nas"))
    with FakeCuda() as gpu:
        result = run_command("nas", "--proxy", str(set_file), *options, *local)

        assert gpu.kernels > 0
    assert (result["num_archs"], result["num_failed"]) == (2, 0)


def test_bench(tmp_path: Path) -> None:
    with FakeCuda() as gpu:
        result = run_bench(tmp_path / "bench", gpus_per_unit=1)

        assert gpu.kernels > 0
    assert result["num_failed"] == 0
    assert {row.status for row in Ledger(tmp_path / "bench").rows()} == {"done"}


@pytest.mark.parametrize("method", ["dm", "random"])
def test_a_trial_of_a_search(method: str, digits: Dataset, tmp_path: Path) -> None:
    layer = {"arch": "convnet2_w8", "compile": "off", "evaluate": {"epochs": 2, "val_seeds": 1}}
    layer |= {"steps": 9, "method": {"batch_real": 4}} if method == "dm" else {}
    plan = resolve(method, digits, ipc=1, layers=[layer])
    train, val = carve_val(digits.train(), seed=0)
    payload = pack(digits, train, str(SplitName(0)), val, pixel_space("normalized", digits, train))
    (tmp_path / "ledger").mkdir()
    budgets = (1, 3, 9) if method == "dm" else (1,)
    job = SearchJob(str(tmp_path), 1, method, 1, 0, plan.config.dump(), budgets, 1.0, 1.0)
    reports: list[dict[str, Any]] = []

    with FakeCuda() as gpu:
        run_trial(job, payload, 0, {}, reports.append)

        assert gpu.kernels > 0
    assert [report["budget"] for report in reports] == [*budgets]
    assert [row.status for row in Ledger(tmp_path).rows()] == ["done"]


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("cuda", "torch sees 0 CUDA devices"),
        ("cuda:1", "torch sees 0 CUDA devices"),
        ("gpu", "--device must be"),
    ],
)
def test_without_a_gpu_it_is_one_line(
    device: str, reason: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert _run([*DISTIL, "--device", device], False) == 2

    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert reason in line


def test_a_device_beyond_the_last_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeCuda(devices=2):
        assert _run([*DISTIL, "--device", "cuda:2"], False) == 2

    assert "torch sees 2 CUDA devices" in capsys.readouterr().err
