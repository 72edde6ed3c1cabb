"""The distance of two sets' covariances by Gram matrices: no d x d matrix is ever formed (DSDM, Eq 5).

With A and B the centred rows of both sets over the square root of their counts, Cov = A'A and B'B, and
||A'A - B'B||^2 = ||AA'||^2 + ||BB'||^2 - 2 ||AB'||^2: exact, for unequal counts too. The three terms cancel
where the sets nearly coincide, so products are summed in float64, a block of columns at a time; those of the
synthetic rows, of which a search may take as many as real ones, also a block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_LEAST_ROWS = 48
_MOST_COLUMNS = 128
_FEWER_COLUMNS = 96  # where the gradient leaves less room
_SHARE = 16  # of the columns in a block: its float64 copy then weighs an eighth of the features


def covariance_distance(real: Tensor, synthetic: Tensor, *, unbiased: bool) -> Tensor:
    """Return the sum over classes of ||Cov real_c - Cov syn_c||_F^2 / d; differentiable in `synthetic`.

    Besides the features it holds n^2 float64 per class for the real images; then the gradient, the products
    of a block of synthetic rows with all others, and a block of columns. At n = 256, d = 2048 that stays
    below 2 n^2 + n d floats for every m up to n, the gradient (m d of them) included.

    Args:
        real: features [K, n, d]; they get no gradient.
        synthetic: features [K, m, d].
        unbiased: covariances over n - 1 (authors' code) instead of n (paper).

    Returns:
        A scalar; 0 where a set has one image and so no covariance.
    """
    if min(real.shape[1], synthetic.shape[1]) < 2:
        return synthetic.new_zeros(())
    distance: Tensor = _CovarianceDistance.apply(real, synthetic, unbiased)
    return distance


class _CovarianceDistance(torch.autograd.Function):
    """The distance, with its gradient computed while the Gram matrices are there: 4 (BB'B - BA'A)."""

    @staticmethod
    def forward(ctx: Any, real: Tensor, synthetic: Tensor, unbiased: bool) -> Tensor:
        less = int(unbiased)
        if _fits_at_once(real, synthetic):
            gradient = torch.empty_like(synthetic) if ctx.needs_input_grad[1] else None
            total = _at_once(real, synthetic, less, gradient)
        else:
            means = _means(real), _means(synthetic)
            total = _real_gram(real, means[0], less).square().sum()
            gradient = torch.empty_like(synthetic) if ctx.needs_input_grad[1] else None
            total = total + _synthetic_terms(real, synthetic, means, less, gradient)
        total = total / real.shape[2]
        ctx.gradient, ctx.less = gradient, less
        ctx.save_for_backward(real, synthetic)
        return total.to(synthetic.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None]:
        # Given away and scaled in place: a second copy would weigh as much as all the rest.
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None and ctx.needs_input_grad[1]:  # asked for once more (retain_graph)
            real, synthetic = ctx.saved_tensors
            gradient = torch.empty_like(synthetic)
            _synthetic_terms(real, synthetic, (_means(real), _means(synthetic)), ctx.less, gradient)
        return None, None if gradient is None else gradient.mul_(grad), None


def _fits_at_once(real: Tensor, synthetic: Tensor) -> bool:
    """Tell whether the Gram matrix of both sets' rows, the gradient and a block stay below 2 n^2 + n d."""
    (n, dims), m = real.shape[1:], synthetic.shape[1]
    block = 3 * (n + m) * max(1, min(_MOST_COLUMNS, dims // _SHARE))  # its float32 rows, and in float64
    return 2 * (n + m) ** 2 + m * dims + block <= 2 * n * n + n * dims


def _at_once(real: Tensor, synthetic: Tensor, less: int, gradient: Tensor | None) -> Tensor:
    """Return the sum over classes of ||AA'||^2 + ||BB'||^2 - 2 ||BA'||^2; write the gradient into `gradient`.

    One pass for all products, of rows less the first real one: they are centred afterwards, and then whatever
    all rows of a set have in common falls out of the gradient too.
    """
    n, m, dims = real.shape[1], synthetic.shape[1], real.shape[2]
    scale_real, scale = (n - less) ** -0.5, (m - less) ** -0.5
    gram = real.new_zeros((len(real), n + m, n + m), dtype=torch.float64)
    for columns in _columns(dims):
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
        for columns in _columns(dims):
            found = within @ synthetic[:, :, columns].double()
            found.baddbmm_(across, real[:, :, columns].double(), beta=scale, alpha=-scale_real)
            gradient[:, :, columns] = found.mul_(4 * scale / dims)
    gram.square_()  # in place: the products are not needed any more
    return among.sum() + within.sum() - 2 * across.sum()


def _synthetic_terms(
    real: Tensor, synthetic: Tensor, means: tuple[Tensor, Tensor], less: int, gradient: Tensor | None
) -> Tensor:
    """Return the sum over classes of ||BB'||^2 - 2 ||BA'||^2; write the gradient into `gradient`."""
    total = synthetic.new_zeros((), dtype=torch.float64)
    n, m, dims = real.shape[1], synthetic.shape[1], real.shape[2]
    scale_real, scale = (n - less) ** -0.5, (m - less) ** -0.5
    most = _most_rows(n, m, dims)
    blocks = list(_columns(dims, _MOST_COLUMNS if most == m else _FEWER_COLUMNS))
    for rows in _blocks(m, most):
        within, across = _grams(real, synthetic, means, rows, blocks)
        within.mul_(scale * scale), across.mul_(scale * scale_real)
        total += within.square().sum() - 2 * across.square().sum()
        if gradient is None:
            continue
        for columns in blocks:
            found = within @ _centred(synthetic, means[1], columns)
            found.baddbmm_(across, _centred(real, means[0], columns), beta=scale, alpha=-scale_real)
            gradient[:, rows, columns] = found.mul_(4 * scale / dims)
        del within, across, found  # or they would stand beside the next block's
    return total


def _real_gram(real: Tensor, means: Tensor, less: int) -> Tensor:
    """Return AA' [K, n, n] in float64."""
    gram = real.new_zeros((real.shape[0], real.shape[1], real.shape[1]), dtype=torch.float64)
    for columns in _columns(real.shape[2]):
        a = _centred(real, means, columns)
        gram.baddbmm_(a, a.mT)
    return gram.div_(real.shape[1] - less)


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
        b = b[:, rows].clone()  # the other rows give way to the real ones
        across.baddbmm_(b, _centred(real, means[0], columns).mT)
    return within, across


def _most_rows(n: int, m: int, dims: int) -> int:
    """Return how many synthetic rows are taken at a time, from what the gradient leaves of 2 n^2 + n d.

    About a third of that is for their products (a float64 weighs two numbers); fewer rows would be slow.
    """
    left = 2 * n * n + (n - m) * dims
    parts = max(1, m // max(_LEAST_ROWS, 3 * left // (20 * (n + m))))
    return min(m, -(-m // parts // 8) * 8)  # products of a multiple of 8 rows are the fastest


def _columns(dims: int, most: int = _MOST_COLUMNS) -> Iterator[slice]:
    return _blocks(dims, max(1, min(most, dims // _SHARE)))


def _blocks(length: int, most: int) -> Iterator[slice]:
    """Yield slices of at most `most` that cover `length`."""
    for start in range(0, length, most):
        yield slice(start, min(length, start + most))


def _means(values: Tensor) -> Tensor:
    """Return the rows' means [K, 1, d] in float64."""
    found = values.new_empty((values.shape[0], 1, values.shape[2]), dtype=torch.float64)
    for columns in _columns(values.shape[2]):
        found[:, :, columns] = values[:, :, columns].to(torch.float64).mean(1, keepdim=True)
    return found


def _centred(values: Tensor, means: Tensor, columns: slice) -> Tensor:
    """Return columns of the rows [K, n, b] less their means, in float64."""
    # Converted first: a difference of two types takes five times as long.
    return values[:, :, columns].to(torch.float64, copy=True).sub_(means[:, :, columns])
