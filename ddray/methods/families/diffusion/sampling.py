"""Images from D3HR's statistics, in a run or from a stored set: group sampling, DDIM sampling, decoding."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ddray.errors import InputError
from ddray.methods.families.diffusion.groups import group_sample
from ddray.methods.families.diffusion.model import DiffusionModel, class_ids
from ddray.methods.families.diffusion.stages import load_generator
from ddray.pool.local import LocalPool
from ddray.pool.spec import PoolSpec
from ddray.seeding import derive
from ddray.system.files import home

if TYPE_CHECKING:
    from ddray.artifact.distilled_set import DistilledSet
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
        self._ids = class_ids(model, class_names, config.class_ids)

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


def generate(distilled: DistilledSet, ipc: int, device: torch.device) -> DistilledSet:
    """Generate `ipc` images per class from a set of statistics (Sec 6.7).

    Args:
        distilled: a set with decoder `d3hr`.
        ipc: images per class, >= 1.
        device: where to compute.

    Raises:
        InputError: ipc is below 1, or the generator no longer exists.
    """
    from ddray.methods.families.diffusion.config import D3HRConfig

    if ipc < 1:
        raise InputError(f"ipc must be >= 1, got {ipc}")
    meta = distilled.meta
    config = D3HRConfig.parse(meta.config.get("method", {}), prefix="method.")
    model = load_generator(_source(config, meta.generator or ""), LocalPool(_refuse))
    sampler = Sampler(
        distilled.compact["mean"],
        distilled.compact["variance"],
        model,
        config,
        class_names=meta.class_names,
        seed=meta.seed or 0,
        device=device,
    )
    num_classes = len(meta.class_names)
    latents = torch.cat([sampler.choose(label, ipc)[0] for label in range(num_classes)])
    labels = torch.arange(num_classes).repeat_interleave(ipc)
    batches = zip(torch.split(latents, config.batch), torch.split(labels, config.batch), strict=True)
    pixels = torch.cat(
        [sampler.decode(batch, batch_labels, meta.image_shape) for batch, batch_labels in batches]
    )
    changes = {"ipc_decoded": ipc, "decoder": None}
    return replace(
        distilled,
        images=distilled.space().encode(pixels),
        labels=labels,
        compact={},
        meta=meta.model_copy(update=changes),
    )


def _source(config: D3HRConfig, fingerprint: str) -> Mapping[str, Any]:
    """Locate a set's generator: the folder it was given, or its pool entry.

    Raises:
        InputError: there is neither.
    """
    if config.diffusion is not None:
        return {"folder": config.diffusion, "fingerprint": fingerprint}
    path = home() / "pool" / fingerprint / "entry.json"
    try:
        return {"spec": json.loads(path.read_text(encoding="utf-8"))["spec"]}
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"the set needs its generator, {path.parent} does not hold it; copy that folder there, or distil "
            "with method.diffusion=FOLDER"
        ) from error


def _refuse(spec: PoolSpec) -> Any:
    raise InputError(f"the set needs its generator, pool entry {spec.key} is damaged; copy it again")
