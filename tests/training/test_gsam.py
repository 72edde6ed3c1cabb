"""GSAM against the formulas by hand, in float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddray.nets import build_net
from ddray.training.engine import Rule, Step
from ddray.training.gsam import Gsam

SGD = partial(torch.optim.SGD, momentum=0.0)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 4, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])


def linear() -> nn.Linear:
    layer = nn.Linear(4, 3).double()
    torch.nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(5))
    return layer


def stepped(layer: nn.Module, gsam: Gsam | None, steps: int = 1) -> list[Tensor]:
    step = Step([layer], Rule(F.cross_entropy, SGD, gsam=gsam), lr=0.1)
    for seed in range(steps):
        step(*batch(seed))
    return [parameter.detach().clone() for parameter in layer.parameters()]


def test_without_radius_and_second_term_it_is_sgd_bit_for_bit() -> None:
    layer = linear()
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    plain = stepped(layer, None, steps=3)
    layer.load_state_dict(state)
    for ours, expected in zip(stepped(layer, Gsam(0.0, 0.0), steps=3), plain, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(("rho", "alpha"), [(0.5, 0.0), (0.0, 0.4), (0.3, 0.7)])
def test_a_step_is_that_of_the_formulas(rho: float, alpha: float) -> None:
    """All parameters as one vector: e = rho w^2 g / ||w g||, then g' - alpha (g - cos ||g|| g' / ||g'||)."""
    layer = linear()
    start = torch.cat([p.detach().flatten() for p in layer.parameters()])
    images, labels = batch()

    def gradient(flat: Tensor) -> Tensor:
        flat = flat.clone().requires_grad_(True)
        logits = images @ flat[:12].view(3, 4).T + flat[12:]
        loss = (logits.logsumexp(1) - logits[torch.arange(6), labels]).mean()
        return torch.autograd.grad(loss, flat)[0]

    g = gradient(start)
    e = rho * start**2 * g / (start.abs() * g).norm()
    far = gradient(start + e)
    cosine = torch.dot(g, far) / (g.norm() * far.norm())
    across = g - cosine * g.norm() * far / far.norm()
    assert abs(float(torch.dot(across, far))) < 1e-12
    expected = start - 0.1 * (far - alpha * across)

    ours = torch.cat([part.flatten() for part in stepped(layer, Gsam(rho, alpha))])
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


def test_the_second_term_climbs_the_part_of_the_gradient_across() -> None:
    first, second = [torch.tensor([[1.0, 1.0]])], [torch.tensor([[2.0, 0.0]])]
    (combined,) = Gsam(0.0, 0.5).combined(first, second)
    assert combined.tolist() == [[2.0, -0.5]]


def test_a_gradient_of_zero_moves_nothing() -> None:
    zero = [torch.zeros(1, 3)]
    gsam = Gsam(0.1, 0.3)
    assert gsam.perturbation([torch.ones(1, 3)], zero)[0].tolist() == [[0.0, 0.0, 0.0]]
    assert gsam.combined(zero, zero)[0].tolist() == [[0.0, 0.0, 0.0]]


def test_fused_networks_have_norms_of_their_own() -> None:
    """Two networks as one take the steps that each takes alone."""
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(2, 5, 1, 8, 8, generator=generator), torch.tensor([0, 1, 2, 1, 0])
    rule: Any = Rule(F.cross_entropy, SGD, gsam=Gsam(0.2, 0.3))
    alone, fused = ([build_net("convnet1_w8", (1, 8, 8), 3, seed=seed) for seed in (1, 2)] for _ in range(2))
    for net, net_images in zip(alone, images, strict=True):
        Step([net], rule, lr=0.1)(net_images, labels)
    together = Step(fused, rule, lr=0.1, fused=True)
    together(images.flatten(0, 1), labels.repeat(2))
    together.finish()
    for one, other in zip(alone, fused, strict=True):
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
