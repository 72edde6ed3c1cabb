"""Eq 3 in closed form against a naive ridge regression in float64, by inverse and by autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ddray.methods.families.ssl import ridge as _ridge
from ddray.methods.families.ssl.ridge import cholesky, ridge_loss, solve

RIDGE = 1e-3


def naive(features: Tensor, targets: Tensor, real: Tensor, representations: Tensor, ridge: float) -> Tensor:
    """T S' (S S' + lambda I)^-1 Y with an explicit inverse; lambda is a constant for the gradient."""
    s = torch.cat([features, torch.ones(len(features), 1, dtype=features.dtype)], 1)
    t = torch.cat([real, torch.ones(len(real), 1, dtype=real.dtype)], 1)
    gram = s @ s.T
    penalty = ridge * gram.diagonal().sum().detach()
    predicted = t @ s.T @ torch.linalg.inv(gram + penalty * torch.eye(len(s), dtype=s.dtype)) @ targets
    return (predicted - representations).square().mean()


def case(num: int, dim: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num * 100 + dim)
    shapes = ((num, dim), (num, 4), (21, dim), (21, 4))
    features, targets, real, representations = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    )
    return features, targets, real, representations


@pytest.mark.parametrize(("num", "dim"), [(6, 10), (10, 10), (11, 10), (25, 7)])
@pytest.mark.parametrize("ridge", [1e-6, 1e-3])
def test_loss_and_gradient_equal_the_naive_ones(num: int, dim: int, ridge: float) -> None:
    """Fewer samples than features, as many, one more than the bias column makes up for, and many more."""
    features, targets, real, representations = case(num, dim)
    x, y = features.clone().requires_grad_(), targets.clone().requires_grad_()
    loss = naive(x, y, real, representations, ridge)
    in_features, in_targets = torch.autograd.grad(loss, (x, y))

    chunks = list(zip(real.split(8), representations.split(8), strict=True))
    result = ridge_loss(features, targets, iter(chunks), ridge=ridge)

    torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(result.targets, in_targets, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(result.features, in_features, rtol=1e-5, atol=1e-7)


def test_single_precision_features_give_the_double_precision_gradient() -> None:
    features, targets, real, representations = case(30, 200)
    x, y = features.clone().requires_grad_(), targets.clone().requires_grad_()
    in_features, in_targets = torch.autograd.grad(naive(x, y, real, representations, 1e-6), (x, y))

    result = ridge_loss(
        features.float(), targets.float(), [(real.float(), representations.float())], ridge=1e-6
    )

    for actual, expected in ((result.features, in_features), (result.targets, in_targets)):
        assert actual.dtype == torch.float32
        assert float((actual - expected).norm() / expected.norm()) < 1e-4


def test_chunks_of_real_images_change_nothing() -> None:
    features, targets, real, representations = case(6, 10)
    whole = ridge_loss(features, targets, [(real, representations)], ridge=RIDGE)
    parts = ridge_loss(
        features, targets, zip(real.split(4), representations.split(4), strict=True), ridge=RIDGE
    )
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_large_solve_that_single_precision_cannot_do_is_done_in_double(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_ridge, "_DOUBLE", 2)
    column = torch.arange(1.0, 41.0).unsqueeze(1)
    gram = column @ column.T  # of rank 1, exact in float32: only the penalty makes it definite
    penalty = torch.tensor(1e-4, dtype=torch.float64)
    assert int(torch.linalg.cholesky_ex(gram + 1e-4 * torch.eye(40)).info) > 0

    factor = cholesky(gram, penalty)

    assert factor.dtype == torch.float64
    right = torch.ones(40, 1)
    solution = solve(factor, right)
    assert solution.dtype == torch.float32
    expected = torch.linalg.solve(gram.double() + 1e-4 * torch.eye(40, dtype=torch.float64), right.double())
    torch.testing.assert_close(solution.double(), expected, rtol=1e-4, atol=1e-2)
