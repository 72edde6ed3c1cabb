"""Names of the parts of train."""

from __future__ import annotations

import pytest
import torch

from ddray.data import Split, SplitName, carve_val


@pytest.mark.parametrize(("text", "val_seed"), [("train", None), ("train-val0", 0), ("train-val12", 12)])
def test_a_name_is_read_as_it_is_written(text: str, val_seed: int | None) -> None:
    assert str(SplitName(val_seed)) == text
    assert SplitName.parse(text) == SplitName(val_seed)


@pytest.mark.parametrize("text", ["test", "train-val", "train-valx", "train-val-1", "xtrain", "train-val0 "])
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
