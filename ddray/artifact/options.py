"""Options of sets that other projects wrote: how pixels are meant, and which of several sets is read."""

from typing import Annotated, Final

from pydantic import AfterValidator, Field

from ddray.config import Config
from ddray.errors import InputError, unknown

_KINDS: Final = ("normalized", "raw", "zca")


def _known_space(text: str | None) -> str | None:
    """Refuse an unknown kind, and `normalized:NAME` of a dataset without a fixed mean and std."""
    kind, colon, name = (text or _KINDS[0]).partition(":")
    if kind not in _KINDS or (colon and kind != "normalized"):
        raise unknown("--pixel-space", str(text), (*_KINDS, "normalized:NAME"))
    if colon:
        from ddray.data.catalog import KNOWN

        names = [dataset for dataset, entry in KNOWN.items() if entry.mean]
        if name not in names:
            raise unknown("the dataset of --pixel-space normalized:NAME", name, names)
    return text


def _not_negative(index: int | None) -> int | None:
    if index is not None and index < 0:
        raise InputError(f"--index must be >= 0 (the first set is 0), got {index}")
    return index


class ForeignOptions(Config):
    """How another project's set is read; ours say so themselves."""

    pixel_space: Annotated[str | None, AfterValidator(_known_space)] = None
    """Of another project's file: normalized, zca, raw, or normalized:cifar10 by that dataset's mean and std;
    default as its project writes it."""
    index: Annotated[int | None, AfterValidator(_not_negative)] = None
    """Which set of another project's file, from 0; default the last of a series, all of several runs."""
    factor: int | None = Field(default=None, ge=1)
    """Parts along each side of a stored image of IDC, IDM or DSDM; 1: undivided."""
