"""Augmentation by name: DSA, and torchvision's policies, on batches in a pixel space."""

from collections.abc import Callable

import torch
from torch import Tensor

from ddray.data import PixelSpace
from ddray.seeding import derive_seed, forked_global
from ddray.training.dsa import siamese
from ddray.training.recipe import Augment

Augmenter = Callable[[Tensor, torch.Generator], Tensor]


def augmenter(
    name: Augment, *, can_flip: bool, space: PixelSpace, strategy: str | None = None
) -> Augmenter | None:
    """Return the augmentation called `name` for batches [N, C, H, W] in `space`.

    `dsa` and `dsa_idc`: per-sample parameters, one op for a batch (`dsa`) as at the peers' evaluation.
    `autoaugment` and `randaugment`: torchvision's policies on the pixels as 8-bit images, image by image
    (DataDAM supplement, Fig 4).

    Args:
        name: which one; `none` gives None.
        can_flip: whether mirrored images keep their class.
        space: pixel space of the batches.
        strategy: operations of `dsa` and `dsa_idc`; None: all of them.

    Raises:
        InputError: the strategy names an unknown operation.
    """
    if name == "autoaugment" or name == "randaugment":
        return _policy(name, space)
    dsa = siamese(can_flip, name, strategy)
    if dsa is None:
        return None

    def apply(batch: Tensor, generator: torch.Generator) -> Tensor:
        return dsa.apply(batch, dsa.draw(len(batch), generator, shared_op=True))

    return apply


def _policy(name: str, space: PixelSpace) -> Augmenter:
    """Return torchvision's AutoAugment or RandAugment on batches in `space`."""
    from torchvision.transforms import v2

    transform = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10) if name == "autoaugment" else v2.RandAugment()
    spaces: dict[torch.device, PixelSpace] = {}  # a whitening's inverse is computed once, not per batch

    def apply(batch: Tensor, generator: torch.Generator) -> Tensor:
        device_space = spaces.setdefault(batch.device, space.to(batch.device))
        pixels = (device_space.decode(batch).clamp(0, 1) * 255).round().to(torch.uint8)
        seed = int(torch.randint(2**62, (), generator=generator))
        with forked_global(derive_seed(seed, "augment")):
            changed = torch.stack([transform(image) for image in pixels])
        return device_space.encode(changed).contiguous(memory_format=torch.channels_last)

    return apply
