"""KRR-ST: self-supervised dataset distillation for transfer learning (Lee et al., ICLR 2024).

Images and target representations are learned so that networks trained on the pairs predict the teacher's
representations of real images: Boost-SSDD's Eq 2 (inner) and Eq 3 (outer), its baseline and engine.

**Deviations** (paper | authors' code | ours)

- inner loss: summed over dimensions (Eq 2), which diverges at lr .1 | mean over rows and dimensions | mean.
- a replaced inner network's counter: not given | stays at Z, so that most steps use a fresh network |
  `pool_reset` by preset.
- initial images: normalised | in [0, 1], while real batches are normalised | `init_raw` by preset.
- teacher: not given | checkpoints of Barlow Twins are shipped, trained elsewhere; padding 2 in the first
  convolution | `repo`: padding 2, and solo-learn's warm-up and crops, by which Boost-SSDD trains its own.
- fine-tuning (`--finetune`): batch not given | 256, in its first version 128; 64 for ResNet-18 at 224 px |
  256.
- lr_outer on CIFAR-100: 1e-4 | 1e-4, in a later README 1e-3 | 1e-4.
- storage: images alone are counted | images alone | images and targets.
- real batches: drawn without repetition within an epoch | within a batch.
"""

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from ddray.artifact.distilled_set import DistilledSet
from ddray.distillation.method import DistillContext, Target
from ddray.methods.families.factory import make_method
from ddray.methods.families.ssl.budget import (
    KrrConfig,
    arch_for,
    evaluate_for,
    feature_dim,
    given_budget,
    num_pairs,
    teacher_for,
    teacher_of,
)
from ddray.methods.families.ssl.loop import SCHEDULE, BilevelLoop, Rows, krr_rules
from ddray.methods.families.ssl.memory import Extent, check_teacher_memory, declared_teacher
from ddray.pool.spec import PoolSpec


class KrrStConfig(KrrConfig):
    """KRR-ST's settings; defaults are the paper's for 32 px."""

    init_raw: bool = False
    """Whether the initial images are pixels in [0, 1] instead of normalised ones (authors' code)."""


def synthesise(parameters: Mapping[str, Tensor], rows: Rows) -> tuple[Tensor, Tensor]:
    """Return images [k, C, H, W] and targets [k, D]: rows of the parameters themselves."""
    return parameters["images"][rows], parameters["targets"][rows]


def preset(name: str, target: Target) -> dict[str, Any]:
    """Return the settings of `paper` or `repo` (authors' code) for a target."""
    small = min(target.image_shape[1:]) <= 32
    method: dict[str, Any] = {"lr_outer": 1e-4 if small else 1e-5, "augment_real": "crop_flip"}
    if name == "repo":
        method |= {"pool_reset": "krrst_code", "init_raw": True, **teacher_for(name)}
    return {
        "steps": 160_000,
        "checkpoint_every": 1000,
        "arch": arch_for(target.image_shape),
        "evaluate": evaluate_for(target),
        "method": method,
    }


def extent_of(ctx: DistillContext, config: KrrStConfig) -> Extent:
    """Return m, and the floats of images and targets."""
    shape = ctx.dataset.image_shape
    m = num_pairs(config, given_budget(ctx), shape, len(ctx.split))
    return Extent(m, 0, m * (math.prod(shape) + feature_dim(config.teacher.arch, shape)))


def pool_specs(ctx: DistillContext, config: KrrStConfig) -> list[PoolSpec]:
    """Return the teacher."""
    return declared_teacher(ctx, config, extent_of(ctx, config))


def start(ctx: DistillContext, config: KrrStConfig) -> BilevelLoop:
    """Start from random real images and the teacher's representations of them.

    Raises:
        InputError: the set is too large for the device's memory.
    """
    extent = extent_of(ctx, config)
    check_teacher_memory(ctx, config, extent)
    representations = teacher_of(ctx, config.teacher).tensors["features"]
    index = torch.randperm(len(ctx.split), generator=ctx.generator("init"))[: extent.num_images]
    real_images = ctx.split.images[index]
    images = real_images.float() / 255 if config.init_raw else ctx.space.encode(real_images)
    parameters = {"images": images, "targets": representations[index]}

    def make_set(learned: Mapping[str, Tensor]) -> DistilledSet:
        return ctx.make_ssl_set(learned["images"], learned["targets"])

    return BilevelLoop(ctx, config, parameters, synthesise, extent, make_set, krr_rules(ctx, config))


METHOD: Final = make_method(
    KrrStConfig, preset, start, specs_of=pool_specs, num_distilled_of=num_pairs, depends_on_steps=SCHEDULE
)
