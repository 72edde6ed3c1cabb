"""How sets are stored and become training images: a decoder is a module, found by the name in a set's meta.

A package of your own offers one through an entry point `name = "package.module"` in the group
`ddray.decoders`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Final, Protocol, cast, runtime_checkable

from ddray.errors import unknown

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ddray.artifact.distilled_set import DistilledSet, Meta, TrainSet

_OURS: Final = {
    "partition": f"{__name__}.partition",
    "boost_ssdd": f"{__name__}.boost_ssdd",
    "d3hr": "ddray.methods.families.diffusion.decoder",  # needs the method's generator
}


class Decoder(Protocol):
    """What a decoder's module defines."""

    def read(self, meta: Meta, tensors: Mapping[str, Tensor], zca: Mapping[str, Tensor]) -> DistilledSet:
        """Return the set of a file's tensors (without ZCA); it is validated afterwards.

        Raises:
            InputError: tensors are missing, unexpected or do not fit.
        """
        ...

    def stored(self, distilled: DistilledSet) -> Mapping[str, Tensor]:
        """Return the tensors that the set's file holds, without ZCA."""
        ...

    def validate(self, distilled: DistilledSet) -> None:
        """Check that tensors and meta agree.

        Raises:
            InputError: names the first rule that is broken.
        """
        ...

    def decode(self, distilled: DistilledSet) -> TrainSet:
        """Return the set as networks train on it."""
        ...


@runtime_checkable
class GenerativeDecoder(Decoder, Protocol):
    """A decoder of sets that store no images."""

    def generate(self, distilled: DistilledSet, ipc: int | None, device: torch.device) -> DistilledSet:
        """Return the set with `ipc` images per class (default: as distilled), stored as they are.

        Raises:
            InputError: ipc is below 1, or the generator is gone.
        """
        ...


def decoder_names() -> list[str]:
    """Return the names of all decoders, ours and those of installed packages."""
    return sorted({*_OURS, *_theirs()})


def is_decoder(name: str) -> bool:
    """Return whether a decoder is called `name`."""
    return name in _OURS or name in _theirs()


def get_decoder(name: str | None) -> Decoder:
    """Return the decoder called `name`; None is that of plain images.

    Raises:
        InputError: there is no such decoder (with the nearest name).
    """
    path = f"{__name__}.images" if name is None else _OURS.get(name) or _theirs().get(name)
    if path is None:
        raise unknown("decoder", str(name), decoder_names())
    return cast("Decoder", importlib.import_module(path))


def _theirs() -> dict[str, str]:
    """Read the entry points of every installed package: 10 ms, so only for a name that is not ours."""
    return {entry.name: entry.value for entry in entry_points(group="ddray.decoders")}
