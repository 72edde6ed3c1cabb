"""The blocks of a ConvNet for training on a CPU, in few passes over memory.

A training step of a ConvNet with instance norms spends up to half of its time outside the convolutions, on
maps that do not fit the cache. Here, for channels_last maps:

- norm, ReLU and average pooling are one operation on a few images at a time. Only the pooled maps are stored;
  the backward pass computes the others anew;
- a convolution of few channels joins them. With the images' patches centred, X [P, K], and its weights W, the
  outputs' variances are diag(W' X'X W) / P, so the norm is folded into weights of each image, and the whole
  block is a matrix product while its map is in the cache.

They round in another order than torch's layers and have no second derivative, so only `training_pass` turns
them on; passes without gradients in bfloat16 take the folded convolution too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Bytes of the part of a map that is worked on at once, of 2 MiB of L2 cache.
_PIECE_BYTES: Final = 2**19
# Inputs of an output pixel up to which a matrix product of the patches beats the convolution.
_MOST_INPUTS: Final = 32
_ON: Final = ContextVar("training_pass", default=False)


@contextmanager
def training_pass() -> Iterator[None]:
    """Let networks take the ways of this module, for a step whose gradients come from `backward()`."""
    token = _ON.set(True)
    try:
        yield
    finally:
        _ON.reset(token)


def in_training_pass() -> bool:
    """Return whether networks may take the ways of this module."""
    return _ON.get()


def _pixels(maps: Tensor) -> Tensor:
    """Return channels_last maps [N, C, H, W] as a view [N, H * W, C]."""
    return maps.permute(0, 2, 3, 1).flatten(1, 2)


def _maps(pixels: Tensor, height: int) -> Tensor:
    """Return pixels [N, H * W, C] as a channels_last view [N, C, H, W]."""
    return torch.unflatten(pixels, 1, (height, -1)).permute(0, 3, 1, 2)


def _windows(pixels: Tensor, height: int) -> Tensor:
    """Return pixels [N, H * W, C] as a view [N, H // 2, 2, W // 2, 2, C]; an odd last row is left out."""
    rows = torch.unflatten(pixels, 1, (height, -1))
    rows = rows[:, : height // 2 * 2, : rows.shape[2] // 2 * 2]
    return torch.unflatten(torch.unflatten(rows, 2, (-1, 2)), 1, (-1, 2))


def _new_maps(like: Tensor, num: int, channels: int, height: int, width: int) -> Tensor:
    size = (num, channels, height, width)
    return torch.empty(size, dtype=like.dtype, memory_format=torch.channels_last)


class _Pieces:
    """Buffers [n, P, C] that stay in the cache, for pieces of maps of `num` images."""

    def __init__(self, num: int, num_pixels: int, channels: int, dtype: torch.dtype, buffers: int) -> None:
        self.size = min(num, max(1, _PIECE_BYTES // (num_pixels * channels * dtype.itemsize)))
        self._buffers = torch.empty(buffers, self.size, num_pixels, channels, dtype=dtype)
        self._rows = torch.full((1, 1, num_pixels), 1 / num_pixels).expand(self.size, 1, num_pixels)

    def buffers(self, num: int) -> Tensor:
        """Return the buffers of a piece of `num` images."""
        return self._buffers if num == self.size else self._buffers[:, :num]

    def mean(self, piece: Tensor) -> Tensor:
        """Return the means over pixels [n, 1, C]: as a matrix product, which is faster than a reduction."""
        return torch.bmm(self._rows[: len(piece)], piece)


def _rectified_pool(pixels: Tensor, height: int, out: Tensor) -> None:
    """Write the 2x2 averages [n, C, H / 2, W / 2] of max(0, pixels), which are changed in place."""
    maps = _maps(pixels.relu_(), height)
    if out.dtype == maps.dtype:
        torch.ops.aten.avg_pool2d.out(maps, [2, 2], [2, 2], out=out)
    else:
        out.copy_(F.avg_pool2d(maps, 2))


def _unpooled_grad(pooled_grad: Tensor, pixels: Tensor, height: int, out: Tensor) -> None:
    """Write 4 times the gradient [n, P, C] before ReLU and pooling; of `pixels` only the signs count."""
    windows = _windows(pixels, height)
    if windows.numel() < pixels.numel():
        out.zero_()
    each = pooled_grad.permute(0, 2, 3, 1)[:, :, None, :, None].expand_as(windows)
    torch.ops.aten.threshold_backward.grad_input(each, windows, 0, grad_input=_windows(out, height))


class _NormBlock(torch.autograd.Function):
    """Instance norm of channels_last maps [N, C, H, W], ReLU and 2x2 average pooling; in float32."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        num, channels, height, width = maps.shape
        pooled = _new_maps(maps, num, channels, height // 2, width // 2)
        pieces = _Pieces(num, height * width, channels, torch.float32, 1)
        means, scales = torch.empty(2, num, 1, channels)
        parts = (torch.split(part, pieces.size) for part in (_pixels(maps), pooled, means, scales))
        for low, out, mean, inverse in zip(*parts, strict=True):
            piece = low.float()
            (normed,) = pieces.buffers(len(piece))
            mean.copy_(pieces.mean(piece))
            variance = pieces.mean(torch.sub(piece, mean, out=normed).square_())
            scale = torch.rsqrt(variance.add_(eps), out=inverse) * weight
            torch.addcmul(bias - mean * scale, piece, scale, out=normed)
            _rectified_pool(normed, height, out)
        ctx.save_for_backward(maps, weight, bias, means, scales)
        return pooled

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, pooled_grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        maps, weight, bias, means, scales = ctx.saved_tensors
        num, channels, height, width = maps.shape
        result = torch.empty_like(maps)
        pieces = _Pieces(num, height * width, channels, torch.float32, 2)
        # Means over pixels of the gradient, and of the gradient times the normalised map.
        grad_means, dot_means = torch.empty(2, num, 1, channels)
        whole = (_pixels(maps), pooled_grad, means, scales, grad_means, dot_means, _pixels(result))
        parts = zip(*(torch.split(part, pieces.size) for part in whole), strict=True)
        for low, out_grad, mean, inverse, grad_mean, dot, out in parts:
            piece = low.float()
            normed, grad = pieces.buffers(len(piece))
            factor = inverse * weight
            torch.addcmul(bias - mean * factor, piece, factor, out=normed)
            _unpooled_grad(out_grad.float(), normed, height, grad)
            torch.mul(pieces.mean(grad), 0.25, out=grad_mean)
            product = pieces.mean(torch.mul(grad, piece, out=normed))
            torch.mul(product.mul_(0.25).addcmul_(mean, grad_mean, value=-1), inverse, out=dot)
            slope = factor * inverse * dot
            torch.addcmul(slope * mean - factor * grad_mean, piece, slope, value=-1, out=normed)
            if out.dtype == normed.dtype:
                torch.addcmul(normed, grad, factor, value=0.25, out=out)
            else:
                out.copy_(normed.addcmul_(grad, factor, value=0.25))
        sums = (means.sum((0, 1)) * height * width for means in (dot_means, grad_means))
        return result, *sums, None


class _PatchBlock(torch.autograd.Function):
    """Products of patches [N, K, P] and weights [N, K, C], ReLU and 2x2 average pooling."""

    @staticmethod
    def forward(ctx: Any, patches: Tensor, weights: Tensor, height: int) -> Tensor:
        num, _, num_pixels = patches.shape
        channels = weights.shape[2]
        pooled = _new_maps(patches, num, channels, height // 2, num_pixels // height // 2)
        pieces = _Pieces(num, num_pixels, channels, patches.dtype, 1)
        parts = (torch.split(part, pieces.size) for part in (patches.transpose(1, 2), weights, pooled))
        for rows, weight, out in zip(*parts, strict=True):
            (pixels,) = pieces.buffers(len(rows))
            _rectified_pool(torch.bmm(rows, weight, out=pixels), height, out)
        ctx.save_for_backward(patches, weights)
        ctx.height = height
        return pooled

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, pooled_grad: Tensor) -> tuple[None, Tensor, None]:
        patches, weights = ctx.saved_tensors
        num, _, num_pixels = patches.shape
        pieces = _Pieces(num, num_pixels, weights.shape[2], patches.dtype, 2)
        result = torch.empty_like(weights)
        whole = (patches, patches.transpose(1, 2), weights, pooled_grad, result)
        for columns, rows, weight, out_grad, out in zip(
            *(torch.split(part, pieces.size) for part in whole), strict=True
        ):
            pixels, grad = pieces.buffers(len(columns))
            torch.bmm(rows, weight, out=pixels)
            _unpooled_grad(out_grad, pixels, ctx.height, grad)
            torch.bmm(columns, grad, out=out)
        return None, result.div_(4), None


def norm_block(norm: nn.GroupNorm, maps: Tensor) -> Tensor:
    """Return the 2x2 averages of the rectified, normalised channels_last maps [N, C, H, W]."""
    args = (maps, norm.weight, norm.bias, norm.eps)
    with torch.autocast("cpu", enabled=False):  # it would round means and variances
        pooled: Tensor = _NormBlock.apply(*args)
    return pooled


def few_inputs(conv: nn.Conv2d, images: Tensor) -> bool:
    """Return whether `conv_norm_block` is the faster way for the convolution and these images."""
    return conv.weight[0].numel() <= _MOST_INPUTS and not images.requires_grad


def conv_norm_block(conv: nn.Conv2d, norm: nn.GroupNorm, images: Tensor) -> Tensor:
    """Return `norm_block(norm, conv(images))` of images [N, C, H, W] without gradient; of stride 1.

    The norm takes out the convolution's bias, whose gradient is zero.
    """
    args = _folded(conv, norm, images)
    with torch.autocast("cpu", enabled=False):
        pooled: Tensor = _PatchBlock.apply(*args)
    return pooled


def takes_low_precision(conv: nn.Conv2d, images: Tensor) -> bool:
    """Return whether `conv_norm` is the faster way: for a pass without gradients in bfloat16."""
    low = torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()
    return low and few_inputs(conv, images)


def conv_norm(conv: nn.Conv2d, norm: nn.GroupNorm, images: Tensor) -> Tensor:
    """Return `norm(conv(images))` of images [N, C, H, W], in channels_last and the autocast's precision."""
    patches, weights, height = _folded(conv, norm, images)
    return _maps(torch.bmm(patches.transpose(1, 2), weights), height)


def _folded(conv: nn.Conv2d, norm: nn.GroupNorm, images: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return patches [N, K + 1, P], each image's weights and shift [N, K + 1, C], and the outputs' height."""
    low = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    with torch.autocast("cpu", enabled=False):
        patches, height = _patches(conv, images.float())
        weight = conv.weight.flatten(1).t()  # [K, C]
        moments = torch.bmm(patches, patches.transpose(1, 2)) / patches.shape[2]
        mean = moments[:, -1:, :-1]  # [N, 1, K]
        covariance = moments[:, :-1, :-1] - mean.transpose(1, 2) * mean
        variance = ((covariance @ weight) * weight).sum(1, keepdim=True)  # [N, 1, C]
        weights = weight * (norm.weight * torch.rsqrt(variance + norm.eps))
        shift = norm.bias - mean @ weights
        if conv.bias is not None:
            shift = shift + 0 * conv.bias
        weights = torch.cat([weights, shift], 1)
    return patches.to(low), weights.to(low), height


def _patches(conv: nn.Conv2d, images: Tensor) -> tuple[Tensor, int]:
    """Return what each output pixel of a convolution sees, and a one, [N, K + 1, P]; and the outputs' height.

    A constant per image and channel is taken off, so that variances are exact to the last digits.
    """
    pad = [int(side) for side in conv.padding]
    padded = F.pad(images, (pad[1], pad[1], pad[0], pad[0])) - images.mean((2, 3), keepdim=True)
    (high, wide) = (int(side) for side in conv.kernel_size)
    windows = padded.unfold(2, high, 1).unfold(3, wide, 1).permute(0, 1, 4, 5, 2, 3)
    patches = images.new_empty(len(images), conv.weight[0].numel() + 1, windows[0, 0, 0, 0].numel())
    patches[:, -1] = 1
    patches[:, :-1].view(windows.shape).copy_(windows)
    return patches, windows.shape[4]
