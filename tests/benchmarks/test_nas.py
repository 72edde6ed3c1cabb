"""Cost of ranking architectures: training against a plain loop, executor overhead, enumeration."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from ddray.cluster.executor import RayExecutor
from ddray.data import PixelSpace
from ddray.ranking.figures_of_merit import figures_of_merit
from ddray.ranking.options import NasRecipe
from ddray.ranking.spaces import get_space, sample
from ddray.ranking.worker import NasTask, SweepData, SweepJob, run_task, training_set
from ddray.runs.executor import Outcome, Task
from ddray.runs.ledger import Ledger, Unit
from ddray.training.dsa import dsa_for
from tests.benchmarks.conftest import random_dataset

pytestmark = pytest.mark.benchmark
NUM_ARCHS, EPOCHS, NUM_WORKERS = 24, 3, 2
RECIPE = NasRecipe(epochs=EPOCHS)


def plain_loop(images: torch.Tensor, labels: torch.Tensor, val: torch.Tensor, indices: list[int]) -> float:
    """Train networks one by one with a DataLoader and a sync per step; return the seconds."""
    space = get_space("convnet720")
    dsa = dsa_for(True)
    begin = time.perf_counter()
    for index in indices:
        net = space.build(index, (3, 32, 32), 10, seed=0, device=torch.device("cpu")).train()
        loader = DataLoader(TensorDataset(images, labels), batch_size=RECIPE.batch, shuffle=True)
        optimizer = torch.optim.SGD(net.parameters(), lr=RECIPE.lr, momentum=0.9, weight_decay=5e-4)
        draw = torch.Generator().manual_seed(0)
        losses = []
        for _ in range(EPOCHS):
            for batch, targets in loader:
                augmented = dsa.apply(batch, dsa.draw(len(batch), draw, shared_op=True))
                loss = F.cross_entropy(net(augmented), targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        net.eval()
        with torch.no_grad():
            for (batch,) in DataLoader(TensorDataset(val), batch_size=RECIPE.batch):
                net(batch).argmax(1).tolist()
    return time.perf_counter() - begin


def our_sweep(data: SweepData, indices: list[int], run: Path) -> float:
    """Train the same architectures over Ray; return the seconds from the first unit to the last row."""
    space = get_space("convnet720")
    Ledger(run).folder.mkdir(parents=True)
    epoch = Ledger(run).open_epoch()
    tasks = [
        NasTask(
            units=(Unit(kind="nas", spec={"index": index}),),
            index=index,
            set_name="proxy",
            seeds=(0,),
            recipe=RECIPE.dump(),
            num_steps=None,
            space={"name": "convnet720"},
            shuffle=True,
            cost=space.cost(index, (3, 32, 32), 10),
        )
        for index in indices
    ]
    tasks.sort(key=lambda task: -task.cost)
    with RayExecutor(cpus=1, gpus=0, max_workers=NUM_WORKERS).workers() as workers:
        data_ref = workers.share(data)
        job = SweepJob(str(run), epoch, run.name, "cpu")
        # Workers are long-lived: their start and imports are not part of a unit. No unit is handed out before
        # both workers are ready, or some work would be done before the clock starts.
        work = [Task(task.key, run_task, (job, data_ref, task)) for task in tasks]
        met: list[str] = []

        def after(outcome: Outcome) -> list[Task]:
            met.append(outcome.key)
            return work if len(met) == NUM_WORKERS else []

        meet = [
            Task(f"worker {worker_index}", _meet, (str(run), worker_index))
            for worker_index in range(NUM_WORKERS)
        ]
        outcomes = workers.run(meet, follow=after)
        assert [next(outcomes).error for _ in meet] == [None] * NUM_WORKERS
        assert not Ledger(run).rows("nas")
        begin = time.perf_counter()
        errors = [outcome.error for outcome in outcomes]
        seconds = time.perf_counter() - begin
    assert errors == [None] * len(indices)
    assert len(Ledger(run).rows("nas")) == len(indices)
    return seconds


def _meet(folder: str, worker_index: int) -> None:
    """Import what units need, and return when all workers have done so."""
    import torchvision  # noqa: F401

    (Path(folder) / f"worker-{worker_index}.here").touch()
    while len(list(Path(folder).glob("worker-*.here"))) < NUM_WORKERS:
        time.sleep(0.01)


@pytest.mark.slow  # three minutes
@pytest.mark.ray
def test_a_sweep_against_a_plain_loop(figures: dict[str, Any], tmp_path: Path) -> None:
    """Bar: >= 1.7x on 2 cores; 24 architectures x 500 images of 32 px, the same epochs."""
    dataset = random_dataset(10, 60)
    split = dataset.train()
    space = PixelSpace("normalized", dataset.mean, dataset.std)
    images = space.encode(split.images)
    # The cheaper three quarters: the widest would take minutes, with the same convolutions on both sides.
    everything = sample(get_space("convnet720"), 32, seed=0, image_shape=(3, 32, 32), num_classes=10)
    costs = {index: get_space("convnet720").cost(index, (3, 32, 32), 10) for index in everything}
    indices = sorted(sorted(everything, key=costs.__getitem__)[:NUM_ARCHS])
    data = SweepData(
        sets={"proxy": training_set(images[:500], split.labels[:500], space)},
        val=(split.images[500:].numpy(), split.labels[500:].numpy()),
        test=None,
        num_classes=10,
        can_flip=True,
    )
    ours = our_sweep(data, indices, tmp_path / "run")
    plain = plain_loop(images[:500], split.labels[:500], images[500:], indices)
    figures.update({"ratio": plain / ours, "plain_s": plain, "ours_s": ours})
    assert plain / ours >= 1.7, (plain, ours)


@pytest.mark.ray
def test_overhead_per_unit(figures: dict[str, Any], tmp_path: Path) -> None:
    """Bar: < 20 ms per unit on top of the training itself."""
    images = np.zeros((10, 1, 16, 16), np.uint8)
    labels = np.arange(10)
    space = {"kind": "raw", "mean": (0.0,), "std": (1.0,)}
    from ddray.ranking.worker import TrainingSet

    data = SweepData({"proxy": TrainingSet(images, labels, space)}, (images, labels), None, 10, False)
    run = tmp_path / "run"
    Ledger(run).folder.mkdir(parents=True)
    epoch = Ledger(run).open_epoch()
    tiny = get_space("convnet720")
    index = min(range(len(tiny)), key=lambda i: tiny.cost(i, (1, 16, 16), 10))
    tasks = [
        NasTask(
            units=(Unit(kind="nas", spec={"number": seed}),),
            index=index,
            set_name="proxy",
            seeds=(seed,),
            recipe=NasRecipe(epochs=1, augment="none").dump(),
            num_steps=1,
            space={"name": "convnet720"},
            shuffle=True,
            cost=1.0,
        )
        for seed in range(100)
    ]
    ledger = Ledger(run)
    with RayExecutor(cpus=1, gpus=0, max_workers=1).workers() as workers:
        data_ref = workers.share(data)
        job = SweepJob(str(run), epoch, "overhead", "cpu")

        def start(key: str, attempt: int) -> None:
            ledger.event("start", key, epoch)

        calls = [Task(task.key, run_task, (job, data_ref, task)) for task in tasks]
        list(workers.run(calls, on_start=start))
    finished = sorted(event["time"] for event in ledger.events() if event["event"] == "finish")
    work = sum(sorted(row.wall_s for row in ledger.rows("nas"))[:-1])  # the first row includes the imports
    overhead = (finished[-1] - finished[0] - work) / (len(tasks) - 1)
    figures.update({"overhead_seconds": overhead})
    assert overhead < 0.020, overhead


def test_describing_every_cell(figures: dict[str, Any]) -> None:
    """Bar: < 10 s for all 15,625."""
    begin = time.perf_counter()
    space = get_space("nasbench201")
    archs = [space.describe(index) for index in range(len(space))]
    seconds = time.perf_counter() - begin
    figures.update({"seconds": seconds})
    assert len(archs) == 15_625
    assert seconds < 10


def test_the_bootstrap_of_every_cell(figures: dict[str, Any]) -> None:
    """Bar: < 10 s of CPU time for the figures of 15,625 cells with 1,000 draws."""
    generator = np.random.default_rng(0)
    truth = np.round(generator.random(15625), 4)
    scores = np.round(truth + 0.1 * generator.standard_normal(15625), 3)
    begin = time.process_time()
    figures = figures_of_merit(scores, truth, storage_images=1.0, wall_s=0.0, chance=0.1, num_bootstrap=1000)
    seconds = time.process_time() - begin
    figures.update({"cpu_seconds": seconds})
    low, high = figures["spearman_ci95"]
    assert high - low < 0.02
    assert seconds < 10, seconds
