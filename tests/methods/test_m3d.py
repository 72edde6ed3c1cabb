"""MMD against its definition, pair by pair in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddray.methods.m3d import mmd_loss
from ddray.nets import build_net
from ddray.seeding import derive_seed

KERNELS = ["gaussian", "polynomial", "linear"]


def features(num_classes: int, num: int, dims: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_classes, num, dims, generator=generator, dtype=torch.float64)


def squared(a: list[float], b: list[float]) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def naive(real: Tensor, synthetic: Tensor, kernel: str, num_widths: int) -> float:
    """E k(x, x') + E k(y, y') - 2 E k(x, y) over all pairs, class by class."""
    total = 0.0
    for xs, ys in zip(real.tolist(), synthetic.tolist(), strict=True):
        both = [*xs, *ys]
        pairs = list(itertools.permutations(range(len(both)), 2))
        width = sum(squared(both[i], both[j]) for i, j in pairs) / len(pairs)

        def k(a: list[float], b: list[float], width: float = width) -> float:
            dot = sum(x * y for x, y in zip(a, b, strict=True))
            if kernel == "linear":
                return dot
            if kernel == "polynomial":
                return (dot / len(a) + 1) ** 2
            powers = range(-(num_widths // 2), num_widths - num_widths // 2)
            return sum(math.exp(-squared(a, b) / (width * 2.0**power)) for power in powers)

        def mean(ones: list[list[float]], others: list[list[float]]) -> float:
            return sum(k(a, b) for a in ones for b in others) / (len(ones) * len(others))

        total += mean(xs, xs) + mean(ys, ys) - 2 * mean(xs, ys)
    return total


@pytest.mark.parametrize(
    ("kernel", "sizes", "num_widths"), list(itertools.product(KERNELS, [(4, 3), (1, 5), (6, 1)], [1, 4, 5]))
)
def test_it_is_the_definition(kernel: Any, sizes: tuple[int, int], num_widths: int) -> None:
    real, synthetic = features(3, sizes[0], 4, 1) + 2, features(3, sizes[1], 4, 2)

    actual = mmd_loss(real, synthetic, kernel=kernel, num_widths=num_widths)

    assert float(actual) == pytest.approx(naive(real, synthetic, kernel, num_widths), rel=1e-10)


@pytest.mark.parametrize("kernel", ["polynomial", "linear"])
def test_its_gradient_is_that_of_finite_differences(kernel: Any) -> None:
    real, synthetic = features(2, 4, 3, 3), features(2, 3, 3, 4).requires_grad_(True)

    assert torch.autograd.gradcheck(lambda x: mmd_loss(real, x, kernel=kernel), (synthetic,))


def test_the_width_gets_no_gradient() -> None:
    """The loss must not be lowered by widening the Gaussian."""
    real, synthetic = features(1, 4, 3, 3), features(1, 2, 3, 4).requires_grad_(True)
    both = torch.cat([real[0], synthetic[0].detach()])
    width = float(torch.cdist(both, both).square().sum() / (6 * 5))

    def fixed(syn: Tensor) -> Tensor:
        def k(a: Tensor, b: Tensor) -> Tensor:
            return torch.exp(-(a[:, None] - b[None]).square().sum(2) / width).mean()

        return k(real[0], real[0]) + k(syn[0], syn[0]) - 2 * k(real[0], syn[0])

    actual, expected = mmd_loss(real, synthetic, kernel="gaussian", num_widths=1), fixed(synthetic)
    gradients = [torch.autograd.grad(value, synthetic)[0] for value in (actual, expected)]
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


@given(seed=st.integers(0, 2**32), num=st.integers(1, 6), kernel=st.sampled_from(KERNELS))
def test_it_vanishes_at_equality_only_and_is_blind_to_order(seed: int, num: int, kernel: Any) -> None:
    real, other = features(2, num, 3, seed), features(2, num, 3, seed + 1)

    assert float(mmd_loss(real, real.flip(1), kernel=kernel)) == pytest.approx(0, abs=1e-12)
    assert float(mmd_loss(real, other, kernel=kernel)) > 0
    torch.testing.assert_close(
        mmd_loss(real.flip(0), other.flip(0), kernel=kernel), mmd_loss(real, other, kernel=kernel)
    )


def test_only_a_gaussian_kernel_sees_more_than_two_moments() -> None:
    """Two sets of equal mean and variance: -1, 1 against a rare pair and zeros."""
    one = torch.tensor([[[-1.0], [1.0], [-1.0], [1.0], [-1.0], [1.0], [-1.0], [1.0]]]).double()
    other = torch.tensor([[[-2.0], [2.0], [0.0], [0.0], [0.0], [0.0], [0.0], [0.0]]]).double()

    assert float(mmd_loss(one, other, kernel="linear")) == pytest.approx(0, abs=1e-12)
    assert float(mmd_loss(one, other, kernel="polynomial")) == pytest.approx(0, abs=1e-12)
    assert float(mmd_loss(one, other, kernel="gaussian")) > 0.1


def test_a_network_serves_for_several_steps(toy: Any, planned: Any) -> None:
    settings = {"batch_real": 4, "steps_per_net": 2, "augment": "none"}
    _, ctx, distiller = planned("m3d", toy(), ipc=1, seed=2, steps=4, method=settings)
    distiller.setup(ctx)
    seen = []
    for _ in range(4):
        distiller.step()
        seen.append(next(iter(distiller._engine._pairs.net.parameters())).clone())

    assert [torch.equal(seen[0], weight) for weight in seen] == [True, True, False, False]
    assert torch.equal(seen[2], seen[3])
    expected = build_net(ctx.arch, (3, 16, 16), 3, seed=derive_seed(2, "distill", "net", 1))
    assert torch.equal(seen[2], next(iter(expected.parameters())))
