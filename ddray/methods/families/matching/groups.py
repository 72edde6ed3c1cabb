"""Memory of a step: its classes in groups that fit a budget, and what an image takes of it.

The losses of distribution matching are sums over classes. A step goes through groups of classes, forward and
backward, and so needs the memory of one group; its gradient is that of all classes at once.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ddray.seeding import forked_global

log = logging.getLogger(__name__)

_PASSING_MAPS: Final = 4  # of the largest size, beside those that are saved: gradients, a layer's workspace


def class_groups(num_classes: int, class_bytes: int, budget: int, *, mixes: bool = False) -> list[slice]:
    """Return ranges of classes, each of which takes at most `budget` bytes, but for a class that alone does.

    Groups are of one size where a divisor of the number of classes is above half of what fits: then one CUDA
    graph serves them all.

    Args:
        num_classes: K.
        class_bytes: what the images of one class take.
        budget: of `memory_budget`.
        mixes: a layer mixes samples (batch norm): all classes are one group, as in the papers' codes.
    """
    largest = max(1, min(num_classes, budget // max(1, class_bytes)))
    needed = class_bytes * (num_classes if mixes else 1)
    if needed > budget:
        what = "all classes, whose samples batch norm mixes" if mixes else "the images of one class"
        log.warning(
            "a step takes about %.1f MiB for %s, more than memory_budget (%.1f MiB)",
            needed / 2**20,
            what,
            budget / 2**20,
        )
    if mixes:
        return [slice(0, num_classes)]
    divisors = (size for size in range(largest, largest // 2, -1) if num_classes % size == 0)
    size = next(divisors, largest)
    return [slice(start, min(num_classes, start + size)) for start in range(0, num_classes, size)]


def rows_of(classes: slice, per_class: int) -> slice:
    """Return the rows of `classes` in a class-sorted tensor of `per_class` rows each."""
    return slice(classes.start * per_class, classes.stop * per_class)


def image_bytes(
    forward: Callable[[Tensor], Any], images: Tensor, map_bytes: int, weights: Iterable[Tensor]
) -> int:
    """Return about how many bytes a forward and a backward pass take for each of `images`.

    Args:
        forward: what is computed of images [N, C, H, W].
        images: two or more (batch norm takes no single one), as a step has them.
        map_bytes: of an image's largest map.
        weights: of the network, which do not count.
    """
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = images.detach().requires_grad_(True)
    with forked_global(0, images.device), torch.enable_grad(), saved_tensors_hooks(note, lambda saved: saved):
        outputs = forward(images)  # stays until the end: no two saved tensors at one address
    ignored = {weight.untyped_storage().data_ptr() for weight in weights}
    saved = sum(size for address, size in sizes.items() if address not in ignored)
    del outputs
    return saved // len(images) + _PASSING_MAPS * max(map_bytes, images[0].numel() * images.element_size())
