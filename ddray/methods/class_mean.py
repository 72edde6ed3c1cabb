"""Class mean: the mean image of each class, or of `ipc` random disjoint parts of it. The baseline to beat.

No learning at all; on digits at ipc 1 it scores higher than most distilled sets, so a method that does not
beat it there has learned nothing that a mean would not give.

**Deviations**: none; it comes from no paper.
"""

from typing import Final

import torch
from torch import Tensor

from ddray.config import Config
from ddray.data.packed import PackedImages, parts_of
from ddray.distillation.method import DistillContext
from ddray.methods.families.selection import apart, selection_method
from ddray.seeding import derive_numpy

_VALUES: Final = 4 * 2**20  # of packed images that are summed at a time; as floats several times in memory


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
        means += [_mean(ctx, rows) for rows in members[order].tensor_split(counts[-1])]
    labels = torch.arange(ctx.classes.start, ctx.classes.stop).repeat_interleave(torch.tensor(counts))
    return torch.stack(means), labels


def _mean(ctx: DistillContext, rows: Tensor) -> Tensor:
    """Return the mean [C, H, W] of images in their pixel space; packed ones are summed part by part."""
    images = ctx.split.images
    if not isinstance(images, PackedImages):
        return ctx.space.encode(images[rows]).double().mean(0).float()
    size = max(1, _VALUES // images[:1].numel())
    parts = (ctx.space.encode(part).sum(0, dtype=torch.float64) for part in parts_of(images.rows(rows), size))
    return (sum(parts, torch.zeros((), dtype=torch.float64)) / len(rows)).float()


METHOD: Final = selection_method(Config, choose_images, coupling=apart)
