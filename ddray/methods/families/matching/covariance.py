"""The distance of two sets' covariances by Gram matrices: no d x d matrix is ever formed (DSDM, Eq 5).

With A and B the centred rows of both sets over the square root of their counts, Cov = A'A and B'B, and
||A'A - B'B||^2 = ||AA'||^2 + ||BB'||^2 - 2 ||AB'||^2: exact, for unequal counts too. The three terms cancel
where the sets nearly coincide, so products are summed in float64, a block of columns at a time; synthetic
rows, which in a search may be as many as the real ones, are also taken in blocks. On a GPU a block has all
rows, and all columns if they fit 1 GiB.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_LEAST_ROWS = 48
_MOST_COLUMNS = 128
_FEWER_COLUMNS = 96  # where the gradient leaves less room
_SHARE = 16  # a block has 1/16 of the columns: its float64 copy is an eighth of the features' size
_GPU_BLOCK = 2**30  # bytes of its float64 copy


def covariance_distance(real: Tensor, synthetic: Tensor, *, unbiased: bool) -> Tensor:
    """Return the sum over classes of ||Cov real_c - Cov syn_c||_F^2 / d; differentiable in `synthetic`.

    The features are `real` [K, n, d], which get no gradient, and `synthetic` [K, m, d]; covariances are over
    n (paper) or, `unbiased`, n - 1 (authors' code). 0 where a set has one image and so no covariance.

    Besides the features it needs, on a CPU, n^2 float64 per class for the real images; then the gradient, the
    products of a block of synthetic rows with all others, and a block of columns. At n = 256, d = 2048 that
    stays below 2 n^2 + n d floats for every m up to n, the gradient (m d of them) included.
    """
    if min(real.shape[1], synthetic.shape[1]) < 2:
        return synthetic.new_zeros(())
    distance: Tensor = _CovarianceDistance.apply(real, synthetic, unbiased)
    return distance


class _CovarianceDistance(torch.autograd.Function):
    """The distance, with its gradient computed while the Gram matrices are there: 4 (BB'B - BA'A)."""

    @staticmethod
    def forward(ctx: Any, real: Tensor, synthetic: Tensor, unbiased: bool) -> Tensor:
        ddof = int(unbiased)
        if real.is_cuda or _fits_at_once(real, synthetic):
            gradient = torch.empty_like(synthetic) if ctx.needs_input_grad[1] else None
            total = _at_once(real, synthetic, ddof, gradient)
        else:
            means = _means(real), _means(synthetic)
            total = _real_gram(real, means[0], ddof).square().sum()
            gradient = torch.empty_like(synthetic) if ctx.needs_input_grad[1] else None
            total = total + _synthetic_terms(real, synthetic, means, ddof, gradient)
        total = total / real.shape[2]
        ctx.gradient, ctx.ddof = gradient, ddof
        ctx.save_for_backward(real, synthetic)
        return total.to(synthetic.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None]:
        # Handed over and scaled in place: a second copy would be as large as everything else.
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None and ctx.needs_input_grad[1]:  # called again (retain_graph)
            real, synthetic = ctx.saved_tensors
            gradient = torch.empty_like(synthetic)
            _synthetic_terms(real, synthetic, (_means(real), _means(synthetic)), ctx.ddof, gradient)
        return None, None if gradient is None else gradient.mul_(grad), None


def _fits_at_once(real: Tensor, synthetic: Tensor) -> bool:
    """Return whether the Gram matrix of both sets' rows, the gradient and a block stay below 2 n^2 + n d."""
    (n, dims), m = real.shape[1:], synthetic.shape[1]
    block = 3 * (n + m) * max(1, min(_MOST_COLUMNS, dims // _SHARE))  # its rows in float32 and in float64
    return 2 * (n + m) ** 2 + m * dims + block <= 2 * n * n + n * dims


def _at_once(real: Tensor, synthetic: Tensor, ddof: int, gradient: Tensor | None) -> Tensor:
    """Return the sum over classes of ||AA'||^2 + ||BB'||^2 - 2 ||BA'||^2; write the gradient into `gradient`.

    One pass for all products, with the first real row subtracted from every row. Centring afterwards also
    removes from the gradient whatever all rows of a set have in common.
    """
    n, m, dims = real.shape[1], synthetic.shape[1], real.shape[2]
    scale_real, scale = (n - ddof) ** -0.5, (m - ddof) ** -0.5
    gram = real.new_zeros((len(real), n + m, n + m), dtype=torch.float64)
    blocks = list(_blocks(dims, _gpu_columns(real, synthetic)) if real.is_cuda else _columns(dims))
    for columns in blocks:
        rows = torch.cat((real[:, :, columns], synthetic[:, :, columns]), 1).double()
        rows.sub_(rows[:, :1].clone())
        gram.baddbmm_(rows, rows.mT)
        del rows
    parts = (gram[:, :n, :n], gram[:, n:, n:], gram[:, n:, :n])
    for part in parts:
        part.sub_(part.mean(2, keepdim=True)).sub_(part.mean(1, keepdim=True))
    counts = (scale_real**2, scale**2, scale * scale_real)
    among, within, across = (part.mul_(count) for part, count in zip(parts, counts, strict=True))
    if gradient is not None:
        for columns in blocks:
            block_gradient = within @ synthetic[:, :, columns].double()
            block_gradient.baddbmm_(across, real[:, :, columns].double(), beta=scale, alpha=-scale_real)
            gradient[:, :, columns] = block_gradient.mul_(4 * scale / dims)
    gram.square_()  # in place: the products are no longer needed
    return among.sum() + within.sum() - 2 * across.sum()


def _synthetic_terms(
    real: Tensor, synthetic: Tensor, means: tuple[Tensor, Tensor], ddof: int, gradient: Tensor | None
) -> Tensor:
    """Return the sum over classes of ||BB'||^2 - 2 ||BA'||^2; write the gradient into `gradient`."""
    total = synthetic.new_zeros((), dtype=torch.float64)
    n, m, dims = real.shape[1], synthetic.shape[1], real.shape[2]
    scale_real, scale = (n - ddof) ** -0.5, (m - ddof) ** -0.5
    max_rows = _most_rows(n, m, dims)
    blocks = list(_columns(dims, _MOST_COLUMNS if max_rows == m else _FEWER_COLUMNS))
    for rows in _blocks(m, max_rows):
        within, across = _grams(real, synthetic, means, rows, blocks)
        within.mul_(scale * scale), across.mul_(scale * scale_real)
        total += within.square().sum() - 2 * across.square().sum()
        if gradient is None:
            continue
        for columns in blocks:
            block_gradient = within @ _centred(synthetic, means[1], columns)
            block_gradient.baddbmm_(across, _centred(real, means[0], columns), beta=scale, alpha=-scale_real)
            gradient[:, rows, columns] = block_gradient.mul_(4 * scale / dims)
        del within, across, block_gradient  # or they would be alive together with the next block's
    return total


def _real_gram(real: Tensor, means: Tensor, ddof: int) -> Tensor:
    """Return AA' [K, n, n] in float64."""
    gram = real.new_zeros((real.shape[0], real.shape[1], real.shape[1]), dtype=torch.float64)
    for columns in _columns(real.shape[2]):
        a = _centred(real, means, columns)
        gram.baddbmm_(a, a.mT)
    return gram.div_(real.shape[1] - ddof)


def _grams(
    real: Tensor, synthetic: Tensor, means: tuple[Tensor, Tensor], rows: slice, blocks: Sequence[slice]
) -> tuple[Tensor, Tensor]:
    """Return rows of BB' [K, r, m] and of BA' [K, r, n] in float64, without the counts."""
    num_classes, num = len(synthetic), rows.stop - rows.start
    within = synthetic.new_zeros((num_classes, num, synthetic.shape[1]), dtype=torch.float64)
    across = synthetic.new_zeros((num_classes, num, real.shape[1]), dtype=torch.float64)
    for columns in blocks:
        b = _centred(synthetic, means[1], columns)
        within.baddbmm_(b[:, rows], b.mT)
        b = b[:, rows].clone()  # frees the other rows before the real ones are taken
        across.baddbmm_(b, _centred(real, means[0], columns).mT)
    return within, across


def _most_rows(n: int, m: int, dims: int) -> int:
    """Return how many synthetic rows are taken at a time, from what the gradient leaves of 2 n^2 + n d.

    About a third of that is for their products (a float64 counts as two numbers); fewer rows would be slow.
    """
    left = 2 * n * n + (n - m) * dims
    parts = max(1, m // max(_LEAST_ROWS, 3 * left // (20 * (n + m))))
    return min(m, -(-m // parts // 8) * 8)  # products of a multiple of 8 rows are the fastest


def _gpu_columns(real: Tensor, synthetic: Tensor) -> int:
    """Return how many columns of both sets a block on a GPU has."""
    return max(1, _GPU_BLOCK // (8 * len(real) * (real.shape[1] + synthetic.shape[1])))


def _columns(dims: int, max_columns: int = _MOST_COLUMNS) -> Iterator[slice]:
    return _blocks(dims, max(1, min(max_columns, dims // _SHARE)))


def _blocks(length: int, max_length: int) -> Iterator[slice]:
    """Yield slices of at most `max_length` that cover `length`."""
    for start in range(0, length, max_length):
        yield slice(start, min(length, start + max_length))


def _means(values: Tensor) -> Tensor:
    """Return the rows' means [K, 1, d] in float64."""
    blocks = (values[:, :, columns].double() for columns in _columns(values.shape[2]))
    return torch.cat([block.mean(1, keepdim=True) for block in blocks], 2)


def _centred(values: Tensor, means: Tensor, columns: slice) -> Tensor:
    """Return columns of the rows [K, n, b] less their means, in float64."""
    # Converted first: a difference of two types takes five times as long.
    return values[:, :, columns].to(torch.float64, copy=True).sub_(means[:, :, columns])
