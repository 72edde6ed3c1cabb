"""Folders of pictures, as people arrange them."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ddray.data import Dataset, open_dataset
from ddray.data.listing import find_parts, part_of
from ddray.errors import InputError
from tests.data.data_files import random_images, write_png


def pictures(folder: Path, num: int = 2, *, seed: int = 0) -> torch.Tensor:
    images = random_images(num, (1, 8, 8), seed)
    for index, image in enumerate(images):
        write_png(folder / f"{index:02}.png", image)
    return torch.from_numpy(images)


def classes(root: Path, names: str = "a b", num: int = 2, *, seed: int = 0) -> torch.Tensor:
    """Pictures in a folder per name."""
    return torch.cat([pictures(root / name, num, seed=seed + i) for i, name in enumerate(names.split())])


def as_set(images: torch.Tensor) -> list[list[int]]:
    rows: list[list[int]] = images.flatten(1).tolist()
    return sorted(rows)


def assert_halves(data: Dataset, train: torch.Tensor, test: torch.Tensor) -> None:
    assert torch.equal(data.train().images, train)
    assert torch.equal(data.test().images, test)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *(
            (n, "train")
            for n in ("train", "Training", "train_set", "training_set", "TRAIN", "trainset", "TrainData")
        ),
        *(
            (n, "test")
            for n in ("Testing", "test_set", "test-images", "eval", "TestSet", "test-00000-of-00002-1a2b")
        ),
        *((n, "val") for n in ("validation", "valid", "val", "dev", "Val_Images", "validation_set")),
    ],
)
def test_words_for_parts(name: str, part: str) -> None:
    assert part_of(name) == (part, "")


@pytest.mark.parametrize(
    "name", ["cat", "strain", "latest", "training_testing", "airplane", "contest", "0", "valley"]
)
def test_words_that_are_no_parts(name: str) -> None:
    assert part_of(name) is None


def test_names_of_one_pair_belong_together() -> None:
    root = Path("x")
    assert find_parts(root, ["seg_train", "seg_test", "seg_pred"]) == {
        "train": "seg_train",
        "test": "seg_test",
    }
    assert find_parts(root, ["train", "train_extra", "test"]) == {"train": "train", "test": "test"}
    assert find_parts(root, ["train2017", "val2017"]) == {"train": "train2017", "val": "val2017"}
    assert find_parts(root, ["train_station", "test_tube", "bus"]) == {}
    for names in (["train", "Training", "test"], ["a_train", "a_test", "b_train", "b_test"]):
        with pytest.raises(InputError, match="one name must be"):
            find_parts(root, names)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        *(("Training", "Testing"), ("training_set", "test_set"), ("Train", "Validation"), ("TRAIN", "dev")),
        *(("seg_train/seg_train", "seg_test/seg_test"), ("archive/ds/train", "archive/ds/test")),
        ("training_set/training_set", "test_set/test_set"),
    ],
)
def test_splits_in_other_words_and_other_depths(
    tmp_path: Path, train: str, test: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "set"
    train_images, test_images = classes(root / train), classes(root / test, seed=7)
    data = open_dataset(str(root))
    assert_halves(data, train_images, test_images)
    assert data.class_names == ("a", "b")
    assert data.name == str(root)
    assert caplog.text == ""


def test_class_folders_in_an_archive_give_a_fifth_to_test(tmp_path: Path) -> None:
    classes(tmp_path / "set" / "archive" / "deeper", num=10)
    data = open_dataset(str(tmp_path / "set"))
    assert data.class_names == ("a", "b")
    assert (len(data.train()), len(data.test())) == (16, 4)


@pytest.mark.parametrize("folder", ["a", "train/a", "archive/ds/a"])
def test_one_class_is_refused(tmp_path: Path, folder: str) -> None:
    pictures(tmp_path / "set" / folder)
    with pytest.raises(InputError, match="2"):
        open_dataset(str(tmp_path / "set"))


def test_class_folders_that_hold_the_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "set"
    train = torch.cat([pictures(root / name / "Train", seed=i) for i, name in enumerate("ab")])
    test = torch.cat([pictures(root / name / "Test", 1, seed=5 + i) for i, name in enumerate("ab")])
    pictures(root / "a" / "masks")
    pictures(root / "b" / "masks")
    data = open_dataset(str(root))
    assert_halves(data, train, test)
    assert data.test().labels.tolist() == [0, 1]
    assert "each class holds Train and Test: the latter is test" in caplog.text
    assert (
        "left out 2 folders that are neither train nor test: a/masks (2 files), b/masks (2 files)"
        in caplog.text
    )


def test_class_folders_that_hold_the_same_folders_are_refused(tmp_path: Path) -> None:
    for name in ("2019", "2020"):
        classes(tmp_path / "set" / name, "cat dog")
    with pytest.raises(InputError, match=r"what a class is.*\(cat, dog\) in each of 2019, 2020"):
        open_dataset(str(tmp_path / "set"))


def test_one_shared_folder_is_tiny_imagenets(tmp_path: Path) -> None:
    root = tmp_path / "set"
    train, val = (
        torch.cat([pictures(root / half / name / "images", seed=seed + i) for i, name in enumerate("ab")])
        for half, seed in (("train", 0), ("val", 5))
    )
    assert_halves(open_dataset(str(root)), train, val)


def test_an_unlabelled_test_gives_way_to_val(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "set"
    train, val = classes(root / "train"), classes(root / "val", seed=5)
    pictures(root / "test", 3)
    assert_halves(open_dataset(str(root)), train, val)
    assert f"{root}: left out 1 folders of test without labels: test (3 files)" in caplog.messages
    assert "20%" not in caplog.text


def test_val_beside_a_labelled_test_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "set"
    train, test = classes(root / "train"), classes(root / "test", seed=5)
    classes(root / "valid", seed=9)
    assert_halves(open_dataset(str(root)), train, test)
    assert caplog.messages == [f"{root}: left out 1 folders of val beside those of test: valid (4 files)"]


def test_without_a_labelled_test_a_fifth_of_train_is_test(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "set"
    classes(root / "train", num=10)
    pictures(root / "test", 3)
    data = open_dataset(str(root))
    assert (len(data.train()), len(data.test())) == (16, 4)
    assert "no labelled test part: a fixed 20% of train is test" in caplog.text


def test_flat_halves_and_a_missing_train_are_refused(tmp_path: Path) -> None:
    for half in ("train", "test"):
        pictures(tmp_path / "flat" / half)
    with pytest.raises(InputError, match="train must have a folder per class, or a CSV"):
        open_dataset(str(tmp_path / "flat"))
    pictures(tmp_path / "flat" / "sample")  # nor are train and test classes then
    with pytest.raises(InputError, match="train must have a folder per class, or a CSV"):
        open_dataset(str(tmp_path / "flat"))
    for half in ("test", "val"):
        classes(tmp_path / "held" / half)
    with pytest.raises(InputError, match="must have a train part, got only test, val"):
        open_dataset(str(tmp_path / "held"))


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    classes(tmp_path / "set", "bus car train", num=5)
    assert open_dataset(str(tmp_path / "set")).class_names == ("bus", "car", "train")


def test_what_is_left_out_is_named_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "set"
    images = classes(root)
    pictures(root / "_background_noise_", 3)
    pictures(root / ".hidden")
    pictures(root / "__MACOSX")
    pictures(root / "a" / ".ipynb_checkpoints", 1)
    pictures(root, 1)
    for file in ("README.md", ".gitattributes", "a/Thumbs.db", "b/._00.png", "b/boxes.txt", "ages.csv"):
        (root / file).write_bytes(b"x")
    (root / ".git").mkdir()
    (root / ".git" / "config").write_bytes(b"no data: not worth a line")
    data = open_dataset(str(root))
    assert as_set(torch.cat([data.train().images, data.test().images])) == as_set(images)
    lines = caplog.messages
    assert (
        f"{root}: left out 4 folders that are hidden or begin with _: a/.ipynb_checkpoints (1 files), "
        ".hidden (2 files), __MACOSX (2 files), ..." in lines
    )
    assert f"{root}: left out 4 files of another kind: a/Thumbs.db, b/._00.png, b/boxes.txt, ..." in lines
    assert len(lines) == 3
    assert f"{root}: left out 1 files outside the folders of classes: 00.png" in lines
    caplog.clear()
    open_dataset(str(root))
    assert caplog.messages == lines  # cached or not


def test_what_lies_beside_an_archives_folder_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "x"
    images = classes(root / "ds")
    classes(root / "__MACOSX" / "ds")
    pictures(root, 1)
    (root / "README.txt").touch()
    data = open_dataset(str(root))
    assert as_set(torch.cat([data.train().images, data.test().images])) == as_set(images)
    assert caplog.messages == [
        f"{root}: left out 1 files outside the folders of classes: 00.png",
        f"{root}: left out 1 folders that are hidden or begin with _: __MACOSX (4 files)",
    ]


def test_what_a_part_leaves_out_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "set"
    for half in ("train", "test"):
        classes(root / half / half)
        pictures(root / half / "__MACOSX", 3)
        pictures(root / half / half, 1)
    data = open_dataset(str(root))
    assert sorted(caplog.messages) == [
        f"{root}: left out 1 files outside the folders of classes: train/train/00.png",
        f"{root}: left out 1 folders that are hidden or begin with _: train/__MACOSX (3 files)",
    ]
    caplog.clear()
    assert len(data.test()) == 4
    assert sorted(caplog.messages) == [
        f"{root / 'test'}: left out 1 files outside the folders of classes: test/00.png",
        f"{root / 'test'}: left out 1 folders that are hidden or begin with _: __MACOSX (3 files)",
    ]


def test_pictures_beside_the_parts_of_a_class_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "set"
    for seed, name in enumerate("ab"):
        classes(root / name, "train test", seed=seed * 5)
        pictures(root / name, 1)
    assert len(open_dataset(str(root)).train()) == 4
    assert f"{root}: left out 2 files outside the folders of classes: a/00.png, b/00.png" in caplog.messages


def test_tiny_imagenets_val_names_what_its_list_leaves_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "set"
    classes(root / "train")
    pictures(root / "val" / "images", 3)
    (root / "val" / "val_annotations.txt").write_text("00.png\ta\n01.png\tb\n")
    assert open_dataset(str(root)).test().labels.tolist() == [0, 1]
    assert caplog.messages == [f"{root / 'val'}: left out 1 files that no list names: images/02.png"]


def test_links_that_lead_back_end_with_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, other = tmp_path / "set", tmp_path / "other"
    images = classes(root / "train")
    linked = pictures(other, seed=8)
    os.symlink(root / "train", root / "train" / "self")
    os.symlink("..", root / "train" / "a" / "up")
    os.symlink(other, root / "train" / "b" / "elsewhere")
    os.symlink(root, other / "back")
    os.symlink("knot", root / "train" / "knot")
    data = open_dataset(str(root))
    assert as_set(torch.cat([data.train().images, data.test().images])) == as_set(torch.cat([images, linked]))
    assert (
        "left out 3 links to a folder that holds them: train/a/up, train/b/elsewhere/back, train/self"
        in caplog.text
    )


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes(tmp_path / "set")
    closed = tmp_path / "set" / "a" / "closed"
    closed.mkdir()
    closed.chmod(0)
    if os.access(closed, os.R_OK):  # root reads everything: refused to it as to others
        scandir = os.scandir

        def refusing(folder: Any) -> Any:
            if Path(folder) == closed:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
            return scandir(folder)

        monkeypatch.setattr(os, "scandir", refusing)
    try:
        with pytest.raises(InputError, match=r"folders .* must be readable, got .*closed"):
            open_dataset(str(tmp_path / "set"))
    finally:
        closed.chmod(0o700)
