from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddray.methods.families.selection import (
    herding_order,
    kcenter_order,
    kmeans_order,
    per_class,
    pool_features,
)
from ddray.nets import build_net


def features(num: int, seed: int, dim: int = 3) -> Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def length(v: list[float]) -> float:
    return sum(x * x for x in v) ** 0.5


def between(a: list[float], b: list[float]) -> float:
    return length([x - y for x, y in zip(a, b, strict=True)])


def mean_of(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def greedy(num: int, ipc: int, cost: Callable[[int, list[int]], float], order: list[int]) -> bool:
    """Whether every choice had the least cost of those left (of two equal ones, rounding decides)."""
    for k in range(ipc):
        costs = {i: cost(i, order[:k]) for i in range(num) if i not in order[:k]}
        if order[k] not in costs or costs[order[k]] > min(costs.values()) + 1e-12:
            return False
    return len(order) == ipc


def is_herding(rows: list[list[float]], ipc: int, order: list[int]) -> bool:
    """Each image keeps the mean of those selected so far nearest to the mean of all."""
    return greedy(
        len(rows),
        ipc,
        lambda i, selected: between(mean_of([rows[j] for j in (*selected, i)]), mean_of(rows)),
        order,
    )


def is_kcenter(rows: list[list[float]], ipc: int, order: list[int]) -> bool:
    """The first is the nearest to the mean, each other the farthest from its nearest selected one."""

    def cost(i: int, selected: list[int]) -> float:
        if not selected:
            return between(rows[i], mean_of(rows))
        return -min(between(rows[i], rows[j]) for j in selected)

    return greedy(len(rows), ipc, cost, order)


@settings(max_examples=60)
@given(num=st.integers(1, 12), seed=st.integers(0, 2**32), data=st.data())
def test_herding_keeps_the_running_mean_nearest_to_the_class_mean(num: int, seed: int, data: Any) -> None:
    ipc = data.draw(st.integers(1, num))
    samples = features(num, seed)

    assert is_herding(samples.tolist(), ipc, herding_order(samples, ipc).tolist())


@settings(max_examples=60)
@given(num=st.integers(1, 12), seed=st.integers(0, 2**32), data=st.data())
def test_kcenter_starts_at_the_mean_and_goes_farthest_first(num: int, seed: int, data: Any) -> None:
    ipc = data.draw(st.integers(1, num))
    samples = features(num, seed)

    assert is_kcenter(samples.tolist(), ipc, kcenter_order(samples, ipc).tolist())


def test_equal_features_still_give_distinct_images() -> None:
    samples = torch.ones(5, 3)

    assert sorted(herding_order(samples, 5).tolist()) == [0, 1, 2, 3, 4]
    assert sorted(kcenter_order(samples, 5).tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("seed", range(4))
def test_kmeans_takes_the_real_image_nearest_to_each_clusters_mean(seed: int) -> None:
    """Three clusters too far apart to be confused; the nearest sample to each mean is found by a loop."""
    centres = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0]], dtype=torch.float64)
    samples = torch.cat([centre + features(5, 10 * seed + i, dim=2) for i, centre in enumerate(centres)])

    order = kmeans_order(samples, 3, seed=seed)

    expected = []
    for cluster in range(3):
        rows = samples[5 * cluster : 5 * cluster + 5].tolist()
        mean = [sum(column) / 5 for column in zip(*rows, strict=True)]
        distances = [length([a - b for a, b in zip(row, mean, strict=True)]) for row in rows]
        expected.append(5 * cluster + distances.index(min(distances)))
    assert sorted(order.tolist()) == expected


def test_kmeans_never_takes_an_image_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two centroids can share their nearest sample: the second takes the next one."""
    samples = torch.tensor([[0.0], [10.0], [11.0], [30.0]])
    import sklearn.cluster

    class Fixed:
        def __init__(self, **kwargs: Any) -> None:
            self.cluster_centers_ = torch.tensor([[9.0], [10.2], [29.0]]).numpy()

        def fit(self, rows: Any) -> Fixed:
            return self

    monkeypatch.setattr(sklearn.cluster, "KMeans", Fixed)
    assert kmeans_order(samples, 3, seed=0).tolist() == [1, 2, 3]


def test_per_class_picks_among_each_classs_own_members() -> None:
    labels = torch.tensor([1, 0, 2, 1, 0, 2, 2])

    indices = per_class(labels, 3, 2, lambda rows: torch.arange(len(rows)).flip(0))

    assert indices.tolist() == [4, 1, 3, 0, 6, 5]


def test_kcenter_indices_are_each_classs_own_kcenter() -> None:
    samples, labels = features(12, 0), torch.tensor([0, 1, 2] * 4)

    indices = per_class(labels, 3, 2, lambda rows: kcenter_order(samples[rows], 2)).view(3, 2)

    for label in range(3):
        assert labels[indices[label]].tolist() == [label, label]
        assert is_kcenter(samples[label::3].tolist(), 2, (indices[label] // 3).tolist())


def test_class_mean_is_the_mean_of_the_encoded_images(toy: Any, planned: Any) -> None:
    dataset = toy()
    _, ctx, method = planned("class_mean", dataset)
    method.setup(ctx)
    distilled = method.snapshot()

    split = dataset.train()
    assert distilled.labels.tolist() == [0, 1, 2]
    for label in range(3):
        total, count = torch.zeros(3, 16, 16, dtype=torch.float64), 0
        for image, image_label in zip(split.images, split.labels.tolist(), strict=True):
            if image_label != label:
                continue
            for channel in range(3):
                pixels = image[channel].double() / 255
                total[channel] += (pixels - dataset.mean[channel]) / dataset.std[channel]
            count += 1
        torch.testing.assert_close(distilled.images[label].double(), total / count, rtol=1e-5, atol=1e-6)


def test_class_mean_at_more_per_class_splits_the_class_into_disjoint_parts(toy: Any, planned: Any) -> None:
    """Weighted with the parts' sizes, the means of the parts are the mean of the class."""
    dataset = toy(counts=(8, 4))
    _, ctx, one = planned("class_mean", dataset)
    one.setup(ctx)
    _, ctx, two = planned("class_mean", dataset, ipc=4)
    two.setup(ctx)

    whole, parts = one.snapshot(), two.snapshot()

    assert parts.labels.tolist() == [0] * 4 + [1] * 4
    torch.testing.assert_close(parts.images.view(2, 4, 3, 16, 16).mean(1), whole.images, rtol=1e-5, atol=1e-6)
    singles = ctx.space.encode(ctx.split.images[ctx.split.labels == 1])  # parts of one image each
    for single in singles:
        assert min(float((single - part).abs().max()) for part in parts.images[4:]) < 1e-6


@pytest.mark.parametrize("method", ["random", "herding", "kcenter", "kmeans"])
def test_coresets_are_real_images_of_their_class_without_repetition(
    method: str, toy: Any, planned: Any
) -> None:
    dataset = toy()
    layers = {} if method == "random" else {"method": {"feature_epochs": 1}}
    _, ctx, distiller = planned(method, dataset, ipc=3, **layers)
    distiller.setup(ctx)
    distilled = distiller.snapshot()

    assert distilled.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    real = ctx.space.encode(ctx.split.images)
    matches = [[i for i in range(len(real)) if torch.equal(real[i], image)] for image in distilled.images]
    assert all(len(positions) == 1 for positions in matches)
    indices = [positions[0] for positions in matches]
    assert len(set(indices)) == 9
    assert torch.equal(ctx.split.labels[indices], distilled.labels)


def test_features_are_the_pool_networks_embedding_in_eval_mode(
    toy: Any, planned: Any, ddray_home: Path
) -> None:
    dataset = toy()
    _, ctx, _ = planned("herding", dataset, arch="convnet1_w8_bn")
    actual = pool_features(ctx, epochs=2)

    from safetensors.torch import load_file

    stored: dict[str, dict[str, torch.Tensor]] = {}
    for entry in (ddray_home / "pool").glob("*/entry.json"):
        stored[json.loads(entry.read_text())["spec"]["kind"]] = load_file(
            entry.with_name("tensors.safetensors")
        )
    assert stored.keys() == {"supervised", "features"}
    assert torch.equal(stored["features"]["features"], actual)
    net = build_net("convnet1_w8_bn", (3, 16, 16), 3, seed=5)
    net.load_state_dict({k.removeprefix("weights."): v for k, v in stored["supervised"].items()})
    with torch.no_grad():
        expected = torch.cat([net.eval().embed(ctx.space.encode(image[None])) for image in ctx.split.images])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(pool_features(ctx, epochs=2), actual)
    assert not torch.equal(pool_features(ctx, epochs=1), actual)
