"""Networks that are trained by several workers: one is lost, or the driver is."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from ddray.cluster.data_parallel import train_parallel
from ddray.jobs.options import PoolOptions
from ddray.jobs.pool_training import train_pool
from ddray.pool.local import LocalPool
from ddray.pool.spec import PoolEntry, PoolSpec, supervised_specs
from tests.faults.processes import DDRAY, finish, ray_workers, start, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]
EPOCHS = 30
RECIPE = {"epochs": EPOCHS, "batch": 64}


def never(spec: PoolSpec) -> Any:
    raise AssertionError("trained twice")


def entry(dataset: Any, folder: Path) -> PoolEntry:
    (spec,) = supervised_specs(
        dataset, split="train", arch="convnet1_w8", device="cpu", recipe=RECIPE, seed=0, num=1
    )
    return LocalPool(never, folder).get([spec])[0]


def check(dataset: Any, folder: Path) -> None:
    """Compare the entry with that of one process that nothing happened to."""
    settings: Any = {"arch": "convnet1_w8", "recipe": RECIPE, "seed": 0, "num_models": 1}
    train_pool(dataset, **settings, device=torch.device("cpu"), folder=folder / "alone")
    expected, result = entry(dataset, folder / "alone"), entry(dataset, folder / "pool")
    assert (result.meta["times_trained"], result.meta["num_workers"]) == (1, 2)
    torch.testing.assert_close(dict(result.tensors), dict(expected.tensors), rtol=1e-2, atol=1e-3)
    assert not list((folder / "pool").glob("*.training"))


@pytest.mark.usefixtures("ray_here")
def test_a_lost_worker_costs_the_epochs_since_the_last_checkpoint(digits: Any, tmp_path: Path) -> None:
    names: set[str] = set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            names.update(path.name for path in (tmp_path / "pool").glob("*.training/checkpoint_*"))

    def kill() -> None:
        wait_for(lambda: len(names) >= EPOCHS // 2, None, 90)
        os.kill(ray_workers("TrainWorker")[-1], signal.SIGKILL)

    threads = [threading.Thread(target=target, daemon=True) for target in (watch, kill)]
    for thread in threads:
        thread.start()
    options = PoolOptions(
        kind="supervised", arch="convnet1_w8", num_workers=2, gpus_per_worker=0, out=tmp_path / "pool"
    )
    train_parallel(digits, options, RECIPE, checkpoint_s=0)
    ended.set()
    threads[1].join(1)

    assert not threads[1].is_alive(), "no worker was killed"
    folders = {name for name in names if "snapshot" not in name}
    assert len(folders) < EPOCHS + 3, "it began anew"
    check(digits, tmp_path)


@pytest.mark.usefixtures("no_ray")
def test_a_killed_driver_goes_on_when_the_command_is_run_again(digits: Any, tmp_path: Path) -> None:
    arguments = [
        *(*DDRAY, "pool", "train", "--kind", "supervised", "--arch", "convnet1_w8", "--num-workers", "2"),
        *("--set", f"epochs={EPOCHS}", "--set", "batch=64", "--out", str(tmp_path / "pool"), "--json"),
    ]
    victim = start(arguments)
    try:
        wait_for(lambda: bool(list((tmp_path / "pool").glob("*.training"))), victim)
    finally:
        victim.kill()
        victim.communicate()
    finish(arguments)
    check(digits, tmp_path)
