"""DC-BENCH's files: `*_images.pt` beside `*_labels.pt`, and sets cut into `images_best_0.pt` and so on."""

import logging
import re
from pathlib import Path
from typing import Any, Final

from ddray.artifact.foreign import ForeignFile, ForeignFormat, ForeignRequest, ForeignSet
from ddray.artifact.foreign.tensor_pairs import beside, is_tensor, read_labels, whole

log = logging.getLogger(__name__)

_PART: Final = re.compile(r"images_best_\d+\.pt")


def _fits(path: Path, contents: Any) -> bool:
    return is_tensor(path, contents, end="_images") or bool(_PART.fullmatch(path.name))


def _read(path: Path, contents: Any, request: ForeignRequest) -> ForeignFile:
    if not _PART.fullmatch(path.name):
        return ForeignFile([ForeignSet(contents, read_labels(beside(path, "_images", "_labels")))])
    parts = sorted(
        (part for part in path.parent.iterdir() if _PART.fullmatch(part.name)),
        key=lambda part: int(part.stem.rpartition("_")[2]),
    )
    log.info("%d files images_best_*.pt in %s are read as one set", len(parts), path.parent)
    labels = [beside(part, "images_", "labels_") for part in parts]
    return ForeignFile([ForeignSet(whole(parts), whole(labels))])


FORMAT: Final = ForeignFormat("*_images.pt beside *_labels.pt (DC-BENCH)", _fits, _read)
