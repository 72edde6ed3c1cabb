"""Spaces of architectures by name, and the choice of some of their members."""

from __future__ import annotations

from typing import Any, Final, Protocol

import torch

from ddray.errors import InputError, unknown
from ddray.nas.convnet720 import ConvNet720
from ddray.nas.nasbench201 import NasBench201
from ddray.nets.build import Net
from ddray.seeding import derive_numpy

SPACES: Final = (ConvNet720.name, NasBench201.name)


class NasSpace(Protocol):
    """A fixed, ordered list of architectures.

    Attributes:
        name: what `--space` calls it.
    """

    name: str

    def __len__(self) -> int: ...

    def choices(self, index: int) -> dict[str, Any]:
        """Return what makes up an architecture, as JSON values."""
        ...

    def arch_name(self, index: int) -> str:
        """Return the name that tables show."""
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
        """Build an architecture for images of `image_shape` (C, H, W); `seed` decides every weight."""
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
        channels: of nasbench201's networks; None: the space file's (16).
        num_cells: cells per stage of nasbench201's networks; None: the space file's (1).
        cell_affine: whether the BN in nasbench201's cells is affine; None: the space file's (no).
        mixture: softmax or softmax_truncated: which faults of DC-BENCH's harness nasbench201's networks have.

    Raises:
        InputError: an unknown name, an option out of range, or one that the space does not take.
    """
    given = {"channels": channels, "num_cells": num_cells, "cell_affine": cell_affine, "mixture": mixture}
    options = {option: value for option, value in given.items() if value is not None}
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
        space: where they are drawn from.
        num: how many; None takes all.
        seed: decides the draw.
        image_shape: (C, H, W) of the images that cost is counted for.
        num_classes: K.
        max_mflops: leave out what needs more million multiply-adds for an image.

    Returns:
        Distinct indices, ascending.

    Raises:
        InputError: more or fewer than the space has.
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
    """Return the indices that a text names, in its order.

    Args:
        text: `"all"`, or indices such as `"1,5,7"`.
        space: what they are indices of.

    Raises:
        InputError: another form, an index the space has not, or one given twice.
    """
    if text.strip() == "all":
        return list(range(len(space)))
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise InputError(f"architectures must be all, or indices such as 1,5,7, got {text!r}")
    found = [int(part) for part in parts]
    for index in found:
        if index >= len(space):
            raise InputError(f"indices of {space.name} must be in 0..{len(space) - 1}, got {index}")
    if len(set(found)) < len(found):
        raise InputError(f"indices of {space.name} must differ, got {text!r}")
    return found
