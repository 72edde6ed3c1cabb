"""Draws whose cost is the batch's: no position twice, every set of positions equally often."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddray.methods.families.matching import batches, idm
from ddray.methods.families.matching.batches import ClassBatches
from ddray.methods.families.matching.draws import distinct
from ddray.seeding import derive


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    num=st.integers(1, 60),
    seed=st.integers(0, 2**32),
)
def test_every_row_has_as_many_different_positions_as_are_drawn(
    lengths: list[int], num: int, seed: int
) -> None:
    num = min(num, *lengths)
    drawn = distinct(torch.tensor(lengths), num, derive(seed, "test"))

    assert drawn.shape == (len(lengths), num)
    for length, row in zip(lengths, drawn.tolist(), strict=True):
        assert len(set(row)) == num
        assert 0 <= min(row) <= max(row) < length
    assert torch.equal(drawn, distinct(torch.tensor(lengths), num, derive(seed, "test")))


def test_every_order_of_positions_is_drawn_equally_often() -> None:
    """20,000 draws of 2 of 4: 12 outcomes, chi-squared of 11 degrees of freedom below its 99.9 % point."""
    drawn = distinct(torch.full((20_000,), 4), 2, derive(0, "test"))

    counts = Counter(map(tuple, drawn.tolist()))

    assert set(counts) == set(itertools.permutations(range(4), 2))
    expected = 20_000 / 12
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 31.3


def test_the_last_of_millions_can_be_drawn() -> None:
    """A float32 has too few digits for them: all would be even."""
    drawn = distinct(torch.tensor([2**25]), 5000, derive(1, "test"))
    assert int(drawn.max()) > 2**25 - 2**16
    assert float((drawn % 2).float().mean()) == pytest.approx(0.5, abs=0.03)


def test_classes_of_a_large_dataset_are_drawn_so(
    toy: Any, planned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unequal classes, and a tail whose images are drawn several times."""
    monkeypatch.setattr(batches, "MANY_IMAGES", 1)
    _, ctx, _ = planned("random", toy(counts=(9, 3, 7), shape=(1, 4, 4)), ipc=5, arch="convnet1_w8")
    large_batches, seen = ClassBatches(ctx, 64), torch.zeros(19)

    for step in range(300):
        index = large_batches.draw(derive(step, "test"))
        assert ctx.split.labels[index].tolist() == [0] * 7 + [1] * 7 + [2] * 7
        counts = torch.bincount(index, minlength=19)
        assert set(counts[ctx.split.labels == 1].tolist()) <= {1, 2, 3}
        assert counts[ctx.split.labels != 1].max() == 1
        seen += counts
    assert float(seen[ctx.split.labels == 1].min()) > 650, "700 expected of each"
    large = seen[ctx.split.labels == 0]
    assert 190 < float(large.min()) <= float(large.max()) < 275, "233 expected of each, std 7"


def test_idm_trains_its_queue_on_such_draws(toy: Any, planned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idm, "MANY_IMAGES", 1)
    settings = {"batch_real": 4, "net_steps": 2, "batch_train": 6}
    _, ctx, distiller = planned("idm", toy(), steps=1, method=settings)
    distiller.setup(ctx)
    batch = distiller._engine._real_batch(derive(0, "test"))

    assert len(set(batch.tolist())) == 6
    assert max(batch.tolist()) < len(ctx.split)
    assert float(distiller.step()["loss"]) > 0
    settings["batch_train"] = 1000
    _, ctx, distiller = planned("idm", toy(), steps=1, method=settings)
    distiller.setup(ctx)
    assert sorted(distiller._engine._real_batch(derive(0, "test")).tolist()) == list(range(len(ctx.split)))
