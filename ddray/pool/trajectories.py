"""Pool entries of kind `trajectory`: an expert's weights before the first and after each epoch.

An entry has `snapshots`, float32 [E + 1, P] in the order of `named_parameters()`, and the buffers at the end
under `buffers.<name>`, where the network has some. Its meta names the parameters and their shapes. Half
precision would lose the small displacements of late epochs. Snapshots are always read from their file,
which is memory-mapped: of a long trajectory only its first part may ever be used.
"""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from ddray.data import Dataset
from ddray.nets import Net, build_net
from ddray.pool.spec import PoolEntry, PoolSpec, transform_of
from ddray.training.experts import ExpertRecipe

KIND: Final = "trajectory"
SNAPSHOTS: Final = "snapshots"
_BUFFERS: Final = "buffers."


def trajectory_specs(
    dataset: Dataset,
    *,
    split: str,
    pixel_space: str,
    arch: str,
    device: str,
    recipe: ExpertRecipe,
    seed: int,
    num: int,
) -> list[PoolSpec]:
    """Return the specs of `num` experts, with seeds `seed`, `seed + 1`, ...

    Args:
        dataset: what they are trained on.
        split: part of the dataset.
        pixel_space: kind of the pixel space, fitted on that part.
        arch: canonical architecture name.
        device: kind of device.
        recipe: how they are trained.
        seed: of the first expert.
        num: how many.
    """
    space = pixel_space if recipe.augment == "none" else f"{pixel_space}+{recipe.augment}"
    return [
        PoolSpec(
            kind=KIND,
            dataset=dataset.fingerprint,
            split=split,
            transform=transform_of(dataset, space),
            arch=arch,
            recipe=recipe.dump(),
            seed=seed + index,
            image_shape=dataset.image_shape,
            num_classes=dataset.num_classes,
            device=device,
        )
        for index in range(num)
    ]


def space_kind(spec: PoolSpec) -> str:
    """Return the kind of pixel space that a spec's expert is trained in."""
    return spec.transform.partition(",")[0].partition("+")[0]


def entry_tensors(snapshots: Tensor, net: Net) -> dict[str, Tensor]:
    """Return what an entry stores of a trained expert."""
    return {SNAPSHOTS: snapshots, **{_BUFFERS + name: buffer for name, buffer in net.named_buffers()}}


def entry_shapes(net: Net) -> list[tuple[str, list[int]]]:
    """Return the names and shapes of a network's parameters, in the order of its snapshots."""
    return [(name, list(parameter.shape)) for name, parameter in net.named_parameters()]


def trained_expert(entry: PoolEntry, device: torch.device) -> Net:
    """Return an entry's network after its last epoch, in eval mode on a device."""
    spec = PoolSpec.parse(entry.meta["spec"])
    net = build_net(spec.arch, spec.image_shape, spec.num_classes, seed=0, device=device)
    weights = entry.tensors[SNAPSHOTS][-1].to(device, copy=True)
    torch.nn.utils.vector_to_parameters(weights, net.parameters())
    buffers: Mapping[str, Tensor] = dict(net.named_buffers())
    for name, buffer in buffers.items():
        buffer.copy_(entry.tensors[_BUFFERS + name])
    return net.eval()
