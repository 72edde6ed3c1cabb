"""Images from D3HR's statistics: group sampling, DDIM sampling, decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddray.methods.families.diffusion.folder import resolve_ids
from ddray.methods.families.diffusion.groups import group_sample
from ddray.methods.families.diffusion.model import DiffusionModel
from ddray.seeding import derive

if TYPE_CHECKING:
    from ddray.methods.families.diffusion.config import D3HRConfig


class Sampler:
    """Generates images of classes from the statistics of their latents.

    Args:
        mean: [K, D] of the latents at level T.
        variance: [K, D].
        model: the generator, on the device to compute on.
        config: settings of group sampling and DDIM sampling.
        class_names: of the dataset.
        seed: of the run; class c's draws depend only on it and c.
        device: where to compute.
    """

    def __init__(
        self,
        mean: Tensor,
        variance: Tensor,
        model: DiffusionModel,
        config: D3HRConfig,
        *,
        class_names: tuple[str, ...],
        seed: int,
        device: torch.device,
    ) -> None:
        dtype = getattr(torch, config.precision) if device.type == "cuda" else torch.float32
        self._mean, self._std = mean, (variance * config.variance_scale).sqrt()
        self._config, self._seed, self._device = config, seed, device
        self.model = model.to(device, dtype)
        self._ids = torch.tensor(
            resolve_ids(model.class_names, model.num_classes, class_names, config.class_ids)
        )

    def choose(self, label: int, ipc: int) -> tuple[Tensor, float]:
        """Return the chosen latents [ipc, D] of a class, and their score per dimension."""
        config = self._config
        latents, score = group_sample(
            self._mean[label].to(self._device),
            self._std[label].to(self._device),
            ipc=ipc,
            num_candidates=1 if config.sampling == "random" else config.num_candidates,
            generator=derive(self._seed, "distill", "group", 0 if config.shared_draws else label),
            weights=(config.lambda_mean, config.lambda_std, config.lambda_skew),
            form=config.form,
        )
        return latents.cpu(), score / latents.shape[1]

    def decode(self, latents: Tensor, labels: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
        """Return raw pixels [N, *image_shape] in [0, 1] of latents [N, D] of level T under labels [N]."""
        ids = self._ids[labels].to(self._device)
        clean = self.model.sample(latents.to(self._device), ids, self._config.levels())
        return self.model.decode(clean, image_shape).cpu()
