"""GSAM, the optimiser of FTD's experts (Du et al., CVPR 2023; Zhuang et al., ICLR 2022).

With g the gradient at the weights w, and g' the one at w + e on the same batch, where

    e = rho w^2 g / || |w| g ||  (adaptive),

the step is taken along g' - alpha (g - cos(g, g') ||g|| g' / ||g'||): g's part across g' is climbed. Norms
and cosine are over all parameters of a network at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST = 1e-12  # of a norm that is divided by: a gradient of 0 moves nothing


@dataclass(frozen=True)
class Gsam:
    """GSAM's settings; every tensor of its functions has a leading axis of S networks.

    Attributes:
        rho: radius of the neighbourhood.
        alpha: weight of the part of g across g'.
    """

    rho: float
    alpha: float

    def perturbation(self, weights: Sequence[Tensor], gradient: Sequence[Tensor]) -> list[Tensor]:
        """Return e of weights and their gradient, each [S, ...]."""
        scaled = [weight * slope for weight, slope in zip(weights, gradient, strict=True)]
        factor = self.rho / _dots(scaled, scaled).sqrt().clamp(min=_LEAST)
        return [_times(weight * part, factor) for weight, part in zip(weights, scaled, strict=True)]

    def combined(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
        """Return what the weights descend along, of g and g', each [S, ...]."""
        share = _dots(first, second) / _dots(second, second).clamp(min=_LEAST**2)  # cos ||g|| / ||g'||
        pairs = zip(first, second, strict=True)
        return [far - self.alpha * (near - _times(far, share)) for near, far in pairs]


def _dots(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Return each network's inner product [S]."""
    pairs = zip(a, b, strict=True)
    return torch.stack([(x * y).reshape(len(x), -1).sum(1) for x, y in pairs]).sum(0)


def _times(tensor: Tensor, factor: Tensor) -> Tensor:
    """Return a tensor [S, ...] times a factor per network [S]."""
    return tensor * factor.view(-1, *[1] * (tensor.ndim - 1))
