from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddray.data import Dataset, Split, carve_val
from ddray.errors import InputError


def numbered(labels: list[int]) -> Split:
    """Images whose pixel encodes their position (two bytes)."""
    position = torch.arange(len(labels))
    images = torch.stack([position // 256, position % 256], 1).to(torch.uint8)[:, :, None, None]
    return Split(images, torch.tensor(labels, dtype=torch.long))


def positions(split: Split) -> list[int]:
    images = split.images[:, :, 0, 0].long()
    return (images[:, 0] * 256 + images[:, 1]).tolist()


@settings(deadline=None, max_examples=60)
@given(
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=120),
    seed=st.integers(0, 2**31),
    fraction=st.sampled_from([0.1, 0.2, 0.5, 0.9]),
)
def test_carve_val_is_disjoint_complete_ordered_and_stratified(
    labels: list[int], seed: int, fraction: float
) -> None:
    split = numbered(labels)
    if max(labels.count(label) for label in labels) < 2:
        with pytest.raises(InputError, match="2 images"):
            carve_val(split, seed=seed, fraction=fraction)
        return
    train, val = carve_val(split, seed=seed, fraction=fraction)
    assert sorted(positions(train) + positions(val)) == list(range(len(labels)))
    assert positions(train) == sorted(positions(train))
    assert positions(val) == sorted(positions(val))
    for part in (train, val):
        assert part.labels.tolist() == [labels[position] for position in positions(part)]
    for label in set(labels):
        num, num_val = labels.count(label), int((val.labels == label).sum())
        if num == 1:
            assert num_val == 0
        else:
            assert 1 <= num_val <= num - 1
            assert abs(num_val - num * fraction) <= 1


def test_carve_val_depends_on_the_seed_alone() -> None:
    split = numbered([i % 3 for i in range(90)])
    assert positions(carve_val(split, seed=1)[1]) == positions(carve_val(split, seed=1)[1])
    assert positions(carve_val(split, seed=1)[1]) != positions(carve_val(split, seed=2)[1])
    assert len(carve_val(split, seed=1)[1]) == 9


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_carve_val_refuses_a_fraction_outside_0_to_1(fraction: float) -> None:
    with pytest.raises(InputError, match="fraction"):
        carve_val(numbered([0, 0]), seed=0, fraction=fraction)


def a_dataset(train: Split, test: Split | None = None, names: tuple[str, ...] = ("a", "b")) -> Dataset:
    def broken() -> Split:
        raise InputError("test is broken")

    return Dataset(
        "made",
        names,
        (2, 1, 1),
        (0.5, 0.5),
        (1.0, 1.0),
        True,
        lambda: train,
        broken if test is None else lambda: test,
    )


def test_fingerprint_covers_train_and_names_and_nothing_of_test() -> None:
    train = numbered([0, 1, 0, 1])
    whole = a_dataset(train, numbered([1, 0]))
    broken_test = a_dataset(train)
    assert whole.fingerprint == broken_test.fingerprint
    with pytest.raises(InputError, match="test is broken"):
        broken_test.test()
    other_pixel = Split(train.images + 1, train.labels)
    other_labels = numbered([0, 1, 1, 1])
    others = [a_dataset(other_pixel), a_dataset(other_labels), a_dataset(train, names=("a", "c"))]
    assert len({whole.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_halves_are_read_once() -> None:
    reads: list[str] = []

    def read(half: str) -> Split:
        reads.append(half)
        return numbered([0, 1])

    data = Dataset(
        "made",
        ("a", "b"),
        (2, 1, 1),
        (0.5, 0.5),
        (1.0, 1.0),
        True,
        lambda: read("train"),
        lambda: read("test"),
    )
    assert reads == []
    assert data.train() is data.train()
    assert reads == ["train"]
    assert data.test() is data.test()
    assert reads == ["train", "test"]
    assert data.num_classes == 2


@pytest.mark.parametrize(
    ("train", "words"),
    [
        (numbered([0, 2]), "labels of made must lie in 0..1"),
        (numbered([0, -1]), "got -1"),
        (numbered([0, 0]), "got none of 'b'"),
        (numbered([]), "got none"),
        (Split(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])), "shape"),
    ],
)
def test_a_split_that_does_not_fit_is_refused(train: Split, words: str) -> None:
    with pytest.raises(InputError, match=words):
        a_dataset(train).train()


def test_a_split_needs_a_label_per_image() -> None:
    with pytest.raises(InputError, match=r"labels \[N\]"):
        Split(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0]))


def test_images_whose_channels_come_last_are_refused(toy: Any) -> None:
    with pytest.raises(InputError, match=r"got \(32, 32, 3\) with the channels last; use images\.permute"):
        toy(shape=(32, 32, 3))
    assert toy(shape=(3, 32, 32)).image_shape == (3, 32, 32)
