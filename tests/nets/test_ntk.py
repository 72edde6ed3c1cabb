"""Tangent kernels against angles by quadrature, loops over positions, and networks of finite width."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from ddray.errors import InputError
from ddray.nets.ntk import (
    KERNELS,
    _all_positions,
    _relu,
    _same_positions,
    check_hours,
    gram,
    hours,
    ntk,
    pair_floats,
    pairs_at_once,
)

W2, B2 = 2.0, 0.01


def images(num: int, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    return torch.randn(num, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def arc_cosines(k: float, a: float, b: float) -> tuple[float, float]:
    """E[relu(u) relu(v)] and E[step(u) step(v)] in closed form, for a = Var u, b = Var v, k = Cov(u, v)."""
    s = math.sqrt(a * b)
    angle = math.acos(max(-1.0, min(1.0, k / s)))
    mean = s * (math.sin(angle) + (math.pi - angle) * math.cos(angle)) / (2 * math.pi)
    return mean, (math.pi - angle) / (2 * math.pi)


@pytest.mark.parametrize("angle", [1e-4, 0.3, 1.0, 2.0, 3.1])
def test_a_relu_has_the_expectations_of_two_gaussians(angle: float) -> None:
    """u = sqrt(a) r cos(phi), v = sqrt(b) r cos(phi - angle), E r^2 = 2: Gauss-Legendre between the kinks."""
    a, b = 1.7, 0.6
    nodes, weights = np.polynomial.legendre.leggauss(40)
    low, high = angle - math.pi / 2, math.pi / 2
    phi = (high - low) / 2 * nodes + (high + low) / 2
    integral = (high - low) / 2 * (weights * np.cos(phi) * np.cos(phi - angle)).sum()
    product_mean, step_mean = math.sqrt(a * b) * integral / math.pi, (high - low) / (2 * math.pi)
    scale2 = torch.tensor([[a * b]], dtype=torch.float64)

    after, tangent = _relu(scale2.sqrt() * math.cos(angle), torch.ones_like(scale2), scale2, None)

    assert float(after) == pytest.approx(product_mean, abs=1e-12)
    # cos of a small angle keeps only some eps / angle of it.
    assert float(tangent) == pytest.approx(step_mean, abs=1e-14 + 1e-16 / angle)


def test_opposite_inputs_share_nothing_and_equal_ones_half() -> None:
    scale2 = torch.tensor([4.0, 4.0], dtype=torch.float64)

    after, tangent = _relu(torch.tensor([2.0, -2.0]).double(), torch.ones(2).double(), scale2, None)

    torch.testing.assert_close(after, torch.tensor([1.0, 0.0]).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(tangent, torch.tensor([0.5, 0.0]).double(), rtol=0, atol=1e-12)


def test_fc1_by_hand() -> None:
    x, y = images(2, (1, 2, 2)), images(3, (1, 2, 2), seed=1)
    result = ntk("fc1", x, y)
    for i, j in product(range(2), range(3)):
        u, v = x[i].flatten(), y[j].flatten()
        k, a, b = (float(p @ q) * W2 / 4 + B2 for p, q in ((u, v), (u, u), (v, v)))
        mean, step = arc_cosines(k, a, b)
        expected = (W2 * mean + B2) + W2 * step * k
        assert float(result[i, j]) == pytest.approx(expected, rel=1e-12)


class Loops:
    """The recursion for one pair of images, over every pair of positions, in Python numbers."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.size = tuple(x.shape[1:])
        self.k = {
            key: self._start(p, q) for key, (p, q) in {"xy": (x, y), "xx": (x, x), "yy": (y, y)}.items()
        }
        self.th = dict.fromkeys(self.k["xy"], 0.0)

    def _start(self, x: Tensor, y: Tensor) -> dict[tuple[int, ...], float]:
        spots = list(product(range(self.size[0]), range(self.size[1])))
        return {(*p, *q): float(x[:, p[0], p[1]] @ y[:, q[0], q[1]]) / len(x) for p in spots for q in spots}

    def conv(self) -> None:
        shifts = list(product((-1, 0, 1), (-1, 0, 1)))

        def patch(maps: dict[tuple[int, ...], float], at: tuple[int, ...]) -> float:
            return sum(maps.get((at[0] + i, at[1] + j, at[2] + i, at[3] + j), 0.0) for i, j in shifts)

        th = {at: W2 / 9 * patch(self.th, at) for at in self.th}
        self.k = {key: {at: B2 + W2 / 9 * patch(maps, at) for at in maps} for key, maps in self.k.items()}
        self.th = {at: self.k["xy"][at] + value for at, value in th.items()}

    def relu(self) -> None:
        after: dict[str, dict[tuple[int, ...], float]] = {key: {} for key in self.k}
        th = {}
        for key, at in product(self.k, self.th):
            a = self.k[key[0] * 2][at[0], at[1], at[0], at[1]]
            b = self.k[key[1] * 2][at[2], at[3], at[2], at[3]]
            after[key][at], step = arc_cosines(self.k[key][at], a, b)
            if key == "xy":
                th[at] = self.th[at] * step
        self.k, self.th = after, th

    def pool(self) -> None:
        def mean(maps: dict[tuple[int, ...], float]) -> dict[tuple[int, ...], float]:
            spots = product(*(range(size // 2) for size in self.size * 2))
            return {
                at: sum(maps[tuple(2 * a + d for a, d in zip(at, delta, strict=True))] for delta in deltas)
                / 16
                for at in spots
            }

        deltas = list(product((0, 1), repeat=4))
        self.k, self.th = {key: mean(maps) for key, maps in self.k.items()}, mean(self.th)
        self.size = (self.size[0] // 2, self.size[1] // 2)

    def flatten(self) -> None:
        spots = list(product(range(self.size[0]), range(self.size[1])))
        self.k = {key: {(): sum(maps[(*p, *p)] for p in spots) / len(spots)} for key, maps in self.k.items()}
        self.th = {(): sum(self.th[(*p, *p)] for p in spots) / len(spots)}

    def dense(self) -> None:
        self.k = {key: {at: B2 + W2 * value for at, value in maps.items()} for key, maps in self.k.items()}
        self.th = {at: self.k["xy"][at] + W2 * value for at, value in self.th.items()}

    def run(self, layers: tuple[str, ...]) -> float:
        for layer in layers:
            getattr(self, layer)()
        return self.th[()]


CONVS = ("conv", "relu", "conv", "relu", "flatten", "dense")
POOLED = ("conv", "relu", "conv", "relu", "pool", "conv", "relu", "flatten", "dense")


def test_kernels_are_those_of_their_layers() -> None:
    """By the recursion of one pair: fc as maps of one position, the others layer by layer."""
    x, y = images(1, (1, 8, 8)), images(1, (1, 8, 8), seed=1)
    block = ("conv", "relu")
    for depth in (1, 2, 3):
        flat = x.flatten()[:, None, None], y.flatten()[:, None, None]
        expected = Loops(*flat).run((*("dense", "relu") * depth, "flatten", "dense"))
        assert float(ntk(f"fc{depth}", x, y)) == pytest.approx(expected, rel=1e-10)
    small = x[..., :3, :3], y[..., :3, :3]
    expected = Loops(small[0][0], small[1][0]).run((*block * 3, "flatten", "dense"))
    assert float(ntk("conv3", *small)) == pytest.approx(expected, rel=1e-10)
    for kernel, first in (("convnet3", ()), ("convnet", block)):
        expected = Loops(x[0], y[0]).run((*first, *(*block, "pool") * 3, "flatten", "dense"))
        assert float(ntk(kernel, x, y)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("layers", [CONVS, POOLED])
def test_a_convolutional_kernel_equals_loops_over_positions(layers: tuple[str, ...]) -> None:
    x, y = images(2, (2, 4, 4)), images(2, (2, 4, 5 if "pool" in layers else 4), seed=1)[..., :4]
    result = _all_positions(layers, x, y, None)
    expected = torch.tensor([[Loops(u, v).run(layers) for v in y] for u in x], dtype=torch.float64)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)


def test_an_odd_last_line_is_not_pooled() -> None:
    x, y = images(1, (2, 5, 4)), images(1, (2, 5, 4), seed=1)
    result = _all_positions(POOLED, x, y, None)
    assert float(result) == pytest.approx(Loops(x[0], y[0]).run(POOLED), rel=1e-10)


def test_without_pooling_equal_positions_are_enough() -> None:
    x, y = images(3, (2, 4, 4)), images(2, (2, 4, 4), seed=1)
    torch.testing.assert_close(_same_positions(CONVS, x, y, None), _all_positions(CONVS, x, y, None))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_gram_matrix_is_symmetric_and_positive(kernel: str) -> None:
    x = images(4, (1, 8, 8))
    result = gram(kernel, x)
    torch.testing.assert_close(result, result.T, rtol=1e-12, atol=1e-12)
    assert float(torch.linalg.eigvalsh(result).min()) > 0
    torch.testing.assert_close(result, ntk(kernel, x, x.clone()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kernel", ["fc2", "conv3", "convnet3"])
def test_gradients_are_finite_on_diagonal_and_duplicates(kernel: str) -> None:
    x = images(3, (1, 8, 8))
    x[1], x[2, :, 3:] = x[0], 0.0  # equal positions within an image too
    x.requires_grad_(True)
    gram(kernel, x).sum().backward()
    assert bool(torch.isfinite(x.grad).all())
    assert float(x.grad.abs().max()) > 0


@pytest.mark.parametrize("kernel", ["fc1", "conv3", "convnet3"])
def test_the_gradient_is_that_of_central_differences(kernel: str) -> None:
    x, y = images(2, (1, 8, 8)), images(2, (1, 8, 8), seed=1)
    weights = images(1, (1, 2, 4), seed=2)[0, 0]

    def value(inputs: Tensor) -> Tensor:
        return (weights * torch.cat([gram(kernel, inputs), ntk(kernel, inputs, y)], 1)).sum()

    leaf = x.clone().requires_grad_(True)
    value(leaf).backward()
    for index in ((0, 0, 1, 2), (1, 0, 5, 7)):
        shift = torch.zeros_like(x)
        shift[index] = 1e-5
        numeric = float(value(x + shift) - value(x - shift)) / 2e-5
        assert float(leaf.grad[index]) == pytest.approx(numeric, rel=1e-6, abs=1e-8)


def test_wide_networks_have_the_kernel_on_average() -> None:
    """One hidden layer of 4,096 units: the mean of 64 draws, whose gradients are written out."""
    x, width = images(5, (1, 3, 3)).flatten(1), 4096
    generator, total = torch.Generator().manual_seed(3), torch.zeros(5, 5).double()
    inner = W2 / x.shape[1] * x @ x.T + B2
    for _ in range(64):
        first, bias, last = (
            torch.randn(shape, generator=generator, dtype=torch.float64)
            for shape in ((width, x.shape[1]), (width,), (width,))
        )
        hidden = x @ first.T * math.sqrt(W2 / x.shape[1]) + math.sqrt(B2) * bias
        on = (hidden > 0).double()
        total += W2 / width * hidden.relu() @ hidden.relu().T + B2
        total += W2 / width * (on * last.square()) @ on.T * inner
    expected = gram("fc1", x[:, None, None])
    assert float((total / 64 - expected).norm() / expected.norm()) < 0.015


def test_costs_count_pairs_of_positions() -> None:
    assert pair_floats("fc1", (3, 32, 32)) == 3
    assert pair_floats("conv3", (1, 16, 16)) == 8 * 256
    assert pair_floats("convnet3", (3, 32, 32)) > 2 * 32**4
    assert pairs_at_once("convnet3", (3, 32, 32), 1) == 1
    assert hours("fc1", (3, 32, 32), 10**6, torch.device("cpu")) < 0.01
    with pytest.raises(InputError, match="at least 8 px, got 4x9; take conv3"):
        pair_floats("convnet3", (3, 4, 9))
    with pytest.raises(InputError, match="kip takes about 1,234 hours, more than max_hours=24: take fc1"):
        check_hours(1234.4, 24, "kip", "take fc1")
    check_hours(23.9, 24, "kip", "take fc1")
