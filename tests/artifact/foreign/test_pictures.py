"""Folders of pictures by class, as SRe2L, RDED, D3HR, Minimax and `ddray export` write them."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import save_image

from ddray.artifact.distilled_set import DistilledSet
from ddray.artifact.export import export_folder
from ddray.artifact.foreign import ForeignRequest
from ddray.artifact.foreign.pictures import labels_of
from ddray.artifact.reading import dataset_of, load
from ddray.data import Dataset
from ddray.errors import InputError

CLASSES, IPC = 3, 2


@pytest.fixture
def dataset(toy: Any) -> Dataset:
    opened: Dataset = toy()
    return opened


def drawn(label: int, number: int, size: int = 16) -> Tensor:
    """A picture's pixels in 0..1, in steps of 1/255."""
    generator = torch.Generator().manual_seed(10 * label + number)
    return torch.randint(0, 256, (3, size, size), generator=generator) / 255


def normalized(pixels: Tensor, dataset: Dataset) -> Tensor:
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (dataset.mean, dataset.std))
    return (pixels - mean) / std


def by_number(folder: Path, name: str, digits: int, suffix: str) -> None:
    """Pictures in folders of classes, as `save_images` of SRe2L and of RDED write them."""
    for class_id in range(CLASSES):
        dir_path = folder / name.format(class_id)
        dir_path.mkdir(parents=True)
        for ipc_id in range(IPC):
            image_np = drawn(class_id, ipc_id).numpy().transpose((1, 2, 0))
            picture = Image.fromarray((image_np * 255).round().astype(np.uint8))
            picture.save(dir_path / f"class{class_id:0{digits}d}_id{ipc_id:0{digits}d}.{suffix}")


def sre2l(folder: Path, suffix: str = "png") -> None:
    """The suffix is SRe2L's own .jpg, or of a follower that keeps the pixels."""
    by_number(folder, "new{:03d}", 3, suffix)


def rded(folder: Path) -> None:
    by_number(folder, "{:05d}", 5, "png")


def minimax(folder: Path) -> None:
    """`sample.py`: folders named by class, pictures by number (here the classes' names are not WordNet's)."""
    for class_id in range(CLASSES):
        (folder / f"class {class_id}").mkdir(parents=True)
        for number in range(IPC):
            save_image(drawn(class_id, number) * 2 - 1, folder / f"class {class_id}" / f"{number}.png",
                       normalize=True, value_range=(-1, 1))  # fmt: skip


@pytest.mark.parametrize("write", [sre2l, rded, minimax])
def test_pictures_are_decoded_and_normalised(write: Any, dataset: Dataset, tmp_path: Path) -> None:
    write(tmp_path / "syn")

    loaded = load(tmp_path / "syn", ForeignRequest(dataset))

    assert loaded.labels.tolist() == [0, 0, 1, 1, 2, 2]
    expected = torch.stack([drawn(label, number) for label in range(CLASSES) for number in range(IPC)])
    torch.testing.assert_close(loaded.images, normalized(expected, dataset))
    meta = loaded.meta
    assert (meta.ipc, meta.pixel_space, meta.mean, meta.arch) == (2, "normalized", dataset.mean, "convnet3")
    assert meta.method == "file:syn"


def test_jpegs_are_nearly_the_same(dataset: Dataset, tmp_path: Path) -> None:
    sre2l(tmp_path / "syn", "jpg")

    loaded = load(tmp_path / "syn", ForeignRequest(dataset))

    assert loaded.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert loaded.images.shape == (6, 3, 16, 16)


def test_pictures_beside_the_class_folders_are_left_out_with_a_word(
    dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rded(tmp_path / "syn")
    save_image(drawn(0, 0), tmp_path / "syn" / "grid.png")

    assert len(load(tmp_path / "syn", ForeignRequest(dataset)).images) == 6
    assert "syn: left out 1 files outside the folders of classes: grid.png" in caplog.text


def test_other_sizes_become_the_datasets(toy: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = toy(shape=(3, 8, 8))
    rded(tmp_path / "syn")

    loaded = load(tmp_path / "syn", ForeignRequest(small))

    assert loaded.meta.image_shape == (3, 8, 8)
    assert "resized" in caplog.text
    means = torch.stack([drawn(label, number) for label in range(CLASSES) for number in range(IPC)])
    pixels = loaded.space().decode(loaded.images)
    torch.testing.assert_close(pixels.mean((1, 2, 3)), means.mean((1, 2, 3)), atol=0.02, rtol=0)


class TestExported:
    @pytest.fixture
    def exported(self, toy: Any, planned: Any, tmp_path: Path) -> tuple[DistilledSet, Path, Dataset]:
        dataset = toy()
        _, ctx, method = planned("random", dataset, ipc=2)
        method.setup(ctx)
        distilled = method.snapshot()
        export_folder(distilled, tmp_path / "pictures")
        return distilled, tmp_path / "pictures", dataset

    def test_our_own_pictures_are_the_set_again(self, exported: Any) -> None:
        distilled, folder, dataset = exported

        loaded = load(folder, ForeignRequest(dataset))

        order = distilled.labels.argsort(stable=True)
        torch.testing.assert_close(loaded.images, distilled.images[order], atol=1e-5, rtol=0)
        assert loaded.labels.tolist() == distilled.labels[order].tolist()
        assert dataset_of(folder) == "toy"
        assert loaded.meta.config == distilled.meta.config
        assert (loaded.meta.arch, loaded.meta.seed) == (distilled.meta.arch, distilled.meta.seed)

    def test_without_their_meta_they_are_any_projects(self, exported: Any) -> None:
        _, folder, dataset = exported
        (folder / "meta.json").unlink()

        assert load(folder, ForeignRequest(dataset)).labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert dataset_of(folder) is None

    def test_a_broken_meta_and_unlabelled_pictures_are_refused(self, exported: Any) -> None:
        _, folder, dataset = exported
        (folder / "meta.json").write_text("[1]")
        with pytest.raises(InputError, match=r"meta\.json must be a JSON object that ddray export wrote"):
            load(folder, ForeignRequest(dataset))
        for name in ("0_class-0", "1_class-1"):
            shutil.rmtree(folder / name)
        (folder / "2_class-2").rename(folder / "unlabelled")
        (folder / "meta.json").unlink()
        with pytest.raises(InputError, match="must hold targets too"):
            load(folder, ForeignRequest(dataset))


class TestNames:
    def labels(self, dataset: Dataset, *folders: str) -> list[int]:
        return labels_of(Path("/syn"), list(folders), dataset)

    def test_wordnet_ids_and_numbers_count_in_the_order_of_folders(self, toy: Any) -> None:
        woof = toy(counts=(1,) * 10, name="imagewoof")  # the catalog's order is not the sorted one

        assert self.labels(woof, "n02096294", "n02093754", "n02105641") == [0, 1, 9]
        assert self.labels(woof, "00000", "00001") == [4, 6]  # n02086240, n02087394

    def test_tiny_imagenets_ids_are_its_labels_if_all_are_there(self, toy: Any) -> None:
        tiny = toy(name="tiny_imagenet")

        assert self.labels(tiny, "n01443537", "n01629819", "n01641577") == [0, 1, 2]
        with pytest.raises(InputError, match=r"names, numbers \(0\.\.2\) or WordNet ids of tiny_imagenet's"):
            self.labels(tiny, "n01443537", "n01629819")

    def test_numbers_that_are_other_classes_names_are_refused(self, dataset: Dataset) -> None:
        numbered = dataclasses.replace(dataset, class_names=("1", "2", "3"))

        assert self.labels(numbered, "1", "3") == [0, 2]
        assert self.labels(numbered, "00000", "00002") == [0, 2]
        with pytest.raises(InputError, match="got '2'"):
            self.labels(numbered, "0", "1", "2")

    @pytest.mark.parametrize("folders", [("new000", "new003"), ("0", "00"), ("new000", "dogs"), ("cats",)])
    def test_other_names_are_refused(self, folders: tuple[str, ...], dataset: Dataset) -> None:
        with pytest.raises(InputError, match=r"class folders of /syn must bear the names, numbers"):
            self.labels(dataset, *folders)


@pytest.mark.parametrize("text", ["{", "[1]", pytest.param("[" * 100_000, id="deep")])
def test_a_damaged_description_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text(text)

    with pytest.raises(InputError, match=r"meta\.json must be a JSON object that ddray export wrote"):
        dataset_of(tmp_path)
