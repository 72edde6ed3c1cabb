"""Class mean: the mean image of each class, or of `ipc` random disjoint parts of it. The baseline to beat.

No learning at all; on digits at ipc 1 it scores higher than most distilled sets, so a method that does not
beat it there has learned nothing that a mean would not give.

**Deviations**: none; it comes from no paper.
"""

from typing import Final

import torch
from torch import Tensor

from ddray.config import Config
from ddray.distillation.method import DistillContext
from ddray.methods.families.selection import apart, selection_method
from ddray.seeding import derive_numpy


def choose_images(ctx: DistillContext, config: Config) -> tuple[Tensor, Tensor]:
    """Return mean images [K * ipc, C, H, W] and their labels; of a class's own images where it has fewer."""
    rng = derive_numpy(ctx.seed, "distill", "parts")
    means, counts = [], []
    for label, size in enumerate(ctx.counts.tolist()):
        order = torch.from_numpy(rng.permutation(size))
        if label not in ctx.classes:
            continue
        members = torch.nonzero(ctx.split.labels == label).flatten()
        counts.append(min(ctx.ipc, size))
        parts = members[order].tensor_split(counts[-1])
        means += [ctx.space.encode(ctx.split.images[rows]).double().mean(0).float() for rows in parts]
    labels = torch.arange(ctx.classes.start, ctx.classes.stop).repeat_interleave(torch.tensor(counts))
    return torch.stack(means), labels


METHOD: Final = selection_method(Config, choose_images, coupling=apart)
