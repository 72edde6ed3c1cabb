"""Decoder `boost_ssdd`: images and targets from bases, coefficients and approximation networks."""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from ddray.artifact.bases import Bases, check, expand, images_of, targets_of
from ddray.artifact.decoders import Decoder
from ddray.artifact.decoders.images import check_images
from ddray.artifact.distilled_set import DistilledSet, Meta, TrainSet
from ddray.errors import InputError


def _read(meta: Meta, tensors: Mapping[str, Tensor], zca: Mapping[str, Tensor]) -> DistilledSet:
    """Return the set with its images and targets, without their views."""
    bases = _bases(meta)
    check(tensors, bases, meta.image_shape)
    labels = torch.zeros(0, dtype=torch.int64)
    return DistilledSet(images_of(tensors, bases), labels, meta, zca, targets_of(tensors), tensors)


def _validate(distilled: DistilledSet) -> None:
    if distilled.targets is None or not distilled.compact:
        raise InputError("decoder boost_ssdd, its bases, tensors and targets must all be given, or none")
    check_images(distilled)
    check(distilled.compact, _bases(distilled.meta), distilled.meta.image_shape)
    distilled.check_storage()


def _decode(distilled: DistilledSet) -> TrainSet:
    """Return the images with their views, and a target each."""
    images, targets = expand(distilled.compact, _bases(distilled.meta))
    return TrainSet(images, distilled.labels, targets)


def _bases(meta: Meta) -> Bases:
    if meta.bases is None:
        raise InputError("decoder boost_ssdd and bases None must both be given, or none")
    return meta.bases


DECODER: Final = Decoder(_read, _validate, _decode)
