"""Experts: networks trained on the real images, whose weights after each epoch are the trajectories to match.

They are trained by SGD at one rate without momentum and decay, as a student can imitate (MTT), or by GSAM
(FTD).
"""

from __future__ import annotations

import math
from typing import Final, Literal

import torch
from pydantic import Field
from torch import Tensor

from ddray.config import Config
from ddray.data import Dataset, PixelSpace, Split, SplitName
from ddray.data.pixels import pixel_space
from ddray.errors import DivergedError
from ddray.nets import Net
from ddray.training.gsam import Gsam
from ddray.training.loop import Augmenter, Training
from ddray.training.recipe import Recipe
from ddray.training.student import flat_parameters

_spaces: Final[dict[tuple[str, str, str, str], PixelSpace]] = {}
"""The last pixel space that was fitted: all experts of a pool take one."""


class ExpertRecipe(Config):
    """How an expert is trained; defaults are MTT's."""

    epochs: int = Field(default=50, ge=1)
    """E; a snapshot follows each."""
    lr: float = Field(default=0.01, gt=0)
    """Learning rate, the same in all epochs."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Momentum; a student has none."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay; a student has none."""
    batch: int = Field(default=256, ge=1)
    """Real images per step."""
    augment: Literal["dsa", "none"] = "dsa"
    """Augmentation of pictures."""
    rho: float = Field(default=0.0, ge=0)
    """Radius of GSAM's neighbourhood (FTD); 0 with alpha 0 is plain SGD."""
    alpha: float = Field(default=0.0, ge=0)
    """Weight of GSAM's second term (FTD)."""

    def supervised(self) -> Recipe:
        """Return the same training without GSAM, as a recipe."""
        fields = self.model_dump(exclude={"rho", "alpha"})
        return Recipe.parse({**fields, "schedule": "constant"})

    @property
    def gsam(self) -> Gsam | None:
        """GSAM's settings; None where it would be plain SGD."""
        return Gsam(self.rho, self.alpha) if self.rho > 0 or self.alpha > 0 else None


def expert_images(
    kind: str, dataset: Dataset, split_name: str, split: Split, device: torch.device
) -> tuple[Split, PixelSpace]:
    """Return what experts of a split see: its images, and the pixel space that is fitted on these.

    Experts and the sets that imitate them must share one whitening, also where a set is distilled from all of
    train and its experts have not seen val.

    Args:
        kind: of the pixel space.
        dataset: what they are trained on.
        split_name: the part of it.
        split: its images, for a name that stands for no part of train.
        device: where ZCA is fitted.
    """
    part = SplitName.parse(split_name)
    images = split if part is None else part.carve(dataset.train())[0]
    key = (kind, dataset.fingerprint, split_name, device.type)
    if key not in _spaces:
        _spaces.clear()
        _spaces[key] = pixel_space(kind, dataset, images, device)
    return images, _spaces[key]


def train_expert(
    net: Net,
    images: Tensor,
    labels: Tensor,
    recipe: ExpertRecipe,
    *,
    generator: torch.Generator,
    augment: Augmenter | None,
) -> tuple[Tensor, float]:
    """Train an expert in place; return its weights before the first and after each epoch, and its last loss.

    Args:
        net: the fresh network, on the labels' device.
        images: float32 [N, C, H, W] in their pixel space, or what `augment` takes.
        labels: int64 [N].
        recipe: how; not its augmentation.
        generator: of the batches' order and the augmentation.
        augment: applied to every batch.

    Returns:
        float32 [E + 1, P] on the CPU, in the order of `named_parameters()`; the mean loss of the last epoch.

    Raises:
        DivergedError: a loss or a weight is not finite, at the end of the epoch in which it became so.
    """
    snapshots = [flat_parameters(net).cpu()]

    def keep(loss: Tensor) -> None:
        snapshots.append(flat_parameters(net).cpu())
        if not (math.isfinite(float(loss)) and bool(torch.isfinite(snapshots[-1]).all())):
            raise DivergedError(
                f"an expert ({net.arch}) diverged in epoch {len(snapshots) - 1} of {recipe.epochs}: its loss "
                f"is {float(loss)} at learning rate {recipe.lr:g}; lower the experts' lr"
            )

    training = Training(images, labels, recipe.supervised(), augment, gsam=recipe.gsam)
    loss = training.run([net], [generator], on_epoch=keep)
    return torch.stack(snapshots), float(loss)
