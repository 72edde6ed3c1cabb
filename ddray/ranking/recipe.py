"""How the architectures of a NAS space are trained."""

import math
from typing import Literal

from pydantic import Field

from ddray.config import Config


class NasRecipe(Config):
    """How every architecture is trained: SGD on cross entropy with a cosine learning rate."""

    epochs: int = Field(default=200, ge=1)
    lr: float = Field(default=0.01, gt=0)
    lr_min: float = Field(default=0.0, ge=0)
    """Final rate of the cosine."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(default=5e-4, ge=0)
    batch: int = Field(default=256, ge=1)
    clip: float | None = Field(default=None, gt=0)
    """Maximum norm of a network's gradient; None does not clip."""
    augment: Literal["dsa", "none"] = "dsa"
    """DSA with one operation per batch and parameters per sample."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16`: autocast the forward pass."""

    def num_steps(self, num_images: int) -> int:
        """Return the optimiser steps of a full training on `num_images`."""
        return self.epochs * math.ceil(num_images / self.batch)

    def lr_at(self, step: int, num_steps: int) -> float:
        """Return the learning rate of a step counted from 0."""
        return self.lr_min + 0.5 * (self.lr - self.lr_min) * (1 + math.cos(math.pi * step / num_steps))
