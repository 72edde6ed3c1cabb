"""Memory that the bilevel loop of KRR-ST and Boost-SSDD takes, checked before any teacher is trained."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import torch

from ddray.distillation.method import DistillContext
from ddray.errors import InputError
from ddray.methods.families.ssl.budget import KrrConfig, feature_dim, spec_of_teacher
from ddray.methods.families.ssl.ridge import solve_bytes
from ddray.nets import build_net
from ddray.pool.spec import PoolSpec
from ddray.system.memory import available_bytes

# Largest graph of distilled images held at once; beyond it the pass runs twice, in parts.
_GRAPH_BYTES: Final = 8 * 2**30


class LoopConfig(Protocol):
    """What the bilevel loop reads of a method's settings (`KrrConfig`)."""

    @property
    def lr_outer(self) -> float: ...

    @property
    def batch_real(self) -> int: ...

    @property
    def pool_size(self) -> int: ...

    @property
    def inner_steps_max(self) -> int: ...

    @property
    def inner_batch(self) -> int | None: ...


@dataclass(frozen=True)
class Extent:
    """How large a set is: m images with A views each, and all learned floats."""

    num_images: int
    num_views: int
    num_floats: int

    @property
    def num_rows(self) -> int:
        """M, images with their views: m * (A + 1)."""
        return self.num_images * (self.num_views + 1)


@dataclass(frozen=True)
class NetworkCosts:
    """What an inner network costs: bytes of one image's largest map and of its graph, F, bytes of weights."""

    sample: int
    graph: int
    num_features: int
    weights: int


def network_costs(ctx: DistillContext) -> NetworkCosts:
    """Measure an inner network on a blank image, on the CPU: a search's driver may lack the device."""
    net = build_net(ctx.arch, ctx.dataset.image_shape, 1, seed=0).eval()
    with torch.no_grad():
        embedding = net.embed(torch.zeros(1, *ctx.dataset.image_shape))
    sizes = net.map_bytes()
    return NetworkCosts(
        sample=max(sizes, default=1),
        # Per map the outputs of convolution and norm, and the pooled map.
        graph=sum(2 * size for size in sizes) * 5 // 4,
        num_features=embedding.shape[1],
        weights=sum(4 * p.numel() for p in net.parameters()),
    )


def images_at_once(costs: NetworkCosts, extent: Extent) -> int:
    """Return how many images' graphs, with their views, the outer pass holds: all, or as many as fit."""
    return max(1, min(extent.num_images, _GRAPH_BYTES // costs.graph // (extent.num_views + 1)))


def needed_bytes(
    ctx: DistillContext,
    config: LoopConfig,
    extent: Extent,
    num_targets: int,
    regression_bytes: Callable[[int, int, int], int] = solve_bytes,
) -> int:
    """Return a run's approximate peak memory on the device, in bytes.

    Args:
        ctx: what to work on.
        config: settings.
        extent: how large the set is.
        num_targets: D.
        regression_bytes: the peak of the regression, for rows, features and targets.
    """
    costs, rows = network_costs(ctx), extent.num_rows
    # A row's graph, and its image: as synthesised, channels last, and its gradient.
    row = costs.graph + 3 * 4 * math.prod(ctx.dataset.image_shape)
    inner = min(rows, config.inner_batch or rows) * row
    at_once = images_at_once(costs, extent) * (extent.num_views + 1)
    solving = regression_bytes(rows, costs.num_features, num_targets)
    # In parts, no graph is held during the solve, and the features' gradients while a part's graph is.
    gradients = 2 * 4 * rows * (costs.num_features + num_targets)
    outer = at_once * row + solving if at_once == rows else max(at_once * row + gradients, solving)
    real = 4 * len(ctx.split) * num_targets + (ctx.split.images.numel() if ctx.device.type == "cuda" else 0)
    weights = costs.weights + 4 * num_targets * (costs.num_features + 1)
    networks = (2 * config.pool_size + 1) * weights  # with momentum, and one gradient
    learned = 4 * 4 * extent.num_floats  # with gradient and AdamW's averages
    return max(inner, outer) + real + networks + learned


def check_memory(
    ctx: DistillContext,
    config: LoopConfig,
    extent: Extent,
    num_targets: int,
    regression_bytes: Callable[[int, int, int], int] = solve_bytes,
) -> None:
    """Refuse a set with targets of `num_targets` dimensions that the device can't hold.

    Raises:
        InputError: naming the memory that it would need.
    """
    needed = needed_bytes(ctx, config, extent, num_targets, regression_bytes) / 2**30
    free = available_bytes(ctx.device) / 2**30
    if needed > free:
        size = "ipc" if ctx.budget is None else "budget"
        raise InputError(
            f"{ctx.method} needs about {needed:.1f} GiB for {extent.num_rows} images with their views, "
            f"{ctx.device} has {free:.1f} free: lower the {size}, or method.inner_batch"
        )


def check_teacher_memory(ctx: DistillContext, config: KrrConfig, extent: Extent) -> None:
    """Refuse a set of the teacher's representations that the device can't hold, before it is trained.

    Raises:
        InputError: naming the memory that it would need.
    """
    check_memory(ctx, config, extent, feature_dim(config.teacher.arch, ctx.dataset.image_shape))


def declared_teacher(ctx: DistillContext, config: KrrConfig, extent: Extent) -> list[PoolSpec]:
    """Return the spec of the teacher that a run will request; none where this machine can't hold the set.

    The worker refuses such a set itself, before it requests a teacher: its device is the one that counts.
    """
    # Asking would open a CUDA context, which a search's driver must not have.
    if ctx.device.type != "cuda" or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        try:
            check_teacher_memory(ctx, config, extent)
        except InputError:
            return []
    return [spec_of_teacher(ctx, config.teacher)]
