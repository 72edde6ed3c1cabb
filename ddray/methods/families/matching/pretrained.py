"""Networks trained on the real images, shared by sets, trials and runs; their features of these images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ddray.config import Config
from ddray.data import search_rows
from ddray.distillation.method import DistillContext
from ddray.pool.spec import PoolSpec, features_spec, supervised_specs
from ddray.system.transfer import to_device


class PoolConfig(Config):
    """The networks that images are matched under."""

    num_models: int = Field(default=10, ge=1)
    """M (Fig 5, right)."""
    epochs: int = Field(default=20, ge=1)
    """E, epochs on the real images (Fig 5, left)."""
    augment: Literal["dsa", "dsa_idc", "none"] = "none"
    """Augmentation of their training."""
    strategy: str | None = None
    """Its operations, joined by "_"; default: all of them."""
    cutmix: float = Field(default=0.0, ge=0, le=1)
    """Probability of CutMix per batch of their training."""
    seed: int = Field(default=0, ge=0)
    """Seed of the first network, the others count up; not the run's: runs of all seeds share one pool."""


def pretrained_specs(ctx: DistillContext, config: PoolConfig, arch: str | None = None) -> list[PoolSpec]:
    """Return the specs of the networks: none has seen val, so that searches and other runs share them.

    `arch` is the canonical name of theirs; default: that of the network to match in.
    """
    return supervised_specs(
        ctx.dataset,
        split=ctx.shared_split,
        arch=arch or ctx.arch,
        device=ctx.device.type,
        recipe=config.model_dump(exclude={"num_models", "seed", "arch"}),
        seed=config.seed,
        num=config.num_models,
    )


@dataclass(frozen=True)
class StoredFeatures:
    """The pool's own features of a context's real images.

    Attributes:
        features: one [N, D] per network; where rows of val follow those of the rest, [N + M, D].
        rows: int64 [N], the row of each real image; None: its own index.
    """

    features: list[Tensor]
    rows: Tensor | None

    def of(self, member: int, index: Tensor, device: torch.device) -> Tensor:
        """Return features [B, D] of real images `index` [B] under one network, on a device."""
        features = self.features[member]
        rows = to_device(index, features.device)
        return to_device(features.index_select(0, rows if self.rows is None else self.rows[rows]), device)


def stored_features(ctx: DistillContext, networks: Sequence[PoolSpec]) -> StoredFeatures | None:
    """Return networks' features of the context's real images, from the pool; None without networks.

    On a GPU, if they take at most half of its free memory.
    """
    whole = ctx.split_name == "train"
    features = [entry.tensors["features"] for entry in ctx.pool.get(list(map(features_spec, networks)))]
    if not features:
        return None
    rows = search_rows(ctx.whole, seed=ctx.search_seed) if whole else None
    if ctx.shard is not None:  # no more than its own images' are needed
        present = ctx.shard.rows if rows is None else rows[ctx.shard.rows]
        features, rows = [tensor[present] for tensor in features], None
    if ctx.device.type == "cuda":
        size = sum(tensor.numel() * tensor.element_size() for tensor in features)
        if 2 * size <= torch.cuda.mem_get_info(ctx.device)[0]:
            features = [tensor.to(ctx.device) for tensor in features]
    return StoredFeatures(features, None if rows is None else rows.to(features[0].device))
