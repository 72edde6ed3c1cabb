from __future__ import annotations

import math

import pytest
import torch

from ddray.training.cutmix import draw_share


def beta_cdf(x: float, alpha: float, num: int = 20_000) -> float:
    """The distribution of Beta(alpha, alpha) at x, by the midpoint rule on its density after u = sqrt(t)."""
    constant = math.gamma(2 * alpha) / math.gamma(alpha) ** 2
    width = math.sqrt(x) / num
    points = (((i + 0.5) * width) ** 2 for i in range(num))
    return sum(
        constant * t ** (alpha - 1) * (1 - t) ** (alpha - 1) * 2 * math.sqrt(t) * width for t in points
    )


@pytest.mark.parametrize("alpha", [0.8, 1.0])
def test_mixups_share_is_a_draw_of_beta(alpha: float) -> None:
    generator, num = torch.Generator().manual_seed(0), 6000

    shares = torch.tensor([draw_share(alpha, generator) for _ in range(num)])

    assert bool(((shares >= 0) & (shares <= 1)).all())
    assert float(shares.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)
    for x in (0.05, 0.2, 0.5, 0.9):
        expected = beta_cdf(x, alpha)
        error = 4 * math.sqrt(expected * (1 - expected) / num)
        assert float((shares <= x).float().mean()) == pytest.approx(expected, abs=error)


def test_a_share_is_the_generators() -> None:
    first, second, other = (draw_share(0.8, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))

    assert first == second != other
