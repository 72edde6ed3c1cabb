"""A network's outputs for whole sets of images, computed part by part."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Final

import torch
from torch import Tensor

from ddray.data.packed import parts_of
from ddray.nets import Net
from ddray.system.tensors import empty_matrix
from ddray.system.transfer import to_device

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
    for part in parts_of(images, chunk or _CHUNK[device.type]):
        encoded = encode(to_device(part, device))
        yield apply(encoded.contiguous(memory_format=torch.channels_last))


def embed_images(
    net: Net,
    images: Tensor,
    encode: Callable[[Tensor], Tensor],
    device: torch.device,
    *,
    result_device: str | torch.device = "cpu",
    more_images: Tensor | None = None,
) -> Tensor:
    """Return the embeddings [N, D] of images [N, C, H, W], on the disk if they are large and on the CPU.

    Args:
        net: the network, on `device`, in eval mode.
        images: as stored.
        encode: from images as stored to what the network takes, such as a pixel space's `encode`.
        device: where to compute.
        result_device: where the result is collected.
        more_images: further ones [M, C, H, W], whose embeddings follow.
    """
    whole, done = torch.empty(0), 0
    sets = [images] if more_images is None else [images, more_images]
    num = sum(map(len, sets))
    for part in chain.from_iterable(outputs(net.embed, each, encode, device) for each in sets):
        if done == 0:  # concatenating a list would take the memory twice
            whole = empty_matrix(num, part, result_device)
        whole[done : done + len(part)] = part
        done += len(part)
    return whole


@dataclass(frozen=True)
class Score:
    """Fractions of images that are classified correctly.

    Attributes:
        accuracy: of all images.
        per_class: of each class's images [K]; None for a class without any.
    """

    accuracy: float
    per_class: tuple[float | None, ...] = ()

    @property
    def balanced_accuracy(self) -> float:
        """The mean over the classes that have images."""
        return statistics.fmean(value for value in self.per_class if value is not None)


@torch.no_grad()
def score(
    apply: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    encode: Callable[[Tensor], Tensor],
    device: torch.device,
    *,
    chunk: int | None = None,
) -> Score:
    """Return the fractions of images that are classified correctly; only the end waits for the device.

    As `outputs`, whose `apply` returns logits here; `chunk` is 32 by default on a CPU (they fit the cache
    there), 1,024 on a GPU. `labels` are int64 [N].
    """
    right, done = torch.empty(0), 0
    for logits in outputs(apply, images, encode, device, chunk=chunk or _SCORED[device.type]):
        if done == 0:
            right = torch.zeros(logits.shape[1], dtype=torch.int64, device=device)
        expected = to_device(labels[done : done + len(logits)], device)
        right.index_add_(0, expected, (logits.argmax(1) == expected).long())
        done += len(logits)
    counts, hits = torch.bincount(labels, minlength=len(right)).tolist(), right.tolist()
    shares = tuple(right_of / num if num else None for right_of, num in zip(hits, counts, strict=True))
    return Score(sum(hits) / len(labels), shares)
