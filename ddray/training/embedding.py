"""A network's outputs for whole sets of images, computed part by part."""

from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import Tensor

from ddray.nets import Net

_CHUNK: Final = {"cpu": 64, "cuda": 1024}
_SCORED: Final = {"cpu": 32, "cuda": 1024}


@torch.no_grad()
def outputs(
    apply: Callable[[Tensor], Tensor],
    images: Tensor,
    encode: Callable[[Tensor], Tensor],
    device: torch.device,
    *,
    chunk: int | None = None,
) -> Iterator[Tensor]:
    """Yield the outputs [n, D] of a network in eval mode, or of its embedding, for parts of `images`.

    Images are [N, C, H, W] as stored, `encode` turns them into what the network takes, and a part has `chunk`
    of them: by default 64 on a CPU, 1,024 on a GPU.
    """
    for part in torch.split(images, chunk or _CHUNK[device.type]):
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


@torch.no_grad()
def share_right(
    apply: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    encode: Callable[[Tensor], Tensor],
    device: torch.device,
    *,
    chunk: int | None = None,
) -> float:
    """Return the fraction of images that are classified correctly; only the end waits for the device.

    As `outputs`, whose `apply` returns logits here; `chunk` is 32 by default on a CPU (they fit the cache
    there), 1,024 on a GPU. `labels` are int64 [N].
    """
    right, done = torch.zeros((), dtype=torch.int64, device=device), 0
    for logits in outputs(apply, images, encode, device, chunk=chunk or _SCORED[device.type]):
        expected = labels[done : done + len(logits)].to(device, non_blocking=True)
        right += (logits.argmax(1) == expected).sum()
        done += len(logits)
    return float(right) / len(labels)
