"""Kernel ridge regression, and the gradient of a loss of its predictions in closed form.

The prediction for new samples is K_ts (K_ss + lambda I)^-1 Y, lambda = ridge tr(K_ss) / n; in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KernelRidge:
    """A fit to n samples.

    Args:
        gram: K_ss [n, n], symmetric, float64.
        targets: Y [n, D].
        ridge: lambda as a fraction of the mean of the diagonal.

    Attributes:
        alpha: (K_ss + lambda I)^-1 Y [n, D]; predictions are K_ts @ alpha. Not finite if the matrix is not
            positive definite.
    """

    @torch.no_grad()
    def __init__(self, gram: Tensor, targets: Tensor, ridge: float) -> None:
        self._ridge = ridge
        regularised = gram.double().clone()
        diagonal = regularised.diagonal()
        diagonal.add_(ridge * diagonal.mean())
        self._factor, failed = torch.linalg.cholesky_ex(regularised)
        self._factor = torch.where(failed == 0, self._factor, torch.nan)
        self.alpha = torch.cholesky_solve(targets.double(), self._factor)

    @torch.no_grad()
    def gradients(self, in_alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Return a loss's gradients in K_ss [n, n] and Y [n, D], given that in alpha [n, D].

        lambda is not constant. The gradient in K_ts is the caller's: R alpha' for R = dL/d(predictions); then
        `in_alpha` is K_ts' R.
        """
        in_targets = torch.cholesky_solve(in_alpha, self._factor)
        in_gram = -in_targets @ self.alpha.T
        in_gram.diagonal().add_(self._ridge * in_gram.diagonal().mean())
        return in_gram, in_targets
