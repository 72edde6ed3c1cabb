"""Neural tangent kernels of infinitely wide networks, by their closed recursion in float64 (KIP).

With K(x, x') the covariance of a layer's outputs and Th(x, x') the tangent kernel so far, both per pair of
positions (p, q) of two images, in the NTK parameterisation (Jacot et al., NeurIPS 2018; Arora et al., NeurIPS
2019; Nguyen et al., ICLR 2021 and NeurIPS 2021), with sigma_w^2 = 2 and sigma_b^2 = .01 in every layer:

- start: K(p, q) = <x(p), x'(q)> / C, Th = 0.
- dense: K <- sw^2 K + sb^2, Th <- K + sw^2 Th.
- conv 3x3, padded by 0: K <- sb^2 + sw^2 / 9 sum over shifts d of K(p + d, q + d), and Th likewise from K.
- ReLU, with s^2 = K_xx(p, p) K_x'x'(q, q), th = arccos(K / s): K <- s (sin th + (pi - th) cos th) / (2 pi),
  Th <- Th (pi - th) / (2 pi).
- 2x2 average pooling: the mean over the 2x2 x 2x2 pairs. Flatten: the mean over p of (p, p).

At th = 0 (an image with itself) K and Th are halved, and the gradient of th, which has a cusp there, is 0.
Kernels without pooling need no pairs but p = q.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.errors import InputError
from ddray.system.memory import available_bytes

KernelName = Literal["fc1", "fc2", "fc3", "conv3", "convnet3", "convnet"]
KERNELS: Final[tuple[str, ...]] = get_args(KernelName)
_CONVS: Final = ("conv", "relu", "pool") * 3
_LAYERS: Final[dict[str, tuple[str, ...]]] = {
    **{f"fc{depth}": (*("dense", "relu") * depth, "dense") for depth in (1, 2, 3)},
    "conv3": (*("conv", "relu") * 3, "flatten", "dense"),
    "convnet3": (*_CONVS, "flatten", "dense"),
    "convnet": ("conv", "relu", *_CONVS, "flatten", "dense"),
}
_W2: Final = 2.0  # sigma_w^2
_B2: Final = 0.01  # sigma_b^2
# Below this sin^2 th is rounding (some 1e-15), and th counts as 0.
_SMALLEST_SIN2: Final = 1e-12
# Seconds per entry of a pair's maps, one map a layer, forward and backward. CPU: one thread of an AMD EPYC
# took .6 to .8e-7 for conv3 and 1.5 to 2.8e-7 with pooling. CUDA: from the double-precision rate of an H100.
_SECONDS: Final = {"cpu": 1e-7, "cuda": 2e-10}
_MAPS: Final = 16  # maps that a layer's graph holds
_PAIR_FLOATS: Final = 64  # floats that a pair takes at least: kernels of single numbers


def pair_floats(kernel: str, image_shape: tuple[int, int, int]) -> int:
    """Return the entries of all maps of one pair of images (C, H, W), a map per layer.

    Raises:
        InputError: the images are too small for the kernel's poolings.
    """
    _, height, width = image_shape
    if "pool" not in _LAYERS[kernel]:
        return (height * width if "conv" in _LAYERS[kernel] else 1) * len(_LAYERS[kernel])
    if min(height, width) < 8:
        raise InputError(
            f"kernel {kernel} halves the image three times, so its sides must be at least 8 px, got "
            f"{height}x{width}; take conv3"
        )
    total = 0
    for layer in _LAYERS[kernel]:
        height, width = (height // 2, width // 2) if layer == "pool" else (height, width)
        total += (height * width) ** 2
    return total


def pair_bytes(kernel: str, image_shape: tuple[int, int, int]) -> int:
    """Return about how many bytes one pair's graph takes."""
    return 8 * max(_PAIR_FLOATS, _MAPS * pair_floats(kernel, image_shape))


def pairs_at_once(kernel: str, image_shape: tuple[int, int, int], budget: int) -> int:
    """Return how many pairs' graphs fit `budget` bytes; at least 1."""
    return max(1, budget // pair_bytes(kernel, image_shape))


def check_row(kernel: str, image_shape: tuple[int, int, int], num: int, device: torch.device) -> None:
    """Refuse images of which one with all `num` of them, the least that is computed at once, does not fit.

    Raises:
        InputError: naming the memory.
    """
    needed, free = num * pair_bytes(kernel, image_shape) / 2**30, available_bytes(device) / 2**30
    if needed > free:
        raise InputError(
            f"kernel {kernel} of {num} images needs about {needed:,.1f} GiB for one of them with all, "
            f"{device} has {free:.1f} free: take fewer images, kernel=fc1 or conv3"
        )


def hours(kernel: str, image_shape: tuple[int, int, int], num_pairs: int, device: torch.device) -> float:
    """Return about how many hours `num_pairs` kernel values take with their gradients, from a fixed rate."""
    return num_pairs * pair_floats(kernel, image_shape) * _SECONDS[device.type] / 3600


def check_hours(estimate: float, limit: float, what: str, advice: str) -> None:
    """Refuse a computation of more than `limit` hours.

    Raises:
        InputError: naming the hours.
    """
    if estimate > limit:
        raise InputError(f"{what} takes about {estimate:,.0f} hours, more than max_hours={limit:g}: {advice}")


def ntk(kernel: str, x: Tensor, y: Tensor, *, same: Tensor | None = None) -> Tensor:
    """Return the tangent kernel [n, m] of images x [n, C, H, W] and y [m, C, H, W], in float64.

    Differentiable in both. `same` [n, m] is true where the two are one image.
    """
    layers = _LAYERS[kernel]
    x, y = x.double(), y.double()
    if "conv" not in layers:
        x, y = x.flatten(1)[..., None, None], y.flatten(1)[..., None, None]
    return _all_positions(layers, x, y, same) if "pool" in layers else _same_positions(layers, x, y, same)


def gram(kernel: str, x: Tensor) -> Tensor:
    """Return the tangent kernel [n, n] of images x [n, C, H, W] with each other, in float64."""
    return ntk(kernel, x, x, same=torch.eye(len(x), dtype=torch.bool, device=x.device))


def _same_positions(layers: Sequence[str], x: Tensor, y: Tensor, same: Tensor | None) -> Tensor:
    """Return the kernel of layers that need p = q alone; maps are [n, m, H, W], those of x2 [n, H, W]."""
    covariance = torch.einsum("ichw,jchw->ijhw", x, y) / x.shape[1]
    x2, y2 = x.square().mean(1), y.square().mean(1)
    tangent = torch.zeros_like(covariance)
    is_same = None if same is None else same[:, :, None, None]
    for layer in layers:
        if layer == "relu":
            covariance, tangent = _relu(covariance, tangent, x2[:, None] * y2[None], is_same)
            x2, y2 = x2 / 2, y2 / 2
        elif layer == "flatten":
            covariance, tangent, x2, y2 = (
                maps.mean((-2, -1), keepdim=True) for maps in (covariance, tangent, x2, y2)
            )
        else:
            patch = _patches if layer == "conv" else _identity
            x2, y2, covariance, tangent = (patch(maps) for maps in (x2, y2, covariance, tangent))
            x2, y2, covariance = (_W2 * maps + _B2 for maps in (x2, y2, covariance))
            tangent = covariance + _W2 * tangent
    return tangent[:, :, 0, 0]


def _all_positions(layers: Sequence[str], x: Tensor, y: Tensor, same: Tensor | None) -> Tensor:
    """Return the kernel of layers that need all pairs of positions.

    Maps are [..., H, H', W, W'], of a pair of images or of one with itself.
    """
    covariance = torch.einsum("ichw,jcuv->ijhuwv", x, y) / x.shape[1]
    x2, y2 = (torch.einsum("ichw,icuv->ihuwv", images, images) / x.shape[1] for images in (x, y))
    tangent = torch.zeros_like(covariance)
    for layer in layers:
        if layer == "relu":
            at_x, at_y = _diagonal(x2), _diagonal(y2)
            here = _is_diagonal(covariance)
            is_same = None if same is None else same[:, :, None, None, None, None] & here
            scale2 = at_x[:, None, :, None, :, None] * at_y[None, :, None, :, None, :]
            covariance, tangent = _relu(covariance, tangent, scale2, is_same)
            x2, y2 = (
                _relu(maps, None, at[:, :, None, :, None] * at[:, None, :, None, :], here)[0]
                for maps, at in ((x2, at_x), (y2, at_y))
            )
        elif layer == "pool":
            x2, y2, covariance, tangent = (_pooled(maps) for maps in (x2, y2, covariance, tangent))
        elif layer == "flatten":
            covariance, tangent = (_diagonal(maps).mean((-2, -1)) for maps in (covariance, tangent))
        elif layer == "conv":
            x2, y2, covariance = (_W2 * _joint_patches(maps) + _B2 for maps in (x2, y2, covariance))
            tangent = covariance + _W2 * _joint_patches(tangent)
        else:  # dense, after flatten: the images' own are no longer needed
            covariance = _W2 * covariance + _B2
            tangent = covariance + _W2 * tangent
    return tangent


def _relu(
    covariance: Tensor, tangent: Tensor | None, scale2: Tensor, same: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return covariance and tangent after a ReLU; `scale2` is s^2, and th is 0 where `same`."""
    sin2 = scale2 - covariance.square()  # times s^2
    apart = sin2 > _SMALLEST_SIN2 * scale2
    if same is not None:
        apart = apart & ~same
    # The inner `where` keeps the root's infinite derivative at 0 out of the gradient.
    root = torch.where(apart, torch.where(apart, sin2, 1.0).sqrt(), 0.0)
    share = 0.5 - torch.atan2(root, covariance) / (2 * math.pi)
    after = root / (2 * math.pi) + share * covariance
    return after, share if tangent is None else share * tangent


def _identity(maps: Tensor) -> Tensor:
    return maps


def _patches(maps: Tensor) -> Tensor:
    """Return the mean over the 3x3 patch at each position of maps [..., H, W], padded by 0."""
    return F.avg_pool2d(maps, 3, stride=1, padding=1)


def _joint_patches(maps: Tensor) -> Tensor:
    """Return the mean over joint shifts of p and q by a 3x3 patch, of maps [..., H, H', W, W']."""
    return _joint_sum(_joint_sum(maps, -4), -2) / 9


def _joint_sum(maps: Tensor, axis: int) -> Tensor:
    """Return the sum over shifts by -1, 0, 1 of an axis and the next one together; beyond the edge is 0."""
    sizes = maps.shape[axis] - 1, maps.shape[axis + 1] - 1
    later = maps.narrow(axis, 1, sizes[0]).narrow(axis + 1, 1, sizes[1])
    sooner = maps.narrow(axis, 0, sizes[0]).narrow(axis + 1, 0, sizes[1])
    after = [0, 0] * (-axis - 2)  # of the axes behind them
    return maps + F.pad(later, [*after, 0, 1, 0, 1]) + F.pad(sooner, [*after, 1, 0, 1, 0])


def _pooled(maps: Tensor) -> Tensor:
    """Return maps [..., H, H', W, W'] after 2x2 average pooling of both images; an odd last line is left."""
    halves = [size // 2 for size in maps.shape[-4:]]
    for axis, half in zip(range(-4, 0), halves, strict=True):
        maps = maps.narrow(axis, 0, 2 * half)
    cut = maps.reshape(*maps.shape[:-4], *(size for half in halves for size in (half, 2)))
    return cut.mean((-7, -5, -3, -1))


def _diagonal(maps: Tensor) -> Tensor:
    """Return the values at p = q [..., H, W] of maps [..., H, H', W, W']."""
    return maps.diagonal(dim1=-4, dim2=-3).diagonal(dim1=-3, dim2=-2)


def _is_diagonal(maps: Tensor) -> Tensor:
    """Return whether p = q, bool [H, H', W, W'], for maps [..., H, H', W, W']."""
    rows, columns = (torch.eye(size, dtype=torch.bool, device=maps.device) for size in maps.shape[-3::2])
    return rows[:, :, None, None] & columns[None, None]
