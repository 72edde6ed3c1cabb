"""Images that stay on the disk behave as a tensor of the same bytes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ddray.data import Split, carve_val, fit_zca, packed, pixels
from ddray.data.packed import PackedImages, parts_of, read, resident
from ddray.data.pixels import channel_statistics
from ddray.errors import InputError
from tests.data.data_files import random_images

SHAPE = (3, 5, 4)


@pytest.fixture
def pair(ddray_home: Path) -> tuple[PackedImages, Tensor]:
    """40 images on the disk, and the same in memory."""
    folder = ddray_home / "packed" / "a"
    folder.mkdir(parents=True)
    pixels = random_images(40, SHAPE)
    np.save(folder / "images.npy", pixels)
    return PackedImages(folder / "images.npy"), torch.from_numpy(pixels)


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "index": lambda images: images[torch.tensor([7, 3, 3, -1, 12])],
    "mask": lambda images: images[torch.arange(40) % 3 == 0],
    "none": lambda images: images[torch.zeros(0, dtype=torch.int64)],
    "row": lambda images: images[-2],
    "part": lambda images: images[5:9],
    "every other": lambda images: images[::2][3:],
    "corner": lambda images: images[[4, 1], :, :2, 1:],
    "channel": lambda images: images[:, 1],
    "index_select": lambda images: images.index_select(0, torch.tensor([9, 2])),
    "columns": lambda images: images.index_select(3, torch.tensor([1])),
    "float": lambda images: images.float() / 255,
    "joined": lambda images: torch.cat([images[30:], images[:2]]),
    "joined with others": lambda images: torch.cat([images[:2], torch.zeros(1, *SHAPE, dtype=torch.uint8)]),
    "parts": lambda images: torch.cat([part.float() for part in torch.split(images, 7)]),
    "contiguous": lambda images: images.contiguous(memory_format=torch.channels_last)[3:5],
    "same device": lambda images: images.to("cpu").to(torch.float32),
    "array": lambda images: torch.from_numpy(images[3:6].numpy()),
    "sum": lambda images: images.sum((0, 2, 3)),
    "max": lambda images: images.max(),
    "equal": lambda images: torch.tensor(torch.equal(images, images.clone())),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_give_what_a_tensor_in_memory_gives(pair: tuple[PackedImages, Tensor], name: str) -> None:
    images, plain = pair
    result, expected = OPERATIONS[name](images), OPERATIONS[name](plain)
    assert result.dtype == expected.dtype
    assert result.shape == expected.shape
    assert torch.equal(result, expected)


def test_shape_and_size_need_no_pixel(
    pair: tuple[PackedImages, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, plain = pair
    monkeypatch.setattr(packed, "_gather", None)
    assert (images.shape, len(images), images.ndim) == (plain.shape, 40, 4)
    assert (images.nbytes, images.numel(), images.dtype) == (plain.nbytes, plain.numel(), torch.uint8)
    assert not images.is_floating_point()
    assert str(images.device) == "cpu"
    assert "PackedImages(" in repr(images)
    assert copy.deepcopy(images) is images
    whole = Split(images, torch.arange(40) % 4)
    train, val = carve_val(whole, seed=0)
    assert (len(train), len(val)) == (36, 4)
    assert isinstance(torch.cat([train.images, val.images]), PackedImages)


def test_select_and_val_are_those_of_images_in_memory(pair: tuple[PackedImages, Tensor]) -> None:
    images, plain = pair
    labels = torch.arange(40) % 4
    for on_disk, in_memory in zip(
        carve_val(Split(images, labels), seed=1), carve_val(Split(plain, labels), seed=1), strict=True
    ):
        assert isinstance(on_disk.images, PackedImages)
        assert torch.equal(on_disk.images, in_memory.images)
        assert torch.equal(on_disk.labels, in_memory.labels)
    twice = Split(images, labels).select(labels == 2).select(torch.tensor([3, 0]))
    assert torch.equal(twice.images, plain[labels == 2][[3, 0]])


def test_they_are_pickled_by_name(pair: tuple[PackedImages, Tensor], tmp_path: Path) -> None:
    images, plain = pair
    pickled = pickle.dumps(images[::2])
    assert plain.numpy().tobytes()[:20] not in pickled
    assert torch.equal(pickle.loads(pickled), plain[::2])


def test_another_home_has_its_own_copy(
    pair: tuple[PackedImages, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, plain = pair
    pickled = pickle.dumps(images)
    monkeypatch.setenv("DDRAY_HOME", str(tmp_path / "other"))
    assert torch.equal(pickle.loads(pickled), plain)  # the driver's
    local = tmp_path / "other" / "packed" / "a" / "images.npy"
    local.parent.mkdir(parents=True)
    np.save(local, plain.numpy())
    assert str(local) in repr(pickle.loads(pickled))


def test_a_node_without_the_file_is_told(pair: tuple[PackedImages, Tensor]) -> None:
    images, _ = pair
    reopened = pickle.loads(pickle.dumps(images))
    images._file.unlink()
    packed._mapped.cache_clear()
    assert reopened.shape == images.shape
    with pytest.raises(InputError, match=r"readable on every node, got .*images\.npy.*DDRAY_HOME"):
        reopened[[1, 2]]


def test_nothing_is_written_to_them(pair: tuple[PackedImages, Tensor]) -> None:
    images, plain = pair
    with pytest.raises(TypeError, match="can't be written to"):
        images.zero_()
    with pytest.raises(TypeError, match="can't be written to"):
        images[torch.tensor([1])] = 0
    images[[1, 2]].zero_()
    assert torch.equal(images, plain)


def test_all_in_memory_is_refused_with_the_figures(
    pair: tuple[PackedImages, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "_CHECKED_BYTES", 100)
    monkeypatch.setattr(packed, "available_bytes", lambda device: 1000)
    images, plain = pair
    assert torch.equal(images[:10].float(), plain[:10].float())
    with pytest.raises(InputError, match=r"all of 40 images in memory, .*GiB, got .*GiB free"):
        images.float()


def test_reading_ahead_keeps_the_order_and_ends_early(pair: tuple[PackedImages, Tensor]) -> None:
    images, plain = pair
    rows = torch.randperm(40).split(9)
    for source in (images, plain):
        assert torch.equal(torch.cat(list(read(source, rows))), plain[torch.cat(rows)])
        assert torch.equal(torch.cat(list(parts_of(source, 7))), plain)
    assert list(read(images, [])) == []
    assert torch.equal(next(iter(read(images, rows))), plain[rows[0]])
    with pytest.raises(IndexError):
        list(read(images, [torch.tensor([40])]))
    assert resident(images, torch.device("cpu")) is images


def test_statistics_are_those_of_images_in_memory_and_computed_once(
    pair: tuple[PackedImages, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, plain = pair
    expected = channel_statistics(plain)
    assert torch.allclose(torch.tensor(channel_statistics(images)), torch.tensor(expected))
    spaces = [fit_zca(Split(each, torch.zeros(40, dtype=torch.int64))) for each in (images, plain)]
    assert torch.equal(spaces[0].zca_matrix, spaces[1].zca_matrix)  # type: ignore[arg-type]
    monkeypatch.setattr(packed, "_gather", None)
    channel_statistics(images)


@pytest.mark.parametrize(("most", "chunk"), [(4096 * 60, 4096), (4096 * 60 - 1, 7)])
def test_statistics_are_summed_as_in_memory_where_there_is_room(
    pair: tuple[PackedImages, Tensor], monkeypatch: pytest.MonkeyPatch, most: int, chunk: int
) -> None:
    """Their last digits depend on the chunk, and keys on them."""
    monkeypatch.setattr(pixels, "_MOST_VALUES", most)
    monkeypatch.setattr(pixels, "_STATISTICS_VALUES", 7 * 60)
    images, plain = pair
    assert channel_statistics(images) == pixels._statistics(plain, chunk)
    assert plain.dtype == torch.uint8


def test_a_large_read_is_made_in_pieces(
    pair: tuple[PackedImages, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "_PART_BYTES", 200)
    images, plain = pair
    index = torch.randperm(40)
    assert torch.equal(images[index], plain[index])
    assert torch.equal(images.whole(), plain)
