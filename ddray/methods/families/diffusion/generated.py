"""Shared by methods whose images a class-conditional diffusion model samples from pure noise.

A step samples and decodes a batch of images. How alike a class's samples are, and how near to real images,
are measures of a run.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Final, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from ddray.artifact.distilled_set import DistilledSet
from ddray.distillation.method import DistillContext, MethodConfig, Target
from ddray.distillation.shards import parts_of
from ddray.errors import InputError
from ddray.methods.families.diffusion.ancestral import ancestral, betas_of, check_steps, respaced
from ddray.methods.families.diffusion.folder import absolute
from ddray.methods.families.diffusion.model import DiffusionModel
from ddray.methods.families.diffusion.source import Source, resolve_source
from ddray.methods.families.diffusion.train import DiffusionRecipe, default_recipe
from ddray.methods.families.state import cpu_copy
from ddray.system.transfer import to_device

_COMPARED: Final = 256  # real images of each class that samples are compared with, at most
_WRITTEN_PER_STEP: Final = 32 * 2**20


class GeneratedConfig(MethodConfig):
    """How images are sampled; defaults are the published ones."""

    quick: ClassVar[Mapping[str, Any]] = {
        "generator": {"epochs": 1, "vae_epochs": 1, "vae_width": 8, "depth": 1, "heads": 1, "head_dim": 8},
        "num_inference_steps": 2,
        "batch": 4,
    }

    diffusion: str | None = None
    """Folder of a DiTPipeline; default: a generator trained on the images, by `generator`."""
    generator: DiffusionRecipe = DiffusionRecipe()
    """How a generator is trained where none is given."""
    class_ids: tuple[int, ...] | None = None
    """The generator's label of each class; default: by name or number."""
    num_inference_steps: int = Field(default=50, ge=2)
    """Levels from pure noise to clean latents."""
    guidance: float = Field(default=4.0, ge=0)
    """Scale of classifier-free guidance; 1: none."""
    guided_channels: int = Field(default=3, ge=1)
    """The first channels of a latent, which alone are guided; as many as it has: all."""
    batch: int = Field(default=64, ge=1)
    """Images sampled and decoded at a time."""
    precision: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the networks on a GPU; a CPU computes in float32."""

    _absolute = field_validator("diffusion")(absolute)

    @property
    def edition(self) -> int:
        """1 for own generators, whose pool entries first lost the scale of their latents."""
        return int(self.diffusion is None)


def generated_preset(name: str, target: Target) -> dict[str, Any]:
    """Return run settings: `paper` and `repo` are the same."""
    # A checkpoint holds all images so far: limit writes to 32 MiB per step on average.
    floats = 2 * target.ipc * target.num_classes * math.prod(target.image_shape)
    return {
        "steps": 0,
        "checkpoint_every": max(1, math.ceil(4 * floats / _WRITTEN_PER_STEP)),
        "evaluate": {"recipe": "minimax"},
        "method": {"generator": default_recipe(target.image_shape)},
    }


def sampled_source(ctx: DistillContext, config: GeneratedConfig) -> Source:
    """Return a method's generator, checked; InputError if it fits neither the images nor the steps."""
    if ctx.split.images.dtype != torch.uint8:
        raise InputError("a diffusion model makes uint8 images, got spectrograms; use another method")
    source = resolve_source(ctx, config)
    check_steps(config.num_inference_steps, source.num_train_timesteps)
    return source


class Generation:
    """A set sampled from a generator, batch by batch.

    Draws depend on seed and batch alone, so sets of two generators with one seed begin with the same noise.
    """

    def __init__(
        self, ctx: DistillContext, config: GeneratedConfig, model: DiffusionModel, ids: tuple[int, ...]
    ) -> None:
        self._ctx, self._config = ctx, config
        self._fingerprint = model.fingerprint
        self._model = model.to(ctx.device, config.precision)
        self._levels = respaced(betas_of(model), config.num_inference_steps).on(ctx.device)
        self._ids = torch.tensor(ids)
        self._labels = torch.arange(ctx.classes.start, ctx.classes.stop).repeat_interleave(ctx.ipc)
        total, batch = ctx.dataset.num_classes * ctx.ipc, config.batch
        present = slice(ctx.classes.start * ctx.ipc, ctx.classes.stop * ctx.ipc)
        batches = (slice(start, min(total, start + batch)) for start in range(0, total, batch))
        # The networks' bits depend on how many images are computed together.
        self._batches = list(parts_of(batches, present, exact=True))
        self.num_steps = len(self._batches)
        # Images stay on the CPU: a batch of them waits for the device once, after its many passes.
        self._images = torch.zeros(len(self._labels), *ctx.dataset.image_shape)
        self._latents = torch.zeros(len(self._labels), math.prod(model.latent_shape), device=ctx.device)
        self._space = ctx.space.to(ctx.device)
        self._step = 0

    def step(self) -> dict[str, Tensor]:
        """Sample and decode a batch; the loss is its latents' mean square, of real ones about 1."""
        ctx, part = self._ctx, self._batches[self._step]
        labels = part.padded(self._ids[self._labels[part.here]])
        generator = ctx.generator("noise", part.whole.start)
        shape = (len(labels), self._latents.shape[1])
        latents = ancestral(
            self._model,
            to_device(labels, ctx.device),
            self._levels,
            lambda: to_device(torch.randn(shape, generator=generator), ctx.device),
            guidance=self._config.guidance,
            channels=self._config.guided_channels,
        )
        pixels = self._model.decode(latents, ctx.dataset.image_shape)
        self._latents[part.here] = part.without_blanks(latents)
        self._images[part.here] = part.without_blanks(self._space.encode(pixels)).cpu()
        self._step += 1
        return {"loss": self._latents[part.here].square().mean()}

    @property
    def measures(self) -> dict[str, float]:
        """How alike samples are: `cosine_within_class` and `cosine_to_real`, of latents.

        The first is the mean of two samples of a class (above ipc 1), the other of a sample and the nearest
        of 256 real images of its class, or of all; over the classes that this process sampled.
        """
        if self._step < self.num_steps:
            return {}
        ctx, latents = self._ctx, F.normalize(torch.unflatten(self._latents, 0, (-1, self._ctx.ipc)), dim=2)
        measured: dict[str, float] = {}
        if ctx.ipc > 1:
            measured["cosine_within_class"] = float(within_class(latents))
        nearest = [
            (part @ F.normalize(self._real(label), dim=1).T).amax(1).mean()
            for label, part in zip(ctx.classes, latents, strict=True)
        ]
        return {**measured, "cosine_to_real": float(torch.stack(nearest).mean())}

    def _real(self, label: int) -> Tensor:
        """Return latents [n, D] of real images of a class, their posteriors' modes."""
        rows = (self._ctx.split.labels == label).nonzero().flatten()[:_COMPARED]
        parts = torch.split(self._ctx.split.images[rows], self._config.batch)
        pixels = (to_device(part, self._ctx.device).float() / 255 for part in parts)
        return torch.cat([self._model.encode(part, "mode") for part in pixels])

    def snapshot(self) -> DistilledSet:
        """Return the set, with blanks for images not sampled yet."""
        distilled = self._ctx.make_set(self._images, self._labels)
        return replace(distilled, meta=distilled.meta.model_copy(update={"generator": self._fingerprint}))

    def state_dict(self) -> dict[str, Any]:
        """Return the images and latents so far, without blanks."""
        done = self._done()
        samples = cpu_copy({"latents": self._latents[:done], "images": self._images[:done]})
        return {"step": self._step, **samples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step = int(state["step"])
        done = self._done()
        self._latents[:done] = to_device(state["latents"], self._latents.device)
        self._images[:done] = state["images"]

    def _done(self) -> int:
        """Return how many images are sampled."""
        return self._batches[self._step - 1].here.stop if self._step else 0


def within_class(unit: Tensor) -> Tensor:
    """Return the mean cosine of two samples of a class, over pairs and classes, of unit vectors [K, n, D]."""
    num = unit.shape[1]
    return ((unit.sum(1).square().sum(1) - num) / (num * (num - 1))).mean()
