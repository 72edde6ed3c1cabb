"""CSV files beside flat folders of pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ddray.data import open_dataset
from ddray.errors import InputError
from tests.data.data_files import random_images, write_png


def pictures(folder: Path, num: int, *, seed: int = 0) -> torch.Tensor:
    images = random_images(num, (1, 8, 8), seed)
    for index, image in enumerate(images):
        write_png(folder / f"{index}.png", image)
    return torch.from_numpy(images)


def write(path: Path, *rows: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in rows))


def whole(root: Path, **content: str) -> tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]:
    """All images and labels of a dataset whose test is drawn from train, in the order of their pixels."""
    data = open_dataset(str(root), **content)
    images = torch.cat([data.train().images, data.test().images])
    labels = torch.cat([data.train().labels, data.test().labels])
    order = sorted(range(len(images)), key=lambda row: images[row].flatten().tolist())
    return images[order], labels[order], data.class_names


@pytest.mark.parametrize(
    "rows",
    [
        ["file,label", *(f"{i}.png,{'cba'[i % 3]}" for i in range(12))],
        ["label,file", *(f"{'cba'[i % 3]},images/{i}.png" for i in range(12))],
        ["id;size;class", *(f"{i};8;{'cba'[i % 3]}" for i in range(12))],
        [f"{i}.png,{'cba'[i % 3]}" for i in range(12)],
        ["Image,Breed", *(f"data/images/{i}.png,{'cba'[i % 3]}" for i in range(12))],
    ],
)
def test_a_list_beside_a_flat_folder(tmp_path: Path, rows: list[str]) -> None:
    root = tmp_path / "set"
    images = pictures(root / "images", 12)
    write(root / "labels.csv", *rows)
    read, labels, names = whole(root)
    order = sorted(range(12), key=lambda row: images[row].flatten().tolist())
    assert names == ("a", "b", "c")
    assert torch.equal(read, images[order])
    assert labels.tolist() == [2 - i % 3 for i in order]


def test_numbers_are_ordered_by_value(tmp_path: Path) -> None:
    pictures(tmp_path / "set" / "images", 12)
    write(tmp_path / "set" / "labels.csv", "file,label", *(f"{i}.png,{i % 3 + 9}" for i in range(12)))
    assert open_dataset(str(tmp_path / "set")).class_names == ("9", "10", "11")


def test_lists_of_train_and_test_with_the_same_names_of_files(tmp_path: Path) -> None:
    root = tmp_path / "set"
    train, test = pictures(root / "train", 4), pictures(root / "test", 4, seed=5)
    write(root / "train.csv", "file,label", "3.png,b", "0.png,a", "1.png,a", "2.png,b")
    write(root / "test_labels.csv", "file,label", "0.png,b", "1.png,a", "2.png,a", "3.png,b")
    data = open_dataset(str(root))
    assert torch.equal(data.train().images, train[[3, 0, 1, 2]])
    assert torch.equal(data.test().images, test)
    assert (data.train().labels.tolist(), data.test().labels.tolist()) == ([1, 0, 0, 1], [1, 0, 0, 1])


def test_lists_inside_the_parts_and_an_unlabelled_test(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "set"
    pictures(root / "train", 4)
    pictures(root / "test", 2, seed=3)
    val = pictures(root / "valid", 2, seed=5)
    write(root / "train" / "metadata.csv", "file_name,label", *(f"{i}.png,{'ab'[i % 2]}" for i in range(4)))
    write(root / "valid" / "metadata.csv", "file_name,label", "0.png,b", "1.png,a")
    write(root / "test.csv", "id", "0.png", "1.png")
    data = open_dataset(str(root))
    assert torch.equal(data.test().images, val)
    assert data.test().labels.tolist() == [1, 0]
    assert caplog.messages == [
        f"{root}: left out 1 files of another kind: test.csv",
        f"{root}: left out 2 files that no list names: test/0.png, test/1.png",
    ]


def test_a_column_of_parts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "set"
    images = pictures(root / "images", 6)
    parts = ["train", "test", "train", "valid", "train", "test"]
    rows = [f"{i}.png,{'ab'[i // 2 % 2]},{part}" for i, part in enumerate(parts)]
    write(root / "all.csv", "file,label,split", *rows)
    data = open_dataset(str(root))
    assert torch.equal(data.train().images, images[[0, 2, 4]])
    assert torch.equal(data.test().images, images[[1, 5]])
    assert caplog.messages == [f"{root}: left out 1 files of val beside those of test: images/3.png"]


def test_the_label_column_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "set"
    pictures(root / "images", 8)
    write(
        root / "list.csv", "file,coarse,fine", *(f"{i}.png,{'xy'[i % 2]},{'pqrs'[i % 4]}" for i in range(8))
    )
    with pytest.raises(InputError, match="CSV file that labels"):
        open_dataset(str(root))
    assert "none of its columns (coarse, fine) is the label; --label-column names one" in caplog.text
    assert open_dataset(str(root), label_column="coarse").class_names == ("x", "y")
    data = open_dataset(f"{root}?label_column=fine")
    assert data.class_names == ("p", "q", "r", "s")
    assert data.name == f"{root}?label_column=fine"


def test_a_label_column_that_no_list_has_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "set"
    pictures(root / "images", 8)
    write(root / "list.csv", "file,kind", *(f"{i}.png,{'xy'[i % 2]}" for i in range(8)))
    with pytest.raises(InputError, match="label_column must be one of kind, got 'sort' for the lists of"):
        open_dataset(str(root), label_column="sort")


def test_another_column_does_not_replace_class_folders(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "set"
    for label in "ab":
        pictures(root / label, 10, seed=ord(label))
    rows = [f"{label}/{i}.png,{'young' if i % 2 else 'old'}" for label in "ab" for i in range(10)]
    write(root / "info.csv", "file,age", *rows)
    assert open_dataset(str(root)).class_names == ("a", "b")
    assert "none of its columns (age) is the label; --label-column names one" in caplog.text
    assert f"{root}: left out 1 files of another kind: info.csv" in caplog.messages
    caplog.clear()
    assert open_dataset(str(root), label_column="age").class_names == ("old", "young")
    line = "info.csv labels the files, not the folders that they are in"
    assert caplog.messages == [f"{root}: {line}"]


def test_a_column_with_a_value_per_file_is_no_label(tmp_path: Path) -> None:
    root = tmp_path / "set"
    pictures(root / "images", 9)
    write(root / "boxes.csv", "ImageId,PredictionString", *(f"{i},n0 {i} {i} 9 9" for i in range(9)))
    with pytest.raises(InputError, match="CSV file that labels"):
        open_dataset(str(root))


def test_a_missing_file_is_not_taken_from_another_folder(tmp_path: Path) -> None:
    root = tmp_path / "set"
    pictures(root / "a", 60)
    pictures(root / "b", 61)
    rows = [f"a/{i}.png,{'xy'[i % 2]}" for i in range(61)]
    write(root / "list.csv", "file,label", *rows)
    with pytest.raises(InputError, match=r"got 'a/60\.png', 'x'"):
        open_dataset(str(root))
    write(root / "list.csv", "file,label", *rows[:60], "/home/me/set/b/60.png,x")
    assert sum(map(len, whole(root)[:1])) == 61


def test_a_test_list_without_classes_gives_way_to_val(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "set"
    pictures(root / "images", 8)
    for part, label, files in (("train", None, range(4)), ("val", None, (4, 5)), ("test", -1, (6, 7))):
        rows = [f"{i}.png,{'ab'[i % 2] if label is None else label}" for i in files]
        write(root / f"{part}.csv", "file,label", *rows)
    assert open_dataset(str(root)).test().labels.tolist() == [0, 1]
    assert caplog.messages == [f"{root}: left out 2 files of test without labels: images/6.png, images/7.png"]


def test_what_lies_beside_listed_files_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "set"
    pictures(root / "images", 6)
    pictures(root / "__MACOSX", 2)
    (root / "images" / "notes.txt").touch()
    write(root / "labels.csv", "file,label", *(f"{i}.png,{'ab'[i % 2]}" for i in range(6)))
    open_dataset(str(root))
    assert caplog.messages == [
        f"{root}: left out 1 folders that are hidden or begin with _: __MACOSX (2 files)",
        f"{root}: left out 1 files of another kind: images/notes.txt",
    ]


def test_a_list_that_repeats_the_class_folders_changes_nothing(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for part in ("train", "test"):
        for label in "ba":
            pictures(root / part / label, 3, seed=ord(label))
    expected = open_dataset(str(root)).fingerprint
    rows = [
        f"{part}/{label}/{i}.png,{label}" for part in ("train", "test") for label in "ab" for i in range(3)
    ]
    write(root / "birds.csv", "filepaths,labels", *rows)
    assert open_dataset(str(root)).fingerprint == expected


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            {"labels.csv": ["file,label", *(f"{i}.png,a" for i in range(60)), "60.png,b", "99.png,b"]},
            "got '99.png', 'b'",
        ),
        ({"labels.csv": ["file,label", "0.png,a", "1.png,"]}, "got '1.png', ''"),
        (
            {name: ["file,label", "0.png,a", "1.png,b"] for name in ("x.csv", "y.csv")},
            "one CSV file.*x.csv and .*y.csv",
        ),
        ({"test.csv": ["file,label", "0.png,a", "1.png,b"]}, "must have a train part, got only test"),
        ({"train.csv": ["file,label", "0.png,a", "1.png,a"]}, "2 classes or more"),
    ],
)
def test_lists_that_cannot_be_meant_are_refused(
    tmp_path: Path, files: dict[str, list[str]], words: str
) -> None:
    root = tmp_path / "set"
    pictures(root / "images", 61)
    for name, rows in files.items():
        write(root / name, *rows)
    with pytest.raises(InputError, match=words):
        open_dataset(str(root))


def test_a_class_of_test_that_train_lacks_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "set"
    pictures(root / "images", 6)
    write(root / "train.csv", "file,label", "0.png,a", "1.png,b")
    write(root / "test.csv", "file,label", "2.png,c")
    data = open_dataset(str(root))
    assert len(data.train()) == 2
    with pytest.raises(InputError, match=r"among train's \(a, b\), got 'c'"):
        data.test()
