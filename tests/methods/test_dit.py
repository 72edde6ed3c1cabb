"""DiT's ancestral sampling: levels, a step, guidance, the bound that trains variances."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.data import Split
from ddray.errors import InputError
from ddray.methods.families.diffusion import ancestral as family
from ddray.methods.families.diffusion.ancestral import (
    ancestral,
    ancestral_step,
    betas_of,
    clean_latents,
    log_variance,
    predict,
    respaced,
    variational_bound,
)
from ddray.methods.families.diffusion.generated import Generation, within_class
from ddray.methods.families.diffusion.model import open_pipeline, save_pipeline
from tests.methods.diffusion_models import TINY, untrained, with_variances

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
QUICK = {"generator": TINY, "num_inference_steps": 3, "batch": 4}


def draws(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_levels_of_50_steps_are_evenly_spaced_from_0_to_999() -> None:
    levels = respaced(BETAS, 50)

    assert levels.timesteps[:3] == (0, 20, 41)
    assert levels.timesteps[-1] == 999
    assert len(set(levels.timesteps)) == 50
    assert respaced(BETAS, 1000).timesteps == tuple(range(1000))
    with pytest.raises(InputError, match=r"num_inference_steps must be 2\.\.1000, .* got 1001"):
        respaced(BETAS, 1001)
    with pytest.raises(InputError, match=r"got 1$"):
        respaced(BETAS, 1)


@pytest.mark.parametrize("step", [7, 49])
@pytest.mark.parametrize("v", [None, -1.0, 1.0, 0.3])
def test_a_step_is_the_posterior_by_hand(step: int, v: float | None) -> None:
    """v = -1 gives beta~, v = 1 beta; None is beta~ too."""
    noisy, noise, fresh = draws(3, 4, 5)
    levels, abar = respaced(BETAS, 50), np.cumprod(1 - BETAS.numpy())
    now, before = abar[levels.timesteps[step]], abar[levels.timesteps[step - 1]]
    beta = 1 - now / before
    clean = (noisy - math.sqrt(1 - now) * noise) / math.sqrt(now)
    mean = (math.sqrt(before) * beta * clean + math.sqrt(1 - beta) * (1 - before) * noisy) / (1 - now)
    least = beta * (1 - before) / (1 - now)
    share = 0.0 if v is None else (v + 1) / 2
    deviation = math.exp(0.5 * (share * math.log(beta) + (1 - share) * math.log(least)))
    learned = None if v is None else torch.full_like(noisy, v)

    result = ancestral_step(noisy, noise, learned, levels.at(step), fresh)

    assert torch.allclose(result, mean + deviation * fresh, atol=1e-12)
    if v in (None, -1.0):
        assert deviation**2 == pytest.approx(least)
        assert torch.allclose(log_variance(learned, levels.at(step)).exp(), torch.tensor(least).double())


def test_the_last_step_is_the_predicted_clean_latent_without_noise() -> None:
    noisy, noise = draws(2, 4, 5)
    first = respaced(BETAS, 50).at(0)

    result = ancestral_step(noisy, noise, torch.zeros_like(noisy), first, None)

    assert torch.allclose(result, clean_latents(noisy, noise, first), atol=1e-12)


def test_the_posterior_is_that_of_the_forward_process() -> None:
    """Draws of x_t, then a step with the true noise, have the moments of x at the level below."""
    levels, num = respaced(BETAS, 20), 200_000
    clean, noise, fresh = torch.full((num, 1), 1.5).double(), draws(num, 1), draws(num, 1, seed=1)
    at, below = levels.at(12), levels.at(11)
    noisy = at.root_alpha * clean + at.root_noise * noise

    moved = ancestral_step(noisy, noise, None, at, fresh)

    assert float(moved.mean()) == pytest.approx(1.5 * float(below.root_alpha), abs=0.01)
    assert float(moved.std()) == pytest.approx(float(below.root_noise), abs=0.01)


def test_coefficients_of_a_batch_are_those_of_its_steps() -> None:
    levels = respaced(BETAS, 20)

    batch = levels.at(torch.tensor([3, 0]))

    for column, at in enumerate((levels.at(3), levels.at(0))):
        assert all(torch.equal(a[column, 0], b) for a, b in zip(batch, at, strict=True))


@pytest.mark.parametrize("make", [untrained, with_variances])
def test_guidance_1_is_the_conditional_model_and_more_guides_the_first_channels(make: Any) -> None:
    model, noisy, labels = make(), draws(2, 256, dtype=torch.float32), torch.tensor([0, 2])

    def outputs(condition: Tensor) -> Tensor:
        times = torch.full((2,), 300)
        shaped = noisy.unflatten(1, (4, 8, 8))
        output: Tensor = model.transformer(shaped, timestep=times, class_labels=condition).sample
        return output.detach()

    with torch.no_grad():
        plain, learned = predict(model, noisy, 300, labels, 1.0, 3)
        guided, variance = predict(model, noisy, 300, labels, 4.0, 3)
        whole, _ = predict(model, noisy, 300, labels, 4.0, 9)
    conditional, free = outputs(labels), outputs(torch.tensor([3, 3]))

    assert torch.allclose(plain, conditional[:, :4].flatten(1))
    expected = free + 4 * (conditional - free)
    first = torch.cat([expected[:, :3], conditional[:, 3:4]], 1).flatten(1)
    assert not torch.allclose(conditional, free)
    assert torch.allclose(guided, first, atol=1e-5)
    assert torch.allclose(whole, expected[:, :4].flatten(1), atol=1e-5)
    if make is untrained:
        assert learned is None
        assert variance is None
    else:
        assert torch.allclose(learned, conditional[:, 4:].flatten(1))
        assert torch.allclose(variance, conditional[:, 4:].flatten(1), atol=1e-5)


def test_sampling_goes_down_all_levels_from_pure_noise() -> None:
    model, labels = with_variances(), torch.tensor([0, 1])
    levels = respaced(betas_of(model), 4).on(torch.device("cpu"))
    noises = [draws(2, 256, seed=seed, dtype=torch.float32) for seed in range(4)]
    stream = iter(noises)

    result = ancestral(model, labels, levels, lambda: next(stream), guidance=2.0, channels=3)

    expected = noises[0]
    for step, fresh in ((3, noises[1]), (2, noises[2]), (1, noises[3]), (0, None)):
        with torch.no_grad():
            noise, learned = predict(model, expected, levels.timesteps[step], labels, 2.0, 3)
        expected = ancestral_step(expected, noise, learned, levels.at(step), fresh)
    assert levels.timesteps == (0, 333, 666, 999)
    assert torch.equal(result, expected)
    assert next(stream, None) is None


def test_the_bound_is_the_divergence_of_two_gaussians() -> None:
    levels = respaced(BETAS, 1000)
    steps = torch.tensor([1, 400, 999])
    at, first = levels.at(steps), torch.zeros(3, 1, dtype=torch.bool)
    clean, noise, predicted = draws(3, 3, 6)
    learned = torch.tanh(draws(3, 6, seed=3))
    noisy = at.root_alpha * clean + at.root_noise * noise

    bound = variational_bound(clean, noisy, predicted, learned, at, first)

    normal = torch.distributions.Normal
    guess = (noisy - at.root_noise * predicted) / at.root_alpha
    true = normal(at.clean * clean + at.noisy * noisy, (0.5 * at.log_posterior).exp())
    model = normal(at.clean * guess + at.noisy * noisy, (0.5 * log_variance(learned, at)).exp())
    expected = torch.distributions.kl_divergence(true, model).mean(1) / math.log(2)
    assert torch.allclose(bound, expected, rtol=1e-9)
    # The true noise and beta~ are the posterior itself.
    exact = variational_bound(clean, noisy, noise, -torch.ones_like(learned), at, first)
    assert torch.allclose(exact, torch.zeros(3).double(), atol=1e-9), (
        "the true noise and beta~ are the posterior"
    )


def test_the_bounds_last_step_is_a_probability_of_8_bits() -> None:
    """The bins of all values sum to 1, the outermost are open."""
    at = respaced(BETAS, 1000).at(torch.zeros(1, dtype=torch.int64))
    values = torch.linspace(-1, 1, 256).double()[:, None]
    noisy, learned = torch.full((256, 1), 0.4).double(), torch.full((256, 1), 0.5).double()

    bits = variational_bound(
        values, noisy, torch.zeros_like(noisy), learned, at, torch.ones(256, 1, dtype=torch.bool)
    )

    assert float(torch.exp2(-bits).sum()) == pytest.approx(1, abs=1e-6)


def test_the_bound_trains_the_variances_of_every_step() -> None:
    at = respaced(BETAS, 1000).at(torch.tensor([5, 0]))
    clean, noise, predicted = draws(3, 2, 6)
    noisy = at.root_alpha * clean + at.root_noise * noise
    learned = torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)

    bound = variational_bound(clean, noisy, predicted, learned, at, torch.tensor([[False], [True]]))
    bound.sum().backward()  # type: ignore[no-untyped-call]

    assert learned.grad is not None
    assert torch.isfinite(learned.grad).all()
    assert (learned.grad.abs().amax(1) > 0).all()


def test_a_run_is_the_generators_samples_in_batches(planned: Any, toy: Any, dit: str) -> None:
    _, ctx, method = planned("dit", toy(), ipc=3, method={**QUICK, "diffusion": dit})
    method.setup(ctx)
    losses = [float(method.step()["loss"]) for _ in range(method.num_steps)]
    distilled = method.snapshot()

    model = open_pipeline(Path(dit))
    levels = respaced(betas_of(model), 3).on(ctx.device)
    latents = []
    for start, labels in ((0, [0, 0, 0, 1]), (4, [1, 1, 2, 2]), (8, [2])):
        generator = ctx.generator("noise", start)
        latents.append(
            ancestral(
                model,
                torch.tensor(labels),
                levels,
                lambda: torch.randn(len(labels), 256, generator=generator),  # noqa: B023
                guidance=4.0,
                channels=3,
            )
        )
    pixels = torch.cat([model.decode(part, (3, 16, 16)) for part in latents])
    assert torch.equal(distilled.images, ctx.space.encode(pixels))
    assert losses == pytest.approx([float(part.square().mean()) for part in latents])
    assert distilled.meta.generator == model.fingerprint
    unit = F.normalize(torch.cat(latents), dim=1).view(3, 3, -1)
    pairs = [unit[c, i] @ unit[c, j] for c in range(3) for i in range(3) for j in range(i)]
    assert method.measures["cosine_within_class"] == pytest.approx(float(sum(pairs) / 9), abs=1e-5)
    real = F.normalize(model.encode(ctx.split.images.float() / 255, "mode"), dim=1)
    nearest = [(unit[c] @ real[ctx.split.labels == c].T).amax(1).mean() for c in range(3)]
    assert method.measures["cosine_to_real"] == pytest.approx(float(sum(nearest) / 3), abs=1e-5)


def test_one_image_per_class_has_no_cosine_within_it(planned: Any, toy: Any, dit: str) -> None:
    _, ctx, method = planned("dit", toy(), method={**QUICK, "diffusion": dit})
    method.setup(ctx)
    assert method.measures == {}, "nothing is sampled yet"
    method.step()
    assert set(method.measures) == {"cosine_to_real"}
    assert float(within_class(torch.ones(2, 3, 1))) == 1


def test_images_follow_label_and_seed(planned: Any, toy: Any, dit: str) -> None:
    def images(seed: int = 0, **method: Any) -> Tensor:
        _, ctx, distiller = planned("dit", toy(), seed=seed, method={**QUICK, "diffusion": dit, **method})
        distiller.setup(ctx)
        distiller.step()
        result: Tensor = distiller.snapshot().images
        return result

    plain, swapped = images(), images(class_ids=(1, 0, 2))
    assert torch.equal(plain[2], swapped[2])
    assert not torch.equal(plain[:2], swapped[:2])
    assert not torch.equal(plain, images(seed=1))
    assert not torch.equal(plain, images(guidance=1.0))
    assert not torch.equal(plain, images(guided_channels=4))


def test_it_shares_d3hrs_generator(planned: Any, toy: Any) -> None:
    specs = {}
    for name in ("dit", "d3hr"):
        _, ctx, distiller = planned(name, toy(), method={"generator": TINY})
        specs[name] = [spec.key for spec in distiller.pool_specs(ctx)]
    assert specs["dit"] == specs["d3hr"][:1]


def test_what_does_not_fit_is_refused_before_anything_is_trained(
    planned: Any, toy: Any, tmp_path: Path, ddray_home: Path
) -> None:
    save_pipeline(untrained((1, 16, 16)), tmp_path / "grey")
    for changes, reason in (
        ({"num_inference_steps": 1001}, r"num_inference_steps must be 2\.\.1000"),
        ({"class_ids": (0, 1)}, "class_ids must be 3 labels"),
        ({"diffusion": str(tmp_path / "grey")}, "must have 3 channels, .*grey has 1"),
        ({"diffusion": str(tmp_path / "nowhere")}, "nowhere has no model_index.json"),
    ):
        _, ctx, method = planned("dit", toy(), method={**QUICK, **changes})
        with pytest.raises(InputError, match=reason):
            method.pool_specs(ctx)
    _, ctx, method = planned("dit", toy(), method=QUICK)
    with pytest.raises(InputError, match="got spectrograms; use another method"):
        method.pool_specs(replace(ctx, split=Split(ctx.split.images.float(), ctx.split.labels)))
    with pytest.raises(InputError, match="steps must be 0 for dit, got 7"):
        planned("dit", toy(), steps=7, method=QUICK)
    assert not list(ddray_home.glob("pool/*"))


def test_a_states_size_is_that_of_what_is_sampled(planned: Any, toy: Any, dit: str) -> None:
    _, ctx, method = planned("dit", toy(), ipc=3, method={**QUICK, "diffusion": dit})
    method.setup(ctx)
    assert isinstance(method._engine, Generation)
    sizes = []
    for _ in range(method.num_steps):
        method.step()
        sizes.append((len(method.state_dict()["latents"]), len(method.state_dict()["images"])))
    assert sizes == [(4, 4), (8, 8), (9, 9)]


def test_8_bits_are_halves_of_a_step_apart() -> None:
    assert pytest.approx(float(torch.linspace(-1, 1, 256)[1]) + 1) == 2 * family._BIN
