from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ddray.training.crops import batched_crops, draw_boxes, padded_crop, random_resized_crop, resized_crops


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [(32, 32), (16, 24)])
def test_boxes_have_the_area_and_ratio_that_were_asked_for(size: tuple[int, int]) -> None:
    height, width = size
    boxes = draw_boxes(4000, size, seeded(), scale=(0.2, 0.6))

    top, left, rows, columns = boxes.double().unbind(1)
    assert bool((top >= 0).all())
    assert bool((top + rows <= height).all())
    assert bool((left >= 0).all())
    assert bool((left + columns <= width).all())
    area, ratio = rows * columns / (height * width), columns / rows
    assert float(area.min()) > 0.15
    assert float(area.max()) < 0.66
    assert float(ratio.min()) > 0.6
    assert float(ratio.max()) < 1.6
    assert float(area.mean()) == pytest.approx(0.4, abs=0.02)
    assert float(ratio.log().mean()) == pytest.approx(0, abs=0.05)
    assert len(set(top.tolist())) > 5


def test_a_ratio_that_never_fits_gives_the_largest_centred_box() -> None:
    boxes = draw_boxes(3, (8, 80), seeded(), scale=(1.0, 1.0), ratio=(1.0, 1.0))

    assert boxes.tolist() == [[0, 36, 8, 8]] * 3


def test_a_crop_is_the_box_resized() -> None:
    images = torch.rand(3, 2, 12, 12, generator=seeded())
    boxes = torch.tensor([[0, 0, 12, 12], [2, 4, 6, 6], [3, 0, 4, 8]])

    crops = resized_crops(images, boxes)

    assert torch.allclose(crops[0], images[0], atol=1e-5)
    for image, crop, (top, left, rows, columns) in zip(
        images[1:], crops[1:], boxes[1:].tolist(), strict=True
    ):
        part = image[None, :, top : top + rows, left : left + columns]
        expected = F.interpolate(part, (12, 12), mode="bilinear", align_corners=False)[0]
        inner = slice(2, -2)  # at its edges a crop sees the image around it, a cut-out part does not
        assert torch.allclose(crop[:, inner, inner], expected[:, inner, inner], atol=1e-4)


@pytest.mark.parametrize(
    ("size", "out"), [((12, 12), (12, 12)), ((32, 20), (16, 10)), ((48, 48), (16, 16)), ((8, 8), (20, 20))]
)
def test_batched_crops_are_resized_as_one_by_one(size: tuple[int, int], out: tuple[int, int]) -> None:
    images = torch.rand(24, 2, *size, generator=seeded(), dtype=torch.float64)
    boxes = draw_boxes(24, size, seeded(1))
    boxes[:3] = torch.tensor([[0, 0, *size], [size[0] - 2, size[1] - 1, 2, 1], [3, 2, 1, 5]])

    crops = batched_crops(images, boxes, out)

    for image, crop, (top, left, rows, columns) in zip(images, crops, boxes.tolist(), strict=True):
        part = image[None, :, top : top + rows, left : left + columns]
        expected = F.interpolate(part, out, mode="bilinear", antialias=True)[0]
        assert torch.allclose(crop, expected, atol=1e-9)


def test_a_flip_mirrors_the_crop() -> None:
    images = torch.rand(2, 1, 8, 8, generator=seeded())
    boxes = torch.tensor([[1, 2, 5, 4]] * 2)
    plain = resized_crops(images, boxes)

    flipped = resized_crops(images, boxes, torch.tensor([True, False]))

    assert torch.allclose(flipped[0], plain[0].flip(-1), atol=1e-5)
    assert torch.allclose(flipped[1], plain[1], atol=1e-6)


def test_half_of_the_images_are_mirrored_and_the_draw_is_the_generators() -> None:
    images = torch.arange(16.0).expand(400, 1, 16, 16).contiguous()

    crops = random_resized_crop(images, seeded(3), scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=True)

    mirrored = (crops[:, 0, 0, 0] > crops[:, 0, 0, -1]).float().mean()
    assert float(mirrored) == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 400))
    again = random_resized_crop(images, seeded(3), scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=True)
    assert torch.equal(crops, again)
    whole = random_resized_crop(images, seeded(), scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert torch.allclose(whole, images, atol=1e-4)


@pytest.mark.parametrize(("factor", "size"), [(1, (32, 32)), (2, (224, 224))])
def test_boxes_of_a_stitched_image_have_at_least_the_area_of_a_part(
    factor: int, size: tuple[int, int]
) -> None:
    """RDED's code crops 1/factor to all of the area: at factor 1 the only box that fits is the image."""
    _, _, rows, columns = draw_boxes(3000, size, seeded(), scale=(1 / factor, 1.0)).double().unbind(1)

    shares = rows * columns / (size[0] * size[1])
    assert float(shares.min()) >= 1 / factor - 1 / size[0]  # by the rounding of both sides
    assert float(shares.max()) <= 1
    if factor == 1:
        assert bool((shares == 1).all())
    else:
        assert float(shares.min()) < 0.51
        assert float(shares.max()) > 0.95


@pytest.mark.parametrize("flip", [False, True])
def test_padded_crops_are_windows_of_the_image_in_a_border(flip: bool) -> None:
    images = torch.rand(500, 2, 5, 6, generator=seeded())
    fill = torch.tensor([-1.0, -2.0]).view(2, 1, 1)

    crops = padded_crop(images, seeded(1), padding=2, fill=fill, flip=flip)

    assert crops.shape == images.shape
    places, mirrored = set(), 0
    for image, crop in zip(images, crops, strict=True):
        border = fill.expand(2, 9, 10).clone()
        border[:, 2:7, 2:8] = image
        windows = {
            (top, left, flipped): border[:, top : top + 5, left : left + 6].flip([-1] if flipped else [])
            for top in range(5)
            for left in range(5)
            for flipped in (False, True)
        }
        (place,) = [place for place, window in windows.items() if torch.equal(window, crop)]
        places.add(place[:2])
        mirrored += place[2]
    assert len(places) == 25
    assert abs(mirrored / 500 - (0.5 if flip else 0)) <= (4 * math.sqrt(0.25 / 500) if flip else 0)
