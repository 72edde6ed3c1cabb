from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ddray.data import Dataset, Split, carve_val, search_rows
from ddray.errors import DivergedError, InputError
from ddray.jobs import trainers as pool_training
from ddray.jobs.context import declared_specs, make_context
from ddray.jobs.plan import resolve
from ddray.jobs.trainers import PoolTrainer
from ddray.nets import build_net
from ddray.pool.local import LocalPool
from ddray.pool.spec import FEATURES, PoolSpec, features_spec, supervised_specs
from ddray.seeding import derive, derive_seed

CPU = torch.device("cpu")


def pool_spec(dataset: Dataset, split: str = "train", seed: int = 3, **recipe: Any) -> PoolSpec:
    recipe = {"epochs": 2, "batch": 7, **recipe}
    (spec,) = supervised_specs(
        dataset, split=split, arch="convnet2_w8", device="cpu", recipe=recipe, seed=seed, num=1
    )
    return spec


def flat(tensors: Any) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def same(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_is_plain_sgd_on_the_normalized_images(toy: Any) -> None:
    """Compared with an explicit loop: SGD .01, momentum .9, weight decay 5e-4, a fresh order each epoch."""
    dataset = toy()
    split = dataset.train()
    seed = derive_seed(3, "pool", "supervised")
    net = build_net("convnet2_w8", dataset.image_shape, 3, seed=seed)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (dataset.mean, dataset.std))
    images = (split.images.float() / 255 - mean) / std
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    order = derive(seed, "order")
    for _ in range(2):
        total = 0.0
        for index in torch.split(torch.randperm(len(split), generator=order), 7):
            loss = F.cross_entropy(net(images[index]), split.labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(index)

    tensors, measured = PoolTrainer(dataset, split, CPU)(pool_spec(dataset))

    peak = measured["peak_memory_bytes"]
    final = pytest.approx(total / len(split), rel=1e-4)
    assert measured == {"final_loss": final, "dataset_name": "toy", "peak_memory_bytes": peak}
    assert peak > 0
    for name, value in net.state_dict().items():
        torch.testing.assert_close(tensors[f"weights.{name}"], value, rtol=1e-3, atol=1e-5)
    assert {name.partition(".")[0] for name in tensors} == {"weights"}, "features are entries of their own"
    (entry,) = LocalPool(PoolTrainer(dataset, split, CPU)).get([features_spec(pool_spec(dataset))])
    with torch.no_grad():
        torch.testing.assert_close(entry.tensors["features"], net.embed(images), rtol=1e-3, atol=1e-4)
    assert entry.tensors.keys() == {"features"}


def test_a_large_split_is_encoded_by_the_batch(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = toy()
    trainer = PoolTrainer(dataset, dataset.train(), CPU)
    whole, _ = trainer(pool_spec(dataset))
    monkeypatch.setattr(pool_training, "_MAX_ENCODED", 0)
    sizes = []
    train = pool_training.train

    def look(net: Any, images: Any, *rest: Any, **options: Any) -> float:
        sizes.append(images.element_size())
        return float(train(net, images, *rest, **options))

    monkeypatch.setattr(pool_training, "train", look)
    by_batch, _ = trainer(pool_spec(dataset))

    assert sizes == [1]  # bytes
    for name, value in whole.items():
        torch.testing.assert_close(by_batch[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("limit", [0, 2**40])
def test_the_recipe_decides(limit: int, toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_training, "_MAX_ENCODED", limit)
    dataset = toy()
    trainer = PoolTrainer(dataset, dataset.train(), CPU)
    changes: list[dict[str, Any]] = [
        {},
        {"augment": "dsa_idc"},
        {"augment": "dsa_idc", "strategy": "crop"},
        {"cutmix": 1.0},
        {"schedule": "cosine"},
        {"lr": 0.1},
    ]

    weights = [flat(trainer(pool_spec(dataset, **change))[0]) for change in changes]

    assert len({tuple(each.tolist()) for each in weights}) == len(changes)
    assert torch.equal(weights[1], flat(trainer(pool_spec(dataset, **changes[1]))[0]))


def test_a_split_is_the_same_images_for_whoever_trains(toy: Any) -> None:
    """A search distils part of train, its final run all of it; they share networks."""
    dataset = toy(counts=(20, 20, 20))
    part, val = carve_val(dataset.train(), seed=0)
    searching, final = (PoolTrainer(dataset, split, CPU) for split in (part, dataset.train()))

    a, b = (trainer(pool_spec(dataset))[0] for trainer in (searching, final))
    c, d = (trainer(pool_spec(dataset, split="train-val0"))[0] for trainer in (searching, final))

    assert same(a, b)
    assert same(c, d)
    assert not same(a, c)
    alone = PoolTrainer(dataset, part, CPU)(pool_spec(dataset, split="part"))[0]
    assert same(c, alone), "val is never trained on"
    of_all, of_part = (
        final(features_spec(pool_spec(dataset, split=name)))[0]["features"]
        for name in ("train", "train-val0")
    )
    assert len(of_all) == len(of_part) == 60
    seen = searching(features_spec(pool_spec(dataset, split="part")))[0]["features"]
    assert torch.equal(of_part[: len(part)], seen)
    rows = search_rows(dataset.train(), seed=0)
    joined = torch.cat([part.images, val.images])
    assert torch.equal(joined[rows], dataset.train().images), "features of val come last"


def test_spectrograms_are_not_augmented(toy: Any) -> None:
    images = toy(shape=(1, 16, 16)).train()
    sound = Split(images.images.float() / 255, images.labels)
    dataset = Dataset(
        "sound", ("a", "b", "c"), (1, 16, 16), (0.5,), (0.3,), False, lambda: sound, lambda: sound
    )
    trainer = PoolTrainer(dataset, sound, CPU)

    assert same(trainer(pool_spec(dataset))[0], trainer(pool_spec(dataset, augment="dsa_idc", cutmix=0.5))[0])


def test_what_cannot_be_trained_is_refused(toy: Any) -> None:
    dataset = toy()
    trainer = PoolTrainer(dataset, dataset.train(), CPU)

    with pytest.raises(
        InputError, match=r"kind of pool entry must be one of .*supervised.*, got 'supervise'"
    ):
        trainer(pool_spec(dataset).model_copy(update={"kind": "supervise"}))
    with pytest.raises(InputError, match=r"unknown option 'recipe.epoch'; did you mean 'epochs'"):
        trainer(pool_spec(dataset, epoch=3))
    with pytest.raises(DivergedError, match=r"training convnet2_w8 for the pool diverged: .*lower lr"):
        trainer(pool_spec(dataset, lr=1e30))


def test_only_selections_made_in_features_declare_their_network(toy: Any, ddray_home: Path) -> None:
    dataset = toy()
    for method, epochs in {"herding": 20, "kcenter": 20, "kmeans": 20, "random": None, "dm": None}.items():
        plan = resolve(method, dataset, ipc=1, seed=4, layers=[{"arch": "convnet1_w8"}])
        ctx = make_context(plan, dataset.train(), split_name="train", device=CPU)

        specs = declared_specs(plan, ctx)

        if epochs is None:
            assert specs == []
            continue
        (features,) = specs
        spec = PoolSpec.parse(features.recipe["network"])
        assert (features.kind, features.parents) == (FEATURES, (spec.key,))
        assert (spec.seed, spec.split, spec.recipe["epochs"], spec.arch) == (4, "train", 20, "convnet1_w8")


def test_what_a_selection_declares_is_what_it_asks_for(toy: Any, planned: Any, ddray_home: Path) -> None:
    dataset = toy()
    plan, ctx, distiller = planned("kcenter", dataset, method={"feature_epochs": 1})
    (spec,) = declared_specs(plan, ctx)
    (entry,) = LocalPool(PoolTrainer(dataset, dataset.train(), CPU)).get([spec])
    assert entry.tensors["features"].shape[0] == len(dataset.train())

    def never(undeclared: PoolSpec) -> Any:
        raise AssertionError(f"{undeclared} was not declared")

    object.__setattr__(ctx, "pool", LocalPool(never))
    distiller.setup(ctx)
    assert len(distiller.snapshot().labels) == 3


def test_a_pool_may_be_given(toy: Any) -> None:
    dataset = toy()
    plan = resolve("random", dataset, ipc=1)
    pool = LocalPool(lambda spec: ({}, {}))
    assert make_context(plan, dataset.train(), split_name="train", device=CPU, pool=pool).pool is pool


def test_an_entry_of_another_kind_of_device_is_not_trained(toy: Any) -> None:
    """Its key would name a device that it was not computed on."""
    dataset = toy()
    spec = pool_spec(dataset).model_copy(update={"device": "cuda"})
    with pytest.raises(InputError, match="must be trained on cuda, this process computes on cpu"):
        PoolTrainer(dataset, dataset.train(), CPU)(spec)
