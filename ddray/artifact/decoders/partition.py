"""Decoder `partition`: several images stored as one, cut apart and up-sampled (IDC, IDM, DSDM)."""

from typing import Final

from ddray.artifact.decoders import Decoder
from ddray.artifact.decoders.images import check_images, read_images
from ddray.artifact.distilled_set import DistilledSet, TrainSet
from ddray.artifact.partition import Partition, expand
from ddray.errors import InputError


def _validate(distilled: DistilledSet) -> None:
    check_images(distilled)
    meta, partition = distilled.meta, distilled.meta.partition or Partition()
    if meta.ipc_decoded != meta.ipc * partition.num_parts:
        raise InputError(
            f"ipc_decoded must be {meta.ipc} x {partition.num_parts} parts, got {meta.ipc_decoded}"
        )
    distilled.check_storage()
    partition.spans(*distilled.images.shape[2:])


def _decode(distilled: DistilledSet) -> TrainSet:
    """Return images [N * P, C, H, W], P per stored image."""
    partition = distilled.meta.partition or Partition()
    num, soft = partition.num_parts, distilled.learned_labels()
    soft = None if soft is None else soft.repeat_interleave(num, 0)
    labels, regress = distilled.labels.repeat_interleave(num), distilled.meta.label_kind == "values"
    return TrainSet(expand(distilled.images, partition), labels, soft_labels=soft, regress=regress)


DECODER: Final = Decoder(read_images, _validate, _decode)
