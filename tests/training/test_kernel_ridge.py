"""Kernel ridge regression and its gradients against autograd through an inverse, in float64; LAMB."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ddray.training.kernel_ridge import KernelRidge
from ddray.training.lamb import Lamb


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(gram: Tensor, targets: Tensor, cross: Tensor, expected: Tensor, *, detach: bool) -> Tensor:
    penalty = 1e-2 * gram.diagonal().mean()
    penalty = penalty.detach() if detach else penalty
    inverse = torch.linalg.inv(gram + penalty * torch.eye(len(gram)).double())
    return (cross @ inverse @ targets - expected).square().sum() / 2


@pytest.mark.parametrize("detach", [False, True])
def test_gradients_are_those_of_autograd_with_the_penalty_attached(detach: bool) -> None:
    half, targets, cross, expected = (
        drawn(6, 6),
        drawn(6, 3, seed=1),
        drawn(9, 6, seed=2),
        drawn(9, 3, seed=3),
    )
    gram = half @ half.T
    leaves = gram.clone().requires_grad_(), targets.clone().requires_grad_()
    in_gram, in_targets = torch.autograd.grad(loss_of(*leaves, cross, expected, detach=detach), leaves)

    fit = KernelRidge(gram, targets, 1e-2)
    residual = cross @ fit.alpha - expected
    result = fit.gradients(cross.T @ residual)

    torch.testing.assert_close(result[1], in_targets, rtol=1e-9, atol=1e-9)
    assert torch.allclose(result[0], in_gram, rtol=1e-8, atol=1e-8) is not detach


def test_a_matrix_that_is_not_positive_gives_no_numbers() -> None:
    fit = KernelRidge(-torch.eye(3).double(), drawn(3, 2), 1e-6)
    assert bool(fit.alpha.isnan().all())


def test_lamb_moves_a_tensor_by_a_share_of_its_norm() -> None:
    """Two steps by hand, on two tensors of different norms and one without a gradient."""
    params = [drawn(4).requires_grad_(), (100 * drawn(3, 2, seed=1)).requires_grad_(), torch.ones(1)]
    before, gradients = [param.detach().clone() for param in params], [drawn(4, seed=2), drawn(3, 2, seed=3)]
    optimizer = Lamb(params, lr=0.1)
    means = [torch.zeros_like(gradient) for gradient in gradients]
    squares = [torch.zeros_like(gradient) for gradient in gradients]
    for step in (1, 2):
        for index, gradient in enumerate(gradients):
            params[index].grad = step * gradient
            means[index] = 0.9 * means[index] + 0.1 * step * gradient
            squares[index] = 0.999 * squares[index] + 0.001 * (step * gradient) ** 2
            update = means[index] / (1 - 0.9**step) / ((squares[index] / (1 - 0.999**step)).sqrt() + 1e-6)
            before[index] = before[index] - 0.1 * before[index].norm() / update.norm() * update
        optimizer.step()
    for param, expected in zip(params, before, strict=True):
        torch.testing.assert_close(param.detach(), expected, rtol=1e-9, atol=1e-9)


def test_a_tensor_of_zeros_takes_adams_own_step() -> None:
    param = torch.zeros(3).double().requires_grad_()
    param.grad = torch.tensor([1.0, -2.0, 4.0]).double()
    Lamb([param], lr=0.1).step()
    torch.testing.assert_close(param.detach(), torch.tensor([-0.1, 0.1, -0.1]).double(), rtol=1e-5, atol=0)
