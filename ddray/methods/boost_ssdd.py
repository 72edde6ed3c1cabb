"""Boost-SSDD: self-supervised distillation by parameterisation, predefined augmentation and approximation.

Yu et al., ICLR 2025 (Algorithms 1 and 2, Eq 2-3, Table 5). KRR-ST's loop on image bases B^x and coefficients
C^x, representation bases B^y and coefficients C^y, and coefficients C^y_a of every predefined view, which
small networks Q_a replace in the end.

**Deviations** (paper | ours)

- inner loss: Eq 2 sums over dimensions, which diverges at its own lr .1 | mean.
- teacher: Barlow Twins, "based on the solo-learn library" | AdamW; `repo`: solo-learn's warm-up, crops and
  first convolution, as in the table files; `paper`: other values of these three (`families/ssl/teacher.py`).
- principal components: centring not given | uncentred, so that no mean is stored; images are shrunk by
  averaging.
- Q_a's optimiser: not given | full-batch Adam, lr .01 falling linearly, 2,000 steps; inputs are standardised
  while training, which is folded into the first layer. Inner weight decay: not given | KRR-ST's 1e-3.
- U and V outside Table 5: twice N, at most the dimension | also at most a half and a third of the floats (the
  shares that the table's own rows take).
- augmentation of real batches: not given | none, so that the teacher's features are read, not computed.
- the inner step: on the views that the outer loss was taken on | on the updated ones (KRR-ST's code).
- inner steps: a full batch, 9,672 rows for CIFAR-100 at N=1000 (21 GiB), 48,508 at N=5000, 9,528 for Tiny
  ImageNet at N=200 (43 GiB), 37,876 for ImageNette at 128 px (358 GiB) | above `inner_batch` (4,096 rows at
  32 px, 2,048 at 64, 1,024 at 128) images drawn anew each step, with all of their views. N <= 100 is a full
  batch. The outer solve is exact, in the features' space, its gradient taken in parts.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Final, Literal

import torch
from pydantic import Field
from torch import Tensor

from ddray.artifact import bases
from ddray.artifact.bases import Approximation, Augmentation, Bases
from ddray.artifact.distilled_set import DistilledSet
from ddray.data import normalized_space
from ddray.distillation.method import DistillContext, Target
from ddray.errors import InputError
from ddray.methods.families.factory import make_method
from ddray.methods.families.ssl.bases_fit import (
    BudgetSplit,
    fit_shifts,
    principal_components,
    shift_floats,
    shrunk_rows,
)
from ddray.methods.families.ssl.budget import (
    KrrConfig,
    arch_for,
    budget_floats,
    evaluate_for,
    feature_dim,
    given_budget,
    teacher_for,
    teacher_of,
)
from ddray.methods.families.ssl.loop import SCHEDULE, BilevelLoop, Rows, krr_rules
from ddray.methods.families.ssl.memory import Extent, check_teacher_memory, declared_teacher
from ddray.methods.families.ssl.teacher import teacher_net
from ddray.nets import Net
from ddray.pool.spec import PoolSpec
from ddray.training.embedding import embed_images

# Rows of an inner step at 32 px: some 9 GiB of graph at every size, since networks halve as sides double.
_INNER_BATCH: Final = 4096
_CHUNK: Final = 1024  # images whose views the teacher sees at a time
# Table 5: dataset -> budget -> (U, V); its weight decay is `budget.evaluate_for`'s.
_TABLE5: Final[dict[str, dict[int, tuple[int, int]]]] = {
    "cifar100": {25: (50, 50), 50: (100, 100), 100: (200, 200), 1000: (500, 500), 5000: (700, 500)},
    "tiny_imagenet": {50: (100, 100), 100: (200, 200), 200: (400, 400)},
    "imagenet": {250: (500, 500)},
}


class BoostSsddConfig(KrrConfig):
    """Boost-SSDD's settings; defaults are the paper's for 32 px."""

    parameterize: bool = True
    """Whether images and representations are learned through bases and coefficients (Table 3)."""
    num_image_bases: int | None = Field(default=None, ge=1)
    """U; default: twice the budget, as far as dimension and budget allow."""
    num_target_bases: int | None = Field(default=None, ge=1)
    """V; likewise."""
    scale: int = Field(default=2, ge=1)
    """s: image bases are smaller than images by this factor."""
    init: Literal["pc", "real", "random"] = "pc"
    """Bases and coefficients start as principal components and projections, as real images and noise, or as
    noise (Table 4)."""
    augmentation: Augmentation = "rotation"
    """The predefined views (Table 12)."""
    approximation: Approximation = "mlp"
    """How the views' targets are computed: networks, one shift each, nothing, or all stored (Table 11)."""
    hidden: int = Field(default=4, ge=1)
    """h, width of the approximation networks."""


def preset(name: str, target: Target) -> dict[str, Any]:
    """Return the paper's settings; `repo`, since there is no code, with a teacher by solo-learn's recipe."""
    side = min(target.image_shape[1:])
    small = side <= 32
    method: dict[str, Any] = {"scale": 2 if small else max(2, side // 16), "hidden": 4 if small else 16}
    method |= teacher_for(name)
    row = _TABLE5.get(target.dataset, {}).get(target.budget or 0)
    if row is not None:
        method["num_image_bases"], method["num_target_bases"] = row
    method["inner_batch"] = _INNER_BATCH * 32 // max(side, 32)
    return {
        "steps": 30_000 if small else 20_000,
        "checkpoint_every": 1000,
        "arch": arch_for(target.image_shape),
        "evaluate": evaluate_for(target),
        "method": method,
    }


def plan_layout(
    config: BoostSsddConfig, budget: int, image_shape: tuple[int, int, int], num_real: int
) -> BudgetSplit:
    """Return how a budget of images is spent: bases and networks first, then m = rest / (U + V) images.

    m is never more than `num_real`: coefficients start as projections of as many real images. Views that are
    all stored (`ideal`) are the paper's upper bound "without considering the storage budget" (A.7): they get
    the same m as networks, and count in `storage_floats` alone.

    Raises:
        InputError: the images don't divide by the scale, or are not square where they are rotated.
    """
    channels, height, width = image_shape
    if height % config.scale or width % config.scale:
        raise InputError(f"method.scale must divide the images' sides, {height}x{width}, got {config.scale}")
    if config.augmentation == "rotation" and height != width:
        raise InputError(
            f"method.augmentation=rotation needs square images, got {height}x{width}; use jigsaw"
        )
    floats, dim = budget_floats(budget, image_shape), feature_dim(config.teacher.arch, image_shape)
    basis = channels * height * width // config.scale**2
    if not config.parameterize:
        # Images and targets are their own coefficients, and no bases are stored.
        num_image_bases, num_target_bases, spent = channels * height * width, dim, 0
    else:
        most_image, most_target = min(basis, num_real), min(dim, num_real)
        # At most twice the budget's images, and half and a third of the floats.
        default_image = max(1, min(2 * budget, most_image, floats // (2 * basis)))
        default_target = max(1, min(2 * budget, most_target, floats // (3 * dim)))
        num_image_bases = config.num_image_bases or default_image
        num_target_bases = config.num_target_bases or default_target
        if num_image_bases > most_image or num_target_bases > most_target:
            raise InputError(
                f"method.num_image_bases must be <= {most_image} and method.num_target_bases "
                f"<= {most_target} (dimensions and images), got {num_image_bases}, {num_target_bases}"
            )
        spent = num_image_bases * basis + num_target_bases * dim
    shifts = partial(shift_floats, bases.NUM_VIEWS[config.augmentation], num_target_bases, config.hidden)
    counted: Approximation = "mlp" if config.approximation == "ideal" else config.approximation
    per_image = num_image_bases + num_target_bases
    num_images = max(0, min(num_real, (floats - spent - shifts(counted)) // per_image))
    stored = spent + shifts(config.approximation, num_images) + num_images * per_image
    return BudgetSplit(num_image_bases, num_target_bases, num_images, stored)


def num_distilled(
    config: BoostSsddConfig, budget: int, image_shape: tuple[int, int, int], num_real: int
) -> int:
    """Return m, how many images the budget holds, without their views."""
    return plan_layout(config, budget, image_shape, num_real).num_images


def planned(ctx: DistillContext, config: BoostSsddConfig) -> tuple[BudgetSplit, Extent]:
    """Return how the budget is spent, and what is learned: the views' targets have no networks yet."""
    plan = plan_layout(config, given_budget(ctx), ctx.dataset.image_shape, len(ctx.split))
    num_views = bases.NUM_VIEWS[config.augmentation]
    view_floats = num_views * plan.num_images * plan.num_target_bases
    return plan, Extent(plan.num_images, num_views, plan.storage_floats + view_floats)


def pool_specs(ctx: DistillContext, config: BoostSsddConfig) -> list[PoolSpec]:
    """Return the teacher."""
    return declared_teacher(ctx, config, planned(ctx, config)[1])


def start(ctx: DistillContext, config: BoostSsddConfig) -> BilevelLoop:
    """Make the initial bases and coefficients, and the loop (Algorithm 1, lines 1-6).

    Raises:
        InputError: the set is too large for the device's memory.
    """
    plan, extent = planned(ctx, config)
    check_teacher_memory(ctx, config, extent)
    entry = teacher_of(ctx, config.teacher)
    learned = Bases(scale=config.scale, augmentation=config.augmentation, approximation="ideal")

    def synthesise(parameters: Mapping[str, Tensor], rows: Rows) -> tuple[Tensor, Tensor]:
        return bases.expand(bases.of_images(parameters, rows), learned)

    index = torch.randperm(len(ctx.split), generator=ctx.generator("init"))[: plan.num_images]
    parameters = _start(ctx, config, plan, entry.tensors["features"], index)
    if learned.num_views:
        teacher = teacher_net(entry).to(ctx.device)
        parameters["view_coefficients"] = _start_view_coefficients(ctx, config, parameters, teacher)
    make_set = partial(_based_set, ctx, config)
    return BilevelLoop(ctx, config, parameters, synthesise, extent, make_set, krr_rules(ctx, config))


def _based_set(ctx: DistillContext, config: BoostSsddConfig, learned: Mapping[str, Tensor]) -> DistilledSet:
    """Fit the approximation networks and return the current set (Algorithm 1, lines 21-23)."""
    tensors = {name: tensor.detach().clone() for name, tensor in learned.items()}
    view_coefficients = tensors.pop("view_coefficients", None)
    mse = None
    if view_coefficients is not None:
        target_coefficients = tensors["target_coefficients" if config.parameterize else "targets"]
        generator = ctx.generator("approximation")
        shift_tensors, mse = _approximate(config, target_coefficients, view_coefficients, generator)
        tensors |= shift_tensors
    names = ("scale", "augmentation", "approximation")
    meta = Bases(**{name: getattr(config, name) for name in names}, approximation_mse=mse)
    return ctx.make_based_set(tensors, meta)


def _approximate(
    config: BoostSsddConfig, coefficients: Tensor, view_coefficients: Tensor, generator: torch.Generator
) -> tuple[dict[str, Tensor], float]:
    """Return tensors that map images' coefficients [m, V] to their views' [A, m, V], and the error."""
    shift = view_coefficients - coefficients
    if config.approximation == "ideal":
        return {"view_coefficients": view_coefficients}, 0.0
    if config.approximation == "same":
        return {}, float(shift.square().mean())
    if config.approximation == "bias":
        bias = shift.mean(1)
        return {"shift_bias": bias}, float((shift - bias[:, None]).square().mean())
    return fit_shifts(coefficients, view_coefficients, config.hidden, generator)


def _start(
    ctx: DistillContext, config: BoostSsddConfig, plan: BudgetSplit, features: Tensor, index: Tensor
) -> dict[str, Tensor]:
    """Return initial bases and coefficients (Sec 3.2; Table 4), or the pairs themselves without bases."""
    features = features.to(ctx.device)
    if not config.parameterize:
        images = ctx.space.encode(ctx.split.images[index]).to(ctx.device)
        return {"images": images, "targets": features[index]}
    rows = shrunk_rows(ctx.split.images, ctx.space.to(ctx.device), config.scale, ctx.device)
    parameters: dict[str, Tensor] = {}
    spaces = (("image", rows, plan.num_image_bases), ("target", features, plan.num_target_bases))
    for name, real, num in spaces:
        generator = ctx.generator("init", name)
        if config.init == "pc":
            base = principal_components(real, num)
            coefficients = real[index.to(real.device)] @ base.T
        else:
            noise = torch.randn(plan.num_images + num, max(num, real.shape[1]), generator=generator)
            coefficients = noise[: plan.num_images, :num].to(real.device)
            basis_index = torch.randperm(len(real), generator=generator)[:num].to(real.device)
            random = noise[plan.num_images :, : real.shape[1]].to(real.device)
            base = real[basis_index] if config.init == "real" else random
        parameters[f"{name}_bases"], parameters[f"{name}_coefficients"] = base, coefficients
    channels, height, width = ctx.dataset.image_shape
    shape = (-1, channels, height // config.scale, width // config.scale)
    return {**parameters, "image_bases": parameters["image_bases"].view(shape)}


def _start_view_coefficients(
    ctx: DistillContext, config: BoostSsddConfig, start: Mapping[str, Tensor], teacher: Net
) -> Tensor:
    """Return initial C^y_a [A, m, V]: the teacher's representations of the views, projected (Sec 3.3)."""
    num_views = bases.NUM_VIEWS[config.augmentation]
    coefficients = start["target_coefficients" if config.parameterize else "targets"]
    if config.parameterize and config.init != "pc":
        shape = (num_views, *coefficients.shape)
        return torch.randn(shape, generator=ctx.generator("init", "views")).to(coefficients.device)
    learned = Bases(scale=config.scale, augmentation=config.augmentation, approximation="same")
    space, teacher_space = ctx.space.to(ctx.device), normalized_space(ctx.dataset)
    view_coefficients = coefficients.new_empty(num_views, *coefficients.shape)
    for rows in torch.split(torch.arange(len(coefficients), device=coefficients.device), _CHUNK):
        images = bases.images_of(bases.of_images(start, rows), learned)
        # A teacher sees normalised pixels, whatever space the set is learned in.
        pixels = space.decode(bases.views(images, config.augmentation)[len(rows) :])
        features = embed_images(teacher, pixels, teacher_space.encode, ctx.device).to(coefficients.device)
        projected = features @ start["target_bases"].T if config.parameterize else features
        view_coefficients[:, rows] = projected.view(num_views, len(rows), -1)
    return view_coefficients


METHOD: Final = make_method(
    BoostSsddConfig,
    preset,
    start,
    specs_of=pool_specs,
    num_distilled_of=num_distilled,
    depends_on_steps=SCHEDULE,
)
