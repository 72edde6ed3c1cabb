from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ddray.artifact.distilled_set import TrainSet
from ddray.data import normalized_space
from ddray.errors import InputError
from ddray.evaluation.subsets import class_ranks, limited, random_subset
from ddray.seeding import derive


def a_set(counts: list[int]) -> TrainSet:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=derive(9))]
    return TrainSet(torch.arange(len(labels)).float().view(-1, 1, 1, 1), labels)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any), st.integers(0, 5))
def test_ranks_number_every_class_from_0(counts: list[int], seed: int) -> None:
    labels = a_set(counts).labels
    ranks = class_ranks(labels, derive(seed))
    for label, count in enumerate(counts):
        assert sorted(ranks[labels == label].tolist()) == list(range(count))


def test_ranks_are_a_random_order() -> None:
    labels = torch.zeros(3, dtype=torch.int64)
    orders = {tuple(class_ranks(labels, derive(seed)).tolist()) for seed in range(60)}
    assert len(orders) == 6
    assert torch.equal(class_ranks(labels, derive(1)), class_ranks(labels, derive(1)))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 30), st.integers(0, 3))
@example([1, 1, 1, 1, 3], 5, 0)
def test_a_limited_set_takes_every_class_by_its_share(counts: list[int], limit: int, seed: int) -> None:
    whole = a_set(counts)
    subset = limited(whole, limit, derive(seed))

    assert len(subset.labels) == min(limit, sum(counts))
    index = subset.images.flatten().long()
    assert bool((index[1:] > index[:-1]).all())  # the order is kept, nothing twice
    assert torch.equal(whole.labels[index], subset.labels)
    share = min(1.0, limit / sum(counts))
    for label, count in enumerate(counts):
        assert abs(int((subset.labels == label).sum()) - share * count) < 1.0


def test_the_draw_depends_on_the_seed_alone() -> None:
    whole = a_set([5, 5, 5])
    drawn = [limited(whole, 7, derive(seed)).images.flatten().tolist() for seed in range(8)]
    assert drawn[0] == limited(whole, 7, derive(0)).images.flatten().tolist()
    assert len({tuple(one) for one in drawn}) > 4
    below = {tuple(limited(whole, 2, derive(seed)).labels.unique().tolist()) for seed in range(30)}
    assert below == {(0, 1), (0, 2), (1, 2)}  # not always the first classes


def test_a_limit_below_1_is_refused() -> None:
    with pytest.raises(InputError, match="--train-limit must be >= 1, got 0"):
        limited(a_set([2]), 0, derive(0))


def test_random_subset_has_so_many_real_images_of_every_class(toy: Any) -> None:
    dataset = toy(counts=(9, 2, 8))
    space = normalized_space(dataset)
    subset = random_subset(dataset.train(), 4, space, derive(0))

    assert torch.bincount(subset.labels).tolist() == [4, 2, 4]
    real = space.encode(dataset.train().images)
    for image, label in zip(subset.images, subset.labels, strict=True):
        same = (real == image).flatten(1).all(1)
        assert dataset.train().labels[same].tolist() == [int(label)]
    other = random_subset(dataset.train(), 4, space, derive(1))
    assert not torch.equal(subset.images, other.images)
