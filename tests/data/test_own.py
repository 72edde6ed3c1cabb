"""Tensors, arrays and torch Datasets: stored by content, read back as they were given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset, Subset, TensorDataset

import ddray
from ddray.data import open_dataset
from ddray.data.own import store
from ddray.errors import InputError
from tests.data.data_files import as_pil, random_images

BYTES = torch.from_numpy(random_images(30, (3, 8, 8)))
LABELS = torch.arange(30) % 3


class Listed(TorchDataset[Any]):
    """Items as they are."""

    def __init__(self, items: list[Any], classes: list[str] | None = None) -> None:
        self.items = items
        if classes:
            self.classes = classes

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class Endless(TorchDataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return BYTES[0], 0


class Streamed(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from zip(BYTES, LABELS, strict=True)


def pictures() -> list[Any]:
    return [(as_pil(image.numpy()), int(label)) for image, label in zip(BYTES, LABELS, strict=True)]


@pytest.mark.parametrize(
    "data",
    [
        (BYTES, LABELS),
        (BYTES / 255, LABELS),
        ((BYTES / 255).half(), LABELS.tolist()),
        (BYTES.permute(0, 2, 3, 1).numpy(), LABELS.numpy()),
        (BYTES.numpy(), LABELS),
        TensorDataset(BYTES / 255, LABELS),
        Streamed(),
        Listed(pictures()),
        Listed([(image / 255, label) for image, label in zip(BYTES, LABELS, strict=True)]),
        Listed(
            [(image.permute(1, 2, 0).numpy(), int(label)) for image, label in zip(BYTES, LABELS, strict=True)]
        ),
        Subset(TensorDataset(BYTES, LABELS), range(30)),
    ],
)
def test_every_form_is_the_same_dataset(data: Any, caplog: pytest.LogCaptureFixture) -> None:
    file = store(data, data)
    assert file == store((BYTES, LABELS), (BYTES, LABELS))
    opened = open_dataset(str(file))
    assert opened.class_names == ("0", "1", "2")
    for split in (opened.train(), opened.test()):
        assert torch.equal(split.images, BYTES)
        assert torch.equal(split.labels, LABELS)
    assert not caplog.messages


def test_labels_of_items_may_be_one_hot() -> None:
    one_hot = Listed([(image, torch.eye(3)[label]) for image, label in zip(BYTES, LABELS, strict=True)])
    assert store(one_hot) == store((BYTES, LABELS))


def test_without_test_a_stratified_fifth_is_test() -> None:
    opened = open_dataset(str(store((BYTES, LABELS))))
    assert torch.bincount(opened.train().labels).tolist() == [8, 8, 8]
    assert torch.bincount(opened.test().labels).tolist() == [2, 2, 2]


def test_classes_and_labels_keep_their_names() -> None:
    named = Listed(pictures(), classes=["ant", "bat", "cow"])
    for data in (named, Subset(named, range(30))):
        assert open_dataset(str(store(data))).class_names == ("ant", "bat", "cow")
    words = [(image, ["cow", "ant", "bat"][label]) for image, label in pictures()]
    opened = open_dataset(str(store(Listed(words), Listed(words))))
    assert opened.class_names == ("ant", "bat", "cow")
    assert opened.train().labels.tolist() == [2, 0, 1] * 10


def test_other_content_is_another_file(ddray_home: Path) -> None:
    files = {
        store((BYTES, LABELS)),
        store((BYTES, LABELS), (BYTES[:3], LABELS[:3])),
        store((BYTES, (LABELS + 1) % 3)),
        store((255 - BYTES, LABELS)),
    }
    assert len(files) == 4
    assert {file.parent for file in files} == {ddray_home / "own"}


def test_rounding_is_said(caplog: pytest.LogCaptureFixture) -> None:
    images = BYTES[:6] / 255
    images[1] += 0.4 / 255 * (images[1] < 0.9)
    opened = open_dataset(str(store((images, LABELS[:6]), (images, LABELS[:6]))))
    assert torch.equal(opened.train().images, BYTES[:6])
    assert caplog.messages == [
        "1 of 6 images of the dataset are stored with 8 bits (256 levels)",
        "1 of 6 images of test are stored with 8 bits (256 levels)",
    ]


def test_grey_pictures_and_one_bit(caplog: pytest.LogCaptureFixture) -> None:
    grey = [
        (Image.fromarray(image[0].numpy()), int(label)) for image, label in zip(BYTES, LABELS, strict=True)
    ]
    assert torch.equal(open_dataset(str(store(Listed(grey), Listed(grey)))).train().images, BYTES[:, :1])
    bits = [(image.point(lambda value: value > 127, mode="1"), label) for image, label in grey]
    opened = open_dataset(str(store(Listed(bits), Listed(bits))))
    assert torch.equal(opened.train().images, (BYTES[:, :1] > 127) * torch.tensor(255, dtype=torch.uint8))
    assert torch.equal(
        open_dataset(str(store((BYTES[:, 0], LABELS), (BYTES[:, 0], LABELS)))).train().images, BYTES[:, :1]
    )


def test_transparent_and_deep_pictures(caplog: pytest.LogCaptureFixture) -> None:
    """As in folders: laid on white, scaled to 8 bits, with a line that counts them."""
    clear = [(Image.new("RGBA", (8, 8), (9, 9, 9, 0)), 0), (Image.new("RGBA", (8, 8), (9, 9, 9, 255)), 1)]
    opened = open_dataset(str(store(Listed(clear), Listed(clear))))
    assert opened.train().images[:, :, 0, 0].tolist() == [[255] * 3, [9] * 3]
    deep = [(Image.fromarray(np.full((8, 8), value, np.uint16)), value) for value in (0x1234, 0xFFFF)]
    opened = open_dataset(str(store(Listed(deep), Listed(deep))))
    assert opened.train().images[:, 0, 0, 0].tolist() == [0x12, 0xFF]
    assert caplog.messages[0] == ("1 of 2 images of the dataset are laid on white where they are transparent")
    assert caplog.messages[-1] == "2 of 2 images of test are scaled from 16 bits per channel to 8"
    with pytest.raises(InputError, match=r"pictures must be grey or RGB, got mode F, item 0 of the dataset"):
        store(Listed([(Image.new("F", (8, 8)), 0)]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            (BYTES.float(), LABELS),
            r"float images must lie in \[0, 1\], got 0\.\.255 in the dataset; divide by",
        ),
        ((BYTES / 255 - 0.5, LABELS), r"float images must lie in \[0, 1\], got -0\.5\.\.0\.5 in the dataset"),
        ((BYTES // 128, LABELS), r"integer images must span 0\.\.255, got 0\.\.1 in the dataset"),
        ((BYTES, LABELS[:5]), r"one label for each of 30 images, got \[5\] in the dataset"),
        ((BYTES[:, :2], LABELS), r"with 1 or 3 channels, got \[30, 2, 8, 8\] in the dataset"),
        ((BYTES[:0], LABELS[:0]), r"must have images, got \[0, 8, 8, 3\] in the dataset"),
        (Listed([]), r"the dataset must have images, got none"),
        (Listed([{"image": 1}]), r"items of a torch Dataset must be \(image, label\), got dict, item 0"),
        (
            Listed([(BYTES[0], 0), (BYTES[1, :, :4], 1)]),
            r"got \[4, 8, 3\] after \[8, 8, 3\], item 1 of the dataset; give the Dataset a transform",
        ),
        (Listed([(BYTES[0], 0), (BYTES[1] * 1.0, 1)]), r"float images .*in item 1 of the dataset"),
        (
            Listed([(BYTES[0], torch.tensor([0.5, 0.5])), (BYTES[1], torch.tensor([0.5, 0.5]))]),
            "got .2, 2. in",
        ),
        (Listed([(BYTES[0], [1, 0]), (BYTES[1], [1])]), "got lists of them in the dataset"),
        ((BYTES, LABELS - 1), r"whole numbers from 0 on, or names, got \[-1\]"),
        (Endless(), r"the dataset must have a length \(__len__\) or be an IterableDataset"),
        ([BYTES], r"must be a name, a path, a torch Dataset or \(images, labels\), got list"),
    ],
)
def test_what_can_not_be_meant_is_refused(data: Any, message: str, ddray_home: Path) -> None:
    with pytest.raises(InputError, match=message):
        store(data)
    assert not (ddray_home / "own").exists()


def test_a_test_half_of_another_size_is_refused() -> None:
    with pytest.raises(InputError, match=r"test images must have train's .*\[8, 8, 3\], got \[4, 8, 3\]"):
        store((BYTES, LABELS), (BYTES[:, :, :4], LABELS))


def bars(num: int = 60) -> TensorDataset:
    """Images whose brightness is their class."""
    labels = torch.arange(num) % 3
    noise = torch.rand(num, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return TensorDataset(noise * 0.5 + labels.view(-1, 1, 1, 1) * 0.25, labels)


def test_a_set_is_distilled_from_own_images_and_scored_on_them() -> None:
    data = bars()
    distilled = ddray.distill("random", dataset=data, ipc=3)
    real = open_dataset(distilled.meta.dataset).train().images
    decoded = (distilled.space().decode(distilled.images) * 255).round().to(torch.uint8)
    assert all((real == image).flatten(1).all(1).any() for image in decoded)
    options: dict[str, Any] = {"archs": ["convnet3_w16"], "seeds": 1, "epochs": 30, "augment": "none"}
    by_object = ddray.evaluate(distilled, dataset=data, **options)
    by_name = ddray.evaluate(distilled, **options)
    assert by_object.results[0].accuracy_mean == by_name.results[0].accuracy_mean >= 0.8


def test_a_test_half_of_ones_own(caplog: pytest.LogCaptureFixture) -> None:
    """Scored on inverted labels, the accuracy falls."""
    data, swapped = bars(), TensorDataset(bars(12).tensors[0], 2 - bars(12).tensors[1])
    distilled = ddray.distill("random", dataset=data, test=swapped, ipc=3)
    options: dict[str, Any] = {"archs": ["convnet3_w16"], "seeds": 1, "epochs": 30, "augment": "none"}
    scored = ddray.evaluate(distilled, dataset=data, test=swapped, **options)
    assert scored.results[0].accuracy_mean <= 0.5
    assert not [line for line in caplog.messages if "fingerprints" in line]
    with pytest.raises(
        InputError, match=r"test must be left out unless dataset is a torch Dataset or tensors"
    ):
        ddray.distill("random", dataset="digits", test=swapped, ipc=1)


def test_architectures_are_ranked_on_own_images(tmp_path: Path) -> None:
    distilled = ddray.distill("random", dataset=bars(), ipc=2)
    options: dict[str, Any] = {"sample": 2, "epochs": 1, "truth_epochs": 1, "executor": "local"}
    by_object = ddray.nas(distilled, dataset=bars(), run_dir=tmp_path / "a", **options)
    opened = open_dataset(str(store(bars())))
    by_open = ddray.nas(distilled, dataset=opened, run_dir=tmp_path / "b", **options)
    assert by_object.dataset == by_open.dataset == opened.name
