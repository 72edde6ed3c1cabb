"""Decoder `boost_ssdd`: images and targets from bases, coefficients and approximation networks.

Boost-SSDD (Yu et al., ICLR 2025), Algorithm 2 and Sec 3.4: X_s = D(C^x B^x, s), Y_s = C^y B^y; the set is
trained on as {X_s, tau_1(X_s), ..., tau_A(X_s)} with targets {Y_s, Y_s + Q_1(C^y) B^y, ...}.
"""

from collections.abc import Mapping
from typing import Final, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ddray.config import Config
from ddray.errors import InputError, one_line

Augmentation = Literal["rotation", "jigsaw", "crop", "none"]
Approximation = Literal["mlp", "bias", "same", "ideal"]

NUM_VIEWS: Final[dict[Augmentation, int]] = {"rotation": 3, "jigsaw": 3, "crop": 5, "none": 0}
"""A: predefined views besides the image itself (Table 12)."""
_CROP: Final = 5 / 8  # 20 of 32 pixels
_PER_IMAGE: Final = ("images", "targets", "image_coefficients", "target_coefficients")
Tensors = Mapping[str, Tensor]


class Bases(Config):
    """How a set is stored: the parameters of decoder `boost_ssdd`."""

    scale: int = Field(ge=1)
    """s: the bases are up-sampled by this factor."""
    augmentation: Augmentation
    """The predefined views."""
    approximation: Approximation
    """What gives the views' targets: networks Q_a | one shift per view | none | all of them stored."""
    approximation_mse: float | None = None
    """Mean squared error of the approximated shifts, in coefficients (Table 11)."""

    @property
    def num_views(self) -> int:
        """A, the predefined views besides the image itself."""
        return NUM_VIEWS[self.augmentation]


def upsample(flat: Tensor, shape: tuple[int, ...], scale: int) -> Tensor:
    """Return D(.): images [m, C, H*scale, W*scale] of rows [m, C*H*W], bilinear.

    Pixel centres are kept (no aligned corners), so that it commutes with rotations by 90 degrees.
    """
    small = flat.view(-1, *shape)
    if scale == 1:
        return small
    return F.interpolate(small, scale_factor=scale, mode="bilinear", align_corners=False)


def views(images: Tensor, augmentation: Augmentation) -> Tensor:
    """Return {X, tau_1(X), ..., tau_A(X)}, float [(A + 1) * m, C, H, W], view by view; differentiable."""
    turned = (view(images, augmentation, index) for index in range(NUM_VIEWS[augmentation]))
    return torch.cat([images, *turned])


def view(images: Tensor, augmentation: Augmentation, index: int) -> Tensor:
    """Return tau_index of images [m, C, H, W], indices from 0."""
    height, width = images.shape[2:]
    if augmentation == "rotation":
        return images.rot90(index + 1, (2, 3))
    if augmentation == "jigsaw":
        shifts = ((0, width // 2), (height // 2, 0), (height // 2, width // 2))[index]
        return images.roll(shifts, (2, 3))
    size_y, size_x = max(1, int(height * _CROP + 0.5)), max(1, int(width * _CROP + 0.5))
    bottom, right = height - size_y, width - size_x
    top, left = ((0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2))[index]
    cropped = images[:, :, top : top + size_y, left : left + size_x]
    return F.interpolate(cropped, size=(height, width), mode="bilinear", align_corners=False)


def view_coefficients(tensors: Tensors, bases: Bases, coefficients: Tensor) -> Tensor:
    """Return coefficients of the views' targets [A, m, V]: C^y [m, V] + Q_a(C^y), or its substitute."""
    if bases.approximation == "ideal":
        return tensors["view_coefficients"]
    if bases.approximation == "same":
        return coefficients.expand(bases.num_views, -1, -1)
    bias = tensors["shift_bias"]
    if bases.approximation == "bias":
        return coefficients + bias[:, None]
    weights = tensors["hidden_weight"], tensors["hidden_bias"], tensors["shift_weight"]
    return coefficients + perceptron(coefficients, *weights, bias)


def perceptron(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Return all two-layer perceptrons Q_a of x [m, V]: w1 [A, h, V], b1 [A, h], w2 [A, V, h], b2 [A, V]."""
    hidden = (x @ w1.mT + b1[:, None]).relu()
    return hidden @ w2.mT + b2[:, None]


def images_of(tensors: Tensors, bases: Bases) -> Tensor:
    """Return the images without their views, X_s [m, C, H, W]."""
    if "images" in tensors:
        return tensors["images"]
    image_bases = tensors["image_bases"]
    flat = tensors["image_coefficients"] @ image_bases.flatten(1)
    return upsample(flat, image_bases.shape[1:], bases.scale)


def targets_of(tensors: Tensors) -> Tensor:
    """Return the targets of the images themselves, Y_s [m, D]."""
    if "targets" in tensors:
        return tensors["targets"]
    return tensors["target_coefficients"] @ tensors["target_bases"]


def of_images(tensors: Tensors, rows: slice | Tensor) -> dict[str, Tensor]:
    """Return the tensors of a subset of the images; bases and networks stay those of all."""
    selected = {name: tensor[rows] if name in _PER_IMAGE else tensor for name, tensor in tensors.items()}
    if "view_coefficients" in selected:
        selected["view_coefficients"] = selected["view_coefficients"][:, rows]
    return selected


def expand(tensors: Tensors, bases: Bases) -> tuple[Tensor, Tensor]:
    """Return the set as it is trained on: images [(A + 1) m, C, H, W] and targets [(A + 1) m, D]."""
    images = views(images_of(tensors, bases), bases.augmentation)
    targets = targets_of(tensors)
    if bases.num_views == 0:
        return images, targets
    # Without bases the coefficients are the targets themselves.
    moved = view_coefficients(tensors, bases, tensors.get("target_coefficients", targets))
    if "target_bases" in tensors:
        moved = moved @ tensors["target_bases"]
    return images, torch.cat([targets, *moved])


def check(tensors: Tensors, bases: Bases, image_shape: tuple[int, int, int]) -> None:
    """Check the names and shapes of the decoder's tensors; InputError names the first broken rule."""
    parts = ("image_bases", "image_coefficients", "target_bases", "target_coefficients")
    expected = {"images", "targets"} if "images" in tensors else set(parts)
    if bases.num_views:
        expected |= {
            "mlp": {"hidden_weight", "hidden_bias", "shift_weight", "shift_bias"},
            "bias": {"shift_bias"},
            "same": set(),
            "ideal": {"view_coefficients"},
        }[bases.approximation]
    if set(tensors) != expected:
        raise InputError(f"decoder boost_ssdd must hold {sorted(expected)}, got {sorted(tensors)}")
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{name} must be finite float32, got {tensor.dtype}, NaN or infinity")
    try:
        images, targets = expand(tensors, bases)
    except (RuntimeError, ValueError, IndexError) as error:
        raise InputError(
            f"the tensors of decoder boost_ssdd must fit one another: {one_line(error, 120)}"
        ) from error
    if tuple(images.shape[1:]) != image_shape or len(images) != len(targets):
        raise InputError(
            f"decoder boost_ssdd must give images {image_shape} and a target each, "
            f"got {list(images.shape)}, {list(targets.shape)}"
        )
