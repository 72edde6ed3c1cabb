"""Decoder boost_ssdd: reconstruction, views, approximation networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ddray.artifact.bases import NUM_VIEWS, Bases, check, expand, images_of, targets_of, upsample, view, views
from ddray.errors import InputError

M, U, V, D, SHAPE = 5, 4, 3, 7, (2, 4, 4)


def tensors(approximation: str = "mlp", num_views: int = 3, hidden: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "image_bases": (U, *SHAPE),
        "image_coefficients": (M, U),
        "target_bases": (V, D),
        "target_coefficients": (M, V),
    }
    if approximation == "mlp":
        shapes |= {
            "hidden_weight": (num_views, hidden, V),
            "hidden_bias": (num_views, hidden),
            "shift_weight": (num_views, V, hidden),
        }
    if approximation in ("mlp", "bias"):
        shapes["shift_bias"] = (num_views, V)
    if approximation == "ideal":
        shapes["view_coefficients"] = (num_views, M, V)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def bases(**changes: Any) -> Bases:
    return Bases.parse({"scale": 2, "augmentation": "rotation", "approximation": "mlp", **changes})


def test_images_are_upsampled_combinations_of_bases() -> None:
    stored = tensors()
    for sample in range(M):
        small = sum(stored["image_coefficients"][sample, u] * stored["image_bases"][u] for u in range(U))
        expected = torch.nn.functional.interpolate(small[None], size=(8, 8), mode="bilinear")[0]
        torch.testing.assert_close(images_of(stored, bases())[sample], expected)
    torch.testing.assert_close(
        targets_of(stored)[1], stored["target_coefficients"][1] @ stored["target_bases"], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_rotations_commute_with_the_reconstruction(scale: int, index: int) -> None:
    """tau(D(C B)) = D(C tau(B)): a rotated set is the set of rotated bases."""
    stored = tensors()
    rotated = {**stored, "image_bases": view(stored["image_bases"], "rotation", index)}
    spec = bases(scale=scale)

    actual, expected = images_of(rotated, spec), view(images_of(stored, spec), "rotation", index)

    assert actual.shape == (M, 2, 4 * scale, 4 * scale)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(actual, images_of(stored, spec), atol=0.1)


def test_upsampling_keeps_a_constant_image() -> None:
    flat = torch.full((1, 32), 0.7)
    assert torch.allclose(upsample(flat, SHAPE, 4), torch.tensor(0.7))


@pytest.mark.parametrize(
    ("augmentation", "count"), [("rotation", 3), ("jigsaw", 3), ("crop", 5), ("none", 0)]
)
def test_views_stand_behind_the_images_and_let_gradients_through(augmentation: Any, count: int) -> None:
    images = torch.randn(M, 2, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()

    result = views(images, augmentation)

    assert NUM_VIEWS[augmentation] == count
    assert result.shape == ((count + 1) * M, 2, 8, 8)
    assert torch.equal(result[:M], images)
    parts = result.detach().split(M)
    assert len({tuple(part.flatten().tolist()) for part in parts}) == count + 1
    (gradient,) = torch.autograd.grad(result.sum(), images)
    assert bool((gradient >= 0.99).all())  # every pixel is seen by the image itself


def test_rotations_and_jigsaws_are_what_they_say() -> None:
    image = torch.arange(16.0).view(1, 1, 4, 4)
    quarters = [image[..., :2, :2], image[..., :2, 2:], image[..., 2:, :2], image[..., 2:, 2:]]

    def joined(order: tuple[int, int, int, int]) -> Tensor:
        a, b, c, d = (quarters[i] for i in order)
        return torch.cat([torch.cat([a, b], 3), torch.cat([c, d], 3)], 2)

    assert torch.equal(view(image, "jigsaw", 0), joined((1, 0, 3, 2)))  # left with right
    assert torch.equal(view(image, "jigsaw", 1), joined((2, 3, 0, 1)))  # top with bottom
    assert torch.equal(view(image, "jigsaw", 2), joined((3, 2, 1, 0)))
    turned = view(image, "rotation", 0)
    assert torch.equal(view(turned, "rotation", 0), view(image, "rotation", 1))
    assert torch.equal(view(view(image, "rotation", 2), "rotation", 0), image)


def test_crops_are_20_of_32_pixels_in_the_corners_and_the_middle() -> None:
    image = torch.arange(32.0 * 32).view(1, 1, 32, 32)
    origins = [(0, 0), (0, 12), (12, 0), (12, 12), (6, 6)]
    for index, (top, left) in enumerate(origins):
        expected = torch.nn.functional.interpolate(
            image[..., top : top + 20, left : left + 20], size=(32, 32), mode="bilinear"
        )
        assert torch.equal(view(image, "crop", index), expected)


@pytest.mark.parametrize("approximation", ["mlp", "bias", "same", "ideal"])
def test_targets_of_views_follow_the_approximation(approximation: Any) -> None:
    stored = tensors(approximation)
    images, targets = expand(stored, bases(approximation=approximation))
    coefficients, base = stored["target_coefficients"], stored["target_bases"]

    assert len(images) == len(targets) == 4 * M
    torch.testing.assert_close(targets[:M], coefficients @ base)
    for index in range(3):
        if approximation == "mlp":
            hidden = (coefficients @ stored["hidden_weight"][index].T + stored["hidden_bias"][index]).clamp(
                min=0
            )
            moved = coefficients + hidden @ stored["shift_weight"][index].T + stored["shift_bias"][index]
        elif approximation == "bias":
            moved = coefficients + stored["shift_bias"][index]
        elif approximation == "same":
            moved = coefficients
        else:
            moved = stored["view_coefficients"][index]
        part = targets[(index + 1) * M : (index + 2) * M]
        torch.testing.assert_close(part, moved @ base, rtol=1e-5, atol=1e-5)


def test_without_bases_the_networks_work_on_the_targets_themselves() -> None:
    stored = tensors()
    plain = {
        name: value for name, value in stored.items() if "bases" not in name and "coefficients" not in name
    }
    plain |= {"images": torch.randn(M, 2, 8, 8), "targets": stored["target_coefficients"]}
    images, targets = expand(plain, bases())
    assert torch.equal(images[:M], plain["images"])
    _, coefficients = expand({**stored, "target_bases": torch.eye(V)}, bases())
    torch.testing.assert_close(targets, coefficients)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shift_bias": None}, "must hold .*'shift_bias'.*, got"),
        ({"labels": torch.zeros(2)}, r"got \[.*'labels'"),
        ({"target_bases": torch.zeros(V, D, dtype=torch.float64)}, "target_bases must be finite float32"),
        ({"image_coefficients": torch.full((M, U), torch.nan)}, "image_coefficients must be finite"),
        ({"image_coefficients": torch.zeros(M, U + 1)}, "must fit one another"),
        ({"target_coefficients": torch.zeros(M + 1, V)}, "and a target each"),
        ({"image_bases": torch.zeros(U, 2, 3, 3)}, r"must give images \(2, 8, 8\)"),
        ({"hidden_weight": torch.zeros(2, 2, V)}, "must fit one another"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    stored = {name: value for name, value in (tensors() | change).items() if value is not None}
    with pytest.raises(InputError, match=message):
        check(stored, bases(), (2, 8, 8))
    check(tensors(), bases(), (2, 8, 8))
