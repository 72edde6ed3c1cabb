"""Losses of the generators, and the augmentation that GANs with little data are trained under."""

from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.training.operations import OPERATIONS, DsaParams

_AUGMENT: Final = DsaParams(crop=0.125, cutout=0.5)  # DiffAugment's translation and cutout


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return the squared distances [..., n, m] of x [..., n, D] and y [..., m, D]; never below 0."""
    products = x @ y.transpose(-1, -2)
    norms = x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :]
    return (norms - 2 * products).clamp(min=0)


def mmd2(x: Tensor, y: Tensor, scales: Sequence[float]) -> Tensor:
    """Return the squared maximum mean discrepancy [...] of x [..., n, D] and y [..., m, D].

    It is the biased estimate, diagonals included, under k(d) = sum over s of exp(-d^2 / 2s).
    """

    def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
        distances = squared_distances(a, b)
        return torch.stack([(-distances / (2 * scale)).exp().mean((-1, -2)) for scale in scales]).sum(0)

    return mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)


def guarded_root(values: Tensor) -> Tensor:
    """Return the roots of values; 0, with gradient 0, where rounding leaves a value <= 0."""
    is_positive = ~(values <= 0)  # NaN stays NaN: a training that diverges is noticed
    return torch.where(is_positive, torch.where(is_positive, values, 1.0).sqrt(), 0.0)


def hinge(real: Tensor, *fakes: tuple[Tensor, float]) -> Tensor:
    """Return the discriminator's hinge loss, the mean of max(0, 1 - D(real)) + w max(0, 1 + D(fake)).

    Args:
        real: logits [N] of real images.
        *fakes: logits [M] of generated ones, each batch with its weight w.
    """
    loss = F.relu(1 - real).mean()
    for logits, weight in fakes:
        loss = loss + weight * F.relu(1 + logits).mean()
    return loss


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, variance) || N(0, 1)), summed over the batch and its units ([N, D])."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()


def info_nce(queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Return the mean over N of -log of the share that a query gives to its own key among the negatives.

    Args:
        queries: [N, d], of length 1.
        keys: [N, d], of length 1; row n belongs to query n.
        negatives: [Q, d], of length 1.
        temperature: what the cosines are divided by.
    """
    positive = (queries * keys).sum(1, keepdim=True)
    logits = torch.cat([positive, queries @ negatives.T], 1) / temperature
    return (logits.logsumexp(1) - logits[:, 0]).mean()


def augmented(images: Tensor, rows: Tensor) -> Tensor:
    """Return images [N, C, H, W] under DiffAugment's translation and cutout, differentiable in them.

    Args:
        images: in [-1, 1]; what moves in or is cut out is 0.
        rows: [N, 11], uniform draws for each image, as `training.operations` takes them.
    """
    for name in ("crop", "cutout"):
        images = OPERATIONS[name](images, rows, _AUGMENT)
    return images


def mirrored(images: Tensor, rows: Tensor) -> Tensor:
    """Return images of which each is mirrored left-right with probability 1/2, by rows [N, 11] of draws."""
    return OPERATIONS["flip"](images, rows, _AUGMENT)
