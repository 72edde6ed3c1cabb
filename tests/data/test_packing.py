"""Encoded images are decoded once, in blocks that a killed process need not do again."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddray.data import dataset, folders, open_dataset, packing, parquet
from ddray.data.packed import PackedImages
from ddray.data.pictures import Geometry, Item
from ddray.errors import InputError, StorageError
from tests.data.data_files import random_images, write_parquet, write_png

NUM = 20


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """5 blocks of 4 images, of 2 tasks each."""
    monkeypatch.setattr(parquet, "_BATCH", 4)
    monkeypatch.setattr(packing, "_TASK", 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A train shard whose images 3 and 17 are of another size, and a test shard."""
    images = [*random_images(NUM, (1, 8, 8))]
    images[3], images[17] = random_images(2, (1, 9, 8), seed=1)
    write_parquet(tmp_path / "p" / "train.parquet", images, [0, 1] * (NUM // 2))
    write_parquet(tmp_path / "p" / "test.parquet", images[:2], [0, 1])
    return tmp_path / "p"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where the images were that were decoded."""
    places: list[str] = []

    def decode(item: Item, geometry: Geometry) -> object:
        places.append(item.where)
        return original(item, geometry)

    original = packing.decode
    monkeypatch.setattr(packing, "decode", decode)
    return places


def open_until(folder: Path, row: int, error: BaseException) -> None:
    """Opens a dataset, where the decoding of a row fails."""
    original = packing.decode

    def decode(item: Item, geometry: Geometry) -> object:
        if item.where.endswith(f"row {row}"):
            raise error
        return original(item, geometry)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "decode", decode)
        open_dataset(str(folder))


def names(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "packed").iterdir())


def test_large_images_stay_on_the_disk_with_the_same_fingerprint(
    folder: Path, ddray_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = open_dataset(str(folder))
    monkeypatch.setattr(packing, "_IN_MEMORY_BYTES", 1)
    large = open_dataset(str(folder))
    assert not isinstance(small.train().images, PackedImages)
    assert isinstance(large.train().images, PackedImages)
    assert torch.equal(large.train().images, small.train().images)
    assert torch.equal(large.test().images, small.test().images)
    assert large.fingerprint == small.fingerprint
    monkeypatch.setattr(dataset, "parts_of", None)  # which it is computed from
    assert open_dataset(str(folder)).fingerprint == small.fingerprint
    assert len(names(ddray_home)) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StorageError("full")])
def test_an_interrupted_decoding_goes_on(
    folder: Path,
    ddray_home: Path,
    caplog: pytest.LogCaptureFixture,
    decoded: list[str],
    error: BaseException,
) -> None:
    expected = open_dataset(str(folder)).train()
    warnings = caplog.messages[:]
    assert any("2 of 20 images are resized" in line for line in warnings)
    shutil.rmtree(ddray_home)
    with pytest.raises(type(error)):
        open_until(folder, 13, error)
    (partial,) = names(ddray_home)
    assert partial.endswith(".partial")
    decoded.clear()
    caplog.clear()
    split = open_dataset(str(folder)).train()
    assert torch.equal(split.images, expected.images)
    assert torch.equal(split.labels, expected.labels)
    assert not {f"{folder / 'train.parquet'}, row {row}" for row in range(8)} & {*decoded}
    assert 8 <= len(decoded) <= 12  # the block of row 13 and those after it
    assert caplog.messages == warnings
    caplog.clear()
    open_dataset(str(folder))
    assert caplog.messages == warnings
    assert names(ddray_home) == [partial.removesuffix(".partial")]


def test_a_torn_line_and_lost_pages_are_decoded_again(
    folder: Path, ddray_home: Path, decoded: list[str]
) -> None:
    expected = open_dataset(str(folder)).train().images
    shutil.rmtree(ddray_home)
    with pytest.raises(KeyboardInterrupt):
        open_until(folder, 19, KeyboardInterrupt())
    (partial,) = (ddray_home / "packed").iterdir()
    with (partial / "blocks.jsonl").open("a") as file:
        file.write('{"start": 16, "par')
    zeroed = (partial / "images.npy").stat().st_size - NUM * 64 + 5 * 64  # in block 1
    with (partial / "images.npy").open("r+b") as file:
        file.seek(zeroed)
        file.write(bytes(32))
    decoded.clear()
    assert torch.equal(open_dataset(str(folder)).train().images, expected)
    assert {int(place.rpartition(" ")[2]) for place in decoded} == {4, 5, 6, 7, 16, 17, 18, 19}
    assert torch.equal(open_dataset(str(folder)).train().images, expected)


def test_changed_bytes_are_noticed_and_only_their_block_is_decoded_again(
    folder: Path, ddray_home: Path, caplog: pytest.LogCaptureFixture, decoded: list[str]
) -> None:
    expected = open_dataset(str(folder)).train().images
    (entry,) = (ddray_home / "packed").iterdir()
    with (entry / "images.npy").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    decoded.clear()
    caplog.clear()
    assert torch.equal(open_dataset(str(folder)).train().images, expected)
    assert len(decoded) == 4
    assert f"{entry} is damaged: 4 of 20 images" in caplog.text
    assert "decoded again" in caplog.text
    assert names(ddray_home) == [entry.name]


def test_a_copy_is_checked_once(
    folder: Path, ddray_home: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[str]
) -> None:
    expected = open_dataset(str(folder)).train().images
    (entry,) = (ddray_home / "packed").iterdir()
    for name in ("images.npy", "labels.npy"):
        os.utime(entry / name, ns=(1, 1))
    decoded.clear()
    assert torch.equal(open_dataset(str(folder)).train().images, expected)
    monkeypatch.setattr(packing, "_mend", None)
    open_dataset(str(folder))
    assert decoded == []


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES])
def test_a_copy_that_cannot_be_written_is_checked_and_used(
    folder: Path, ddray_home: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[str], error: int
) -> None:
    expected = open_dataset(str(folder)).train().images
    (entry,) = (ddray_home / "packed").iterdir()
    before = (entry / "facts.json").read_bytes()
    os.utime(entry / "images.npy", ns=(1, 1))

    @contextmanager
    def refused(partial: Path) -> Iterator[None]:
        raise OSError(error, os.strerror(error))
        yield

    monkeypatch.setattr(packing, "_locked", refused)
    decoded.clear()
    assert torch.equal(open_dataset(str(folder)).train().images, expected)
    assert decoded == []
    assert (entry / "facts.json").read_bytes() == before
    (entry / "images.npy").write_bytes((entry / "images.npy").read_bytes()[:-1] + b"x")
    with pytest.raises(StorageError, match="must be writable"):
        open_dataset(str(folder)).train()


@pytest.mark.parametrize("size", [0, 50, 128])
def test_a_cut_off_file_is_decoded_again(folder: Path, ddray_home: Path, size: int) -> None:
    expected = open_dataset(str(folder)).train().images
    (entry,) = (ddray_home / "packed").iterdir()
    os.truncate(entry / "images.npy", size)
    assert torch.equal(open_dataset(str(folder)).train().images, expected)
    assert names(ddray_home) == [entry.name]


def test_what_was_computed_of_damaged_images_is_forgotten(
    folder: Path, ddray_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_IN_MEMORY_BYTES", 1)
    expected = open_dataset(str(folder))
    facts = expected.mean, expected.fingerprint
    (entry,) = (ddray_home / "packed").iterdir()
    remembered = sorted(entry.glob("remembered-*.json"))
    assert len(remembered) == 2
    remembered[0].write_text('"of damaged images"')
    with (entry / "images.npy").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    again = open_dataset(str(folder))
    assert (again.mean, again.fingerprint) == facts


def test_blocks_of_another_cut_are_left_out(
    folder: Path, ddray_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = open_dataset(str(folder)).train()
    shutil.rmtree(ddray_home)
    with pytest.raises(KeyboardInterrupt):
        open_until(folder, 17, KeyboardInterrupt())
    monkeypatch.setattr(parquet, "_BATCH", 6)  # as of another version
    split = open_dataset(str(folder)).train()
    assert torch.equal(split.images, expected.images)
    assert torch.equal(split.labels, expected.labels)
    (entry,) = (ddray_home / "packed").iterdir()
    _, *blocks = map(json.loads, (entry / "blocks.jsonl").read_text().splitlines())
    assert sorted(block["start"] for block in blocks) == [0, 6, 12, 18]
    os.utime(entry / "images.npy", ns=(1, 1))
    monkeypatch.setattr(packing, "_make", None)  # it is whole
    assert torch.equal(open_dataset(str(folder)).train().images, expected.images)


def test_a_lock_waits_out_a_folder_that_its_last_owner_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = Path.open, 0

    def moved(path: Path, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            path.parent.rmdir()
        return original(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", moved)
    with packing._locked(tmp_path / "x.partial"):
        assert (tmp_path / "x.partial" / "lock").exists()
    assert calls == 2


def test_a_changed_label_is_noticed(folder: Path, ddray_home: Path, decoded: list[str]) -> None:
    open_dataset(str(folder))
    (entry,) = (ddray_home / "packed").iterdir()
    np.save(entry / "labels.npy", np.zeros(NUM, dtype=np.int64))
    decoded.clear()
    assert open_dataset(str(folder)).train().labels.tolist() == [0, 1] * (NUM // 2)
    assert decoded == []


def test_a_disk_without_space_is_refused_before_anything_is_decoded(
    folder: Path, ddray_home: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2000, 1500, 500))  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match=r"20 images of 1x8x8 take 0\.00 GiB in .*free; set \$DDRAY_HOME"):
        open_dataset(str(folder))
    assert decoded == names(ddray_home) == []


def test_the_size_is_told_beforehand(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(packing, "_IN_MEMORY_BYTES", 1)
    open_dataset(str(folder))
    assert any(line.startswith("20 images of 1x8x8 take 0.00 GiB in ") for line in caplog.messages)


def test_a_broken_image_leaves_nothing(
    folder: Path, ddray_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError):
        open_until(folder, 19, InputError("image must be readable"))
    assert names(ddray_home) == []


@pytest.mark.parametrize("when", ["opened", "read"])
def test_a_failing_disk_leaves_what_is_decoded(
    tmp_path: Path, ddray_home: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[str], when: str
) -> None:
    for number, image in enumerate(random_images(12, (3, 16, 16))):
        write_png(tmp_path / "i" / f"class{number % 2}" / f"{number}.png", image)
    monkeypatch.setattr(folders, "_BATCH", 4)

    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def opened(path: Path, *arguments: Any, **options: Any) -> Any:
        is_due = path.suffix == ".png" and len(decoded) > 8
        if is_due and when == "opened":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return Failing() if is_due else original(path, *arguments, **options)

    original = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        with pytest.raises(StorageError, match=r"png: .*Input/output error; check the disk"):
            open_dataset(str(tmp_path / "i"))
    (partial,) = names(ddray_home)
    assert partial.endswith(".partial")
    decoded.clear()
    open_dataset(str(tmp_path / "i"))
    assert 0 < len(decoded) <= 8


def test_of_several_readers_one_decodes(folder: Path, decoded: list[str]) -> None:
    results: list[torch.Tensor] = []
    readers = [
        threading.Thread(target=lambda: results.append(open_dataset(str(folder)).train().images))
        for _ in range(4)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert len(results) == 4
    assert all(torch.equal(images, results[0]) for images in results)
    assert len(decoded) == NUM


def test_blocks_are_lines_with_the_labels(folder: Path, ddray_home: Path) -> None:
    open_dataset(str(folder))
    (entry,) = (ddray_home / "packed").iterdir()
    head, *blocks = map(json.loads, (entry / "blocks.jsonl").read_text().splitlines())
    assert (head["num"], head["shape"]) == (NUM, [1, 8, 8])
    assert [block["start"] for block in blocks] == [0, 4, 8, 12, 16]
    assert all(len(block["parts"]) == 2 and block["labels"] == [0, 1, 0, 1] for block in blocks)


def test_a_survey_reads_headers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        write_png(tmp_path / "i" / name / "0.png", random_images(1, (3, 16, 16))[0])
    monkeypatch.setattr(packing, "_decode", lambda *_: pytest.exit("no header alone"))
    monkeypatch.setattr(Item, "read", None)
    from ddray.data.folders import layout_of_folder

    layout = layout_of_folder(tmp_path / "i")
    assert layout is not None
    from ddray.data.sources import survey

    source = layout.train.args[0]  # type: ignore[attr-defined]
    assert survey(source).shape == (3, 16, 16)
