"""`res_*.pt` of the DC family: DC, DSA, DM, DataDAM."""

import logging
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from ddray.artifact.foreign import ForeignFormat
from ddray.system.tensors import is_plain

log = logging.getLogger(__name__)


def _fits(path: Path, contents: Any) -> bool:
    match contents:
        case {"data": [[images, labels], *_]}:
            return is_plain(images) and is_plain(labels)
    return False


def _read(path: Path, contents: Any) -> tuple[Tensor, Tensor]:
    if len(contents["data"]) > 1:
        log.info("%s holds %d sets: reading the first", path, len(contents["data"]))
    images, labels = contents["data"][0]
    return images, labels


FORMAT: Final = ForeignFormat('{"data": [[images, labels], ...]} (DC family)', _fits, _read)
