"""Protocol `soft` on an artifact: its settings from the options, its teachers from the pool."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ddray.artifact.distilled_set import DistilledSet
from ddray.artifact.partition import default_factor
from ddray.config import merge, parse_overrides
from ddray.data import Split
from ddray.errors import InputError, unknown
from ddray.evaluation.options import HARD_RECIPE
from ddray.evaluation.protocol import EvalContext
from ddray.evaluation.soft import Soft, SoftConfig
from ddray.evaluation.teachers import Teachers, get_teachers
from ddray.nets.names import resolve_arch
from ddray.pool.local import LocalPool
from ddray.pool_training import PoolTrainer

if TYPE_CHECKING:
    from ddray.evaluation.options import EvaluateOptions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lesson:
    """A protocol that is ready to train, with its teachers.

    Attributes:
        evaluator: the protocol.
        num_seeds: networks per architecture.
        teachers: None on hard labels.
    """

    evaluator: Soft
    num_seeds: int
    teachers: Teachers | None

    def describe(self) -> dict[str, Any]:
        """Return the teacher's part of the command's JSON; empty without one."""
        return {} if self.teachers is None else {"teacher": self.teachers.describe()}


def teach(
    options: EvaluateOptions, distilled: DistilledSet, ctx: EvalContext, real: tuple[Split, str]
) -> Lesson | None:
    """Return training on soft labels, or on hard ones as in D3HR's Table 5; None for any other protocol.

    Teachers are trained, and checked to be better than chance, before any student.

    Args:
        options: the options of `ddray evaluate`.
        distilled: the artifact.
        ctx: the target, and the held-out part that teachers are scored on.
        real: the images that teachers are trained on, and their split's name; nothing held out is among them.

    Raises:
        InputError: an option does not go with the protocol, or a setting or network is unknown.
        DdrayError: a teacher is no better than chance.
    """
    soft = options.protocol == "soft"
    if options.teachers and not soft:
        raise InputError("--teacher must be left out, or used with --protocol soft")
    if not soft and not (options.protocol == "hard" and options.recipe == HARD_RECIPE):
        return None
    if options.augment is not None:
        raise InputError("--augment must be left out here: the recipe trains on random resized crops")
    config = soft_config(options, distilled)
    if not soft:
        return Lesson(Soft(config, None), config.seeds, None)
    names = [resolve_arch(arch, distilled.meta.image_shape) for arch in options.teachers or ("resnet18",)]
    pool = LocalPool(PoolTrainer(ctx.dataset, real[0], ctx.device))
    teachers = get_teachers(pool, names, config.teacher, ctx, split_name=real[1])
    log.info("teacher %s: accuracy %.1f%%", teachers.arch, 100 * teachers.accuracy)
    return Lesson(Soft(config, teachers), config.seeds, teachers)


def soft_config(options: EvaluateOptions, distilled: DistilledSet) -> SoftConfig:
    """Return the settings: options over `--set` over the recipe; stitched sets default to their own patches.

    Raises:
        InputError: a setting is unknown, or the recipe belongs to the other protocol.
    """
    sets = parse_overrides(options.sets)
    names = ("paper", "repo") if options.protocol == "soft" else (HARD_RECIPE,)
    recipe = options.recipe or sets.get("recipe") or names[0]
    if recipe not in names:
        raise unknown(f"recipe of --protocol {options.protocol}", recipe, names)
    defaults: dict[str, Any] = {}
    if distilled.meta.method == "rded":
        factor = distilled.meta.config.get("method", {}).get("factor")
        defaults["patches"] = factor or default_factor(distilled.meta.image_shape)
    option_values = {"seeds": options.seeds, "epochs": options.epochs}
    overrides = {key: value for key, value in option_values.items() if value is not None}
    return SoftConfig.parse(merge(defaults, sets, overrides, {"recipe": recipe}))
