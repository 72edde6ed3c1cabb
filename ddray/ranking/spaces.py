"""Spaces of architectures by name, and samples of them."""

from __future__ import annotations

from typing import Any, Final, Protocol

import torch

from ddray.errors import InputError, unknown
from ddray.nets.build import Net
from ddray.ranking.convnet720 import ConvNet720
from ddray.ranking.nasbench201 import NasBench201
from ddray.seeding import derive_numpy

SPACES: Final = (ConvNet720.name, NasBench201.name)


class NasSpace(Protocol):
    """A fixed, ordered list of architectures.

    Attributes:
        name: its name for `--space`.
    """

    name: str

    def __len__(self) -> int: ...

    def choices(self, index: int) -> dict[str, Any]:
        """Return the design choices of an architecture, as JSON values."""
        ...

    def arch_name(self, index: int) -> str:
        """Return the name shown in tables."""
        ...

    def describe(self, index: int) -> dict[str, Any]:
        """Return index, name, choices, `params_m` and `flops_m` (millions)."""
        ...

    def build(
        self,
        index: int,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        seed: int,
        device: str | torch.device = "cpu",
    ) -> Net:
        """Build an architecture for images of `image_shape` (C, H, W); `seed` determines every weight."""
        ...

    def cost(self, index: int, image_shape: tuple[int, int, int], num_classes: int) -> float:
        """Return the multiply-adds of one image's forward pass, in millions."""
        ...


def get_space(
    name: str,
    *,
    channels: int | None = None,
    num_cells: int | None = None,
    cell_affine: bool | None = None,
    mixture: str | None = None,
) -> NasSpace:
    """Return a space by name.

    Args:
        name: convnet720 or nasbench201.
        channels: channels of nasbench201's networks; None: the space file's (16).
        num_cells: cells per stage of nasbench201's networks; None: the space file's (1).
        cell_affine: whether the BN in nasbench201's cells is affine; None: the space file's (no).
        mixture: softmax or softmax_truncated: the bugs of DC-BENCH's harness in nasbench201's networks.

    Raises:
        InputError: an unknown name, an option out of range, or one that does not apply to the space.
    """
    settings = {"channels": channels, "num_cells": num_cells, "cell_affine": cell_affine, "mixture": mixture}
    options = {option: value for option, value in settings.items() if value is not None}
    if name == NasBench201.name:
        return NasBench201(**options)
    if name != ConvNet720.name:
        raise unknown("--space", name, SPACES)
    if options:
        raise InputError(
            f"{', '.join(options)} must be left out for --space {name}: only nasbench201 has cells"
        )
    return ConvNet720()


def sample(
    space: NasSpace,
    num: int | None,
    *,
    seed: int,
    image_shape: tuple[int, int, int],
    num_classes: int,
    max_mflops: float | None = None,
) -> list[int]:
    """Draw architectures of all costs: one from each of `num` strata of equal size.

    Args:
        space: the space to draw from.
        num: how many; None takes all.
        seed: seed of the draw.
        image_shape: (C, H, W) of the images for which the cost is computed.
        num_classes: K.
        max_mflops: leave out architectures that need more multiply-adds per image (millions).

    Returns:
        Distinct indices, ascending.

    Raises:
        InputError: `num` is less than 1 or more than the space has.
    """
    import numpy as np

    costs = np.array([space.cost(index, image_shape, num_classes) for index in range(len(space))])
    order = np.argsort(costs, kind="stable")
    limit = ""
    if max_mflops is not None:
        order, limit = order[costs[order] <= max_mflops], f" up to {max_mflops:g} million FLOPs"
    if num is None and len(order):
        return sorted(order.tolist())
    if num is None or not 1 <= num <= len(order):
        raise InputError(f"--sample must be in 1..{len(order)} for {space.name}{limit}, got {num}")
    strata = np.array_split(order, num)
    generator = derive_numpy(seed, "nas", "sample", space.name, num)
    return sorted(int(generator.choice(stratum)) for stratum in strata)


def parse_indices(text: str, space: NasSpace) -> list[int]:
    """Return the indices in a text, in its order.

    Args:
        text: `"all"`, or indices such as `"1,5,7"`.
        space: the space that they index.

    Raises:
        InputError: malformed text, an index out of range, or a duplicate.
    """
    if text.strip() == "all":
        return list(range(len(space)))
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise InputError(f"architectures must be all, or indices such as 1,5,7, got {text!r}")
    indices = [int(part) for part in parts]
    for index in indices:
        if index >= len(space):
            raise InputError(f"indices of {space.name} must be in 0..{len(space) - 1}, got {index}")
    if len(set(indices)) < len(indices):
        raise InputError(f"indices of {space.name} must differ, got {text!r}")
    return indices
