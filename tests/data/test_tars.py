"""WebDataset tars, written as `webdataset.ShardWriter` and `tar` write them."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from ddray.data import open_dataset
from ddray.errors import InputError
from tests.data.data_files import png, random_images

IMAGES = random_images(12, (3, 16, 16))
Files = Mapping[str, bytes]


def write_tar(path: Path, samples: Sequence[Files]) -> None:
    """Write the files of samples `0000`, `0001`, ..., by ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for index, files in enumerate(samples):
            for ending, content in files.items():
                info = tarfile.TarInfo(f"{index:04}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def labelled(images: np.ndarray, labels: Sequence[object], ending: str = "cls") -> list[Files]:
    return [
        {"png": png(image), ending: str(label).encode()} for image, label in zip(images, labels, strict=True)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


@pytest.fixture(autouse=True)
def _webdataset() -> None:
    pytest.importorskip("webdataset")


def test_shards_of_two_halves(folder: Path) -> None:
    write_tar(folder / "set-train-000000.tar", labelled(IMAGES[:4], [0, 1, 2, 0]))
    write_tar(folder / "set-train-000001.tar", labelled(IMAGES[4:8], [1, 2, 10, 10]))
    write_tar(folder / "set-test-000000.tar", labelled(IMAGES[8:], [10, 2, 1, 0]))
    data = open_dataset(str(folder))
    assert data.class_names == ("0", "1", "2", "10")
    assert torch.equal(data.train().images, torch.from_numpy(IMAGES[:8]))
    assert data.train().labels.tolist() == [0, 1, 2, 0, 1, 2, 3, 3]
    assert torch.equal(data.test().images, torch.from_numpy(IMAGES[8:]))
    assert data.test().labels.tolist() == [3, 2, 1, 0]


def test_folders_of_shards_with_class_names(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As the sets of CLIP's benchmark: train/0.tar, test/0.tar, classnames.txt."""
    write_tar(folder / "train" / "0.tar", labelled(IMAGES[:6], [0, 1] * 3))
    write_tar(folder / "test" / "0.tar", labelled(IMAGES[6:8], [1, 0]))
    write_tar(folder / "val" / "0.tar", labelled(IMAGES[8:], [0, 1] * 2))
    (folder / "classnames.txt").write_text("wolf\nfox\n")
    data = open_dataset(str(folder))
    assert data.class_names == ("wolf", "fox")
    assert data.test().labels.tolist() == [1, 0]
    assert caplog.messages == [f"{folder}: left out 1 tars of val beside those of test: val/0.tar"]


def test_tars_are_read_once(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What archives of a Mac add is none of them."""
    samples = labelled(IMAGES, [0, 1, 2] * 4)
    samples[3] = {"png": png(IMAGES[3])}
    write_tar(folder / "train.tar", samples)
    (folder / "__MACOSX").mkdir()
    for name in ("._train.tar", "__MACOSX/train.tar", "cover.png"):
        (folder / name).write_bytes(b"no tar")
    fingerprint, lines = open_dataset(str(folder)).fingerprint, caplog.messages[:]
    assert lines[:-1] == [
        f"{folder} has no labelled test part: a fixed 20% of train is test (of sound: each 8th file of a "
        "class)",
        "1 of 12 samples have no image or no label and are left out, such as 0003 in "
        f"{folder}/train.tar (.png)",
        f"{folder}: left out 2 files of another kind: ._train.tar, cover.png",
    ]
    assert "__MACOSX (1 files)" in lines[-1]
    caplog.clear()
    monkeypatch.setitem(sys.modules, "webdataset.tariterators", None)
    again = open_dataset(str(folder))
    assert again.fingerprint == fingerprint
    assert len(again.test()) == 3
    assert caplog.messages == lines


def test_an_unlabelled_test_gives_way_to_validation(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tar(folder / "train.tar", labelled(IMAGES[:6], [0, 1] * 3))
    write_tar(folder / "val.tar", labelled(IMAGES[6:8], [1, 0]))
    write_tar(folder / "test.tar", labelled(IMAGES[8:], [-1] * 4))
    assert open_dataset(str(folder)).test().labels.tolist() == [1, 0]
    assert caplog.messages == [f"{folder}: left out 1 tars of test without labels: test.tar"]


def test_names_and_json_as_labels_of_one_file(folder: Path) -> None:
    samples = [
        {
            "jpeg.txt": b"a caption",
            "png": png(image),
            "json": json.dumps({"label": name, "fine": k % 4}).encode(),
        }
        for k, (image, name) in enumerate(zip(IMAGES, ["dog", "cat"] * 6, strict=True))
    ]
    write_tar(folder / "pets.tar", samples)
    data = open_dataset(str(folder / "pets.tar"))
    assert data.class_names == ("cat", "dog")
    assert torch.bincount(data.test().labels).tolist() == [1, 1]
    image_of = {image.tobytes(): k for k, image in enumerate(IMAGES)}
    for image, label in zip(data.train().images, data.train().labels, strict=True):
        assert int(label) == 1 - image_of[image.numpy().tobytes()] % 2
    fine = open_dataset(str(folder / "pets.tar"), label_column="fine")
    assert fine.class_names == ("0", "1", "2", "3")
    for image, label in zip(fine.train().images, fine.train().labels, strict=True):
        assert int(label) == image_of[image.numpy().tobytes()] % 4


def test_samples_without_image_or_label_are_counted_and_named(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples = labelled(IMAGES, [0, 1, 2] * 4)
    samples[3] = {"png": png(IMAGES[3])}
    samples[5] = {"cls": b"1", "txt": b"lost"}
    samples[7] = {**samples[7], "jpg": b"a mask"}
    write_tar(folder / "train.tar", samples)
    write_tar(folder / "test.tar", labelled(IMAGES[:3], [0, 1, 2]))
    data = open_dataset(str(folder))
    rest = [row for row in range(12) if row not in (3, 5)]
    assert torch.equal(data.train().images, torch.from_numpy(IMAGES[rest]))
    assert data.train().labels.tolist() == [row % 3 for row in rest]
    assert caplog.messages == [
        "2 of 12 samples have no image or no label and are left out, such as 0003 in "
        f"{folder}/train.tar (.png)",
        "1 of 12 samples have several images, of which the first is read, such as 0007 in "
        f"{folder}/train.tar (.png .cls .jpg)",
    ]


def test_tars_that_can_not_be_meant(folder: Path) -> None:
    write_tar(folder / "a" / "folders.tar", [{"wav": b"RIFF"}])
    with pytest.raises(InputError, match=r"an image and a label .*got 0000 in .*folders\.tar \(\.wav\)"):
        open_dataset(str(folder / "a"))
    for content, words in ((b"[1]", "in a JSON object, got list"), (b"[" * 100_000, "text or JSON")):
        write_tar(folder / "e" / "x.tar", [{"png": png(IMAGES[0]), "json": content}])
        with pytest.raises(InputError, match=f"label must be {words}"):
            open_dataset(str(folder / "e"))
    write_tar(folder / "f" / "x.tar", labelled(IMAGES, [0, 1, -1] * 4))
    with pytest.raises(InputError, match=r"whole numbers from 0 on, or names, got \[-1\]"):
        open_dataset(str(folder / "f"))
    (folder / "b").mkdir()
    (folder / "b" / "cut.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(InputError, match=r"tar must be readable, got .*cut\.tar: "):
        open_dataset(str(folder / "b"))
    write_tar(folder / "c" / "test.tar", labelled(IMAGES, [0, 1] * 6))
    with pytest.raises(InputError, match=r"tars must have a train part, got only test in"):
        open_dataset(str(folder / "c"))
    write_tar(folder / "d" / "x.tar", labelled(IMAGES, [0, 1, 2] * 4))
    (folder / "d" / "classes.txt").write_text("one\ntwo\n")
    with pytest.raises(InputError, match=r"labels must lie in 0\.\.1, as there are 2 class names, got 2 in"):
        open_dataset(str(folder / "d"))


def test_without_the_extra_the_message_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "webdataset.tariterators", None)
    write_tar(folder / "x.tar", labelled(IMAGES, [0, 1] * 6))
    with pytest.raises(
        InputError, match=r"tars need the extra webdataset: pip install 'ddray\[webdataset\]'"
    ):
        open_dataset(str(folder))
