"""`images_best.pt` of MTT, with `labels_best.pt` beside it."""

from pathlib import Path
from typing import Any, Final

from torch import Tensor

from ddray.artifact.foreign import ForeignFormat
from ddray.system.tensors import is_plain, read_tensors


def _labels(path: Path) -> Any:
    return read_tensors(path.with_name(path.name.replace("images_", "labels_", 1)))


def _fits(path: Path, contents: Any) -> bool:
    return is_plain(contents) and path.name.startswith("images_") and is_plain(_labels(path))


def _read(path: Path, contents: Any) -> tuple[Tensor, Tensor]:
    return contents, _labels(path)


FORMAT: Final = ForeignFormat("images_*.pt beside labels_*.pt (MTT)", _fits, _read)
