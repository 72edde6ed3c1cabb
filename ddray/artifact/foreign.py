"""Files of the DC family (`res_*.pt`) and of MTT (`images_best.pt` beside `labels_best.pt`)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from ddray.errors import InputError
from ddray.system.tensors import is_plain, read_tensors

log = logging.getLogger(__name__)


def read_foreign(path: Path, contents: Any) -> tuple[Tensor, Tensor]:
    """Return images [N, C, H, W] and labels [N] of another project's file.

    Args:
        path: the file; MTT's labels are in one beside it.
        contents: what `read_tensors` returned for it.

    Raises:
        InputError: its layout is unknown.
    """
    if isinstance(contents, dict) and isinstance(contents.get("data"), list) and contents["data"]:
        if len(contents["data"]) > 1:
            log.info("%s holds %d sets: reading the first", path, len(contents["data"]))
        pair = contents["data"][0]
        if isinstance(pair, list | tuple) and len(pair) == 2 and all(is_plain(tensor) for tensor in pair):
            return _shaped(path, *pair)
    if is_plain(contents) and path.name.startswith("images_"):
        labels_path = path.with_name(path.name.replace("images_", "labels_", 1))
        labels = read_tensors(labels_path)
        if is_plain(labels):
            return _shaped(path, contents, labels)
    raise InputError(
        f'{path} must be ddray\'s own file, {{"data": [[images, labels], ...]}} (DC family), or images_*.pt '
        "beside labels_*.pt (MTT)"
    )


def _shaped(path: Path, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if images.ndim != 4 or labels.shape != images.shape[:1] or len(labels) == 0 or labels.min() < 0:
        raise InputError(
            f"{path} must hold images [N, C, H, W] and labels [N] >= 0, "
            f"got {list(images.shape)}, {list(labels.shape)}"
        )
    return images, labels
