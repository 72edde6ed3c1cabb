"""What the self-supervised methods share: the teacher of the pool, the storage budget, selections of images.

A budget of N images is N * C * H * W floats (Boost-SSDD Sec 4, Storage Budget). We count every float that a
set needs: images and their representations alike.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from ddray.distillation.method import DistillContext, Distiller, MethodConfig, Target
from ddray.errors import InputError
from ddray.methods.families.factory import Selected, make_method
from ddray.methods.families.ssl.teacher import TeacherConfig, ssl_teacher_spec
from ddray.nets import build_net
from ddray.pool.spec import PoolEntry, PoolSpec

EVALUATE: Final[dict[str, Any]] = {
    "epochs": 1000,
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 1e-3,
    "batch": 256,
    "schedule": "constant",
    "augment": "none",
}
"""Pre-training on a distilled set (Boost-SSDD A.1): SGD on the mean squared error, no augmentation."""

_LARGE_BUDGET: Final = 1000

Choose = Callable[[DistillContext, Tensor, int], Tensor]


class SslConfig(MethodConfig):
    """Settings of every self-supervised method."""

    quick: ClassVar[Mapping[str, Any]] = {
        "teacher": {"arch": "convnet2_w8", "epochs": 1, "batch": 64, "projector": 8}
    }

    teacher: TeacherConfig = TeacherConfig()
    """The network whose representations are distilled; one pool entry for all runs."""


def evaluate_for(target: Target) -> dict[str, Any]:
    """Return a target's pre-training settings: the same for all methods, so that a table's rows compare.

    Weight decay is the last column of Boost-SSDD's Table 5: 1e-3; 1e-4 on CIFAR-100 from N = 1000; 5e-3 above
    32 px.
    """
    decay = 1e-3
    if min(target.image_shape[1:]) > 32:
        decay = 5e-3
    elif target.dataset == "cifar100" and (target.budget or 0) >= _LARGE_BUDGET:
        decay = 1e-4
    return {**EVALUATE, "weight_decay": decay}


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
    channels, height, width = image_shape
    return budget * channels * height * width


def num_pairs(config: SslConfig, budget: int, image_shape: tuple[int, int, int]) -> int:
    """Return how many images fit a budget together with their representations."""
    pair = budget_floats(1, image_shape) + feature_dim(config.teacher.arch, image_shape)
    return budget_floats(budget, image_shape) // pair


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


def ssl_selection(config_class: type[SslConfig], choose: Choose) -> type[Distiller]:
    """Return a method without steps: real images with the teacher's representations of them.

    Args:
        config_class: its settings.
        choose: picks m indices, given the context, the teacher's features [N, D] and m.
    """

    def preset(name: str, target: Target) -> dict[str, Any]:
        return {"steps": 0, "arch": arch_for(target.image_shape), "evaluate": evaluate_for(target)}

    def specs(ctx: DistillContext, config: SslConfig) -> list[PoolSpec]:
        return [spec_of_teacher(ctx, config.teacher)]

    def num_distilled(config: Any, budget: int, image_shape: tuple[int, int, int], num_real: int) -> int:
        return num_pairs(config, budget, image_shape)

    def start(ctx: DistillContext, config: SslConfig) -> Selected:
        features = teacher_of(ctx, config.teacher).tensors["features"]
        index = choose(ctx, features, num_pairs(config, given_budget(ctx), ctx.dataset.image_shape))
        images = ctx.space.encode(ctx.split.images[index])
        return Selected(ctx.make_ssl_set(images, features[index]), features)

    return make_method(
        config_class, preset, start, specs_of=specs, num_distilled_of=num_distilled, has_steps=False
    )
