"""Partition & expansion against up-sampling by hand."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddray.artifact.partition import Partition, compose, expand
from ddray.data import PixelSpace
from ddray.errors import InputError

SHAPES = [(1, 16, 16), (3, 7, 11), (2, 3, 9)]
PARTITIONS = [Partition(factor=f, axes=axes) for f, axes in itertools.product((1, 2, 3), ("both", "time"))]


def weights(size: int, target_size: int) -> Tensor:
    """Bilinear interpolation along one axis as a matrix [wanted, size], corners not aligned."""
    matrix = torch.zeros(target_size, size, dtype=torch.float64)
    for row in range(target_size):
        position = max(0.0, (row + 0.5) * size / target_size - 0.5)
        low = min(int(position), size - 1)
        matrix[row, low] += 1 - (position - low)
        matrix[row, min(low + 1, size - 1)] += position - low
    return matrix


def bounds(size: int, parts: int) -> list[tuple[int, int]]:
    edges = [part * size // parts for part in range(parts + 1)]
    return list(itertools.pairwise(edges))


def by_hand(image: Tensor, partition: Partition) -> list[Tensor]:
    _, height, width = image.shape
    rows = bounds(height, partition.factor if partition.axes == "both" else 1)
    expanded = []
    for (top, bottom), (left, right) in itertools.product(rows, bounds(width, partition.factor)):
        part = image[:, top:bottom, left:right].double()
        expanded.append(weights(bottom - top, height) @ part @ weights(right - left, width).T)
    return expanded


def test_four_pixels_become_four_flat_images() -> None:
    image = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])

    expanded = expand(image, Partition(factor=2))

    assert expanded.shape == (4, 1, 2, 2)
    assert (
        [float(part.min()) for part in expanded] == [float(part.max()) for part in expanded] == [1, 2, 3, 4]
    )


def test_time_is_the_last_axis() -> None:
    image = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])

    expanded = expand(image, Partition(factor=2, axes="time"))

    assert expanded[:, 0].tolist() == [[[1, 1], [3, 3]], [[2, 2], [4, 4]]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("partition", PARTITIONS, ids=str)
def test_expanding_is_bilinear_up_sampling_of_every_part(
    shape: tuple[int, int, int], partition: Partition
) -> None:
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))

    expanded = expand(images, partition)

    expected = torch.stack([part for image in images for part in by_hand(image, partition)])
    assert expanded.shape == (2 * partition.num_parts, *shape)
    torch.testing.assert_close(expanded.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("partition", PARTITIONS, ids=str)
def test_every_stored_pixel_counts(partition: Partition) -> None:
    images = torch.randn(1, 1, 7, 11, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(lambda x: expand(x, partition), (images,))
    (gradient,) = torch.autograd.grad(expand(images, partition).sum(), images)
    assert float(gradient.min()) > 0


@given(factor=st.integers(1, 3), axes=st.sampled_from(["both", "time"]), seed=st.integers(0, 2**32))
def test_it_commutes_with_normalising(factor: int, axes: Any, seed: int) -> None:
    """Stored raw pixels can be normalised before or after: the artifact holds normalised ones."""
    images = torch.rand(2, 3, 8, 6, generator=torch.Generator().manual_seed(seed))
    space, partition = (
        PixelSpace("normalized", (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)),
        Partition(factor=factor, axes=axes),
    )

    torch.testing.assert_close(
        expand(space.encode(images), partition), space.encode(expand(images, partition)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("partition", PARTITIONS, ids=str)
@pytest.mark.parametrize("resize", ["bilinear", "nearest"])
def test_composing_puts_every_image_into_its_part(
    shape: tuple[int, int, int], partition: Partition, resize: Any
) -> None:
    parts = partition.num_parts
    flat = torch.arange(2.0 * parts).view(-1, 1, 1, 1).expand(-1, *shape).contiguous()

    stored = compose(flat, partition, resize)

    assert stored.shape == (2, *shape)
    torch.testing.assert_close(expand(stored, partition), flat)


def test_nearest_takes_pixels_and_bilinear_averages() -> None:
    image = torch.arange(16.0).view(1, 1, 4, 4).repeat(4, 1, 1, 1)

    nearest, smooth = (
        compose(image, Partition(factor=2), mode)[0, 0, :2, :2] for mode in ("nearest", "bilinear")
    )

    assert nearest.tolist() == [[0, 2], [8, 10]]
    assert float(smooth.mean()) == pytest.approx(7.5)
    assert not set(smooth.flatten().tolist()) & set(image.flatten().tolist())


@pytest.mark.parametrize("factor", [0, 4])
def test_the_factor_is_one_to_three(factor: int) -> None:
    with pytest.raises(InputError, match=r"factor: .*got"):
        Partition.parse({"factor": factor})


def test_an_image_smaller_than_the_factor_is_refused() -> None:
    with pytest.raises(InputError, match="factor must be at most the image's side of 2 px, got 3"):
        expand(torch.zeros(1, 1, 2, 8), Partition(factor=3))
    assert expand(torch.zeros(1, 1, 2, 8), Partition(factor=3, axes="time")).shape == (3, 1, 2, 8)
