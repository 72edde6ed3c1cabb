"""The real datasets under $DDRAY_DATA, if there are any."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ddray.data import open_dataset

DATA = Path(os.environ.get("DDRAY_DATA", "/nonexistent"))


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not (DATA / name).exists(), reason=f"no {name} under $DDRAY_DATA")


@pytest.fixture(scope="module")
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache for the module: CIFAR-10 is decoded once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def use_shared_home(ddray_home: Path, shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDRAY_HOME", str(shared_home))


def extracted(name: str, folder: Path) -> Path:
    with tarfile.open(DATA / name) as archive:
        archive.extractall(folder, filter="data")
    return folder


@needs("cifar10")
def test_cifar10() -> None:
    data = open_dataset("cifar10", data_dir=DATA)
    train, test = data.train(), data.test()
    assert torch.bincount(train.labels).tolist() == [5000] * 10
    assert torch.bincount(test.labels).tolist() == [1000] * 10
    assert train.images.shape == (50000, 3, 32, 32)
    mean = train.images.float().mean((0, 2, 3)) / 255
    torch.testing.assert_close(mean, torch.tensor(data.mean), rtol=0, atol=1e-3)
    assert data.class_names[-1] == "truck"


@needs("mnist")
def test_mnist() -> None:
    data = open_dataset("mnist", data_dir=DATA)
    assert (len(data.train()), len(data.test())) == (60000, 10000)
    assert data.image_shape == (1, 28, 28)
    assert float(data.train().images.float().mean()) / 255 == pytest.approx(data.mean[0], abs=1e-3)


@needs("cifar100-12k")
def test_cifar100_by_path() -> None:
    data = open_dataset(str(DATA / "cifar100-12k"))
    assert data.num_classes == 100
    assert data.image_shape == (3, 32, 32)
    assert torch.bincount(data.train().labels).tolist() == [100] * 100
    assert torch.bincount(data.test().labels).tolist() == [20] * 100
    from ddray.data.catalog import KNOWN

    assert data.class_names == KNOWN["cifar100"].class_names


@needs("imagenette224-small.tar")
def test_imagenette(tmp_path: Path) -> None:
    extracted("imagenette224-small.tar", tmp_path / "imagenette")
    data = open_dataset("imagenette", data_dir=tmp_path)
    assert data.image_shape == (3, 128, 128)
    assert data.class_names[0] == "tench"
    assert torch.bincount(data.train().labels).tolist() == [200] * 10
    assert torch.bincount(data.test().labels).tolist() == [50] * 10
    train_folders = list((tmp_path / "imagenette").rglob("train"))
    assert open_dataset(str(train_folders[0].parent)).image_shape == (3, 224, 224)


@needs("fsdd.tar")
def test_spoken_digits(tmp_path: Path) -> None:
    folder = extracted("fsdd.tar", tmp_path) / "fsdd"
    data = open_dataset(str(folder))
    assert (len(data.train()), len(data.test())) == (2700, 300)
    assert data.image_shape == (1, 64, 64)
    assert data.num_classes == 10
    assert bool(data.train().images.isfinite().all())
