"""What the self-supervised methods share: the teacher of the pool, the storage budget, selections of images.

A budget of N images is N * C * H * W floats (Boost-SSDD Sec 4, Storage Budget). We count every float that a
set needs: images and their representations alike, unless a selection is told to count images.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ddray.config import added
from ddray.distillation.method import DistillContext, Distiller, MethodConfig, Target
from ddray.errors import InputError
from ddray.methods.families.factory import Selected, make_method
from ddray.methods.families.ssl.teacher import SOLO_LEARN, TeacherConfig, ssl_teacher_spec
from ddray.nets import build_net
from ddray.pool.spec import PoolEntry, PoolSpec

Choose = Callable[[DistillContext, Tensor, int], Tensor]


class SslConfig(MethodConfig):
    """Settings of every self-supervised method."""

    quick: ClassVar = {"teacher": {"arch": "convnet2_w8", "epochs": 1, "batch": 64, "projector": 8}}

    teacher: TeacherConfig = TeacherConfig()
    """The network whose representations are distilled; one pool entry for all runs."""


class KrrConfig(SslConfig):
    """Settings of the bilevel loop of KRR-ST and Boost-SSDD."""

    quick: ClassVar = {**SslConfig.quick, "batch_real": 8, "pool_size": 2, "inner_steps_max": 2}

    lr_outer: float = Field(default=1e-3, gt=0)
    """Learning rate of the distilled parameters (AdamW without weight decay), falling linearly to 0."""
    batch_real: int = Field(default=1024, ge=1)
    """Real images per step; never more than there are."""
    augment_real: Literal["crop_flip", "none"] = "none"
    """`crop_flip`: the teacher sees each real batch under RandomCrop and a flip; `none`: its features are
    those of the pool."""
    ridge: float = Field(default=1e-6, gt=0)
    """lambda of Eq 3, as a fraction of the Gram matrix's trace."""
    pool_size: int = Field(default=10, ge=1)
    """L, inner networks."""
    inner_steps_max: int = Field(default=1000, ge=1)
    """Z, steps after which an inner network is replaced."""
    pool_reset: Literal["paper", "krrst_code"] = "paper"
    """`paper`: a replaced network counts from 0; `krrst_code`: its counter stays at Z, so that it is replaced
    each time it is drawn."""
    lr_inner: float = Field(default=0.1, gt=0)
    """Learning rate of the inner networks (SGD)."""
    momentum_inner: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of the inner networks."""
    decay_inner: float = Field(default=1e-3, ge=0)
    """Weight decay of the inner networks."""
    inner_batch: int | None = Field(default=None, ge=2)
    """Rows of the set per inner step: images drawn at random, with all of their views; default: all."""


class SelectionConfig(SslConfig):
    """Settings of a selection of real images."""

    count: Literal["storage", "images"] = added("storage")
    """What a budget of N buys: `storage`: as many images as fit N images' floats together with their
    representations; `images`: N images, whose representations come on top (Boost-SSDD Sec 4, Random and
    KMeans)."""


def evaluate_for(target: Target) -> dict[str, Any]:
    """Return a target's pre-training settings: the same for all methods, so that a table's rows compare.

    SGD on the mean squared error, without augmentation (Boost-SSDD A.1). Weight decay is the last column of
    its Table 5: 1e-3; 1e-4 on CIFAR-100 from N = 1000; 5e-3 above 32 px. Fine-tuning takes batches of 256
    (KRR-ST's code; 64 for ResNet-18 at 224 px, and 128 in its first version).
    """
    decay = 1e-3
    if min(target.image_shape[1:]) > 32:
        decay = 5e-3
    elif target.dataset == "cifar100" and (target.budget or 0) >= 1000:
        decay = 1e-4
    settings = {"epochs": 1000, "lr": 0.1, "momentum": 0.9, "weight_decay": decay, "batch": 256}
    return {**settings, "schedule": "constant", "augment": "none", "finetune": {"batch": 256}}


def teacher_for(name: str) -> dict[str, Any]:
    """Return a preset's settings of the teacher: `repo` trains it by solo-learn's recipe."""
    return {"teacher": dict(SOLO_LEARN)} if name == "repo" else {}


def teacher_of(ctx: DistillContext, config: TeacherConfig) -> PoolEntry:
    """Return the pool's teacher for the context's images: weights, and features [N, D] in their order."""
    return ctx.pool.get([spec_of_teacher(ctx, config)])[0]


def spec_of_teacher(ctx: DistillContext, config: TeacherConfig) -> PoolSpec:
    """Return the pool spec of the teacher of the context's images."""
    return ssl_teacher_spec(config, ctx.dataset, ctx.split, split_name=ctx.split_name, device=ctx.device)


@lru_cache(maxsize=32)
def feature_dim(arch: str, image_shape: tuple[int, int, int]) -> int:
    """Return D, the dimension of a teacher's representations."""
    net = build_net(arch, image_shape, 1, seed=0).eval()
    with torch.no_grad():
        return net.embed(torch.zeros(1, *image_shape)).shape[1]


def budget_floats(budget: int, image_shape: tuple[int, int, int]) -> int:
    """Return the floats that `budget` images of `image_shape` (C, H, W) take."""
    return budget * math.prod(image_shape)


def num_pairs(config: SslConfig, budget: int, image_shape: tuple[int, int, int], num_real: int) -> int:
    """Return how many images fit a budget together with their representations, if there are as many."""
    pair = budget_floats(1, image_shape) + feature_dim(config.teacher.arch, image_shape)
    return budget_floats(budget, image_shape) // pair


def num_selected(
    config: SelectionConfig, budget: int, image_shape: tuple[int, int, int], num_real: int
) -> int:
    """Return how many images a selection takes for a budget, if there are as many."""
    return budget if config.count == "images" else num_pairs(config, budget, image_shape, num_real)


def arch_for(image_shape: tuple[int, int, int]) -> str:
    """Return the papers' inner network: batch norm, channels doubling to 512 in the last block."""
    size = min(image_shape[1:])
    depth = 3 if size <= 32 else 4 if size <= 64 else 5 if size <= 128 else 6
    return f"convnet{depth}_w{512 // 2 ** (depth - 1)}_x2_bn"


def given_budget(ctx: DistillContext) -> int:
    """Return the run's budget in images.

    Raises:
        InputError: the context was made for a method that counts images per class.
    """
    if ctx.budget is None:
        raise InputError(f"{ctx.method} needs a budget of images, got none; add --budget N")
    return ctx.budget


def ssl_selection(choose: Choose) -> type[Distiller]:
    """Return a method without steps: real images with the teacher's representations of them.

    `choose` picks m indices, given the context, the teacher's features [N, D] and m.
    """

    def preset(name: str, target: Target) -> dict[str, Any]:
        return {
            "steps": 0,
            "arch": arch_for(target.image_shape),
            "evaluate": evaluate_for(target),
            "method": teacher_for(name),
        }

    def specs(ctx: DistillContext, config: SelectionConfig) -> list[PoolSpec]:
        return [spec_of_teacher(ctx, config.teacher)]

    def start(ctx: DistillContext, config: SelectionConfig) -> Selected:
        features = teacher_of(ctx, config.teacher).tensors["features"]
        m = num_selected(config, given_budget(ctx), ctx.dataset.image_shape, len(ctx.split))
        index = choose(ctx, features, m)
        images = ctx.space.encode(ctx.split.images[index])
        return Selected(ctx.make_ssl_set(images, features[index]), features)

    return make_method(
        SelectionConfig, preset, start, specs_of=specs, num_distilled_of=num_selected, has_steps=False
    )
