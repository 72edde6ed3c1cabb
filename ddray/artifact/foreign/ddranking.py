"""DD-Ranking's `images.pt`, `labels.pt` (classes or logits) and `lr.pt`; `ddray export` writes them too."""

import logging
from pathlib import Path
from typing import Any, Final

import torch

from ddray.artifact.foreign import ForeignFile, ForeignFormat, ForeignRequest, ForeignSet
from ddray.artifact.foreign.tensor_pairs import is_tensor, read_labels, read_rate
from ddray.errors import InputError

log = logging.getLogger(__name__)


def _fits(path: Path, contents: Any) -> bool:
    return path.name == "images.pt" and is_tensor(path, contents)


def _read(path: Path, contents: Any, request: ForeignRequest) -> ForeignFile:
    labels_file, num_classes = path.with_name("labels.pt"), request.dataset.num_classes
    if labels_file.is_file():
        labels = read_labels(labels_file)
    else:  # its evaluators then take the images as sorted by class
        if len(contents) % num_classes:
            raise InputError(
                f"{path} must lie beside labels.pt, or hold equally many images of {num_classes} classes"
            )
        labels = torch.arange(num_classes).repeat_interleave(len(contents) // num_classes)
        log.warning("%s has no labels.pt beside it: its images are taken as sorted by class", path)
    return ForeignFile([ForeignSet(contents, labels, lr=read_rate(path.with_name("lr.pt")))])


FORMAT: Final = ForeignFormat("images.pt beside labels.pt (DD-Ranking)", _fits, _read)
