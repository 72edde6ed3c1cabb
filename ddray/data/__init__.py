"""Datasets, splits and pixel spaces."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddray.system.lazy import lazy

if TYPE_CHECKING:
    from ddray.data.dataset import Dataset, Split, SplitName, carve_val, search_rows
    from ddray.data.loaders import dataset_names, open_dataset
    from ddray.data.pixels import PixelSpace, fit_zca, normalized_space

__all__ = [
    "Dataset",
    "PixelSpace",
    "Split",
    "SplitName",
    "carve_val",
    "dataset_names",
    "fit_zca",
    "normalized_space",
    "open_dataset",
    "search_rows",
]
__getattr__ = lazy(
    __name__,
    {
        "dataset": ("Dataset", "Split", "SplitName", "carve_val", "search_rows"),
        "loaders": ("dataset_names", "open_dataset"),
        "pixels": ("PixelSpace", "fit_zca", "normalized_space"),
    },
)
