"""Two processes that train one network together, against one process."""

from __future__ import annotations

import multiprocessing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ddray.jobs.trainers import PoolTrainer
from ddray.nets import build_net
from ddray.pool.spec import supervised_specs
from ddray.seeding import derive
from ddray.testing import random_dataset
from ddray.training.dsa import Dsa
from ddray.training.engine import Rule, Step
from ddray.training.loop import DsaAugment, Training
from ddray.training.recipe import Recipe
from ddray.training.team import Team

TIMEOUT = timedelta(seconds=60)  # of the other process: its start, and each of its answers
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("convnet2_w4", {"batch": 7, "schedule": "constant"}),  # 23 rows: the last batch has 2
    "phases": ("convnet1_w4", {"batch": 11, "schedule": "vico"}),  # 1 row, which both members take
    "augmented": ("convnet1_w4", {"batch": 9, "schedule": "cosine"}),
    "mixed": ("convnet1_w4", {"batch": 9, "schedule": "cosine", "cutmix": 0.7}),
    "batch norm": ("convnet2_w4_bn", {"batch": 6, "schedule": "cosine"}),
}


def trained(case: str, team: Team | None) -> dict[str, Tensor]:
    """Return what a network in float64 has become, and its mean loss."""
    arch, settings = CASES[case]
    recipe = Recipe(epochs=2, lr=0.05, augment="dsa", **settings)
    images = torch.rand(23, 3, 16, 16, generator=derive(0, "images"), dtype=torch.float64)
    labels = torch.arange(23) % 3
    augment = None if case == "plain" else DsaAugment(Dsa("color_crop_cutout_flip_scale_rotate"))
    net = build_net(arch, (3, 16, 16), 3, seed=1).double()
    if team is not None:
        if team.rank:  # as on a GPU of another model
            net = build_net(arch, (3, 16, 16), 3, seed=2).double()
        team.join(net)
    training = Training(images, labels, recipe, augment, team=team)
    loss = training.run([net], [derive(0, "order")])
    return {**net.state_dict(), "loss": loss}


def pool_entry(team: Team | None) -> dict[str, Tensor]:
    """Return the tensors of a pool entry; of a team, one member's."""
    dataset = random_dataset()
    recipe = {"epochs": 2, "batch": 7, "augment": "dsa"}
    (spec,) = supervised_specs(
        dataset, split="train-val0", arch="convnet1_w4", device="cpu", recipe=recipe, seed=0, num=1
    )
    tensors, measured = PoolTrainer(dataset, dataset.train(), torch.device("cpu"), team)(spec)
    return {**tensors, "loss": torch.tensor(measured["final_loss"])}


def clipped(team: Team | None) -> dict[str, Tensor]:
    """Return weights after a step whose gradient is clipped, which must be the gradient of all rows."""
    net = torch.nn.Linear(3, 2).double()
    torch.nn.init.constant_(net.weight, 0.1)
    torch.nn.init.constant_(net.bias, 0.0)
    rule = Rule(torch.nn.functional.mse_loss, torch.optim.SGD, clip=0.01)
    step = Step([net], rule, lr=0.5, team=team)
    inputs, targets = torch.arange(15.0).view(5, 3).double(), torch.ones(5, 2).double()
    rows = slice(None) if team is None else team.rows(5)
    step(inputs[rows], targets[rows])
    return dict(net.state_dict())


def member(rank: int, folder: str) -> dict[str, dict[str, Tensor]]:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=TIMEOUT)
    team = Team(rank, 2)
    results = {case: trained(case, team) for case in CASES}
    results["pool"], results["clipped"] = pool_entry(team), clipped(team)
    decided = torch.tensor(team.first(float(rank == 0), torch.device("cpu")))
    results["first"] = {"decided": decided}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    return results


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What this process and another one got."""
    folder = str(tmp_path_factory.mktemp("team"))
    other = multiprocessing.get_context("spawn").Process(target=member, args=(1, folder))
    other.start()
    try:
        first = member(0, folder)
        other.join(TIMEOUT.total_seconds())
    finally:
        other.kill()  # in vain if it has ended
    assert other.exitcode == 0
    return [first, torch.load(Path(folder, "1.pt"), weights_only=True)]


@pytest.mark.parametrize("case", CASES)
def test_two_train_the_network_of_one(case: str, members: list[dict[str, dict[str, Tensor]]]) -> None:
    expected = trained(case, None)
    for results in members:
        assert results[case].keys() == expected.keys()
        for name, value in expected.items():
            # The loss is summed in float32; a row that both take counts twice.
            rtol = 1e-8 if name != "loss" else 0.1 if case == "phases" else 1e-5
            torch.testing.assert_close(results[case][name], value, rtol=rtol, atol=1e-10)


def test_a_clipped_gradient_is_that_of_all_rows(members: list[dict[str, dict[str, Tensor]]]) -> None:
    for results in members:
        torch.testing.assert_close(results["clipped"], clipped(None), rtol=1e-10, atol=1e-12)


def test_each_has_the_network_that_one_trains(members: list[dict[str, dict[str, Tensor]]]) -> None:
    expected = pool_entry(None)
    for results in members:
        torch.testing.assert_close(results["pool"], expected, rtol=1e-4, atol=1e-5)


def test_the_first_decides(members: list[dict[str, dict[str, Tensor]]]) -> None:
    assert [float(results["first"]["decided"]) for results in members] == [1.0, 1.0]


@pytest.mark.parametrize("num", [0, 1, 2, 5, 9])
def test_shares_are_every_row_once(num: int) -> None:
    shares = [Team(rank, 3).share(num) for rank in range(3)]
    assert [row for share in shares for row in range(num)[share]] == list(range(num))
    assert all(len(range(num)[Team(rank, 3).rows(num)]) >= min(num, 1) for rank in range(3))
