"""`images_*.pt` beside `labels_*.pt` and, if any, `lr_*.pt`: MTT, TESLA, FTD, and DATM with soft labels."""

from pathlib import Path
from typing import Any, Final

from ddray.artifact.foreign import ForeignFile, ForeignFormat, ForeignRequest, ForeignSet
from ddray.artifact.foreign.tensor_pairs import beside, is_tensor, read_labels, read_rate
from ddray.errors import InputError


def _read(path: Path, contents: Any, request: ForeignRequest) -> ForeignFile:
    if path.name.startswith("images_zca_"):
        images = beside(path, "zca_", "").name
        raise InputError(f"{path} holds pictures for the eye: read {images} with --pixel-space zca")
    labels = read_labels(beside(path, "images_", "labels_"))
    return ForeignFile([ForeignSet(contents, labels, lr=read_rate(beside(path, "images_", "lr_")))])


FORMAT: Final = ForeignFormat(
    "images_*.pt beside labels_*.pt (MTT, DATM)",
    lambda path, contents: is_tensor(path, contents, start="images_"),
    _read,
)
