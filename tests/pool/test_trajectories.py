"""Pool kind `trajectory`: what an entry holds, replayed by hand, shared by runs, and read from its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ddray.data import SplitName
from ddray.errors import DivergedError, InputError
from ddray.jobs.context import declared_specs
from ddray.jobs.pool_training import expert_specs, train_experts
from ddray.jobs.trainers import PoolTrainer
from ddray.nets import build_net
from ddray.pool.files import PoolFiles, small_arrays
from ddray.pool.listing import list_pool
from ddray.pool.local import LocalPool
from ddray.pool.spec import PoolSpec
from ddray.pool.trajectories import trained_expert
from ddray.seeding import derive, derive_seed
from ddray.testing import random_dataset
from ddray.training.student import flat_parameters

CPU = torch.device("cpu")
RECIPE: dict[str, Any] = {"epochs": 3, "batch": 10, "lr": 0.05, "augment": "none"}


def spec_of(dataset: Any, arch: str = "convnet1_w8", **recipe: Any) -> PoolSpec:
    settings = {**RECIPE, **recipe}
    (spec,) = expert_specs(dataset, arch=arch, recipe=settings, seed=4, num_models=1, device="cpu")
    return spec


def test_an_entry_is_plain_sgd_replayed_by_hand() -> None:
    """Snapshot 0 is the fresh network, each other one follows from the one before it."""
    dataset = random_dataset((12, 10, 14))
    spec = spec_of(dataset)
    tensors, measured = PoolTrainer(dataset, dataset.train(), CPU)(spec)
    snapshots = tensors["snapshots"]

    seed = derive_seed(4, "pool", "trajectory")
    net = build_net("convnet1_w8", dataset.image_shape, 3, seed=seed)
    assert snapshots.shape == (4, sum(p.numel() for p in net.parameters()))
    assert snapshots.dtype == torch.float32
    assert torch.equal(snapshots[0], flat_parameters(net))
    split, _ = SplitName(0).carve(dataset.train())
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (dataset.mean, dataset.std))
    images, order = (split.images.float() / 255 - mean) / std, derive(seed, "order")
    for epoch in range(1, 4):
        torch.nn.utils.vector_to_parameters(snapshots[epoch - 1].clone(), net.parameters())
        for rows in torch.randperm(len(split), generator=order).split(10):
            loss = F.cross_entropy(net(images[rows]), split.labels[rows])
            gradients = torch.autograd.grad(loss, list(net.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(net.parameters(), gradients, strict=True):
                    parameter -= 0.05 * gradient
        torch.testing.assert_close(flat_parameters(net), snapshots[epoch], rtol=1e-4, atol=1e-5)
        assert not torch.equal(snapshots[epoch], snapshots[epoch - 1])
    assert measured["parameters"] == [(name, [*p.shape]) for name, p in net.named_parameters()]


def test_an_experts_network_comes_back_with_its_buffers(ddray_home: Path) -> None:
    dataset = random_dataset((12, 10, 14))
    spec = spec_of(dataset, arch="convnet1_w8_bn")
    (entry,) = LocalPool(PoolTrainer(dataset, dataset.train(), CPU)).get([spec])
    net = trained_expert(entry, CPU)
    assert torch.equal(flat_parameters(net), entry.tensors["snapshots"][-1])
    assert not net.training
    buffers = dict(net.named_buffers())
    assert buffers
    for name, buffer in buffers.items():
        assert torch.equal(buffer, entry.tensors[f"buffers.{name}"])


def test_gsam_changes_the_path_and_is_in_the_key() -> None:
    dataset = random_dataset((12, 10, 14))
    plain, sharp = spec_of(dataset), spec_of(dataset, rho=0.5, alpha=0.3)
    assert plain.key != sharp.key
    trainer = PoolTrainer(dataset, dataset.train(), CPU)
    first, second = trainer(plain)[0]["snapshots"], trainer(sharp)[0]["snapshots"]
    assert torch.equal(first[0], second[0])
    assert not torch.allclose(first[1], second[1])


def test_an_expert_that_diverges_says_so_at_the_end_of_the_epoch() -> None:
    dataset = random_dataset((12, 10, 14))
    trainer = PoolTrainer(dataset, dataset.train(), CPU)
    with pytest.raises(DivergedError, match=r"expert \(convnet1_w8\) diverged in epoch 1 of 3: .* lower"):
        trainer(spec_of(dataset, lr=1e30))


def test_runs_of_all_seeds_and_the_command_share_the_experts(planned: Any, ddray_home: Path) -> None:
    dataset = random_dataset((12, 10, 14))
    experts = {"num_models": 2, **{name: RECIPE[name] for name in ("epochs", "batch", "lr")}}
    method = {"augment": "none", "expert_epochs": 1, "max_start": 2, "experts": experts}
    keys = []
    for seed in (0, 1):
        plan, ctx, _ = planned("mtt", dataset, seed=seed, arch="convnet1_w8", method=method)
        keys.append([spec.key for spec in declared_specs(plan, ctx)])
    assert keys[0] == keys[1]
    settings: dict[str, Any] = {"arch": "convnet1_w8", "recipe": RECIPE, "seed": 0, "num_models": 2}
    result = train_experts(dataset, **settings, device=CPU)
    assert result.keys == keys[0]
    assert {(model.kind, model.epochs, model.times_trained) for model in list_pool().models} == {
        ("trajectory", 3, 1)
    }


def test_a_pixel_space_is_part_of_the_recipe_and_checked() -> None:
    dataset = random_dataset((12, 10, 14))
    assert spec_of(dataset, pixel_space="zca", augment="dsa").transform == "zca+dsa"
    with pytest.raises(InputError, match="pixel_space"):
        spec_of(dataset, pixel_space="zka")


def test_snapshots_are_mapped_and_never_put_into_an_object_store(ddray_home: Path) -> None:
    dataset = random_dataset((12, 10, 14))
    spec = spec_of(dataset)
    (entry,) = LocalPool(PoolTrainer(dataset, dataset.train(), CPU)).get([spec])
    path = PoolFiles(ddray_home / "pool").tensors_path(spec.key)
    assert small_arrays(path, "trajectory") == ({}, False)
    assert small_arrays(path)[1]
    before = path.read_bytes()
    entry.tensors["snapshots"].zero_()  # a private map: nobody else sees it
    assert path.read_bytes() == before
    assert str(path) in Path("/proc/self/maps").read_text(encoding="utf-8")
