"""How sets are stored and become training images: decoders, one file each, found by the name in a set's meta.

A decoder's module ends in `DECODER: Final = Decoder(...)`. One that needs its method's code stands in the
method's file; a package of your own offers one through an entry point in the group `ddray.decoders`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

import torch
from torch import Tensor

from ddray.system.registry import Registry

if TYPE_CHECKING:
    from ddray.artifact.distilled_set import DistilledSet, Meta, TrainSet

_OURS: Final = Registry("decoder", __name__, "DECODER", "ddray.decoders")
_OF_METHODS: Final = Registry("decoder", "ddray.methods", "DECODER", "ddray.decoders")


@dataclass(frozen=True)
class Decoder:
    """A way of storing a set.

    Attributes:
        read: returns the set of meta, a file's tensors, and its ZCA; InputError if a tensor is missing.
        validate: raises InputError unless tensors and meta agree.
        decode: returns the set as networks train on it.
        generate: for sets without images: returns the set with images, any number per class (default: as
            distilled), computed on a device.
    """

    read: Callable[[Meta, Mapping[str, Tensor], Mapping[str, Tensor]], DistilledSet]
    validate: Callable[[DistilledSet], None]
    decode: Callable[[DistilledSet], TrainSet]
    generate: Callable[[DistilledSet, int | None, torch.device], DistilledSet] | None = None


def decoder_names() -> list[str]:
    """Return the names of all decoders."""
    return sorted({*_OURS.builtin_names(), *_OF_METHODS.names()})


def get_decoder(name: str | None) -> Decoder:
    """Return the decoder called `name`, None being `images`; InputError if there is none."""
    name = name or "images"
    registry = _OURS if name in _OURS.builtin_names() else _OF_METHODS
    return cast("Decoder", registry.get(name))
