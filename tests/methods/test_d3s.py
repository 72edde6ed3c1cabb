"""D3S: the divergence of Gaussians against torch.distributions, invariances, averages of a set in batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from ddray.distillation.method import coupling_of
from ddray.errors import InputError
from ddray.methods import get_method
from ddray.methods.d3s import D3SConfig, gaussian_kl
from ddray.methods.families.activations import covariance_of, layer_statistics, moments
from ddray.nets import Net
from ddray.tuning.settings import method_protocol

QUICK = {"teacher_arch": "convnet2_w8_bn", "num_teachers": 2, "teacher_epochs": 1}


def gaussian(dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return mean and covariance of 4 dim random rows."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(4 * dim, dim, generator=generator, dtype=torch.float64)
    rows = rows @ torch.randn(dim, dim, generator=generator, dtype=torch.float64) + seed
    return rows.mean(0), torch.cov(rows.T, correction=0).reshape(dim, dim)


@pytest.mark.parametrize(("dim", "ridge"), [(1, 0.0), (5, 0.0), (12, 0.0), (5, 0.3)])
def test_the_divergence_is_that_of_torchs_distributions(dim: int, ridge: float) -> None:
    (mean, covariance), (set_mean, set_covariance) = gaussian(dim, 0), gaussian(dim, 1)
    eye = ridge * torch.eye(dim, dtype=torch.float64)
    leaf = set_covariance.clone().requires_grad_()
    real = MultivariateNormal(mean, covariance + eye)
    expected = kl_divergence(real, MultivariateNormal(set_mean, leaf + eye))
    (in_leaf,) = torch.autograd.grad(expected, leaf)

    result = gaussian_kl(mean, covariance, set_mean, leaf, ridge=ridge)

    assert float(result.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    (gradient,) = torch.autograd.grad(result, leaf)
    torch.testing.assert_close(gradient + gradient.T, in_leaf + in_leaf.T, rtol=1e-6, atol=1e-9)


def test_it_is_zero_for_equal_gaussians_and_nowhere_else() -> None:
    mean, covariance = gaussian(6, 0)

    assert float(gaussian_kl(mean, covariance, mean, covariance)) == pytest.approx(0, abs=1e-9)
    assert float(gaussian_kl(mean, covariance, mean + 0.1, covariance)) > 1e-4
    assert float(gaussian_kl(mean, covariance, mean, 1.1 * covariance)) > 1e-4


def test_it_is_invariant_under_an_invertible_linear_map() -> None:
    """Without a ridge, with more images than channels."""
    (mean, covariance), (set_mean, set_covariance) = gaussian(5, 0), gaussian(5, 1)
    mapping = torch.randn(5, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mapping += 3 * torch.eye(5, dtype=torch.float64)

    mapped = gaussian_kl(
        mapping @ mean,
        mapping @ covariance @ mapping.T,
        mapping @ set_mean,
        mapping @ set_covariance @ mapping.T,
    )

    assert float(mapped) == pytest.approx(float(gaussian_kl(mean, covariance, set_mean, set_covariance)))


def test_its_arguments_are_not_exchangeable() -> None:
    """The real Gaussian is the first: KL(N(0, 1) || N(0, 4)) is .5 (1/4 - 1 + ln 4)."""
    zero, one = torch.zeros(1).double(), torch.ones(1, 1).double()

    forward, backward = gaussian_kl(zero, one, zero, 4 * one), gaussian_kl(zero, 4 * one, zero, one)

    assert float(forward) == pytest.approx(0.5 * (0.25 - 1 + 1.3862943611198906))
    assert float(backward) == pytest.approx(0.5 * (4 - 1 - 1.3862943611198906))


def test_diagonal_covariances_give_the_sum_over_channels() -> None:
    generator = torch.Generator().manual_seed(0)
    real, ours = (torch.rand(7, generator=generator, dtype=torch.float64) + 0.1 for _ in range(2))
    mean, set_mean = (torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(2))

    result = gaussian_kl(mean, real.diag(), set_mean, ours.diag())

    expected = 0.5 * (real / ours + (set_mean - mean) ** 2 / ours - 1 + (ours / real).log()).sum()
    assert float(result) == pytest.approx(float(expected), rel=1e-10)


def test_a_dead_channel_and_too_few_images_need_the_ridge() -> None:
    mean, covariance = gaussian(4, 0)
    dead = covariance.clone()
    dead[2], dead[:, 2] = 0, 0
    few = moments(torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0)))

    assert torch.isnan(gaussian_kl(mean, dead, mean, covariance))
    for real in (dead, covariance):
        assert torch.isfinite(gaussian_kl(mean, real, few[0], covariance_of(*few), ridge=0.1))


def started(planned: Any, toy: Any, *, steps: int = 20, ipc: int = 4, **method: Any) -> Any:
    _, ctx, distiller = planned("d3s", toy(), ipc=ipc, steps=steps, method={**QUICK, **method})
    distiller.setup(ctx)
    return ctx, distiller


def test_the_loss_is_the_mean_over_networks_of_both_terms(planned: Any, toy: Any) -> None:
    """Against a walk through both networks."""
    ctx, method = started(planned, toy, kl_weight=0.5, ridge=0.2, per_channel=False)
    engine = method._engine
    images, labels = engine._images.detach().clone(), engine._labels
    specs = method.pool_specs(ctx)
    total = 0.0
    for network, statistics in zip(ctx.pool.get(specs[:2]), ctx.pool.get(specs[2:]), strict=True):
        net: Any = network.module()
        assert isinstance(net, Net)
        x, real = images, layer_statistics(statistics, ctx.device, torch.float64)
        with torch.no_grad():
            for (mean, second), conv, norm in zip(real, net.body.convs, net.body.norms, strict=True):
                outputs = norm(conv(x))
                rows = outputs.mean((2, 3)).double()
                target = covariance_of(mean, second)
                ridge = 0.2 * target.diagonal().mean()
                ours = rows.T.cov(correction=0)
                total += 0.5 * 0.5 * float(gaussian_kl(mean, target, rows.mean(0), ours, ridge=ridge))
                x = F.avg_pool2d(F.relu(outputs), 2)
            total += 0.5 * float(F.cross_entropy(net(images), labels))

    assert float(method.step()["loss"]) == pytest.approx(total, rel=1e-4)


def test_the_loss_falls_and_images_stay_pixels(planned: Any, toy: Any) -> None:
    ctx, method = started(planned, toy, init="noise")

    losses = [float(method.step()["loss"]) for _ in range(20)]

    pixels = ctx.space.decode(method.snapshot().images)
    assert -1e-5 < float(pixels.min()) < float(pixels.max()) < 1 + 1e-5
    assert losses[-1] < 0.7 * losses[0]


def test_a_set_in_batches_is_estimated_by_running_averages(planned: Any, toy: Any) -> None:
    """After one pass the corrected averages are weighted means of the batches' moments."""
    _, whole = started(planned, toy)
    _, parts = started(planned, toy, batch=4, decay=0.5)
    engine = parts._engine
    assert engine._num_batches == 3
    images = engine._images.detach().clone()
    expected = [torch.zeros(8).double(), torch.zeros(8, 8).double()]
    net = engine._nets[0]._net
    for index in range(3):
        with torch.no_grad():
            batch = moments(net.body.norms[0](net.body.convs[0](images[index::3])))
        for total, value in zip(expected, batch, strict=True):
            total.mul_(0.5).add_(value, alpha=0.5)

    loss = parts.step()["loss"]

    for average, value in zip(engine._nets[0].averages[0], expected, strict=True):
        torch.testing.assert_close(average, value, rtol=1e-5, atol=1e-7)
    assert torch.isfinite(loss)
    assert engine._labels[::3].tolist() == [0, 0, 1, 2]  # every batch has all classes
    assert not whole.state_dict()["averages"]
    assert len(parts.state_dict()["averages"]) == 2


def test_a_run_in_batches_continues_bit_for_bit(planned: Any, toy: Any) -> None:
    runs = [started(planned, toy, steps=4, batch=4)[1] for _ in range(3)]
    whole, first, second = runs
    losses = [whole.step()["loss"] for _ in range(4)]
    for _ in range(2):
        first.step()
    second.load_state_dict(first.state_dict())

    rest = [second.step()["loss"] for _ in range(2)]

    assert torch.equal(torch.stack(rest), torch.stack(losses[2:]))
    assert torch.equal(second.snapshot().images, whole.snapshot().images)


def test_networks_without_batch_norm_and_whitened_pixels_are_refused(planned: Any, toy: Any) -> None:
    message = "teacher_arch must have batch norm for d3s, convnet2_w8 has none; add _bn"
    with pytest.raises(InputError, match=message):
        started(planned, toy, teacher_arch="convnet2_w8")
    _, ctx, method = planned("d3s", toy(), steps=1, pixel_space="zca", method=QUICK)
    with pytest.raises(InputError, match="d3s needs pixel_space=normalized, got zca"):
        method.setup(ctx)


def test_it_is_scored_with_soft_labels_and_takes_no_shards() -> None:
    reason = coupling_of(get_method("d3s"), D3SConfig(), "convnet3")

    assert method_protocol("d3s") == "soft"
    assert reason is not None
    assert "all classes together" in reason
