"""Datasets, splits, pixel spaces and differentiable Siamese augmentation."""

from __future__ import annotations

from ddray.data.dataset import Dataset, Split, carve_val, search_rows
from ddray.data.loaders import dataset_names, open_dataset
from ddray.data.pixels import PixelSpace, fit_zca, normalized_space
from ddray.training.dsa import Dsa, DsaPlan, dsa_for
from ddray.training.operations import DsaParams

__all__ = [
    "Dataset",
    "Dsa",
    "DsaParams",
    "DsaPlan",
    "PixelSpace",
    "Split",
    "carve_val",
    "dataset_names",
    "dsa_for",
    "fit_zca",
    "normalized_space",
    "open_dataset",
    "search_rows",
]
