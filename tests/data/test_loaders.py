from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ddray.data import dataset_names, normalized_space, open_dataset
from ddray.errors import DdrayError, InputError
from tests.data.data_files import random_images, write_cifar, write_idx


def test_digits_needs_no_files_and_has_a_fixed_split() -> None:
    data = open_dataset("digits")
    assert data.image_shape == (1, 16, 16)
    assert data.class_names == tuple("0123456789")
    assert not data.can_flip
    assert len(data.train()) + len(data.test()) == 1797
    per_class = torch.bincount(data.test().labels)
    assert int(per_class.min()) >= 34
    assert int(per_class.max()) <= 37
    assert data.train().images.dtype == torch.uint8
    assert int(data.train().images.max()) == 255
    assert data.fingerprint == open_dataset("digits").fingerprint
    encoded = normalized_space(data).encode(data.train().images)
    assert abs(float(encoded.mean())) < 1e-4
    assert float(encoded.std()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_torchvisions_idx_files(tmp_path: Path, name: str, folder: str) -> None:
    images = random_images(20, (1, 28, 28))
    labels = [i % 10 for i in range(20)]
    write_idx(tmp_path, folder, "train", images, labels)
    write_idx(tmp_path, folder, "t10k", images[:10], labels[:10])
    data = open_dataset(name, data_dir=tmp_path)
    assert torch.equal(data.train().images, torch.from_numpy(images))
    assert data.train().labels.tolist() == labels
    assert len(data.test()) == 10
    (tmp_path / folder / "raw" / "t10k-images-idx3-ubyte").unlink()
    (tmp_path / folder / "raw" / "t10k-labels-idx1-ubyte").write_bytes(b"broken")
    broken = open_dataset(name, data_dir=tmp_path)
    assert broken.fingerprint == data.fingerprint
    with pytest.raises(InputError, match="test half"):
        broken.test()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_torchvisions_cifar_batches(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []

    def check(path: str, md5: str | None = None) -> bool:
        checked.append(Path(path).name)
        return True

    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", check)
    written = write_cifar(tmp_path, fine=name == "cifar100")
    data = open_dataset(name, data_dir=tmp_path)
    assert data.class_names[0] == ("apple" if name == "cifar100" else "airplane")
    assert data.num_classes == len(set(data.class_names))
    data.train()
    assert checked
    assert not [file for file in checked if file.startswith("test")]  # a broken test batch disturbs nothing
    for half, split in (("train", data.train()), ("test", data.test())):
        assert torch.equal(split.images, torch.from_numpy(written[half][0]))
        assert split.labels.tolist() == written[half][1]


def test_a_cifar_batch_that_fails_its_checksum_is_refused(tmp_path: Path) -> None:
    write_cifar(tmp_path, fine=False)
    with pytest.raises(InputError, match="train half of CIFAR10"):
        open_dataset("cifar10", data_dir=tmp_path).train()


def test_torchvisions_svhn_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat

    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda *_: True)

    images = random_images(20, (3, 32, 32))
    labels = np.array([[i % 10 or 10] for i in range(20)], dtype=np.uint8)  # 10 means the digit 0
    for half in ("train", "test"):
        savemat(tmp_path / f"{half}_32x32.mat", {"X": images.transpose(2, 3, 1, 0), "y": labels})
    data = open_dataset("svhn", data_dir=tmp_path)
    assert torch.equal(data.train().images, torch.from_numpy(images))
    assert data.train().labels.tolist() == [i % 10 for i in range(20)]
    assert not data.can_flip
    assert len(data.test()) == 20
    (tmp_path / "test_32x32.mat").write_bytes(b"broken")
    broken = open_dataset("svhn", data_dir=tmp_path)
    assert broken.fingerprint == data.fingerprint
    with pytest.raises(InputError, match="test half of SVHN"):
        broken.test()


def test_unknown_names_are_told_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"digits, mnist.*or a folder, got 'cifar_10'; did you mean 'cifar10'"
    ) as caught:
        open_dataset("cifar_10")
    assert caught.value.exit_code == 2
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(InputError, match="or a folder"):
        open_dataset(str(file))


def test_a_missing_dataset_tells_where_it_looked_and_how_to_help(tmp_path: Path) -> None:
    missing = [name for name in dataset_names() if name != "digits"]
    assert len(missing) == 13
    for name in missing:
        with pytest.raises(InputError, match=r"--data-dir or set \$DDRAY_DATA"):
            open_dataset(name)
        with pytest.raises(InputError, match=str(tmp_path / name)):
            open_dataset(name, data_dir=tmp_path)
    with pytest.raises(InputError, match="--download"):
        open_dataset("svhn", data_dir=tmp_path)


def test_only_download_downloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torchvision.datasets

    calls: list[bool] = []

    def fake(root: Path, train: bool, download: bool) -> None:
        calls.append(train)
        print("Downloading")  # noqa: T201
        write_idx(
            root, "MNIST", "train" if train else "t10k", random_images(10, (1, 28, 28)), list(range(10))
        )

    real = torchvision.datasets.MNIST
    monkeypatch.setattr(torchvision.datasets, "MNIST", fake)
    with pytest.raises(InputError):
        open_dataset("mnist", data_dir=tmp_path)
    assert calls == []
    data = open_dataset("mnist", data_dir=tmp_path, download=True)
    assert calls == [True, False]
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(torchvision.datasets, "MNIST", real)
    assert len(data.train()) == 10


def test_a_failed_download_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.SVHN", fail)
    with pytest.raises(DdrayError, match="no network") as caught:
        open_dataset("svhn", data_dir=tmp_path, download=True)
    assert caught.value.exit_code == 1
