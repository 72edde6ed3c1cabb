"""Boost-SSDD's setup and final fit: principal components, float accounting, approximation networks."""

import math
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.artifact.bases import Approximation, perceptron
from ddray.data import PixelSpace

_CHUNK: Final = 1024
_FIT_STEPS: Final = 2000
_FIT_LR: Final = 0.01
_CONSTANT: Final = 1e-4  # of a column's mean: a smaller spread counts as none


@dataclass(frozen=True)
class BudgetSplit:
    """How a budget is spent: U image bases, V target bases, m images, and all floats that are stored."""

    num_image_bases: int
    num_target_bases: int
    num_images: int
    storage_floats: int


def shift_floats(
    num_views: int, width: int, hidden: int, approximation: Approximation, num_images: int = 0
) -> int:
    """Return the floats stored for the views' targets: A networks V -> h -> V, or their replacement."""
    if approximation == "mlp":
        return num_views * (width * hidden + hidden + hidden * width + width)
    if approximation == "bias":
        return num_views * width
    return num_views * width * num_images if approximation == "ideal" else 0


def shrink(images: Tensor, scale: int) -> Tensor:
    """Return images [m, C, H, W] averaged over scale x scale pixels, as rows [m, C*H*W / scale^2]."""
    return F.avg_pool2d(images, scale).flatten(1)


def shrunk_rows(images: Tensor, space: PixelSpace, scale: int, device: torch.device) -> Tensor:
    """Return all real images shrunk, in `space`, float32 [N, d], computed chunk by chunk."""
    return torch.cat([shrink(space.encode(part.to(device)), scale) for part in torch.split(images, _CHUNK)])


def principal_components(rows: Tensor, num: int) -> Tensor:
    """Return the first `num` principal directions [num, d] of rows [N, d], uncentred: no mean to store.

    They are eigenvectors of the second moments, summed in float64.
    """
    moments = rows.new_zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for part in torch.split(rows, _CHUNK):
        chunk = part.double()
        moments.addmm_(chunk.T, chunk)
    vectors: Tensor = torch.linalg.eigh(moments).eigenvectors
    return vectors[:, -num:].flip(1).T.float().contiguous()


def fit_shifts(
    coefficients: Tensor, view_coefficients: Tensor, hidden: int, generator: torch.Generator
) -> tuple[dict[str, Tensor], float]:
    """Train the approximation networks Q_a on the shifts from C^y [m, V] to C^y_a [A, m, V].

    That is Algorithm 1, lines 21-23. Inputs are standardised while training, which is folded into the first
    layer. Returned are the networks' tensors (`ddray.artifact.bases`), and their mean squared error.
    """
    num_views, _, width = view_coefficients.shape
    shifts = view_coefficients - coefficients
    mean, std = coefficients.mean(0), coefficients.std(0, correction=0)
    # Dividing by the spread of a column that hardly varies would fold into weights and biases so large that
    # their difference is lost in float32's rounding.
    std = std.where(std > (_CONSTANT * mean.abs()).clamp_min(1e-6), 1.0)
    inputs = (coefficients - mean) / std
    shapes = ((num_views, hidden, width), (num_views, hidden), (num_views, width, hidden), (num_views, width))
    with torch.enable_grad():
        weights = []
        for shape, fan_in in zip(shapes, (width, width, hidden, hidden), strict=True):
            drawn = (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(fan_in)
            weights.append(drawn.to(coefficients.device).requires_grad_(True))
        optimizer = torch.optim.Adam(weights, lr=_FIT_LR)
        for step in range(_FIT_STEPS):
            optimizer.param_groups[0]["lr"] = _FIT_LR * (1 - step / _FIT_STEPS)
            loss = (perceptron(inputs, *weights) - shifts).square().mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    w1, b1, w2, b2 = (weight.detach() for weight in weights)
    w1 = w1 / std
    tensors = {"hidden_weight": w1, "hidden_bias": b1 - w1 @ mean, "shift_weight": w2, "shift_bias": b2}
    return tensors, float((perceptron(coefficients, *tensors.values()) - shifts).square().mean())
