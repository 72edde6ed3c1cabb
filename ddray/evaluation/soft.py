"""Protocol `soft` (SRe2L, RDED, D3HR): a fresh network learns a teacher's probabilities on crops of the set.

The loss is the KL divergence of softened probabilities, batch mean, or G-VBSM's of logits (`mse_gt`);
student and teacher see the same crops, flipped and mixed. A set is trained on by the recipe of its own
method, or by the one named: `soft_recipes` holds them with their **Deviations**.

A last batch of one image, an error in the batch norms of all three authors' code, is joined to the batch
before it.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ddray.artifact.distilled_set import DistilledSet, TrainSet
from ddray.artifact.partition import default_factor
from ddray.config import merge, parse_overrides
from ddray.data import PixelSpace
from ddray.errors import DivergedError, InputError, unknown
from ddray.evaluation.options import EvaluateOptions
from ddray.evaluation.protocol import EvalContext, EvalResult, EvaluationProtocol, RealImages, Scoring
from ddray.evaluation.soft_recipes import (
    RECIPES,
    TABLE5,
    Settings,
    SoftConfig,
    check_loss,
    own_recipe,
    rate_factor,
    recipe_teachers,
    resolve_settings,
)
from ddray.evaluation.teachers import Teachers, get_teachers
from ddray.nets import Net, check_arch
from ddray.nets.names import resolve_arch
from ddray.seeding import derive
from ddray.system.transfer import to_device
from ddray.training.crops import padded_crop, random_resized_crop
from ddray.training.cutmix import Mixed, cutmix, draw_share, mixed_cross_entropy
from ddray.training.engine import Batch, Order, Rule, Step, decay_matrices, run

log = logging.getLogger(__name__)

PADDING: Final = 4


@dataclass(frozen=True)
class Soft:
    """Training on teachers' soft labels; for `recipe=table5`, without teachers, on the set's hard ones.

    Raises:
        InputError: soft labels without a teacher, or hard ones with one.
    """

    config: SoftConfig
    teachers: Teachers | None

    def __post_init__(self) -> None:
        hard = self.config.recipe == TABLE5
        if (self.teachers is None) != hard:
            raise InputError(f"recipe {self.config.recipe} must have {'no' if hard else 'a'} teacher")

    def evaluate(self, train_set: TrainSet, ctx: EvalContext, *, arch: str, seed: int) -> EvalResult:
        """Train one network and score it."""
        begin = time.perf_counter()
        num, _, *size = train_set.images.shape
        settings = resolve_settings(
            self.config, arch=arch, num_images=num, num_classes=ctx.dataset.num_classes, size=max(size)
        )
        net = ctx.fresh_net(arch, train_set.images, seed=seed)
        loss = self._train(net, train_set, ctx, settings, derive(seed, "evaluate", "soft"))
        if not math.isfinite(loss):
            raise DivergedError(f"training {arch} on soft labels diverged: its loss is {loss}; lower lr")
        score = ctx.score(net)
        wall_s = time.perf_counter() - begin
        return EvalResult(check_arch(arch), seed, score.accuracy, num, wall_s, per_class=score.per_class)

    def _train(
        self, net: Net, train_set: TrainSet, ctx: EvalContext, settings: Settings, generator: torch.Generator
    ) -> float:
        """Train `net` in place and leave it in eval mode; return the last epoch's mean loss."""
        images, labels = train_set.images.to(ctx.device), train_set.classes.to(ctx.device)
        space, teachers = ctx.space.to(ctx.device), self.teachers
        if teachers is not None:
            teachers = teachers.set_up(settings.teacher_mode, settings.average)
        crop = cropper(settings, space, images, flip=ctx.dataset.can_flip)
        order = Order(len(labels), settings.batch, last="join")
        epoch = len(order.sizes)

        def batch(index: Tensor) -> Batch:
            crops = crop(shuffle_strips(images[index], settings.patches, generator), generator)
            mixed = mix(crops, settings.mix, generator, alpha=settings.mix_alpha)
            inputs = mixed.images.contiguous(memory_format=torch.channels_last)
            if teachers is None:
                return (inputs, *mixed.targets(labels[index]))
            if settings.loss == "mse_gt":
                return inputs, teachers.logits(mixed.images, space), labels[index]
            return inputs, teachers.probabilities(mixed.images, space, settings.temperature)

        repeat_updates(net, settings.bn_updates)
        net.to(memory_format=torch.channels_last).train()
        last_loss = run(
            Step([net], training_rule(settings, hard=teachers is None), num_steps=settings.epochs * epoch),
            map(batch, order.indices(generator, ctx.device)),
            lr=lambda step: settings.lr * rate_factor(settings, step // epoch),
            epoch=epoch,
        )
        net.eval()
        return float(last_loss)


def training_rule(settings: Settings, *, hard: bool) -> Rule:
    """Return loss and optimiser of a training on soft labels, or on `hard` ones."""
    factor = settings.temperature**2 if settings.scale_loss else 1.0
    loss: Any = partial(soft_loss, temperature=settings.temperature, factor=factor)
    if hard:
        loss = mixed_cross_entropy
    elif settings.loss == "mse_gt":
        loss = partial(mse_gt, ce_weight=settings.ce_weight)
    optimizer: Any = torch.optim.AdamW
    if settings.optimizer == "sgd":
        optimizer = partial(torch.optim.SGD, momentum=0.9)
    return Rule(
        loss,
        partial(optimizer, weight_decay=settings.weight_decay),
        groups=decay_matrices if settings.decay == "matrices" else None,
    )


def cropper(
    settings: Settings, space: PixelSpace, images: Tensor, *, flip: bool
) -> Callable[[Tensor, torch.Generator], Tensor]:
    """Return the random crops of batches of `images` [N, C, H, W], which are in `space`.

    Padding is black: the mean over pixels of the encoded black image (all are equal unless it is whitened).
    """
    if settings.crop == "resized":
        return partial(random_resized_crop, scale=(settings.min_scale, 1.0), flip=flip)
    black = space.encode(torch.zeros_like(images[:1])).mean((2, 3), keepdim=True)
    return partial(padded_crop, padding=PADDING, fill=black, flip=flip)


def repeat_updates(net: nn.Module, num: int) -> None:
    """Let each forward pass of `net` move its running averages as far as `num` passes of the same batch do.

    After k passes r becomes (1 - m)^k r + (1 - (1 - m)^k) s: one pass with the momentum 1 - (1 - m)^k.
    """
    for module in net.modules():
        if isinstance(module, _BatchNorm) and module.momentum is not None:
            module.momentum = 1 - (1 - module.momentum) ** num


def soft_loss(logits: Tensor, soft_labels: Tensor, temperature: float, factor: float = 1.0) -> Tensor:
    """Return `factor` times the KL divergence of softmax(logits / T) [N, K] from soft labels, batch mean."""
    loss = F.kl_div(F.log_softmax(logits / temperature, 1), soft_labels, reduction="batchmean")
    return loss if factor == 1 else factor * loss


def mse_gt(logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, ce_weight: float) -> Tensor:
    """Return the mean squared error of logits [N, K] plus `ce_weight` times their cross entropy (G-VBSM).

    The labels int64 [N] are the images' own, also where they are mixed with others.
    """
    return F.mse_loss(logits, teacher_logits) + ce_weight * F.cross_entropy(logits, labels)


def mix(images: Tensor, kind: str, generator: torch.Generator, *, alpha: float = 1.0) -> Mixed:
    """Return images [N, C, H, W] mixed with partners by `cutmix` or `mixup`, or as they are (`none`).

    Mixup's share is one draw of Beta(alpha, alpha) for the batch.
    """
    if kind == "mixup":
        share = draw_share(alpha, generator)
        partner = to_device(torch.randperm(len(images), generator=generator), images.device)
        return Mixed(share * images + (1 - share) * images[partner], partner, share)
    mixed = cutmix(images, 1.0, generator) if kind == "cutmix" else None
    return mixed or Mixed(images, torch.arange(len(images), device=images.device), 1.0)


def shuffle_strips(images: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """Return images [N, C, H, W] with their `num` strips along each axis shuffled, each image on its own.

    Raises:
        InputError: the strips do not divide the image.
    """
    if num == 1:
        return images
    for axis in (3, 2):
        if images.shape[axis] % num:
            raise InputError(f"patches must divide the image's side of {images.shape[axis]} px, got {num}")
        order = to_device(torch.rand(len(images), num, generator=generator).argsort(1), images.device)
        strips = torch.unflatten(images, axis, (num, -1))
        index = order.view(len(images), *(num if dim == axis else 1 for dim in range(1, 5)))
        images = strips.take_along_dim(index, axis).flatten(axis, axis + 1)
    return images


def check_soft(options: EvaluateOptions) -> None:
    """Refuse what this training does not have, with the nearest name or a value's rule."""
    if options.augment is not None:
        raise InputError("--augment must be left out here: the recipe trains on random crops")
    sets = parse_overrides(options.sets)
    config = SoftConfig.parse(sets if options.recipe is None else {**sets, "recipe": options.recipe})
    if options.recipe or {"recipe", "loss"} & sets.keys():  # else the set's own recipe has a say
        check_loss(config)


def soft_config(
    options: EvaluateOptions, distilled: DistilledSet, recipes: tuple[str, ...] = RECIPES
) -> SoftConfig:
    """Return the settings: options over `--set` over the recipe, by default the one of the set's own method.

    Stitched sets default to their own patches.

    Raises:
        InputError: a setting is unknown or not its loss's, or the recipe belongs to the other protocol.
    """
    sets, meta = parse_overrides(options.sets), distilled.meta
    settings = meta.config.get("method") or {}
    recipe = options.recipe or sets.get("recipe") or _default_recipe(meta.method, settings, recipes)
    if recipe not in recipes:
        raise unknown(f"recipe of --protocol {options.protocol}", recipe, recipes)
    defaults: dict[str, Any] = {}
    if meta.method == "rded":
        defaults["patches"] = settings.get("factor") or default_factor(meta.image_shape)
    overrides = options.model_dump(include={"seeds", "epochs"}, exclude_none=True)
    config = SoftConfig.parse(merge(defaults, sets, overrides, {"recipe": recipe}))
    check_loss(config)
    return config


def _default_recipe(method: str, settings: Mapping[str, Any], recipes: tuple[str, ...]) -> str:
    recipe = own_recipe(method, settings)
    return recipe if recipe in recipes else recipes[0]


def recipe_epochs(
    recipe: str | None, method: str, settings: Mapping[str, Any], **network_and_set: Any
) -> int:
    """Return the epochs of a recipe, by default of the one for a method's sets (see `resolve_settings`)."""
    name = recipe or _default_recipe(method, settings, RECIPES)
    return resolve_settings(SoftConfig.parse({"recipe": name}), **network_and_set).epochs


def _make(options: EvaluateOptions, distilled: DistilledSet, ctx: EvalContext, real: RealImages) -> Scoring:
    """Teachers are trained, and checked to be better than chance, before any student."""
    config = soft_config(options, distilled)
    if distilled.soft_labels is not None:
        log.warning("the set's own soft labels are not used: the teacher labels its images anew")
    shape = distilled.meta.image_shape
    teachers_by_recipe = recipe_teachers(config.recipe, max(shape[1:]))
    archs = [resolve_arch(arch, shape) for arch in options.teachers or teachers_by_recipe]
    teachers = get_teachers(real.pool, archs, config.teacher, ctx, split_name=real.split_name)
    log.info("teacher %s: accuracy %.1f%%", teachers.arch, 100 * teachers.accuracy)
    details = {"recipe": config.recipe, "teacher": teachers.describe()}
    return Scoring(Soft(config, teachers), config.seeds, details)


PROTOCOL: Final = EvaluationProtocol(
    _make,
    config_type=SoftConfig,
    check=check_soft,
    options=("teachers",),
    recipes=RECIPES,
    editions={"default": 1, "paper": 1, "repo": 1},
    published_metric="top1_accuracy",
)
