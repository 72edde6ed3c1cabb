"""Images from D3HR's statistics: group sampling, DDIM sampling, decoding; and decoder `d3hr`.

A set that holds statistics of latents gives any number of images, which a generator makes from them.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from ddray.artifact.decoders import Decoder
from ddray.artifact.distilled_set import DistilledSet, Meta
from ddray.errors import InputError
from ddray.methods.families.diffusion.config import D3HRConfig
from ddray.methods.families.diffusion.folder import resolve_ids
from ddray.methods.families.diffusion.groups import group_sample
from ddray.methods.families.diffusion.model import DiffusionModel
from ddray.methods.families.diffusion.stages import load_generator
from ddray.pool.local import LocalPool
from ddray.pool.spec import PoolSpec
from ddray.seeding import derive
from ddray.system.files import home


class Sampler:
    """Generates images of classes from mean and variance [K, D] of their latents at level T.

    Class c's draws depend only on the run's `seed` and c.
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
        self._mean, self._std = mean, (variance * config.variance_scale).sqrt()
        self._config, self._seed, self._device = config, seed, device
        self.model = model.to(device, config.precision)
        ids = resolve_ids(model.class_names, model.num_classes, class_names, config.class_ids)
        self._ids = torch.tensor(ids)

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


def _read(meta: Meta, tensors: Mapping[str, Tensor], zca: Mapping[str, Tensor]) -> DistilledSet:
    """Return a set without images, which holds a file's statistics."""
    blank, none = torch.zeros(0, *meta.image_shape), torch.zeros(0, dtype=torch.int64)
    return DistilledSet(blank, none, meta, zca, compact=tensors)


def _validate(distilled: DistilledSet) -> None:
    tensors, num_classes = distilled.compact, len(distilled.meta.class_names)
    if set(tensors) != {"mean", "variance"} or any(t.dtype != torch.float32 for t in tensors.values()):
        raise InputError(f"decoder d3hr must come with float32 mean and variance, got {sorted(tensors)}")
    mean, variance = tensors["mean"], tensors["variance"]
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in (mean, variance))
    if mean.ndim != 2 or len(mean) != num_classes or variance.shape != mean.shape or not finite:
        raise InputError(
            f"mean and variance must be finite [{num_classes}, D], got {list(mean.shape)} and "
            f"{list(variance.shape)}"
        )
    if bool((variance < 0).any()):
        raise InputError(f"variance must be >= 0, got {float(variance.min())}")
    distilled.check_storage()


def generate(distilled: DistilledSet, ipc: int | None, device: torch.device) -> DistilledSet:
    """Generate `ipc` images per class (None: as distilled) from a set of statistics (Sec 6.7).

    InputError if ipc is below 1, or the generator no longer exists.
    """
    meta = distilled.meta
    ipc = meta.ipc if ipc is None else ipc
    if ipc < 1:
        raise InputError(f"ipc must be >= 1, got {ipc}")
    config = D3HRConfig.parse(meta.config.get("method", {}), prefix="method.")
    sampler = Sampler(
        **distilled.compact,
        model=load_generator(_source(config, meta.generator or ""), LocalPool(_refuse)),
        config=config,
        class_names=meta.class_names,
        seed=meta.seed or 0,
        device=device,
    )
    num_classes = len(meta.class_names)
    latents = torch.cat([sampler.choose(label, ipc)[0] for label in range(num_classes)])
    labels = torch.arange(num_classes).repeat_interleave(ipc)
    batches = zip(torch.split(latents, config.batch), torch.split(labels, config.batch), strict=True)
    pixels = torch.cat([sampler.decode(*batch, meta.image_shape) for batch in batches])
    return replace(
        distilled,
        images=distilled.space().encode(pixels),
        labels=labels,
        compact={},
        meta=meta.model_copy(update={"ipc_decoded": ipc, "decoder": None}),
    )


def _source(config: D3HRConfig, fingerprint: str) -> Mapping[str, Any]:
    """Return a set's generator, the folder it was given or its pool entry; InputError if there is neither."""
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


STATISTICS: Final = Decoder(
    read=_read,
    validate=_validate,
    decode=lambda distilled: generate(distilled, None, torch.device("cpu")).decode(),
    generate=generate,
)
