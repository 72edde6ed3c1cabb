"""Decoder `d3hr`: a set holds statistics of latents; a generator makes any number of images from them."""

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
from ddray.methods.families.diffusion.sampling import Sampler
from ddray.methods.families.diffusion.stages import load_generator
from ddray.pool.local import LocalPool
from ddray.pool.spec import PoolSpec
from ddray.system.files import home

_NAMES: Final = ("mean", "variance")


def _read(meta: Meta, tensors: Mapping[str, Tensor], zca: Mapping[str, Tensor]) -> DistilledSet:
    """Return a set without images, which holds a file's statistics."""
    blank, none = torch.zeros(0, *meta.image_shape), torch.zeros(0, dtype=torch.int64)
    return DistilledSet(blank, none, meta, zca, compact=tensors)


def _validate(distilled: DistilledSet) -> None:
    tensors, num_classes = distilled.compact, len(distilled.meta.class_names)
    if set(tensors) != set(_NAMES) or any(tensor.dtype != torch.float32 for tensor in tensors.values()):
        raise InputError(f"decoder d3hr must come with float32 mean and variance, got {sorted(tensors)}")
    mean, variance = (tensors[name] for name in _NAMES)
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
    """Generate `ipc` images per class from a set of statistics (Sec 6.7).

    Args:
        distilled: a set with decoder `d3hr`.
        ipc: images per class, >= 1; None: as distilled.
        device: where to compute.

    Raises:
        InputError: ipc is below 1, or the generator no longer exists.
    """
    meta = distilled.meta
    ipc = meta.ipc if ipc is None else ipc
    if ipc < 1:
        raise InputError(f"ipc must be >= 1, got {ipc}")
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


STATISTICS: Final = Decoder(
    read=_read,
    validate=_validate,
    decode=lambda distilled: generate(distilled, None, torch.device("cpu")).decode(),
    generate=generate,
)
