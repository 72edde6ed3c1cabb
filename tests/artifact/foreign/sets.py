"""What the files of other projects hold in these tests: images and labels of six images of three classes."""

import torch
from torch import Tensor

from ddray.data import Dataset

LABELS = torch.tensor([0, 0, 1, 1, 2, 2])


def normal(shift: float = 0.0, num: int = 6) -> Tensor:
    """Images as networks are trained on them."""
    return torch.randn(num, 3, 16, 16, generator=torch.Generator().manual_seed(0)) + shift


def pixels(num: int = 6, size: int = 16) -> Tensor:
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(0))


def normalized(images: Tensor, dataset: Dataset) -> Tensor:
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (dataset.mean, dataset.std))
    return (images - mean) / std


def leaf(images: Tensor) -> Tensor:
    """What is distilled in the projects' code: a leaf with gradients."""
    return images.clone().requires_grad_(True)
