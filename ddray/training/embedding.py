"""A network's outputs for whole sets of images, computed part by part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import Tensor

from ddray.nets import Net

_CHUNK: Final = {"cpu": 64, "cuda": 1024}


@torch.no_grad()
def outputs(
    apply: Callable[[Tensor], Tensor],
    images: Tensor,
    encode: Callable[[Tensor], Tensor],
    device: torch.device,
) -> Iterator[Tensor]:
    """Yield a network's outputs [n, D] for parts of the images, on the device.

    Args:
        apply: the network, or its embedding, in eval mode.
        images: [N, C, H, W] as stored.
        encode: from images as stored to what the network takes.
        device: where to compute.
    """
    for part in torch.split(images, _CHUNK[device.type]):
        encoded = encode(part.to(device, non_blocking=True))
        yield apply(encoded.contiguous(memory_format=torch.channels_last))


def embed_images(
    net: Net,
    images: Tensor,
    encode: Callable[[Tensor], Tensor],
    device: torch.device,
    *,
    result_device: str | torch.device = "cpu",
) -> Tensor:
    """Return the embeddings [N, D] of images [N, C, H, W].

    Args:
        net: the network, on `device`, in eval mode.
        images: as stored.
        encode: from images as stored to what the network takes, such as a pixel space's `encode`.
        device: where to compute.
        result_device: where the result is collected.
    """
    whole, done = torch.empty(0), 0
    for part in outputs(net.embed, images, encode, device):
        if done == 0:  # concatenating a list would take the memory twice
            whole = part.new_empty(len(images), part.shape[1], device=result_device)
        whole[done : done + len(part)] = part
        done += len(part)
    return whole
