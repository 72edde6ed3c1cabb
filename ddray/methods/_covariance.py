"""The distance of two sets' covariances by Gram matrices: no d x d matrix is ever formed (DSDM, Eq 5).

With A and B the centred rows of both sets over the square root of their counts, Cov = A'A and B'B, and
||A'A - B'B||^2 = ||AA'||^2 + ||BB'||^2 - 2 ||AB'||^2: exact, for unequal counts too. The three terms cancel
where the sets nearly coincide, so products are summed in float64, a block of columns at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_MOST_COLUMNS = 128
_SHARE = 16  # of the columns in a block: its float64 copy then weighs an eighth of the features


def covariance_distance(real: Tensor, synthetic: Tensor, *, unbiased: bool) -> Tensor:
    """Return the sum over classes of ||Cov real_c - Cov syn_c||_F^2 / d; differentiable in `synthetic`.

    Besides the features it holds n^2 numbers per class for the real images, then m (m + n) for the synthetic
    ones, a block of columns, and the gradient.

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
        dims = real.shape[2]
        scale = (synthetic.shape[1] - less) ** -0.5
        total = _real_gram(real, less).square().sum()
        within, across = _grams(real, synthetic, less)
        total = (total + within.square().sum() - 2 * across.square().sum()) / dims
        if ctx.needs_input_grad[1]:
            gradient = torch.empty_like(synthetic)
            for columns, a, b in _blocks(real, synthetic, less):
                gradient[:, :, columns] = (within @ b).baddbmm_(across, a, alpha=-1).mul_(4 * scale / dims)
            ctx.save_for_backward(gradient)
        return total.to(synthetic.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None]:
        held = ctx.saved_tensors
        return None, grad * held[0] if held else None, None


def _real_gram(real: Tensor, less: int) -> Tensor:
    """Return AA' [K, n, n] in float64."""
    gram = real.new_zeros((real.shape[0], real.shape[1], real.shape[1]), dtype=torch.float64)
    for columns in _columns(real.shape[2]):
        a = _centred(real[:, :, columns], less)
        gram.baddbmm_(a, a.mT)
    return gram


def _grams(real: Tensor, synthetic: Tensor, less: int) -> tuple[Tensor, Tensor]:
    """Return BB' [K, m, m] and BA' [K, m, n] in float64."""
    num_classes, num = synthetic.shape[:2]
    within = synthetic.new_zeros((num_classes, num, num), dtype=torch.float64)
    across = synthetic.new_zeros((num_classes, num, real.shape[1]), dtype=torch.float64)
    for _, a, b in _blocks(real, synthetic, less):
        within.baddbmm_(b, b.mT)
        across.baddbmm_(b, a.mT)
    return within, across


def _blocks(real: Tensor, synthetic: Tensor, less: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield blocks of columns, and A and B of them."""
    for columns in _columns(real.shape[2]):
        yield columns, _centred(real[:, :, columns], less), _centred(synthetic[:, :, columns], less)


def _columns(dims: int) -> Iterator[slice]:
    width = max(1, min(_MOST_COLUMNS, dims // _SHARE))
    for start in range(0, dims, width):
        yield slice(start, min(dims, start + width))


def _centred(values: Tensor, less: int) -> Tensor:
    """Return rows [K, n, b] in float64, less their mean, over sqrt(n - less)."""
    held = values.to(torch.float64, copy=True)
    return held.sub_(held.mean(1, keepdim=True)).mul_((values.shape[1] - less) ** -0.5)
