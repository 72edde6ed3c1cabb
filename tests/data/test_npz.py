"""NumPy's .npz files: the values that come out are those that went in."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from ddray.data import Dataset, open_dataset
from ddray.errors import InputError
from tests.data.data_files import random_images

LABELS = np.arange(12) % 3


def colour(num: int = 12, seed: int = 0, size: int = 28) -> np.ndarray:
    """uint8 [num, size, size, 3]"""
    return random_images(num, (3, size, size), seed).transpose(0, 2, 3, 1)


def opened(folder: Path, **arrays: object) -> Dataset:
    np.savez(folder / "a.npz", **arrays)  # type: ignore[arg-type]
    return open_dataset(str(folder / "a.npz"))


def first(images: np.ndarray) -> torch.Tensor:
    """[N, H, W, C] as [N, C, H, W]"""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def test_medmnist(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As PathMNIST's file: uint8 [N, 28, 28, 3], labels uint8 [N, 1], three halves."""
    train, val, test = (colour(12, seed) for seed in range(3))
    labels = LABELS[:, None].astype(np.uint8)
    data = opened(
        tmp_path,
        train_images=train,
        train_labels=labels,
        val_images=val,
        val_labels=labels,
        test_images=test,
        test_labels=labels[::-1],
    )
    assert data.name == str(tmp_path / "a.npz")
    assert data.class_names == ("0", "1", "2")
    assert torch.equal(data.train().images, first(train))
    assert data.train().labels.tolist() == LABELS.tolist()
    assert torch.equal(data.test().images, first(test))
    assert data.test().labels.tolist() == LABELS[::-1].tolist()
    assert caplog.messages == [
        f"{tmp_path}/a.npz: left out 2 arrays of val beside those of test: val_images, val_labels"
    ]


def test_grey_medmnist_without_test_takes_validation(tmp_path: Path) -> None:
    train, val = (colour(12, seed)[..., 0] for seed in range(2))
    data = opened(tmp_path, train_images=train, train_labels=LABELS, val_images=val, val_labels=LABELS)
    assert data.image_shape == (1, 28, 28)
    assert torch.equal(data.test().images, torch.from_numpy(val.copy())[:, None])


def test_keras_keys_channels_first_and_one_hot(tmp_path: Path) -> None:
    train, test = (random_images(12, (3, 20, 24), seed) for seed in range(2))
    data = opened(tmp_path, x_train=train, y_train=np.eye(3)[LABELS], x_test=test, y_test=np.eye(3)[LABELS])
    assert data.image_shape == (3, 20, 24)  # kept, though not square
    assert torch.equal(data.train().images, torch.from_numpy(train))
    assert torch.equal(data.test().images, torch.from_numpy(test))
    assert data.test().labels.tolist() == LABELS.tolist()


def test_without_halves_a_stratified_fifth_is_test(tmp_path: Path) -> None:
    images = colour(30)
    data = opened(tmp_path, images=images, labels=np.arange(30) % 3)
    assert torch.bincount(data.train().labels).tolist() == [8, 8, 8]
    assert torch.bincount(data.test().labels).tolist() == [2, 2, 2]
    seen = {image.numpy().tobytes() for split in (data.train(), data.test()) for image in split.images}
    assert seen == {image.numpy().tobytes() for image in first(images)}


def test_unnamed_arrays_beside_test_are_train(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train, test = colour(), colour(seed=1)
    data = opened(tmp_path, x=train, y=LABELS, x_test=test, y_test=LABELS, ids=LABELS)
    assert torch.equal(data.train().images, first(train))
    assert torch.equal(data.test().images, first(test))
    assert caplog.messages == [
        f"{tmp_path}/a.npz: 2 arrays whose names say no part are train, such as x",
        f"{tmp_path}/a.npz: left out 1 arrays that are neither images nor labels: ids",
    ]


def test_an_unlabelled_test_gives_way_to_validation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arrays: dict[str, object] = {}
    for seed, half in enumerate(("train", "val", "test")):
        arrays |= {f"x_{half}": colour(seed=seed), f"y_{half}": LABELS if half != "test" else LABELS * 0 - 1}
    data = opened(tmp_path, **arrays)
    assert torch.equal(data.test().images, first(colour(seed=1)))
    assert caplog.messages == [f"{tmp_path}/a.npz: left out 2 arrays of test without labels: x_test, y_test"]
    with pytest.raises(InputError, match=r"whole numbers from 0 on, or names, got \[-1\]"):
        opened(tmp_path, images=colour(), labels=LABELS - 1)


def test_headers_that_claim_more_than_the_file_has_are_refused(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 1000, 1000, 3)}
    )
    np.savez(tmp_path / "a.npz", labels=LABELS)
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("images.npy", header.getvalue())
    with pytest.raises(InputError, match=r"images \[1000000000, 1000, 1000, 3\] must fit the 128 bytes"):
        open_dataset(str(tmp_path / "a.npz"))


def test_files_that_unpack_to_more_than_the_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((12, 99, 99), np.uint8), labels=LABELS)
    monkeypatch.setattr("ddray.data.npz.available_bytes", lambda device: 100_000)
    with pytest.raises(InputError, match="must fit the 117740 bytes it has and the 100000 of memory"):
        open_dataset(str(tmp_path / "a.npz"))


def test_labels_are_named_by_what_they_say(tmp_path: Path) -> None:
    """Names are sorted; numbers keep their order, and gaps are no classes."""
    names = np.array(["cat", "ape", "bee"])[LABELS]
    halves = {"train_images": colour(), "test_images": colour()}
    data = opened(tmp_path, **halves, train_labels=names, test_labels=names[::-1])
    assert data.class_names == ("ape", "bee", "cat")
    assert [data.class_names[label] for label in data.train().labels] == names.tolist()
    assert [data.class_names[label] for label in data.test().labels] == names[::-1].tolist()
    numbers = np.array([20, 3, 100])[LABELS]
    data = opened(tmp_path, **halves, train_labels=numbers, test_labels=numbers)
    assert data.class_names == ("3", "20", "100")
    assert data.train().labels.tolist()[:3] == [1, 0, 2]
    data = opened(
        tmp_path, **halves, train_labels=LABELS, test_labels=LABELS, class_names=np.array(["z", "y", "x"])
    )
    assert data.class_names == ("z", "y", "x")
    assert data.train().labels.tolist() == LABELS.tolist()


def test_floats_and_bools_are_read_with_8_bits_and_what_is_lost_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = colour()
    data = opened(tmp_path, images=(images / 255).astype(np.float16), labels=LABELS)
    again = opened(tmp_path, images=images, labels=LABELS)
    assert torch.equal(data.train().images, again.train().images)
    assert not caplog.messages
    dim = images / 255
    dim[3] *= 0.999
    for _ in range(2):  # cached or not
        caplog.clear()
        opened(tmp_path, images=dim, labels=LABELS)
        (line,) = caplog.messages
        assert line.startswith("1 of 12 images are stored with 8 bits (256 levels), such as images of")
        assert line.endswith("a.npz, row 3")
    ink = images > 127
    assert set(opened(tmp_path, images=ink, labels=LABELS).train().images.unique().tolist()) == {0, 255}
    wide = opened(tmp_path, images=images.astype(np.int64), labels=LABELS)
    assert torch.equal(wide.train().images, again.train().images)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            colour() / 127.0,
            r"float images must lie in \[0, 1\], got 0\.\.2\.008 in images of .*a\.npz; divide by",
        ),
        (colour() / 255.0 - 0.5, r"float images must lie in \[0, 1\], got -0\.5\.\.0\.5 in"),
        (np.full((12, 8, 8), np.nan), r"float images must lie in \[0, 1\], got nan\.\.nan in"),
        (colour().astype(np.uint16) * 257, r"integer images must lie in 0\.\.255, got 0\.\.65535 in"),
        (colour() // 128, r"integer images must span 0\.\.255, got 0\.\.1 in"),
        (np.zeros((12, 28, 28, 28), np.uint8), r"with 1 or 3 channels, got \[12, 28, 28, 28\] in"),
        (np.zeros((12, 64), np.uint8), r"images must be \[N, H, W\].*got \[12, 64\] in"),
    ],
)
def test_images_that_can_not_be_meant(images: np.ndarray, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        opened(tmp_path, images=images, labels=LABELS)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS[:7], r"one label for each of 12 images, got \[7\] in labels of"),
        (np.ones((12, 14), np.uint8), r"one label for each of 12 images, got \[12, 14\] in labels of"),
        (
            LABELS + 0.5,
            r"labels must be whole numbers from 0 on, or names, got \[0\.5\] \(float64\) in",
        ),
        (np.array([{}] * 12), r"\.npz file must be readable, got .*a\.npz: Object arrays"),
    ],
)
def test_labels_that_can_not_be_meant(labels: np.ndarray, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        opened(tmp_path, images=colour(), labels=labels)


def test_a_label_of_test_that_train_lacks_is_refused_when_test_is_read(tmp_path: Path) -> None:
    data = opened(
        tmp_path, x_train=colour(), y_train=LABELS, x_test=colour(), y_test=np.where(LABELS == 2, 7, LABELS)
    )
    assert len(data.train()) == 12
    with pytest.raises(InputError, match=r"labels must be among train's \(0, 1, 2\), got '7' in x_test of"):
        data.test()


def test_files_without_the_keys_and_broken_ones(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"must have train_images and train_labels, .*got embeddings, labels in"
    ):
        opened(tmp_path, embeddings=colour(), labels=LABELS)
    with pytest.raises(InputError, match=r"arrays must have a train part, got only test in"):
        opened(tmp_path, test_images=colour(), test_labels=LABELS)
    with pytest.raises(InputError, match=r"one array of train images, got train_images and x_train in"):
        opened(tmp_path, train_images=colour(), x_train=colour(), y_train=LABELS)
    np.save(tmp_path / "b.npy", colour())
    (tmp_path / "b.npy").rename(tmp_path / "a.npz")
    with pytest.raises(InputError, match=r"\.npz file must be readable, got .*a\.npz: "):
        open_dataset(str(tmp_path / "a.npz"))
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(InputError, match=r"\.npz file must be readable, got .*a\.npz: "):
        open_dataset(str(tmp_path / "a.npz"))


def test_the_only_file_of_a_folder_is_read_of_several_one_must_be_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=colour(), labels=LABELS)
    assert open_dataset(str(tmp_path)).fingerprint == open_dataset(str(tmp_path / "a.npz")).fingerprint
    np.savez(tmp_path / "b.npz", images=colour(), labels=LABELS)
    with pytest.raises(InputError, match=r"a folder must hold one \.npz file, got 2 in .*; give .*a\.npz"):
        open_dataset(str(tmp_path))


def test_an_image_size_resizes(tmp_path: Path) -> None:
    flat = np.repeat((np.arange(12, dtype=np.uint8) * 20)[:, None, None], 28, 1).repeat(28, 2)
    np.savez(tmp_path / "a.npz", x_train=flat, y_train=LABELS, x_test=flat, y_test=LABELS)
    data = open_dataset(str(tmp_path / "a.npz"), image_size=14)
    assert data.image_shape == (1, 14, 14)
    assert data.train().images.flatten(1).unique(dim=1).flatten().tolist() == flat[:, 0, 0].tolist()
    assert data.test().images.shape == (12, 1, 14, 14)
