from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ddray.data import open_dataset
from ddray.data.reference import DatasetRef
from ddray.errors import InputError
from tests.data.data_files import random_images, write_idx, write_png


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("cifar10", {}),
        ("cifar10?image_size=64", {"image_size": 64}),
        ("/a/b?can_flip=false&label_column=a%26b+c", {"can_flip": False, "label_column": "a&b c"}),
        ("x?clip_offset=0.5&clip_seconds=2.0", {"clip_offset": 0.5, "clip_seconds": 2.0}),
    ],
)
def test_a_reference_is_read_and_written(text: str, options: dict[str, Any]) -> None:
    reference = DatasetRef.parse(text)
    assert reference.base == text.partition("?")[0]
    assert reference.content() == options
    assert str(reference) == text
    assert str(DatasetRef.parse(reference.base).with_options(**options)) == text


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("imagenet224", "imagenet?image_size=224"),
        ("imagenet224?can_flip=false", "imagenet?can_flip=false&image_size=224"),
        ("imagenet224?image_size=96", "imagenet?image_size=96"),
    ],
)
def test_imagenet_has_a_name_for_the_size_that_most_papers_take(text: str, name: str) -> None:
    assert str(DatasetRef.parse(text)) == name
    assert str(DatasetRef.parse(text).absolute()) == name


def test_options_are_sorted_and_the_later_ones_win() -> None:
    reference = DatasetRef.parse("mnist?label_column=x&image_size=64").with_options(
        image_size=32, can_flip=None
    )
    assert str(reference) == "mnist?image_size=32&label_column=x"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mnist?imag_size=64", "imag_size.*did you mean 'image_size'"),
        ("mnist?image_size=0", "image_size.*greater than or equal to 1"),
        ("mnist?image_size", "name=value"),
        ("mnist?image_size=3&image_size=4", "distinct"),
        ("mnist?base=cifar10", "distinct name=value"),
        ("mnist?can_flip=perhaps", "can_flip.*boolean"),
    ],
)
def test_bad_options_are_refused(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        DatasetRef.parse(text)


def a_folder(root: Path) -> Path:
    for label, name in enumerate(("a", "b")):
        for half in ("train", "test"):
            for index, image in enumerate(random_images(2, (1, 8, 8), seed=label)):
                write_png(root / half / name / f"{index}.png", image)
    return root


def test_a_folder_whose_name_looks_like_options_is_a_folder(tmp_path: Path) -> None:
    root = a_folder(tmp_path / "odd?image_size=16")
    data = open_dataset(str(root))
    assert (data.name, data.base, data.image_shape) == (str(root), str(root), (1, 8, 8))
    larger = open_dataset(data.name, image_size=32)
    assert larger.name == f"{root}?image_size=32"
    assert open_dataset(larger.name).image_shape == (1, 32, 32)


def test_a_name_reopens_the_same_content(tmp_path: Path) -> None:
    data = open_dataset(str(a_folder(tmp_path / "x")), image_size=16, can_flip=False)
    assert data.name == f"{tmp_path / 'x'}?can_flip=false&image_size=16"
    again = open_dataset(data.name)
    assert again.fingerprint == data.fingerprint
    assert not again.can_flip
    assert again.train().images.shape == again.test().images.shape == (4, 1, 16, 16)


def test_a_relative_folder_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_folder(tmp_path / "x")
    monkeypatch.chdir(tmp_path)
    assert open_dataset("x?can_flip=false").name == f"{tmp_path / 'x'}?can_flip=false"


def test_named_datasets_take_a_size(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = random_images(20, (1, 28, 28))
    for part in ("train", "t10k"):
        write_idx(tmp_path, "MNIST", part, images, [i % 10 for i in range(20)])
    data = open_dataset("mnist?image_size=14", data_dir=tmp_path)
    assert (data.image_shape, data.mean, data.base) == ((1, 14, 14), (0.1307,), "mnist")
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(images).float(), size=14, mode="bilinear", antialias=True
    )
    torch.testing.assert_close(data.train().images.float(), resized.round(), rtol=0, atol=1)
    assert caplog.messages == ["20 images of MNIST are resized to 14x14"]
    caplog.clear()
    monkeypatch.delattr("ddray.data.vision._read")  # resized once
    again = open_dataset("mnist?image_size=14", data_dir=tmp_path)
    assert torch.equal(again.train().images, data.train().images)
    assert caplog.messages == ["20 images of MNIST are resized to 14x14"]
    assert "digits" not in caplog.text
    digits = open_dataset("digits", image_size=32)
    assert "1797 images of digits are resized from 8x8 to 32x32, not to 16x16" in caplog.messages
    assert digits.train().images.shape[1:] == digits.image_shape == (1, 32, 32)


def test_options_that_no_file_of_the_dataset_has_are_refused(tmp_path: Path) -> None:
    root = str(a_folder(tmp_path / "x"))
    for options in ({"label_column": "label"}, {"clip_seconds": 2.0}, {"clip_offset": 0.0}):
        with pytest.raises(InputError, match=f"{next(iter(options))} must be left out"):
            open_dataset(root, **options)
        with pytest.raises(InputError, match="must be left out for digits"):
            open_dataset("digits", **options)
    with pytest.raises(InputError, match=r"unknown option '--image-siz'.*did you mean"):
        open_dataset(root, image_siz=3)


def test_an_open_dataset_can_only_be_told_whether_it_flips() -> None:
    digits = open_dataset("digits")
    flipped = digits.with_options(can_flip=True)
    assert (flipped.name, flipped.can_flip, digits.can_flip) == ("digits?can_flip=true", True, False)
    assert flipped.fingerprint == digits.fingerprint
    assert digits.with_options(can_flip=None) is digits
    with pytest.raises(InputError, match=r"image_size.*open_dataset\(\.\.\., image_size=9\)"):
        digits.with_options(image_size=9)
