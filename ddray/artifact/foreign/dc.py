"""`res_*.pt` of the DC family: DC, DSA, DM, DataDAM."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from ddray.system.tensors import is_plain

log = logging.getLogger(__name__)

LAYOUT: Final = '{"data": [[images, labels], ...]} (DC family)'


def fits(path: Path, contents: Any) -> bool:
    """Return whether a file holds a list of pairs of tensors."""
    sets = contents.get("data") if isinstance(contents, dict) else None
    if not isinstance(sets, list) or not sets:
        return False
    pair = sets[0]
    return isinstance(pair, list | tuple) and len(pair) == 2 and all(is_plain(tensor) for tensor in pair)


def read(path: Path, contents: Any) -> tuple[Tensor, Tensor]:
    """Return the images and labels of the first set."""
    if len(contents["data"]) > 1:
        log.info("%s holds %d sets: reading the first", path, len(contents["data"]))
    images, labels = contents["data"][0]
    return images, labels
