"""Repositories of the Hugging Face hub: parquet shards in their layouts, with labels of several kinds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ddray.data import open_dataset
from ddray.data.parquet import shards
from ddray.errors import InputError
from tests.data.data_files import random_images, write_parquet

NAMES = ("cat", "dog", "eel")


def shard(
    path: Path,
    labels: list[object],
    names: tuple[str, ...] | None = NAMES,
    *,
    column: str = "label",
    seed: int = 0,
) -> torch.Tensor:
    images = random_images(len(labels), (1, 8, 8), seed)
    write_parquet(path, images, labels, names=names, columns=("image", column))
    return torch.from_numpy(images)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("plain_text/train-00000-of-00001.parquet", "plain_text/test-00000-of-00001.parquet"),
        ("default/train/0000.parquet", "default/test/0000.parquet"),
        ("train/0000.parquet", "test/0000.parquet"),
        ("data/train-00000-of-00001-b42a775f407cee45.parquet", "data/validation-00000-of-00001-8bf1.parquet"),
        ("mnist_train.parquet", "mnist_test.parquet"),
        ("Training.parquet", "Testing.parquet"),
    ],
)
def test_repositories_as_they_are_downloaded(
    tmp_path: Path, train: str, test: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "repository"
    train_images, test_images = shard(root / train, [0, 1, 2]), shard(root / test, [2, 1, 0], seed=1)
    (root / ".git").mkdir()
    data = open_dataset(str(root))
    assert torch.equal(data.train().images, train_images)
    assert torch.equal(data.test().images, test_images)
    assert data.test().labels.tolist() == [2, 1, 0]
    assert caplog.text == ""


def test_the_folders_own_name_is_no_part(tmp_path: Path) -> None:
    shard(tmp_path / "test" / "0000.parquet", [0, 1, 2] * 5)
    assert len(open_dataset(str(tmp_path / "test")).train()) == 12


def test_several_configurations_are_refused(tmp_path: Path) -> None:
    for name in ("en", "de"):
        shard(tmp_path / "r" / name / "train.parquet", [0, 1, 2])
    with pytest.raises(InputError, match="one configuration, got de, en in"):
        open_dataset(str(tmp_path / "r"))
    assert len(open_dataset(str(tmp_path / "r" / "en")).class_names) == 3


def test_shards_that_are_no_part_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train", "test", "extra"):
        shard(tmp_path / "r" / f"{name}-00000-of-00001.parquet", [0, 1, 2])
    shard(tmp_path / "r" / "validation-00000-of-00001.parquet", [0, 1, 2])
    assert sorted(shards(tmp_path / "r")) == ["", "test", "train", "val"]
    caplog.clear()
    assert len(open_dataset(str(tmp_path / "r")).train()) == 3
    assert caplog.messages == [
        f"{tmp_path / 'r'}: left out 1 shards {reason}-00000-of-00001.parquet"
        for reason in ("of val beside those of test: validation", "that are neither train nor test: extra")
    ]


def test_shards_without_a_part_beside_test_are_train(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = shard(tmp_path / "r" / "pets.parquet", [0, 1, 2])
    shard(tmp_path / "r" / "test.parquet", [2, 1, 0], seed=1)
    assert torch.equal(open_dataset(str(tmp_path / "r")).train().images, images)
    line = "1 shards whose names say no part are train, such as pets.parquet"
    assert caplog.messages == [f"{tmp_path / 'r'}: {line}"]


def test_what_lies_beside_shards_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "r"
    shard(root / "train.parquet", [0, 1, 2])
    shard(root / "test.parquet", [0, 1, 2])
    shard(root / "data" / "train.parquet", [0, 1, 2])
    (root / "pictures" / "cat").mkdir(parents=True)
    for name in ("pictures/cat/0.png", "cover.png", "._train.parquet", "README.md", "LICENSE"):
        (root / name).write_bytes(b"x")
    open_dataset(str(root))
    assert caplog.messages == [
        f"{root}: left out 2 files of another kind: ._train.parquet, cover.png",
        f"{root}: left out 2 folders that are neither train nor test: data (1 files), pictures (1 files)",
    ]


def test_numbers_with_gaps_are_the_classes_that_occur(tmp_path: Path) -> None:
    shard(tmp_path / "r" / "train.parquet", [3, 1, 2], None)
    shard(tmp_path / "r" / "test.parquet", [2, 3], None)
    data = open_dataset(str(tmp_path / "r"))
    assert data.class_names == ("1", "2", "3")
    assert (data.train().labels.tolist(), data.test().labels.tolist()) == ([2, 0, 1], [1, 2])


@pytest.mark.parametrize("labels", [[-1, -1], [None, None], None])
def test_an_unlabelled_test_gives_way_to_validation(
    tmp_path: Path, labels: list[object] | None, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "r"
    shard(root / "train.parquet", [0, 1, 2])
    val = shard(root / "validation.parquet", [2, 0], seed=1)
    if labels is None:
        shard(root / "test.parquet", [0, 1], column="something")
    else:
        import pyarrow as pa

        shard(root / "test.parquet", pa.array(labels, pa.int64()), seed=2)
    data = open_dataset(str(root))
    assert torch.equal(data.test().images, val)
    assert data.test().labels.tolist() == [2, 0]
    assert caplog.messages == [f"{root}: left out 1 shards of test without labels: test.parquet"]


def test_without_any_labelled_test_a_fifth_of_train_is_test(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shard(tmp_path / "r" / "train.parquet", [0, 1, 2] * 5)
    shard(tmp_path / "r" / "test.parquet", [-1, -1])
    data = open_dataset(str(tmp_path / "r"))
    assert (len(data.train()), len(data.test())) == (12, 3)
    assert "no labelled test part: a fixed 20% of train is test" in caplog.text


def test_shards_are_matched_by_the_names_of_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "r"
    shard(root / "train-0.parquet", [0, 1, 2], ("cat", "dog", "eel"))
    shard(root / "train-1.parquet", [0, 1, 2], ("eel", "fox", "cat"), seed=1)
    shard(root / "test.parquet", [0, 1], ("dog", "cat"), seed=2)
    data = open_dataset(str(root))
    assert data.class_names == ("cat", "dog", "eel", "fox")
    assert data.train().labels.tolist() == [0, 1, 2, 2, 3, 0]
    assert data.test().labels.tolist() == [1, 0]
    assert f"2 of 2 shards, such as {root / 'train-0.parquet'}, name or order" in caplog.text
    assert f"1 of 1 shards, such as {root / 'test.parquet'}, name or order" in caplog.text


def test_a_class_of_test_that_train_lacks_is_refused(tmp_path: Path) -> None:
    shard(tmp_path / "r" / "train.parquet", [0, 1, 2])
    shard(tmp_path / "r" / "test.parquet", [0, 1], ("cat", "yak"))
    with pytest.raises(InputError, match=r"names of train's classes, got 1 in .*test.parquet, row 1"):
        open_dataset(str(tmp_path / "r")).test()


def test_names_that_stand_for_two_classes_keep_both(tmp_path: Path) -> None:
    """ImageNet has two classes called crane."""
    shard(tmp_path / "r" / "train.parquet", [0, 1, 2], ("crane", "dog", "crane"))
    shard(tmp_path / "r" / "test.parquet", [2, 0], ("crane", "dog", "crane"))
    data = open_dataset(str(tmp_path / "r"))
    assert data.class_names == ("crane", "dog", "crane")
    assert data.test().labels.tolist() == [2, 0]
    shard(tmp_path / "r" / "train-2.parquet", [0, 1, 2], ("dog", "crane", "crane"))
    with pytest.raises(InputError, match="must name each once"):
        open_dataset(str(tmp_path / "r"))


@pytest.mark.parametrize("dictionary", [False, True])
def test_texts_as_labels(tmp_path: Path, dictionary: bool) -> None:
    import pyarrow as pa

    def texts(*labels: str) -> pa.Array:
        return pa.array(labels).dictionary_encode() if dictionary else pa.array(labels)

    shard(tmp_path / "r" / "train.parquet", texts("dog", "cat", "eel", "dog"), None)
    shard(tmp_path / "r" / "test.parquet", texts("eel", "cat"), None)
    data = open_dataset(str(tmp_path / "r"))
    assert data.class_names == ("cat", "dog", "eel")
    assert data.train().labels.tolist() == [1, 0, 2, 1]
    assert data.test().labels.tolist() == [2, 0]


def test_numbers_as_texts_are_ordered_by_value(tmp_path: Path) -> None:
    shard(tmp_path / "r" / "train.parquet", ["10", "9", "2"], None)
    data = open_dataset(str(tmp_path / "r"), can_flip=False)
    assert data.class_names == ("2", "9", "10")


@pytest.mark.parametrize("column", ["label", "fine_label", "labels", "target", "class"])
def test_usual_columns_of_labels(tmp_path: Path, column: str) -> None:
    shard(tmp_path / "r" / "train.parquet", [2, 1, 0], column=column)
    assert open_dataset(str(tmp_path / "r")).class_names == NAMES


def test_the_label_column_by_name(tmp_path: Path) -> None:
    import json

    import pyarrow.parquet as pq

    path = tmp_path / "cifar100" / "train.parquet"
    shard(path, [3, 1, 2, 0], column="fine_label")
    table = pq.read_table(path).append_column("coarse_label", [[1, 0, 1, 0]])
    features = {
        "fine_label": {"names": [f"fine {i}" for i in range(100)]},
        "coarse_label": {"names": ["fish", "flowers"]},
    }
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    images = np.concatenate([random_images(4, (3, 32, 32))])
    write_parquet(path, images, [3, 1, 2, 0], columns=("image", "fine_label"))
    table = table.set_column(0, "image", pq.read_table(path)["image"])
    pq.write_table(table, path)
    data = open_dataset(str(path.parent), label_column="coarse_label")
    assert data.class_names == ("fish", "flowers")
    assert (data.train().labels.bincount() + data.test().labels.bincount(minlength=2)).tolist() == [2, 2]
    named = open_dataset("cifar100?label_column=coarse_label", data_dir=tmp_path)
    assert named.class_names == ("fish", "flowers")
    assert named.name == "cifar100?label_column=coarse_label"
    with pytest.raises(
        InputError, match=r"label column named superclass, got image, fine_label, coarse_label"
    ):
        open_dataset(str(path.parent), label_column="superclass")
