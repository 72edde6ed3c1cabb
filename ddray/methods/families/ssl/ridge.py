"""Kernel ridge regression of teacher representations on features: Eq 3 and its gradient, in closed form.

The prediction for real features T is T S' (S S' + lambda I)^-1 Y, for features S and targets Y of the
distilled set, both with a bias column. Its gradient needs no graph through the solve, and only one pass
over real features, chunk by chunk. With more samples than features the same is solved as
S (S'S + lambda I)^-1, so that no matrix is larger than the smaller side.
"""

from collections.abc import Iterable
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to this size the solve is in float64, which never fails, so the result needs no check.
_DOUBLE: Final = 4096


class RidgeLoss(NamedTuple):
    """The mean squared error over real samples and dimensions, and its gradients.

    They are those in the distilled features [M, F] and targets [M, D].
    """

    loss: Tensor
    features: Tensor
    targets: Tensor


@torch.no_grad()
def ridge_loss(
    features: Tensor, targets: Tensor, real: Iterable[tuple[Tensor, Tensor]], *, ridge: float
) -> RidgeLoss:
    """Return the outer loss (Eq 3, as a mean) with its gradient in the distilled features and targets.

    Features come without the bias column. `real` yields chunks of features [n, F] and teacher representations
    [n, D]. `ridge` is lambda as a fraction of the Gram matrix's trace (bias column included; held constant).
    """
    s = with_bias(features)
    penalty = ridge * s.square().sum(dtype=torch.float64)
    dual = len(s) <= s.shape[1]
    factor = cholesky(s @ s.T if dual else s.T @ s, penalty)
    alpha = solve(factor, targets if dual else s.T @ targets)
    weights = s.T @ alpha if dual else alpha  # [F + 1, D]
    loss, gradient = _residuals(weights, real)
    if dual:
        in_targets = solve(factor, s @ gradient)
        in_features = alpha @ (gradient - s.T @ in_targets).T
    else:
        z = solve(factor, gradient)
        in_targets = s @ z
        in_features = (targets - s @ weights) @ z.T
    in_features.addmm_(in_targets, weights.T, alpha=-1)
    return RidgeLoss(loss, in_features[:, :-1], in_targets)


def _residuals(weights: Tensor, real: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the mean squared error of real features times `weights` [F + 1, D], and its gradient."""
    loss, gradient, count = weights.new_zeros(()), torch.zeros_like(weights), 0
    for features, representations in real:
        t = with_bias(features)
        residual = t @ weights - representations
        loss += residual.square().sum()
        gradient.addmm_(t.T, residual)
        count += residual.numel()
    return loss / count, gradient.mul_(2 / count)


def with_bias(features: Tensor) -> Tensor:
    """Return features [n, F] with a column of ones [n, F + 1]."""
    return F.pad(features, (0, 1), value=1.0)


def cholesky(gram: Tensor, penalty: Tensor) -> Tensor:
    """Return the lower Cholesky factor of gram + penalty * I [n, n].

    In float64; above 4,096 rows in the matrix's own dtype, with float64 as the fallback.
    """
    if len(gram) > _DOUBLE:
        factor, failed = _factor(gram, penalty, gram.dtype)
        if not bool(failed):
            return factor
        del factor  # before the larger one is allocated
    return _factor(gram, penalty, torch.float64)[0]


def _factor(gram: Tensor, penalty: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the factor in `dtype`, and a number that is nonzero on failure."""
    regularised = gram.to(dtype, copy=True)
    regularised.diagonal().add_(penalty.to(dtype))
    return torch.linalg.cholesky_ex(regularised)  # type: ignore[no-any-return]


def solve(factor: Tensor, right: Tensor) -> Tensor:
    """Return the solution for right-hand sides [n, k], in their dtype."""
    return torch.cholesky_solve(right.to(factor.dtype), factor).to(right.dtype)


def solve_bytes(num_rows: int, num_features: int, num_targets: int) -> int:
    """Return the peak bytes of `ridge_loss` for M rows, F features (without the bias column) and D targets.

    The input features are included.
    """
    size = min(num_rows, num_features + 1)
    # The Gram matrix in float32, its copy and its factor in float64, which a large one falls back to.
    square = size * size * (4 + 2 * 8)
    # The input features, with their bias column, and their gradient; targets, and theirs.
    rows = 4 * num_rows * (3 * (num_features + 1) + 3 * num_targets)
    # Weights, their gradient, and right-hand sides and solutions in float64.
    return square + rows + num_targets * (3 * 4 * (num_features + 1) + 4 * 8 * size)
