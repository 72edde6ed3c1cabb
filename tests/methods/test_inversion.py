"""DDIM inversion on a mixture of Gaussians, whose noise is known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ddray.methods.families.diffusion.model import DiffusionModel, Levels
from tests.methods.diffusion_models import untrained

DIM, SPREAD = 256, 0.6
ALPHAS = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MEANS = torch.randn(3, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def exact_noise(z: Tensor, timestep: int) -> Tensor:
    """The expected noise in z [N, D] at a timestep: -sqrt(1 - a) times the score of the noised mixture.

    The mixture is sum_k w_k N(m_k, s^2); with noise it is sum_k w_k N(sqrt(a) m_k, a s^2 + 1 - a).
    """
    alpha = float(ALPHAS[timestep])
    variance = alpha * SPREAD**2 + 1 - alpha
    away = z[:, None] - math.sqrt(alpha) * MEANS  # [N, 3, D]
    shares = (WEIGHTS.log() - away.square().sum(2) / (2 * variance)).softmax(1)
    score = -(shares[..., None] * away).sum(1) / variance
    return -math.sqrt(1 - alpha) * score


@pytest.fixture
def mixture(monkeypatch: pytest.MonkeyPatch) -> DiffusionModel:
    """A model that predicts exactly the noise of the mixture."""
    model = untrained()

    def predict(self: DiffusionModel, z: Tensor, timestep: int, labels: Tensor, guidance: float) -> Tensor:
        calls.append(timestep)
        return exact_noise(z.double(), timestep).float()

    calls: list[int] = []
    monkeypatch.setattr(DiffusionModel, "predict", predict)
    monkeypatch.setattr(model, "calls", calls, raising=False)
    return model


def clean_latents(num: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    which = torch.multinomial(WEIGHTS, num, replacement=True, generator=generator)
    noise = torch.randn(num, DIM, generator=generator, dtype=torch.float64)
    return (MEANS[which] + SPREAD * noise).float()


def error(model: DiffusionModel, fixed_point: int, steps: int = 50, num: int = 31) -> float:
    """Return the relative error of latents that were taken up and down again."""
    levels = Levels(num_inference_steps=steps, num_steps=num, guidance=1.0, fixed_point=fixed_point)
    clean, labels = clean_latents(32), torch.zeros(32, dtype=torch.int64)
    back = model.sample(model.invert(clean, labels, levels), labels, levels)
    return float((back - clean).norm() / clean.norm())


def test_fixed_point_iterations_make_inversion_the_inverse_of_sampling(mixture: DiffusionModel) -> None:
    """Measured here: .042 after none, .0034 after one, .0003 after two, 3e-7 after five."""
    errors = [error(mixture, number) for number in (0, 1, 2, 5)]

    assert errors == sorted(errors, reverse=True)
    assert 0.02 < errors[0] < 0.1
    assert errors[3] < 0.001


def test_without_iterations_inversion_is_equation_3(mixture: DiffusionModel) -> None:
    levels = Levels(num_inference_steps=50, num_steps=3, guidance=1.0)
    z = clean_latents(4)

    expected, before = z.double(), torch.tensor(1.0, dtype=torch.float64)
    for timestep in (0, 20, 40):
        noise, after = exact_noise(expected, timestep), ALPHAS[timestep]
        change = (1 / after - 1).sqrt() - (1 / before - 1).sqrt()
        expected = (after / before).sqrt() * expected + after.sqrt() * change * noise
        before = after

    up = mixture.invert(z, torch.zeros(4, dtype=torch.int64), levels)
    torch.testing.assert_close(up.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_limit_is_the_latent_whose_ddim_step_leads_back(mixture: DiffusionModel) -> None:
    """One step, from the level of timestep 20 to that of 40, and DDIM back down by hand."""
    levels = Levels(num_inference_steps=50, num_steps=3, guidance=1.0, fixed_point=30)
    labels = torch.zeros(2, dtype=torch.int64)
    up = mixture.invert(clean_latents(2), labels, levels).double()

    low, high = ALPHAS[20], ALPHAS[40]
    clean_part = (up - (1 - high).sqrt() * exact_noise(up, 40)) / high.sqrt()
    down = low.sqrt() * clean_part + (1 - low).sqrt() * exact_noise(up, 40)  # DDIM, as Song et al. print it

    shorter = levels.model_copy(update={"num_steps": 2})
    torch.testing.assert_close(
        down, mixture.invert(clean_latents(2), labels, shorter).double(), rtol=1e-4, atol=1e-4
    )


def test_sampling_takes_one_prediction_a_step_and_inversion_one_more_per_iteration(
    mixture: DiffusionModel,
) -> None:
    levels = Levels(num_inference_steps=10, num_steps=4, guidance=1.0, fixed_point=2)
    labels = torch.zeros(2, dtype=torch.int64)
    up = mixture.invert(clean_latents(2), labels, levels)
    assert mixture.calls == [0, 0, 0, 100, 100, 100, 200, 200, 200, 300, 300, 300]
    mixture.calls.clear()
    mixture.sample(up, labels, levels)
    assert mixture.calls == [300, 200, 100, 0]
