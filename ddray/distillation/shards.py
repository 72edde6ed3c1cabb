"""Class shards: contiguous classes that are distilled apart from the others and joined to the same bytes.

A shard has the real images of its classes only. What a method draws over all classes at once it draws whole,
from the numbers of images alone, and takes its classes' rows.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from ddray.artifact.distilled_set import DistilledSet
from ddray.data import Split
from ddray.errors import DdrayError


@dataclass(frozen=True)
class Shard:
    """The classes of a shard, and what it knows of the others.

    Attributes:
        classes: its labels.
        labels: of the whole split, int64 [N].
        minimum: the smallest value of all real images, where they are floats (spectrograms).
    """

    classes: range
    labels: Tensor
    minimum: float | None = None

    @property
    def rows(self) -> Tensor:
        """Where its images are in the whole split, int64 [n], ascending."""
        is_here = (self.labels >= self.classes.start) & (self.labels < self.classes.stop)
        return is_here.nonzero().flatten()

    @property
    def whole(self) -> Split:
        """The whole split with blanks of one pixel for images."""
        blank = torch.zeros(1, 1, 1, 1, dtype=torch.uint8)
        return Split(blank.expand(len(self.labels), 1, 1, 1), self.labels)


def shard_classes(num_classes: int, num_shards: int) -> list[range]:
    """Return contiguous ranges of labels that differ by at most one in length."""
    ends = [num_classes * part // num_shards for part in range(num_shards + 1)]
    return [range(start, stop) for start, stop in pairwise(ends)]


def join_sets(sets: Sequence[DistilledSet]) -> DistilledSet:
    """Return the set of all classes from those of all shards, in the order of their classes.

    Raises:
        DdrayError: they were whitened by different matrices.
    """
    if any(not torch.equal(one.zca[name], tensor) for one in sets for name, tensor in sets[0].zca.items()):
        raise DdrayError(
            "the shards were whitened by different matrices (nodes of several kinds, or other CPUs per shard "
            "before --resume); begin a new run"
        )
    if any(one.meta.format_version > 1 for one in sets):
        raise DdrayError("shards can't be joined: each has soft labels, a learned rate or steps of its own")
    floats = sum(one.meta.storage_floats for one in sets)
    return replace(
        sets[0],
        images=torch.cat([one.images for one in sets]),
        labels=torch.cat([one.labels for one in sets]),
        meta=sets[0].meta.model_copy(update={"storage_floats": floats}),
    )


@dataclass(frozen=True)
class Part:
    """What a shard has of samples that the unsharded run computes together.

    The bits of a sample can depend on how many are computed with it, but not on what these are: blanks may
    stand for the other shards' samples.

    Attributes:
        whole: the samples that the unsharded run computes together, among all of its samples.
        here: those that the shard has, among all that it has.
        before: blanks to compute before them.
        after: blanks to compute after them.
    """

    whole: slice
    here: slice
    before: int = 0
    after: int = 0

    @property
    def is_padded(self) -> bool:
        """Whether there are blanks."""
        return self.before + self.after > 0

    def padded(self, samples: Tensor) -> Tensor:
        """Return the shard's samples [n, ...] with blanks around them, zeros."""
        if not self.is_padded:
            return samples
        blanks = (samples.new_zeros(num, *samples.shape[1:]) for num in (self.before, self.after))
        before, after = blanks
        return torch.cat([before, samples, after])

    def without_blanks(self, values: Tensor) -> Tensor:
        """Return the rows of `values` that are not of blanks."""
        return values[self.before : len(values) - self.after] if self.is_padded else values


def parts_of(passes: Iterable[slice], present: slice, *, exact: bool) -> Iterator[Part]:
    """Yield the parts that a shard has of the unsharded run's passes, in order.

    Args:
        passes: ranges of samples that the unsharded run computes together.
        present: the samples that the shard has; those of the unsharded run: all.
        exact: whether bits may depend on the number of samples that are computed together: then there are as
            many as in the unsharded run. Otherwise only a single sample is computed in another way (matrix
            products become products with a vector), so there are two.
    """
    for whole in passes:
        start, stop = max(whole.start, present.start), min(whole.stop, present.stop)
        if start >= stop:
            continue
        before, after = start - whole.start, whole.stop - stop
        if not exact:
            before, after = 0, int(stop - start == 1 and before + after > 0)
        yield Part(whole, slice(start - present.start, stop - present.start), before, after)
