"""Decoder `partition`: several images stored as one, cut apart and up-sampled (IDC, IDM, DSDM)."""

from __future__ import annotations

from ddray.artifact.decoders.images import check_images, read, stored
from ddray.artifact.distilled_set import DistilledSet, TrainSet, check_storage
from ddray.artifact.partition import Partition, expand
from ddray.errors import InputError

__all__ = ["decode", "read", "stored", "validate"]


def validate(distilled: DistilledSet) -> None:
    """Check images, counts, and that every side has enough pixels for its parts."""
    check_images(distilled)
    meta, partition = distilled.meta, _partition(distilled)
    if meta.ipc_decoded != meta.ipc * partition.num_parts:
        raise InputError(
            f"ipc_decoded must be {meta.ipc} x {partition.num_parts} parts, got {meta.ipc_decoded}"
        )
    check_storage(distilled)
    partition.spans(*distilled.images.shape[2:])


def decode(distilled: DistilledSet) -> TrainSet:
    """Return images [N * P, C, H, W], P per stored image."""
    partition = _partition(distilled)
    labels = distilled.labels.repeat_interleave(partition.num_parts)
    return TrainSet(expand(distilled.images, partition), labels)


def _partition(distilled: DistilledSet) -> Partition:
    if distilled.meta.partition is None:
        raise InputError("decoder partition and partition None must both be given, or none")
    return distilled.meta.partition
