"""`pool train --kind trajectory --num-workers` on a local Ray: several at a time, the same entries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ddray.cluster.pool import ClusterPool, PoolAddress, pool_service
from ddray.cluster.pretrain import train_experts
from ddray.errors import DivergedError
from ddray.jobs import pool_training
from ddray.jobs.options import PoolOptions
from ddray.jobs.pool_training import expert_specs
from ddray.pool.local import LocalPool
from ddray.pool.spec import PoolSpec

CPU = torch.device("cpu")
BASE: dict[str, Any] = {"kind": "trajectory", "arch": "convnet1_w8", "gpus_per_worker": 0, "num_models": 2}
RECIPE: dict[str, Any] = {"epochs": 2, "batch": 128}


def never(spec: PoolSpec) -> Any:
    raise AssertionError("trained twice")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
class TestOnRay:
    def test_the_entries_are_those_of_one_process(self, digits: Any, tmp_path: Path) -> None:
        result = train_experts(digits, PoolOptions(**BASE, num_workers=2, out=tmp_path / "two"), RECIPE)
        settings: dict[str, Any] = {"arch": "convnet1_w8", "recipe": RECIPE, "seed": 0, "num_models": 2}
        here = pool_training.train_experts(digits, **settings, device=CPU, folder=tmp_path / "one")
        assert result.keys == here.keys
        specs = expert_specs(digits, **settings, device="cpu")
        pairs = zip(*(LocalPool(never, tmp_path / name).get(specs) for name in ("two", "one")), strict=True)
        for one, other in pairs:
            assert torch.equal(one.tensors["snapshots"], other.tensors["snapshots"])
            assert one.meta["times_trained"] == 1
        again = train_experts(digits, PoolOptions(**BASE, num_workers=2, out=tmp_path / "two"), RECIPE)
        assert again == result

    def test_an_expert_that_diverges_ends_the_command(self, digits: Any, tmp_path: Path) -> None:
        options = PoolOptions(**BASE, num_workers=2, out=tmp_path)
        with pytest.raises(DivergedError, match=r"an expert .* diverged in epoch 1"):
            train_experts(digits, options, {**RECIPE, "lr": 1e30})

    def test_a_searchs_service_leaves_snapshots_in_their_file(self, digits: Any, tmp_path: Path) -> None:
        settings: dict[str, Any] = {"arch": "convnet1_w8", "recipe": RECIPE, "seed": 0, "num_models": 1}
        pool_training.train_experts(digits, **settings, device=CPU, folder=tmp_path / "pool")
        specs = expert_specs(digits, **settings, device="cpu")
        address = PoolAddress(f"experts-{tmp_path.name}", str(tmp_path / "pool"))
        with pool_service(address):
            pool = ClusterPool(never, address)
            (entry,) = pool.get(specs)
            served = pool._call("ask", specs[0].key)
            assert pool._fetch(served.arrays) == {}
            assert not served.is_whole
        (local,) = LocalPool(never, tmp_path / "pool").get(specs)
        assert torch.equal(entry.tensors["snapshots"], local.tensors["snapshots"])
