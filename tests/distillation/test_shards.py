from __future__ import annotations

from itertools import chain

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from ddray.distillation.shards import Part, Shard, parts_of, shard_classes


@hypothesis.given(st.integers(1, 60), st.integers(1, 60))
def test_shards_are_contiguous_and_differ_by_at_most_one_class(num_classes: int, num_shards: int) -> None:
    num_shards = min(num_shards, num_classes)
    shards = shard_classes(num_classes, num_shards)

    assert list(chain(*shards)) == list(range(num_classes))
    sizes = [len(classes) for classes in shards]
    assert len(sizes) == num_shards
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


def test_a_shard_knows_where_its_images_are() -> None:
    shard = Shard(range(1, 3), torch.tensor([2, 0, 1, 1, 3, 2]))

    assert shard.rows.tolist() == [0, 2, 3, 5]
    assert len(shard.whole) == 6


def test_parts_are_what_a_shard_has_of_each_pass() -> None:
    passes = [slice(0, 4), slice(4, 8), slice(8, 9)]

    exact = list(parts_of(passes, slice(3, 9), exact=True))
    loose = list(parts_of(passes, slice(3, 9), exact=False))

    assert exact == [
        Part(slice(0, 4), slice(0, 1), before=3),
        Part(slice(4, 8), slice(1, 5)),
        Part(slice(8, 9), slice(5, 6)),
    ]
    assert loose == [
        Part(slice(0, 4), slice(0, 1), after=1),  # no single sample where the unsharded run has several
        Part(slice(4, 8), slice(1, 5)),
        Part(slice(8, 9), slice(5, 6)),
    ]


@pytest.mark.parametrize("exact", [True, False])
def test_the_unsharded_run_has_no_blanks(exact: bool) -> None:
    passes = [slice(0, 1), slice(1, 6)]
    parts = list(parts_of(passes, slice(0, 6), exact=exact))

    assert [part.here for part in parts] == passes
    assert not any(part.is_padded for part in parts)
    samples = torch.rand(5, 2)
    assert parts[1].padded(samples) is samples
    assert parts[1].without_blanks(samples) is samples


def test_blanks_are_around_the_samples_and_their_values_are_dropped() -> None:
    part = Part(slice(0, 6), slice(0, 2), before=3, after=1)
    samples = torch.rand(2, 3)

    padded = part.padded(samples)

    assert padded.shape == (6, 3)
    assert torch.equal(padded[3:5], samples)
    assert float(padded.sum()) == pytest.approx(float(samples.sum()))
    assert torch.equal(part.without_blanks(padded), samples)
