"""The contract of every pool: the one in files, and the one that a cluster's workers share."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddray.cluster.pool import ClusterPool, PoolAddress, pool_service
from ddray.errors import DivergedError
from ddray.nets import build_net
from ddray.pool.files import TENSORS
from ddray.pool.local import LocalPool
from ddray.pool.spec import ModelPool, PoolSpec, Trainer

Make = Callable[[Trainer], ModelPool]


def spec(seed: int = 0, arch: str = "convnet1_w8_bn") -> PoolSpec:
    return PoolSpec(
        kind="supervised",
        dataset="f" * 8,
        split="train",
        transform="normalized",
        arch=arch,
        recipe={"epochs": 2},
        seed=seed,
        image_shape=(1, 8, 8),
        num_classes=3,
    )


class Counting:
    """Builds networks, counts its calls."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def __call__(self, pool_spec: PoolSpec) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        self.seeds.append(pool_spec.seed)
        net = build_net(pool_spec.arch, pool_spec.image_shape, pool_spec.num_classes, seed=pool_spec.seed + 1)
        weights = {f"weights.{name}": tensor for name, tensor in net.state_dict().items()}
        return {**weights, "features": torch.arange(6.0).view(3, 2).T}, {"final_loss": 0.5}


@pytest.fixture(params=["files", pytest.param("cluster", marks=pytest.mark.ray)])
def make(request: pytest.FixtureRequest, ddray_home: Path) -> Iterator[Make]:
    """Makes pools that share their entries."""
    if request.param == "files":
        yield LocalPool
        return
    request.getfixturevalue("ray_here")
    address = PoolAddress(f"test-{ddray_home.parent.name}", str(ddray_home / "pool"), lease_s=5.0)
    with pool_service(address):
        yield lambda trainer: ClusterPool(trainer, address)


def test_nothing_is_asked_for(make: Make) -> None:
    assert make(Counting()).get([]) == []


def test_what_is_missing_is_trained_once_and_given_in_order(make: Make, ddray_home: Path) -> None:
    trainer = Counting()
    pool = make(trainer)

    entries = pool.get([spec(), spec(1), spec()])
    later = make(trainer).get([spec(1)])
    in_files = LocalPool(trainer).get([spec(), spec(1)])

    assert trainer.seeds == [0, 1]
    assert [entry.meta["spec"]["seed"] for entry in entries] == [0, 1, 0]
    assert [entry.meta for entry in in_files] == [entry.meta for entry in entries[:2]]
    assert later[0].meta == entries[1].meta
    meta = entries[0].meta
    assert (meta["key"], meta["times_trained"], meta["final_loss"]) == (spec().key, 1, 0.5)
    assert meta["wall_s"] > 0
    for entry, other in zip(entries[:2], in_files, strict=True):
        assert entry.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(value, other.tensors[name]) for name, value in entry.tensors.items())
    folders = sorted(path.name for path in (ddray_home / "pool").iterdir() if path.is_dir())
    assert folders == sorted([spec().key, spec(1).key])


def test_an_entry_of_the_files_is_found(make: Make) -> None:
    (entry,) = LocalPool(Counting()).get([spec()])
    trainer = Counting()
    assert make(trainer).get([spec()])[0].meta == entry.meta
    assert trainer.seeds == []


def test_an_entry_gives_its_network(make: Make) -> None:
    (entry,) = make(Counting()).get([spec()])
    expected_net = build_net("convnet1_w8_bn", (1, 8, 8), 3, seed=1).eval()
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(entry.module()(images), expected_net(images))
    assert torch.equal(entry.tensors["features"], torch.tensor([[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]))


def test_writing_to_an_entry_changes_nobody_elses(make: Make) -> None:
    pool = make(Counting())
    first, second = (pool.get([spec()])[0] for _ in range(2))
    for tensor in first.tensors.values():
        tensor.zero_()
    assert second.tensors["features"].sum() == 15
    assert make(Counting()).get([spec()])[0].tensors["features"].sum() == 15


def test_an_error_of_the_trainer_is_the_callers_and_the_next_one_may_try(make: Make) -> None:
    def fail(pool_spec: PoolSpec) -> Any:
        raise DivergedError(f"seed {pool_spec.seed} diverged")

    with pytest.raises(DivergedError, match="seed 0 diverged"):
        make(fail).get([spec()])
    trainer = Counting()
    assert make(trainer).get([spec()])[0].meta["times_trained"] == 1
    assert trainer.seeds == [0]


def test_a_damaged_entry_is_trained_again(make: Make, ddray_home: Path) -> None:
    LocalPool(Counting()).get([spec(), spec(1)])
    path = ddray_home / "pool" / spec().key / TENSORS
    path.write_bytes(path.read_bytes()[:100])
    trainer = Counting()

    entries = make(trainer).get([spec(), spec(1)])

    assert trainer.seeds == [0]
    assert [entry.meta["times_trained"] for entry in entries] == [2, 1]
    assert (ddray_home / "pool" / f"{spec().key}.corrupt-1" / TENSORS).stat().st_size == 100


def test_of_many_clients_one_trains_each_entry(make: Make) -> None:
    trainer, results, errors = Counting(), [], []
    specs = [spec(seed) for seed in range(4)]
    gate = threading.Barrier(5)

    def work() -> None:
        try:
            pool = make(trainer)
            gate.wait()
            results.append(pool.get(specs))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    assert sorted(trainer.seeds) == [0, 1, 2, 3]
    metas = {json.dumps([entry.meta for entry in entries], sort_keys=True) for entries in results}
    assert (len(results), len(metas)) == (5, 1)


def test_an_entry_may_be_trained_from_another(make: Make) -> None:
    """For example features from a teacher: the trainer itself uses the pool."""
    feature_sums: list[int] = []

    def train(pool_spec: PoolSpec) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        if pool_spec.parents:
            feature_sums.append(int(make(train).get([spec()])[0].tensors["features"].sum()))
        return Counting()(pool_spec)

    child = spec(1).model_copy(update={"parents": (spec().key,)})
    make(train).get([child])
    assert feature_sums == [15]


def test_large_tensors_arrive_too(make: Make) -> None:
    """More than 64 MiB: read from the file, while others go through the object store."""
    large = torch.arange(17 * 2**20, dtype=torch.int32)

    def train(pool_spec: PoolSpec) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        return {"large": large, "half": torch.ones(3, dtype=torch.bfloat16), "small": torch.ones(2)}, {}

    (entry,) = make(train).get([spec()])
    assert torch.equal(entry.tensors["large"], large)
    assert torch.equal(entry.tensors["half"], torch.ones(3, dtype=torch.bfloat16))
    assert torch.equal(entry.tensors["small"], torch.ones(2))
