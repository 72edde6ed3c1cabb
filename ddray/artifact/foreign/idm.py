"""`acc_*.pkl` of IDM: a pickled (images, labels), normalised, four images stored as one under its `--aug`."""

from pathlib import Path
from typing import Any, Final

from ddray.artifact.foreign import ForeignFile, ForeignFormat, ForeignRequest, ForeignSet
from ddray.artifact.foreign.idc import check_factor
from ddray.system.tensors import is_plain


def _fits(path: Path, contents: Any) -> bool:
    match contents:
        case [images, labels]:
            return path.suffix == ".pkl" and is_plain(images) and is_plain(labels)
    return False


def _read(path: Path, contents: Any, request: ForeignRequest) -> ForeignFile:
    check_factor(path, request, " (2 under its --aug)")
    images, labels = contents
    return ForeignFile([ForeignSet(images, labels, is_divided=True)])


FORMAT: Final = ForeignFormat("acc_*.pkl = (images, labels) (IDM)", _fits, _read)
