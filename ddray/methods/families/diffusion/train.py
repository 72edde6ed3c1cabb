"""Training D3HR's generator: a small VAE and DiT from scratch, or an opened DiT fine-tuned for a dataset.

The autoencoder is trained on reconstruction (mean squared error) and a little KL divergence, the DiT on the
noise of scaled latents (epsilon prediction, Ho et al. 2020), with labels dropped for classifier-free guidance
and an exponential moving average of the weights, which becomes the model. Every step draws from its own
generator: a run that continues from its checkpoint ends with the same bytes.
"""

import math
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from ddray.config import Config
from ddray.data import Split
from ddray.errors import InputError
from ddray.methods.families.diffusion.fit import Checkpoint, TrainingStage
from ddray.methods.families.diffusion.folder import absolute, known_names
from ddray.methods.families.diffusion.model import DiffusionModel, open_pipeline
from ddray.seeding import derive, derive_seed, forked_global
from ddray.system.numerics import has_bf16
from ddray.system.transfer import to_device
from ddray.training.engine import cosine

SCHEDULE: Final[dict[str, Any]] = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "clip_sample": False,
    "prediction_type": "epsilon",
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "timestep_spacing": "leading",
}
"""DiT's noise schedule (Peebles & Xie 2023)."""


class DiffusionRecipe(Config):
    """How a generator is trained; defaults suit 32 px, `default_recipe` covers other sizes."""

    init: str | None = None
    """Folder of a DiTPipeline to re-label and fine-tune; default: train from scratch."""
    epochs: int = Field(default=400, ge=1)
    """Epochs of the DiT (the paper fine-tunes 400)."""
    vae_epochs: int = Field(default=40, ge=1)
    """Epochs of the autoencoder; an opened model keeps its own."""
    batch: int = Field(default=128, ge=1)
    lr: float = Field(default=5e-4, gt=0)
    """Learning rate of the DiT (AdamW)."""
    vae_lr: float = Field(default=1e-3, gt=0)
    """Learning rate of the autoencoder (Adam, cosine)."""
    ema: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the moving average of the DiT's weights."""
    label_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of labels replaced by the null label."""
    kl_weight: float = Field(default=1e-4, ge=0)
    """Weight of the KL divergence per latent number against the squared error per pixel."""
    latent_channels: int = Field(default=4, ge=1)
    vae_width: int = Field(default=32, ge=8, multiple_of=8)
    """Channels of the autoencoder's first block; they double with each halving."""
    vae_halvings: int = Field(default=1, ge=0, le=5)
    """How often the autoencoder halves the image."""
    patch: int = Field(default=2, ge=1)
    """Side of the DiT's patches, in latent pixels."""
    depth: int = Field(default=8, ge=1)
    heads: int = Field(default=4, ge=1)
    head_dim: int = Field(default=64, ge=8, multiple_of=4)

    _absolute = field_validator("init")(absolute)


def default_recipe(image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Return the settings for images of `image_shape` (C, H, W) that differ from the defaults."""
    size = max(image_shape[1:])
    if size <= 16:
        training = {"epochs": 100, "vae_epochs": 20, "batch": 64, "ema": 0.995}
        return {**training, "depth": 4, "head_dim": 32, "vae_width": 16}
    if size <= 32:
        return {}
    if size <= 64:
        return {"vae_halvings": 2, "depth": 12, "heads": 6}
    return {"vae_halvings": 3, "vae_width": 64, "depth": 12, "heads": 6, "vae_epochs": 100, "batch": 32}


def train_generator(
    split: Split,
    class_names: tuple[str, ...],
    recipe: DiffusionRecipe,
    *,
    seed: int,
    device: torch.device,
    checkpoint: Path | None = None,
) -> tuple[DiffusionModel, dict[str, float]]:
    """Train a generator on real images, from its checkpoint if there is one.

    The images are uint8 [N, C, H, W]; `seed` decides initial weights and every draw. The file `checkpoint` is
    updated about once a minute; the caller removes it once the model is stored. Returns the model (in eval
    mode, on `device`) and the last epoch's mean losses. InputError if the images are of the wrong kind or the
    folder to start from can't be opened, DivergedError if a loss becomes NaN.
    """
    if split.images.dtype != torch.uint8:
        raise InputError("a diffusion model is trained on uint8 images, got spectrograms; use another method")
    shape = (split.images.shape[1], split.images.shape[2], split.images.shape[3])
    stored = Checkpoint(checkpoint)
    measured: dict[str, float] = {}
    if recipe.init is not None:
        model = relabel(open_pipeline(Path(recipe.init)), class_names, seed=seed).to(device)
    else:
        model = build(recipe, shape, class_names, seed=seed).to(device)
        measured["vae_loss"] = _train_vae(model, split, recipe, stored, seed=seed)
    measured["loss"] = _train_dit(model, split, recipe, stored, seed=seed)
    return model, measured


def build(
    recipe: DiffusionRecipe, image_shape: tuple[int, int, int], class_names: tuple[str, ...], *, seed: int
) -> DiffusionModel:
    """Return an untrained generator for images of `image_shape` (C, H, W).

    Its images' side is rounded up to a multiple of what the autoencoder's halvings and the patches need.
    """
    from diffusers import AutoencoderKL, DiTTransformer2DModel

    grain = 2**recipe.vae_halvings * recipe.patch
    size = math.ceil(max(image_shape[1:]) / grain) * grain
    blocks = recipe.vae_halvings + 1
    with forked_global(derive_seed(seed, "diffusion", "build")):
        vae = AutoencoderKL(
            in_channels=image_shape[0],
            out_channels=image_shape[0],
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            block_out_channels=tuple(recipe.vae_width * 2**i for i in range(blocks)),
            latent_channels=recipe.latent_channels,
            norm_num_groups=8,
            sample_size=size,
        )
        transformer = DiTTransformer2DModel(
            num_attention_heads=recipe.heads,
            attention_head_dim=recipe.head_dim,
            in_channels=recipe.latent_channels,
            num_layers=recipe.depth,
            sample_size=size // 2**recipe.vae_halvings,
            patch_size=recipe.patch,
            num_embeds_ada_norm=len(class_names),
        )
    _start_as_identity(transformer)
    return DiffusionModel(transformer, vae, SCHEDULE, fingerprint="", class_names=class_names)


@torch.no_grad()
def _start_as_identity(transformer: Any) -> None:
    """Zero what DiT zeroes (Peebles & Xie 2023, adaLN-Zero) and diffusers leaves at its default."""
    heads = [transformer.proj_out_1, transformer.proj_out_2]
    for layer in [*(block.norm1.linear for block in transformer.transformer_blocks), *heads]:
        layer.weight.zero_()
        layer.bias.zero_()


@torch.no_grad()
def relabel(model: DiffusionModel, class_names: tuple[str, ...], *, seed: int) -> DiffusionModel:
    """Return an opened generator with labels for other classes.

    A class that the model knows by name keeps its embedding; any other starts at the mean embedding plus a
    little noise, so that classes can separate. The null label keeps its embedding.
    """
    label_of = known_names(model.class_names)
    old_labels = [label_of.get(name) for name in class_names]
    num_old = model.num_classes
    for layer, block in enumerate(model.transformer.transformer_blocks):
        embedder = block.norm1.emb.class_embedder
        table = embedder.embedding_table.weight
        middle, spread = table[:num_old].mean(0), 0.1 * table[:num_old].std(0, unbiased=False)
        noise = torch.randn(len(old_labels), table.shape[1], generator=derive(seed, "relabel", layer))
        fresh = middle + spread * noise
        for label, old_label in enumerate(old_labels):
            if old_label is not None:
                fresh[label] = table[old_label]
        with forked_global(0):
            embedder.embedding_table = nn.Embedding(len(old_labels) + 1, table.shape[1])
        embedder.embedding_table.weight.copy_(torch.cat([fresh, table[num_old:]]))
        embedder.num_classes = len(old_labels)
    model.transformer.register_to_config(num_embeds_ada_norm=len(old_labels))
    return replace(model, fingerprint="", class_names=class_names)


def epoch_batch(seed: int, network: str, step: int, per_epoch: int, num: int, batch: int) -> Tensor:
    """Return the image indices of a step; an epoch's order depends only on its number."""
    epoch, position = divmod(step, per_epoch)
    return _order(seed, network, epoch, num)[position * batch : (position + 1) * batch]


@lru_cache(maxsize=1)
def _order(seed: int, network: str, epoch: int, num: int) -> Tensor:
    return torch.randperm(num, generator=derive(seed, network, "epoch", epoch))


def _train_vae(
    model: DiffusionModel, split: Split, recipe: DiffusionRecipe, checkpoint: Checkpoint, *, seed: int
) -> float:
    """Train the autoencoder in place; return the mean loss of its last epoch."""
    vae, device = model.vae, next(model.vae.parameters()).device
    per_epoch = math.ceil(len(split) / recipe.batch)
    total = per_epoch * recipe.vae_epochs

    def loss(step: int) -> Tensor:
        index = epoch_batch(seed, "vae", step, per_epoch, len(split), recipe.batch)
        pixels = model.fit(to_device(split.images[index], device).float() / 255)
        posterior = vae.encode(pixels.contiguous(memory_format=torch.channels_last)).latent_dist
        noise = to_device(torch.randn(posterior.mean.shape, generator=derive(seed, "vae", step)), device)
        reconstruction = vae.decode(posterior.mean + posterior.std * noise).sample
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        total: Tensor = F.mse_loss(reconstruction, pixels) + recipe.kl_weight * divergence
        return total

    vae.to(memory_format=torch.channels_last)
    return TrainingStage(
        name="autoencoder",
        net=vae,
        optimizer=torch.optim.Adam(vae.parameters(), lr=recipe.vae_lr),
        loss=loss,
        lr=lambda step: recipe.vae_lr * cosine(step, total),
        per_epoch=per_epoch,
        epochs=recipe.vae_epochs,
    ).run(checkpoint)


@torch.no_grad()
def _posteriors(model: DiffusionModel, split: Split, batch: int) -> tuple[Tensor, Tensor]:
    """Return means and standard deviations [N, C, h, w] of all latents, unscaled, on the model's device."""
    device = next(model.vae.parameters()).device
    means, deviations = [], []
    for images in torch.split(split.images, batch):
        posterior = model.vae.encode(model.fit(to_device(images, device).float() / 255)).latent_dist
        means.append(posterior.mean.contiguous())
        deviations.append(posterior.std.contiguous())
    return torch.cat(means), torch.cat(deviations)


def _train_dit(
    model: DiffusionModel, split: Split, recipe: DiffusionRecipe, checkpoint: Checkpoint, *, seed: int
) -> float:
    """Train the transformer in place on the split's latents; return the mean loss of its last epoch."""
    from diffusers import DDPMScheduler

    means, deviations = _posteriors(model, split, recipe.batch)
    device, labels = means.device, split.labels.to(means.device)
    if recipe.init is None:
        # Latents of unit variance, like the noise (Rombach et al. 2022, D.1).
        spread = float((means.double().var() + deviations.double().square().mean()).sqrt())
        model.vae.register_to_config(scaling_factor=1 / spread)
    factor, steps = float(model.vae.config.scaling_factor), int(model.scheduler["num_train_timesteps"])
    scheduler = DDPMScheduler.from_config({**model.scheduler, "_class_name": "DDPMScheduler"})
    per_epoch, bf16 = math.ceil(len(labels) / recipe.batch), has_bf16(device)

    def loss(step: int) -> Tensor:
        index = to_device(epoch_batch(seed, "dit", step, per_epoch, len(labels), recipe.batch), device)
        generator = derive(seed, "dit", step, device=device)
        drawn, noise = torch.randn((2, *means[index].shape), generator=generator, device=device)
        clean = (means[index] + deviations[index] * drawn) * factor
        times = torch.randint(steps, (len(index),), generator=generator, device=device)
        dropped = torch.rand(len(index), generator=generator, device=device) < recipe.label_dropout
        conditioning = torch.where(dropped, model.num_classes, labels[index])
        noisy = scheduler.add_noise(clean, noise, times)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            # In eval mode, or diffusers would drop labels too: by the global generator, anew in each block.
            predicted = model.transformer(noisy, timestep=times, class_labels=conditioning).sample
        return F.mse_loss(predicted[:, : noise.shape[1]].float(), noise)

    return TrainingStage(
        name="diffusion transformer",
        net=model.transformer,
        optimizer=torch.optim.AdamW(model.transformer.parameters(), lr=recipe.lr, weight_decay=0.0),
        loss=loss,
        lr=lambda step: recipe.lr * min(1.0, (step + 1) / 100),
        per_epoch=per_epoch,
        epochs=recipe.epochs,
        ema=recipe.ema,
    ).run(checkpoint)
