from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from ddray.data import open_dataset, packing
from ddray.errors import InputError, StorageError
from tests.data.data_files import random_images, write_parquet


def a_folder(root: Path, seed: int = 0) -> torch.Tensor:
    images = random_images(10, (1, 8, 8), seed)
    for half in ("train", "test"):
        write_parquet(root / f"{half}.parquet", images, [0, 1] * 5)
    return torch.from_numpy(images)


def entries(home: Path) -> list[Path]:
    return sorted((home / "packed").iterdir())


def test_images_are_decoded_once(tmp_path: Path, ddray_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = a_folder(tmp_path / "p")
    open_dataset(str(tmp_path / "p")).test()
    assert len(entries(ddray_home)) == 2
    assert not list(ddray_home.rglob("*.tmp"))

    def fail(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(packing, "decode", fail)
    data = open_dataset(str(tmp_path / "p"))
    assert torch.equal(data.train().images, images)
    assert torch.equal(data.test().images, images)


def test_a_dataset_without_test_is_decoded_once(
    tmp_path: Path, ddray_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = [*random_images(19, (1, 8, 8)), *random_images(1, (1, 9, 8))]
    write_parquet(tmp_path / "p" / "0000.parquet", images, [0, 1] * 10)
    data = open_dataset(str(tmp_path / "p"))
    assert (len(data.train()), len(data.test())) == (16, 4)
    assert len(entries(ddray_home)) == len(caplog.messages) == 1


def test_a_changed_file_makes_a_new_entry(tmp_path: Path, ddray_home: Path) -> None:
    a_folder(tmp_path / "p")
    first = open_dataset(str(tmp_path / "p")).fingerprint
    changed = a_folder(tmp_path / "p", seed=1)
    file = tmp_path / "p" / "train.parquet"
    os.utime(file, ns=(1, 1))
    data = open_dataset(str(tmp_path / "p"))
    assert torch.equal(data.train().images, changed)
    assert data.fingerprint != first
    assert len(entries(ddray_home)) == 2


def test_writing_to_a_split_leaves_the_cache_alone(tmp_path: Path) -> None:
    images = a_folder(tmp_path / "p")
    data = open_dataset(str(tmp_path / "p"))
    data.train().images.zero_()
    data.train().labels.zero_()
    again = open_dataset(str(tmp_path / "p"))
    assert torch.equal(again.train().images, images)
    assert again.train().labels.tolist() == [0, 1] * 5


@pytest.mark.parametrize("file", [packing.IMAGES, packing.LABELS, "facts.json"])
def test_a_damaged_entry_is_made_again(tmp_path: Path, ddray_home: Path, file: str) -> None:
    images = a_folder(tmp_path / "p")
    open_dataset(str(tmp_path / "p"))
    (entry,) = entries(ddray_home)
    (entry / file).write_bytes((entry / file).read_bytes()[:-7])
    assert torch.equal(open_dataset(str(tmp_path / "p")).train().images, images)
    assert entries(ddray_home) == [entry]


def test_nothing_is_left_of_a_failed_decoding(tmp_path: Path, ddray_home: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(b"broken")
    with pytest.raises(InputError):
        open_dataset(str(tmp_path))
    assert entries(ddray_home) == []


def test_a_home_that_cannot_be_written_is_named(tmp_path: Path, ddray_home: Path) -> None:
    a_folder(tmp_path / "p")
    ddray_home.write_text("a file where the folder should be")
    with pytest.raises(StorageError, match=r"home.*DDRAY_HOME"):
        open_dataset(str(tmp_path / "p"))


def test_a_full_disk_is_an_error_of_ours(
    tmp_path: Path, ddray_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_folder(tmp_path / "p")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="No space left"):
        open_dataset(str(tmp_path / "p"))
    assert entries(ddray_home) == []
