"""Names of the parts of train."""

from __future__ import annotations

import pytest
import torch

from ddray.data import Split, SplitName, carve_val
from ddray.errors import InputError


@pytest.mark.parametrize(("text", "val_seed"), [("train", None), ("train-val0", 0), ("train-val12", 12)])
def test_a_name_is_read_as_it_is_written(text: str, val_seed: int | None) -> None:
    assert str(SplitName(val_seed)) == text
    assert SplitName.parse(text) == SplitName(val_seed)


def test_a_number_of_val_images_is_part_of_the_name() -> None:
    assert str(SplitName(0, 10_000)) == "train-val0-10000"
    assert SplitName.parse("train-val0-10000") == SplitName(0, 10_000) != SplitName(0)
    with pytest.raises(InputError, match="--val-images 10 needs --val-seed"):
        SplitName(None, 10)


def test_a_fifth_of_train_holds_the_tenth_of_its_seed_and_the_same_of_every_class() -> None:
    labels = torch.arange(50) % 5
    train = Split(torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1), labels)
    rest, val = SplitName(3, 10).carve(train)
    _, tenth = SplitName(3).carve(train)
    assert val is not None
    assert tenth is not None
    assert torch.bincount(val.labels).tolist() == [2] * 5
    assert sorted([*rest.images.flatten().tolist(), *val.images.flatten().tolist()]) == list(range(50))
    assert set(tenth.images.flatten().tolist()) < set(val.images.flatten().tolist())
    for number in (50, 60):
        with pytest.raises(InputError, match=rf"--val-images must be in 1\.\.49, got {number}"):
            SplitName(3, number).carve(train)


@pytest.mark.parametrize(
    "text",
    ["test", "train-val", "train-valx", "train-val-1", "xtrain", "train-val0 ", "train-val0-", "train-7"],
)
def test_other_names_are_no_part_of_train(text: str) -> None:
    assert SplitName.parse(text) is None


def test_it_carves_what_the_name_says() -> None:
    train = Split(torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1), torch.arange(40) % 2)
    whole, nothing = SplitName().carve(train)
    assert whole is train
    assert nothing is None
    rest, val = SplitName(3).carve(train)
    expected_rest, expected_val = carve_val(train, seed=3)
    assert val is not None
    assert torch.equal(rest.images, expected_rest.images)
    assert torch.equal(val.images, expected_val.images)
