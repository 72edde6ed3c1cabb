"""CutMix (Yun et al., ICCV 2019, arXiv:1905.04899) with Beta(1, 1), as IDC's and DSDM's code draws it.

And the share of mixup (Zhang et al., ICLR 2018, arXiv:1710.09412).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.system.transfer import to_device


@dataclass(frozen=True)
class Mixed:
    """A batch after CutMix or mixup.

    Attributes:
        images: [N, C, H, W], each with a box of its partner, or blended with it.
        partner: int64 [N] on the images' device, the image that each was mixed with.
        share: fraction of an image's own pixels that is left, the weight of its own label.
    """

    images: Tensor
    partner: Tensor
    share: float

    def targets(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what `mixed_cross_entropy` takes beside logits; `labels` [N] or [N, K] are the images'."""
        shares = to_device(torch.tensor([self.share, 1 - self.share]), labels.device)
        return labels, labels[self.partner], shares[0], shares[1]


def mixed_cross_entropy(logits: Tensor, labels: Tensor, *mixed: Tensor) -> Tensor:
    """Return the mean cross entropy of logits [N, K]; in a mixed batch that of both labels, by share.

    `labels` are classes int64 [N], or probabilities [N, K].

    `mixed`: of such a batch, the partners' labels and the weights of own and partners' labels.
    """
    loss = F.cross_entropy(logits, labels)
    if not mixed:
        return loss
    partner_labels, share, rest = mixed
    return share * loss + rest * F.cross_entropy(logits, partner_labels)


def cutmix(images: Tensor, probability: float, generator: torch.Generator) -> Mixed | None:
    """Return a batch [N, C, H, W] mixed with itself, with a probability; otherwise None.

    Every draw is made on the CPU, so that nothing waits for the device; `images` are left as they are.
    """
    drawn, lam, row, column = torch.rand(4, generator=generator).tolist()
    if drawn >= probability:
        return None
    partner = to_device(torch.randperm(len(images), generator=generator), images.device)
    height, width = images.shape[2:]
    rows, columns = _side(height, lam, row), _side(width, lam, column)
    mixed = images.clone()
    mixed[:, :, rows, columns] = images[:, :, rows, columns].index_select(0, partner)
    covered = (rows.stop - rows.start) * (columns.stop - columns.start)
    return Mixed(mixed, partner, 1 - covered / (height * width))


def draw_share(alpha: float, generator: torch.Generator) -> float:
    """Return a draw of Beta(alpha, alpha), in [0, 1]: an image's own share under mixup."""
    if alpha == 1:
        return float(torch.rand((), generator=generator))
    seed = int(torch.randint(2**62, (), generator=generator))
    return float(np.random.default_rng(seed).beta(alpha, alpha))


def _side(size: int, lam: float, centre: float) -> slice:
    """Return the box's pixels along an axis: sqrt(1 - lam) of it around a uniform centre, cut at the border.

    `lam` is the draw of Beta(1, 1), the share of the image to leave; `centre` is in [0, 1).
    """
    middle = int(centre * size)
    half = int(size * math.sqrt(1 - lam)) // 2
    return slice(max(middle - half, 0), min(middle + half, size))
