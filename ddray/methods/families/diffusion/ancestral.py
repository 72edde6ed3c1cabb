"""DDPM's ancestral sampling as DiT does it, from pure noise on respaced levels; its variational bound.

Ho et al. 2020 (Eq 5-8, 11), Nichol & Dhariwal 2021 (Eq 15: learned variances; respaced levels), Peebles & Xie
2023 (classifier-free guidance of the first channels alone). Steps are numbered upwards: step 0 leads to the
clean latents.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import torch
from torch import Tensor

from ddray.errors import InputError
from ddray.methods.families.diffusion.model import DiffusionModel

_BIN: Final = 1 / 255  # half the width of a value, in the likelihood of the last step


class Coefficients(NamedTuple):
    """What a step needs of the schedule; scalars, or [N, 1] for latents at levels of their own.

    With a the product of 1 - beta up to the level: `root_alpha` sqrt(a) and `root_noise` sqrt(1 - a) of the
    forward process; `clean` and `noisy`, the posterior mean's weights of x0 and of x_t; the logarithms of
    beta and of the posterior's variance beta~ (at step 0, where that is 0, of step 1).
    """

    root_alpha: Tensor
    root_noise: Tensor
    clean: Tensor
    noisy: Tensor
    log_beta: Tensor
    log_posterior: Tensor


@dataclass(frozen=True)
class Respaced:
    """Levels of a noise schedule, evenly from its first to its last.

    Attributes:
        timesteps: the network's number of each level, ascending.
        columns: [6, S], the levels' `Coefficients`.
    """

    timesteps: tuple[int, ...]
    columns: Tensor

    def at(self, step: int | Tensor) -> Coefficients:
        """Return the coefficients of a step, or of steps [N], as [N, 1]."""
        rows = self.columns[:, step] if isinstance(step, int) else self.columns[:, step, None]
        return Coefficients(*rows.unbind(0))

    def on(self, device: torch.device) -> "Respaced":
        """Return these levels with coefficients in float32 on a device."""
        return replace(self, columns=self.columns.to(device, torch.float32))


def respaced(betas: Tensor, num_steps: int) -> Respaced:
    """Return `num_steps` levels, 2 or more, of a schedule of T betas, in float64 on the CPU.

    Levels are the integers nearest to 0, stride, ..., T - 1; the betas are those that give the schedule's own
    noise there. InputError if there are not so many levels.
    """
    check_steps(num_steps, len(betas))
    stride = (len(betas) - 1) / (num_steps - 1)
    timesteps = tuple(round(stride * step) for step in range(num_steps))
    alpha = (1 - betas.double()).cumprod(0)[list(timesteps)]
    before = torch.cat([alpha.new_ones(1), alpha[:-1]])
    beta = 1 - alpha / before
    posterior = beta * (1 - before) / (1 - alpha)
    columns = (
        alpha.sqrt(),
        (1 - alpha).sqrt(),
        beta * before.sqrt() / (1 - alpha),
        (1 - beta).sqrt() * (1 - before) / (1 - alpha),
        beta.log(),
        torch.cat([posterior[1:2], posterior[1:]]).log(),
    )
    return Respaced(timesteps, torch.stack(columns))


def check_steps(num_steps: int, num_train_timesteps: int) -> None:
    """Raise InputError unless a schedule of `num_train_timesteps` has so many levels."""
    if not 2 <= num_steps <= num_train_timesteps:
        raise InputError(
            f"num_inference_steps must be 2..{num_train_timesteps}, the generator's levels, got {num_steps}"
        )


def betas_of(model: DiffusionModel) -> Tensor:
    """Return the betas [T] of a model's noise schedule."""
    from diffusers import DDPMScheduler

    betas: Tensor = DDPMScheduler.from_config({**model.scheduler, "_class_name": "DDPMScheduler"}).betas
    return betas


def clean_latents(noisy: Tensor, noise: Tensor, at: Coefficients) -> Tensor:
    """Return x0 [N, D], not clipped, from x_t and the noise in it: exact for the true noise."""
    return (noisy - at.root_noise * noise) / at.root_alpha


def log_variance(learned: Tensor | None, at: Coefficients) -> Tensor:
    """Return a step's logarithm of the variance: with u = (v + 1) / 2, u log beta + (1 - u) log beta~.

    `learned` is v [N, D], -1..1 where the network was trained so; None: beta~.
    """
    if learned is None:
        return at.log_posterior
    share = (learned + 1) / 2
    return share * at.log_beta + (1 - share) * at.log_posterior


def ancestral_step(
    noisy: Tensor, noise: Tensor, learned: Tensor | None, at: Coefficients, fresh: Tensor | None
) -> Tensor:
    """Return latents a level further down.

    Args:
        noisy: x_t [N, D].
        noise: that is predicted in it, [N, D].
        learned: as `log_variance` takes it.
        at: the step's coefficients.
        fresh: standard normal draws [N, D]; None at step 0.
    """
    mean = at.clean * clean_latents(noisy, noise, at) + at.noisy * noisy
    return mean if fresh is None else mean + torch.exp(0.5 * log_variance(learned, at)) * fresh


def predict(
    model: DiffusionModel, noisy: Tensor, timestep: int, labels: Tensor, guidance: float, channels: int
) -> tuple[Tensor, Tensor | None]:
    """Return the noise [N, D] in latents [N, D] under labels [N], and the v [N, D] of a network that has one.

    `guidance` is of the first `channels` channels; 1 is the conditional model, whose prediction the other
    channels and v are in any case.
    """
    num = model.latent_shape[0]
    shaped = torch.unflatten(noisy, 1, model.latent_shape).to(model.transformer.dtype)
    if guidance != 1:
        shaped = torch.cat([shaped, shaped])
        labels = torch.cat([labels, torch.full_like(labels, model.num_classes)])
    timesteps = torch.full((len(labels),), timestep, device=noisy.device)
    output = model.transformer(shaped, timestep=timesteps, class_labels=labels).sample.float()
    if guidance != 1:
        channels = min(channels, num)
        conditional, free = output.chunk(2)
        first = free[:, :channels] + guidance * (conditional[:, :channels] - free[:, :channels])
        output = torch.cat([first, conditional[:, channels:]], 1)
    return split_output(output, num)


def split_output(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """Return noise and v, both [N, D], of a network's output [N, C or 2C, h, w]; v None if it has none."""
    noise = output[:, :channels].flatten(1)
    return noise, output[:, channels:].flatten(1) if output.shape[1] == 2 * channels else None


@torch.no_grad()
def ancestral(
    model: DiffusionModel,
    labels: Tensor,
    levels: Respaced,
    draw: Callable[[], Tensor],
    *,
    guidance: float,
    channels: int,
) -> Tensor:
    """Return clean latents [N, D] of the model's labels [N], sampled from pure noise.

    `levels` are on the model's device; `draw` gives standard normal draws [N, D] there: the start, then one
    for every level but the lowest. The rest is as in `predict`.
    """
    latents = draw()
    for step in range(len(levels.timesteps) - 1, -1, -1):
        timestep = levels.timesteps[step]
        noise, learned = predict(model, latents, timestep, labels, guidance, channels)
        latents = ancestral_step(latents, noise, learned, levels.at(step), draw() if step else None)
    return latents


def variational_bound(
    clean: Tensor, noisy: Tensor, noise: Tensor, learned: Tensor, at: Coefficients, is_first: Tensor
) -> Tensor:
    """Return the bound of each sample, in bits per dimension [N] (Ho et al. 2020, Eq 5), which trains v.

    It is the divergence between the posterior of a step and the model's; at step 0, minus the logarithm of
    the probability of the values of 8 bits.

    Args:
        clean: x0 [N, D].
        noisy: x_t [N, D].
        noise: that is predicted in it, [N, D]; as it trains nothing but v, without gradient.
        learned: v [N, D].
        at: coefficients of the samples' levels, [N, 1].
        is_first: whether a sample is at step 0, [N, 1].
    """
    log_model = log_variance(learned, at)
    mean = at.clean * clean_latents(noisy, noise, at) + at.noisy * noisy
    gap = (at.clean * clean + at.noisy * noisy - mean).square() * torch.exp(-log_model)
    ratio = at.log_posterior - log_model
    divergence = 0.5 * (torch.exp(ratio) - ratio - 1 + gap)
    surprise = -_log_probability(clean, mean, 0.5 * log_model)
    return torch.where(is_first, surprise, divergence).mean(1) / math.log(2)


def _log_probability(values: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Return the logarithm of a Gaussian's mass within half a step of 8 bits; the outermost are open."""
    scale = torch.exp(-log_std)
    below = torch.special.ndtr(scale * (values - mean - _BIN))
    above = torch.special.ndtr(scale * (values - mean + _BIN))
    above = torch.where(values > 0.999, torch.ones_like(above), above)
    below = torch.where(values < -0.999, torch.zeros_like(below), below)
    return (above - below).clamp(min=1e-12).log()
