"""`pool train --num-workers` on a local Ray: the entry of one process, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ddray.cluster import data_parallel
from ddray.cluster.data_parallel import _collected, _failure, _part, train_parallel
from ddray.errors import DdrayError, DivergedError, InputError
from ddray.jobs.options import PoolOptions
from ddray.jobs.pool_training import train_pool
from ddray.jobs.trainers import PoolTrainer
from ddray.pool.local import LocalPool
from ddray.pool.spec import PoolSpec, teacher_spec
from ddray.training.recipe import TeacherRecipe

CPU = torch.device("cpu")
BASE: dict[str, Any] = {"kind": "supervised", "arch": "convnet1_w8", "gpus_per_worker": 0}


def never(spec: PoolSpec) -> Any:
    raise AssertionError("trained twice")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
class TestOnRay:
    def test_the_entry_is_that_of_one_process(self, digits: Any, tmp_path: Path) -> None:
        """Of a teacher of soft labels, so that an evaluation finds it."""
        teacher = TeacherRecipe(epochs=2, batch=64)
        options = PoolOptions(**BASE, num_workers=2, out=tmp_path / "two")
        result = train_parallel(digits, options, teacher.dump())

        spec = teacher_spec(digits, "train", "convnet1_w8", teacher, device=CPU)
        assert result.keys == [spec.key]
        assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [spec.key, f"{spec.key}.lock"]
        (entry,) = LocalPool(never, tmp_path / "two").get([spec])
        alone = LocalPool(PoolTrainer(digits, digits.train(), CPU), tmp_path / "one").get([spec])[0]
        assert set(entry.meta) - set(alone.meta) == {"num_workers"}
        assert entry.meta["num_workers"] == 2
        assert entry.meta["peak_memory_bytes"] > 2**20
        assert entry.meta["final_loss"] == pytest.approx(alone.meta["final_loss"], rel=1e-4)
        torch.testing.assert_close(dict(entry.tensors), dict(alone.tensors), rtol=1e-3, atol=1e-4)

    def test_a_loss_that_is_nan_is_said_and_not_tried_again(self, digits: Any, tmp_path: Path) -> None:
        options = PoolOptions(**BASE, num_workers=2, out=tmp_path)
        with pytest.raises(DivergedError, match="lower lr"):
            train_parallel(digits, options, {"epochs": 1, "lr": 1e30})
        assert not list(tmp_path.glob("*/entry.json"))

    @pytest.mark.parametrize(
        ("changes", "recipe", "message"),
        [
            ({"num_workers": 500}, {}, r"--num-workers must be <= \d+, the workers with 1 CPUs and 0 GPUs"),
            ({"num_workers": 2}, {"batch": 1}, "--num-workers must be <= 1, the images of a batch, got 2"),
            ({"num_workers": 1, "cpus_per_worker": 99}, {}, "--cpus-per-worker must be <= "),
        ],
    )
    def test_workers_that_do_not_fit_are_refused(
        self, changes: Any, recipe: Any, message: str, digits: Any, tmp_path: Path
    ) -> None:
        with pytest.raises(InputError, match=message):
            train_parallel(digits, PoolOptions(**BASE, **changes, out=tmp_path), recipe)
        assert not list(tmp_path.glob("*.training"))


def test_a_gpu_is_one_workers(digits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_parallel, "with_gpus", lambda options: options)
    options = PoolOptions(**{**BASE, "gpus_per_worker": 0.5}, num_workers=2)
    with pytest.raises(InputError, match=r"--gpus-per-worker must be 0 or 1 .*, got 0\.5"):
        train_parallel(digits, options, {})


def test_the_failure_of_a_worker_is_said_in_its_words() -> None:
    class Failed(Exception):
        def __init__(self, **failures: Exception) -> None:
            super().__init__("Training failed due to worker errors:\n...")
            self.worker_failures = {0: RuntimeError("Connection closed by peer"), **failures}

    assert str(_failure(Failed(one=InputError("no such dataset here")))) == "no such dataset here"
    other = _failure(Failed())
    assert isinstance(other, DdrayError)
    assert "failed 3 times: " in str(other)
    assert "Connection closed by peer; run the command again" in str(other)


def test_another_trainer_may_train_what_is_missing(digits: Any, tmp_path: Path) -> None:
    specs: list[PoolSpec] = []

    def record(spec: PoolSpec) -> Any:
        specs.append(spec)
        return {"weights.x": torch.zeros(1)}, {}

    settings: Any = {"arch": "convnet1_w8", "recipe": {}, "seed": 0, "num_models": 2, "device": CPU}
    result = train_pool(digits, **settings, folder=tmp_path, trainer=record)
    assert result.keys == [spec.key for spec in specs]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_the_first_workers_weights_and_the_largest_peak_are_the_entrys(
    tmp_path: Path, num_workers: int
) -> None:
    for rank in range(num_workers):
        values = {} if rank else {"weights.x": torch.ones(3)}
        save_file(values, _part(tmp_path, rank), {"peak_memory_bytes": str(9 + rank)})
    collected, peak = _collected(tmp_path, num_workers)
    assert collected.keys() == {"weights.x"}
    assert torch.equal(collected["weights.x"], torch.ones(3))
    assert peak == 8 + num_workers
