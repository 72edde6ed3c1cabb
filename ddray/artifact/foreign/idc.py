"""`data.pt` of IDC and its kin (DSDM, DREAM): [images, labels], pixels in 0..1, several images in one."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from ddray.artifact.foreign import ForeignFile, ForeignFormat, ForeignRequest, ForeignSet
from ddray.errors import InputError
from ddray.system.tensors import is_plain


def _fits(path: Path, contents: Any) -> bool:
    match contents:
        case [images, labels]:
            return path.suffix != ".pkl" and is_plain(images) and is_plain(labels)
    return False


def _read(path: Path, contents: Any, request: ForeignRequest) -> ForeignFile:
    settings, hint = path.with_name("args.txt"), ""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        hint = f" ({settings.name} says {int(json.loads(settings.read_text())['factor'])})"
    check_factor(path, request, hint)
    images, labels = contents
    return ForeignFile([ForeignSet(images, labels, is_unit=request.pixel_space is None, is_divided=True)])


def check_factor(path: Path, request: ForeignRequest, hint: str = "") -> None:
    """Refuse to read images undecoded: nothing in the file says whether one holds several."""
    if request.factor is None:
        raise InputError(
            f"{path} must be read with --factor N, the parts along each side of its images, which it does "
            f"not say{hint}; 1 if they are whole"
        )


FORMAT: Final = ForeignFormat("data.pt = [images, labels] (IDC, DSDM)", _fits, _read)
