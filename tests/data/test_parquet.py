from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ddray.data import open_dataset
from ddray.errors import InputError
from tests.data.data_files import as_pil, random_images, write_parquet

NAMES = ("zebra", "ant", "bee")


def a_folder(root: Path, *, shape: tuple[int, int, int] = (3, 16, 16), num: int = 30) -> torch.Tensor:
    """Two train shards and a test shard; returns the train images."""
    images = random_images(num, shape)
    labels = [i % 3 for i in range(num)]
    half = num // 2
    write_parquet(root / "train-00000-of-00002.parquet", images[:half], labels[:half], names=NAMES)
    write_parquet(root / "train-00001-of-00002.parquet", images[half:], labels[half:], names=NAMES)
    write_parquet(root / "test-00000-of-00001.parquet", images[:6], labels[:6], names=NAMES)
    return torch.from_numpy(images)


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 28, 28)])
def test_a_folder_of_shards_keeps_its_size_and_channels(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    images = a_folder(tmp_path / "made", shape=shape)
    data = open_dataset(str(tmp_path / "made"))
    assert data.image_shape == shape
    assert data.class_names == NAMES
    assert data.name == str(tmp_path / "made")
    assert torch.equal(data.train().images, images)
    assert data.train().labels.tolist() == [i % 3 for i in range(30)]
    assert torch.equal(data.test().images, images[:6])
    assert data.mean == pytest.approx((images.double() / 255).mean((0, 2, 3)).tolist(), abs=1e-6)


def test_a_known_name_is_found_and_uses_the_papers_constants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = random_images(20, (3, 32, 32))
    for prefix, half in (("train", images), ("validation", images[:10])):
        file = tmp_path / "cifar10" / "data" / f"{prefix}-00000-of-00001.parquet"
        write_parquet(file, half, [i % 10 for i in range(len(half))], columns=("image", "label"))
    monkeypatch.setenv("DDRAY_DATA", str(tmp_path))
    data = open_dataset("cifar10")
    assert data.mean == (0.4914, 0.4822, 0.4465)
    assert data.class_names[1] == "automobile"
    assert torch.equal(data.train().images, torch.from_numpy(images))
    assert len(data.test()) == 10


def test_fine_labels_and_numbers_for_names(tmp_path: Path) -> None:
    write_parquet(
        tmp_path / "p" / "train.parquet",
        random_images(4, (1, 8, 8)),
        [0, 1, 2, 1],
        columns=("image", "fine_label"),
    )
    data = open_dataset(str(tmp_path / "p"))
    assert data.class_names == ("0", "1", "2")


def test_without_test_shards_a_fixed_fifth_is_test(tmp_path: Path) -> None:
    images = random_images(30, (1, 8, 8))
    write_parquet(tmp_path / "p" / "0000.parquet", images, [i // 10 for i in range(30)])
    data = open_dataset(str(tmp_path / "p"))
    assert torch.bincount(data.test().labels).tolist() == [2, 2, 2]
    assert len(data.train()) == 24
    again = open_dataset(str(tmp_path / "p"))
    assert torch.equal(again.test().images, data.test().images)
    test_images = {bytes(image.flatten().tolist()) for image in data.test().images}
    assert test_images.isdisjoint(bytes(image.flatten().tolist()) for image in data.train().images)


@pytest.mark.parametrize("damage", [b"no parquet at all", None])
def test_a_broken_test_shard_disturbs_only_test(tmp_path: Path, damage: bytes | None) -> None:
    a_folder(tmp_path / "whole")
    expected = open_dataset(str(tmp_path / "whole")).fingerprint
    a_folder(tmp_path / "made")
    shard = tmp_path / "made" / "test-00000-of-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-200] if damage is None else damage)
    data = open_dataset(str(tmp_path / "made"))
    assert len(data.train()) == 30
    assert data.fingerprint == expected
    with pytest.raises(InputError, match=r"test-00000-of-00001\.parquet"):
        data.test()


def test_a_shard_with_a_broken_page_is_named(tmp_path: Path) -> None:
    a_folder(tmp_path / "made")
    shard = tmp_path / "made" / "train-00001-of-00002.parquet"
    content = bytearray(shard.read_bytes())
    content[4:3000] = b"\xff" * 2996
    shard.write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"train-00001-of-00002.parquet"):
        open_dataset(str(tmp_path / "made"))


def test_a_broken_image_is_named_with_its_row(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "p").mkdir()
    table = pa.table({"img": [{"bytes": b"no image", "path": "x"}] * 2, "label": [0, 1]})
    pq.write_table(table, tmp_path / "p" / "train.parquet")
    with pytest.raises(InputError, match=r"train.parquet, row 0"):
        open_dataset(str(tmp_path / "p"))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, 1, 3], "0..2"),
        ([0, 1, -1], "got -1"),
        (["ant", "bee", "cow"], "names of train's classes, got 'cow'"),
        ([0, 1, 1], "'bee'"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, labels: list[object], words: str) -> None:
    write_parquet(tmp_path / "p" / "train.parquet", random_images(3, (1, 8, 8)), labels, names=NAMES)
    with pytest.raises(InputError, match=words):
        open_dataset(str(tmp_path / "p")).train()


def test_a_named_set_refuses_images_of_another_size(tmp_path: Path) -> None:
    write_parquet(tmp_path / "mnist" / "train.parquet", random_images(10, (1, 27, 28)), list(range(10)))
    with pytest.raises(InputError, match=r"28x28.*28x27.*row 0"):
        open_dataset("mnist", data_dir=tmp_path).train()


def test_columns_and_train_shards_must_be_there(tmp_path: Path) -> None:
    write_parquet(
        tmp_path / "a" / "train.parquet", random_images(1, (1, 8, 8)), [0], columns=("pixels", "label")
    )
    with pytest.raises(InputError, match="image column named img or image"):
        open_dataset(str(tmp_path / "a"))
    write_parquet(tmp_path / "b" / "test.parquet", random_images(1, (1, 8, 8)), [0])
    with pytest.raises(InputError, match="must have a train part, got only test"):
        open_dataset(str(tmp_path / "b"))


def test_mixed_sizes_are_brought_to_one(tmp_path: Path) -> None:
    images = [random_images(1, (3, *size))[0] for size in ((70, 90), (80, 66), (64, 64))]
    write_parquet(tmp_path / "p" / "train.parquet", images, [0, 1, 0])
    data = open_dataset(str(tmp_path / "p"))
    assert data.image_shape == (3, 64, 64)
    resized = as_pil(images[0]).resize((82, 64), 2).crop((9, 0, 73, 64))
    actual = as_pil(open_dataset(str(tmp_path / "p")).train().images[0].numpy())
    assert actual.tobytes() == resized.tobytes() or len(data.test()) > 0
