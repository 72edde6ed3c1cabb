"""A class-conditional latent diffusion model (DiT) as D3HR uses it: encode, invert, sample, decode.

The transformer and the schedulers of diffusers are called directly: `DiTPipeline.__call__` can only start
from noise, and uses 1000 as the null label whatever the number of classes K (it should be K).

Levels: with S inference steps, step k = 0..S-1 is at timestep t_k = k * (1000 // S). Inverting T steps
from a clean latent ends at level t_(T-1), and sampling starts there: the noise predicted on the way up at t_k
approximates that on the way down, so the two are inverse to each other up to the step size (Eq 2, 3).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddray.config import Config, added
from ddray.errors import InputError
from ddray.methods.families.diffusion.folder import (
    BROKEN,
    PARTS,
    SEEN,
    damaged,
    read_folder,
    weights_variant,
)
from ddray.seeding import forked_global
from ddray.system.files import write_folder

Encoding = Literal["mode", "sample"]


class Levels(Config):
    """How many steps latents are moved, and with what guidance."""

    num_inference_steps: int
    """S, steps of the full schedule to pure noise."""
    num_steps: int
    """T <= S, steps actually taken."""
    guidance: float
    """Scale of classifier-free guidance; 1 is the conditional model alone."""
    fixed_point: int = added(0, ge=0)
    """Iterations that refine each step of inversion; 0: Eq 3."""


@dataclass(eq=False)
class DiffusionModel:
    """A DiT, its autoencoder and its noise schedule."""

    transformer: Any
    """A `DiTTransformer2DModel`; K+1 labels, of which K means "no label"."""
    vae: Any
    """An `AutoencoderKL`."""
    scheduler: Mapping[str, Any]
    """Configuration of a DDIM-compatible scheduler."""
    fingerprint: str
    """Sha256 of weights and configuration."""
    class_names: tuple[str, ...] = ()
    """Names of the K labels, as far as known."""
    seen: tuple[Mapping[str, str], ...] = ()
    """`{"dataset": fingerprint, "split": name}` of the images that ddray trained it on."""

    def __post_init__(self) -> None:
        for net in (self.transformer, self.vae):
            net.eval().requires_grad_(False)

    @property
    def num_classes(self) -> int:
        """K; also the null label."""
        return int(self.transformer.config.num_embeds_ada_norm)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of a latent."""
        config = self.transformer.config
        return int(config.in_channels), int(config.sample_size), int(config.sample_size)

    @property
    def image_size(self) -> int:
        """Side of the autoencoder's input images, in pixels."""
        return self.latent_shape[1] << (len(self.vae.config.block_out_channels) - 1)

    def to(self, device: torch.device, precision: str = "float32") -> DiffusionModel:
        """Move the networks to a device, on a GPU in a precision; return this object."""
        dtype = getattr(torch, precision) if device.type == "cuda" else torch.float32
        for net in (self.transformer, self.vae):
            # Not diffusers' own `to`, which prints a warning wherever a precision is named.
            nn.Module.to(net, device, dtype, non_blocking=device.type == "cuda")
        return self

    def fit(self, pixels: Tensor) -> Tensor:
        """Convert raw pixels [N, C, H, W] in [0, 1] to the autoencoder's input: its size, in [-1, 1]."""
        channels = _channels(pixels, int(self.vae.config.in_channels))
        return _resize(channels, (self.image_size, self.image_size)) * 2 - 1

    @torch.no_grad()
    def encode(self, pixels: Tensor, encoding: Encoding, generator: torch.Generator | None = None) -> Tensor:
        """Return scaled latents [N, D] of raw pixels [N, C, H, W] in [0, 1], resized to the model's size.

        They are the posterior's `mode`, or one `sample` of it (as in the authors' code) by `generator`. Grey
        images are repeated for a model of colour images.
        """
        posterior = self.vae.encode(self.fit(pixels).to(self.vae.dtype)).latent_dist
        latents = posterior.mode() if encoding == "mode" else posterior.sample(generator)
        scaled: Tensor = latents.float().flatten(1) * self.vae.config.scaling_factor
        return scaled

    @torch.no_grad()
    def decode(self, latents: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
        """Return raw pixels [N, *image_shape] in [0, 1] of scaled latents [N, D]."""
        shaped = torch.unflatten(latents / self.vae.config.scaling_factor, 1, self.latent_shape)
        pixels = (self.vae.decode(shaped.to(self.vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)
        return _resize(_channels(pixels, image_shape[0]), (image_shape[1], image_shape[2])).clamp(0, 1)

    def invert(self, latents: Tensor, labels: Tensor, levels: Levels) -> Tensor:
        """Return clean latents [N, D] taken up to level T by DDIM inversion (Eq 3) under their labels [N].

        Eq 3 takes the noise predicted for the latent before a step, a DDIM step down that for the latent
        after it. Each of `levels.fixed_point` iterations predicts it anew, for the latent found so far, and
        repeats the step with it: z <- Eq 3 (z_before, noise(z)), whose fixed point DDIM leads back from.
        """
        return self._moved(latents, labels, "DDIMInverseScheduler", levels, slice(levels.num_steps))

    def sample(self, latents: Tensor, labels: Tensor, levels: Levels) -> Tensor:
        """Return latents [N, D] of level T taken down to clean ones by DDIM (Eq 2) under their labels [N]."""
        return self._moved(latents, labels, "DDIMScheduler", levels, slice(-levels.num_steps, None))

    @torch.no_grad()
    def _moved(self, latents: Tensor, labels: Tensor, kind: str, levels: Levels, steps: slice) -> Tensor:
        scheduler = self._prepared(kind, levels)
        iterations = 1 + (levels.fixed_point if kind == "DDIMInverseScheduler" else 0)
        for t in scheduler.timesteps[steps].tolist():
            moved = latents
            for _ in range(iterations):
                noise = self.predict(moved, t, labels, levels.guidance)
                moved = scheduler.step(noise, t, latents).prev_sample
            latents = moved
        return latents

    def add_noise(self, latents: Tensor, noise: Tensor, levels: Levels) -> Tensor:
        """Return clean latents [N, D] with noise [N, D] at level T, by the forward process (Eq 1)."""
        scheduler = self._prepared("DDIMInverseScheduler", levels)
        alpha = float(scheduler.alphas_cumprod[int(scheduler.timesteps[levels.num_steps - 1])])
        return math.sqrt(alpha) * latents + math.sqrt(1 - alpha) * noise

    def predict(self, latents: Tensor, timestep: int, labels: Tensor, guidance: float) -> Tensor:
        """Predict the noise [N, D] in latents [N, D] given labels [N]; `guidance` 1 is none."""
        shaped = torch.unflatten(latents, 1, self.latent_shape).to(self.transformer.dtype)
        if guidance != 1:
            shaped = torch.cat([shaped, shaped])
            labels = torch.cat([labels, torch.full_like(labels, self.num_classes)])
        timesteps = torch.full((len(labels),), timestep, device=latents.device)
        output = self.transformer(shaped, timestep=timesteps, class_labels=labels).sample
        noise: Tensor = output[:, : self.latent_shape[0]].float().flatten(1)  # the rest is a learned variance
        if guidance == 1:
            return noise
        conditional, free = noise.chunk(2)
        guided: Tensor = free + guidance * (conditional - free)
        return guided

    def _prepared(self, kind: str, levels: Levels) -> Any:
        """Return a scheduler on the model's schedule, with the spacing that both directions share."""
        import diffusers

        changes = {"clip_sample": False, "timestep_spacing": "leading", "steps_offset": 0}
        scheduler = getattr(diffusers, kind).from_config({**self.scheduler, **changes})
        check_levels(levels, scheduler.config.num_train_timesteps)
        scheduler.set_timesteps(levels.num_inference_steps)
        return scheduler


def _channels(pixels: Tensor, num: int) -> Tensor:
    """Return images [N, num, H, W]: grey ones repeated, coloured ones averaged."""
    return pixels if pixels.shape[1] == num else pixels.mean(1, keepdim=True).expand(-1, num, -1, -1)


def _resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(pixels.shape[2:]) == size:
        return pixels
    return F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)


def network_kinds() -> dict[str, Any]:
    """Return diffusers' class of each of the `PARTS`."""
    from diffusers import AutoencoderKL, DiTTransformer2DModel

    return dict(zip(PARTS, (DiTTransformer2DModel, AutoencoderKL), strict=True))


def open_pipeline(folder: Path) -> DiffusionModel:
    """Open a folder that diffusers' `DiTPipeline.save_pretrained` wrote, without network access.

    Weights of a variant (`*.fp16.safetensors`) are read where there are no others, into float32. InputError
    if it is not such a folder, a file is damaged or lacks weights, or its schedule does not fit.
    """
    about = read_folder(folder)
    nets = []
    for part, kind in network_kinds().items():
        try:
            with forked_global(0):  # layers draw initial weights before the stored ones are loaded
                net, loaded = kind.from_pretrained(
                    folder / part,
                    local_files_only=True,
                    low_cpu_mem_usage=False,
                    output_loading_info=True,
                    variant=weights_variant(folder / part),
                )
        except BROKEN as error:
            raise damaged(folder, error) from error
        if missing := sorted(loaded["missing_keys"]):
            raise InputError(
                f"{folder / part} must hold all weights of its network, {len(missing)} are missing (first: "
                f"{missing[0]}); get it again"
            )
        nets.append(net)
    return DiffusionModel(nets[0], nets[1], about.schedule, about.fingerprint, about.class_names, about.seen)


def save_pipeline(model: DiffusionModel, folder: Path) -> None:
    """Write a model as a DiTPipeline folder; an existing folder is replaced only after success.

    The splits it was trained on go into `ddray.json`, which diffusers ignores. StorageError if it can't be
    written.
    """
    from diffusers import DDIMScheduler, DiTPipeline

    names = dict(enumerate(model.class_names))
    pipeline = DiTPipeline(model.transformer, model.vae, DDIMScheduler.from_config(model.scheduler), names)
    pipeline.register_to_config(id2label=names)

    def write(target: Path) -> None:
        pipeline.save_pretrained(target)
        if model.seen:
            (target / SEEN).write_text(json.dumps({"seen": [dict(part) for part in model.seen]}))

    write_folder(folder, write)


def check_levels(levels: Levels, num_train_timesteps: int) -> None:
    """Raise InputError unless a schedule of `num_train_timesteps` has the numbers of steps."""
    if not 1 <= levels.num_steps <= levels.num_inference_steps <= num_train_timesteps:
        raise InputError(
            "diffusion steps must satisfy 1 <= inversion_steps <= num_inference_steps <= "
            f"{num_train_timesteps}, got {levels.num_steps} and {levels.num_inference_steps}"
        )
