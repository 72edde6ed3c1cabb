"""Small generators for tests: seconds to train, or not trained at all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ddray.data import Dataset, Split
from ddray.methods.families.diffusion.model import DiffusionModel
from ddray.methods.families.diffusion.train import DiffusionRecipe, build, train_generator

TINY = {"epochs": 1, "vae_epochs": 1, "vae_width": 8, "depth": 1, "heads": 1, "head_dim": 8, "batch": 16}
# Settings of D3HR that take no time.
BASE = {"num_candidates": 7, "num_inference_steps": 2, "generator": TINY}


def tiny_recipe(**changes: Any) -> DiffusionRecipe:
    return DiffusionRecipe.parse({**TINY, **changes})


def untrained(
    shape: tuple[int, int, int] = (1, 16, 16), num_classes: int = 3, **changes: Any
) -> DiffusionModel:
    names = tuple(f"class {i}" for i in range(num_classes))
    model = build(tiny_recipe(**changes), shape, names, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # a DiT starts as the identity and would predict zero noise
        for layer in (model.transformer.proj_out_2, model.transformer.transformer_blocks[0].norm1.linear):
            layer.weight.copy_(0.3 * torch.randn(layer.weight.shape, generator=generator))
    return model


def with_variances(channels: int = 1) -> DiffusionModel:
    """Return an untrained generator whose network also has variances, as the released one does."""
    from diffusers import DiTTransformer2DModel

    plain = untrained((channels, 16, 16))
    config = {name: value for name, value in plain.transformer.config.items() if name[0] != "_"}
    transformer = DiTTransformer2DModel(**{**config, "out_channels": 8})
    with torch.no_grad():
        for index, weight in enumerate(transformer.parameters()):
            generator = torch.Generator().manual_seed(index)
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return replace(plain, transformer=transformer)


def trained_on(dataset: Dataset, num: int, **changes: Any) -> tuple[DiffusionModel, Split]:
    """Return a generator trained on the first `num` images, and those images."""
    split = dataset.train()
    split = Split(split.images[:num], split.labels[:num])
    recipe = DiffusionRecipe.parse({**TINY, "depth": 2, "heads": 2, "head_dim": 32, "batch": 50, **changes})
    model, _ = train_generator(split, dataset.class_names, recipe, seed=0, device=torch.device("cpu"))
    return model, split
