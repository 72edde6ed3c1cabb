"""What every network returns from one pass, and the normalisation layers the families share."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from ddray.nets.names import GROUPS


class Features(NamedTuple):
    """One forward pass.

    Attributes:
        logits: [N, K].
        embedding: [N, D], what feeds the classifier.
        maps: per block its post-activation, pre-pool map [N, C_l, H_l, W_l].
    """

    logits: Tensor
    embedding: Tensor
    maps: tuple[Tensor, ...]


def norm_layer(norm: str, shape: tuple[int, int, int]) -> nn.Module:
    """Return an affine normalisation layer for maps of `shape` (C, H, W).

    The field's "instance norm" is a GroupNorm with one group per channel (DC's networks.py), whose statistics
    are the sample's own in train() and eval() alike.

    Args:
        norm: none, batch, layer, instance or group (4 groups).
        shape: (C, H, W) of the maps; only layer norm depends on H and W.
    """
    channels = shape[0]
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "layer":
        return nn.LayerNorm(list(shape))
    if norm == "instance":
        return nn.GroupNorm(channels, channels)
    if norm == "group":
        return nn.GroupNorm(GROUPS, channels)
    return nn.Identity()
