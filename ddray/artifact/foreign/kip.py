"""KIP's .npz: `images` [N, H, W, C] and `labels` [N, K], a value per class (one-hot - 1/K, or learned)."""

from pathlib import Path
from typing import Any, Final

from ddray.artifact.foreign import ForeignFile, ForeignFormat, ForeignRequest, ForeignSet
from ddray.artifact.foreign.tensor_pairs import classes_of
from ddray.data import PixelSpace
from ddray.data.pixels import channel_statistics
from ddray.errors import InputError


def _fits(path: Path, contents: Any) -> bool:
    return path.suffix == ".npz" and isinstance(contents, dict) and {"images", "labels"} <= contents.keys()


def _read(path: Path, contents: Any, request: ForeignRequest) -> ForeignFile:
    if "_zca_" in path.name and request.pixel_space is None:
        raise InputError(
            f"{path} is in KIP's own whitening (each image of norm 1 first), which ddray doesn't have: add "
            "--pixel-space zca to score it in MTT's, which comes near"
        )
    images, labels = contents["images"], contents["labels"]
    images = images.movedim(-1, 1) if images.ndim == 4 else images[:, None]
    if labels.ndim == 2:
        labels = classes_of(path, labels)
    # Normalised by what is measured on train, not by the DC family's constants.
    space = PixelSpace("normalized", *channel_statistics(request.dataset.train().images))
    return ForeignFile([ForeignSet(images.contiguous(), labels, space=space)])


FORMAT: Final = ForeignFormat(".npz of images and labels (KIP)", _fits, _read)
