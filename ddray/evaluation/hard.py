"""Protocol `hard` (DC, DSA, DM, DataDAM): train a fresh network on the set's own labels and score it.

The last epoch's network is scored once; the peers score on test up to 400 times and report the best score.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ddray.artifact.distilled_set import DistilledSet, TrainSet
from ddray.data.packed import resident
from ddray.errors import DivergedError
from ddray.evaluation.options import EvaluateOptions, check_settings, evaluation_config, learned_rate
from ddray.evaluation.protocol import EvalContext, EvalResult, EvaluationProtocol, RealImages, Scoring
from ddray.evaluation.soft import Soft, check_soft, soft_config
from ddray.evaluation.soft_recipes import TABLE5
from ddray.nets import Net, check_arch
from ddray.seeding import derive
from ddray.training.loop import Augmenter, augmenter, train_together
from ddray.training.recipe import RECIPES, Recipe

log = logging.getLogger(__name__)


def fit(
    train_set: TrainSet,
    ctx: EvalContext,
    recipe: Recipe,
    *,
    arch: str,
    seed: int,
    augment: Augmenter | None = None,
    name: str = "set",
) -> Net:
    """Return a fresh network trained on a labelled set, in eval mode; spectrograms are not augmented.

    The seed decides weights, batch order and augmentation. Images are in the context's space, or as `augment`
    takes them, which replaces the recipe's augmentation. An error calls the set by its `name`.

    Raises:
        InputError: the architecture is unknown or does not fit the images.
        DivergedError: the training loss became NaN.
    """
    return fit_all(train_set, ctx, recipe, arch=arch, seeds=[seed], augment=augment, name=name)[0]


def fit_all(
    train_set: TrainSet,
    ctx: EvalContext,
    recipe: Recipe,
    *,
    arch: str,
    seeds: Sequence[int],
    augment: Augmenter | None = None,
    name: str = "set",
) -> list[Net]:
    """Return a network per seed as `fit` does; on a GPU they may be trained as one.

    Raises:
        InputError: the architecture is unknown or does not fit the images.
        DivergedError: a training loss became NaN.
    """
    recipe, can_flip = recipe.on(ctx.split), ctx.dataset.can_flip
    nets = [ctx.fresh_net(arch, train_set.images, seed=seed) for seed in seeds]
    loss = train_together(
        nets,
        resident(train_set.images, ctx.device),
        train_set.supervision.to(ctx.device),
        recipe,
        generators=[derive(seed, "evaluate", "train") for seed in seeds],
        augment=augment
        or augmenter(recipe.augment, can_flip=can_flip, space=ctx.space, strategy=recipe.strategy),
        regress=train_set.regress,
    )
    if not math.isfinite(value := float(loss)):
        raise DivergedError(f"training {arch} on the {name} diverged: its loss is {value}; lower evaluate.lr")
    return nets


@dataclass(frozen=True)
class Hard:
    """Training by a recipe on hard labels, or on the soft ones that a set holds (DATM, KIP)."""

    recipe: Recipe

    def evaluate(self, train_set: TrainSet, ctx: EvalContext, *, arch: str, seed: int) -> EvalResult:
        """Train one network and score it."""
        return self.evaluate_together(train_set, ctx, arch=arch, seeds=[seed])[0]

    def evaluate_together(
        self, train_set: TrainSet, ctx: EvalContext, *, arch: str, seeds: Sequence[int]
    ) -> list[EvalResult]:
        """Train a network per seed and score each."""
        begin = time.perf_counter()
        nets = fit_all(train_set, ctx, self.recipe, arch=arch, seeds=seeds)
        scores, num = [ctx.score(net) for net in nets], len(train_set.labels)
        wall_s, arch = (time.perf_counter() - begin) / len(nets), check_arch(arch)
        return [
            EvalResult(arch, seed, score.accuracy, num, wall_s, per_class=score.per_class)
            for seed, score in zip(seeds, scores, strict=True)
        ]


def _make(options: EvaluateOptions, distilled: DistilledSet, ctx: EvalContext, real: RealImages) -> Scoring:
    """Return training by the set's recipe, or as in D3HR's Table 5."""
    if options.recipe == TABLE5:
        if distilled.meta.label_kind == "values":
            log.warning("the set's values are not regressed to: recipe %s trains on their classes", TABLE5)
        table5 = soft_config(options, distilled, (TABLE5,))
        return Scoring(Soft(table5, None), table5.seeds)
    config = evaluation_config(distilled, options)
    if config.cutmix and distilled.meta.label_kind == "values":
        log.warning("cutmix is left out: it mixes classes, and the set has values to regress to")
    return Scoring(Hard(config.as_recipe()), config.seeds, learned_rate(distilled, options))


PROTOCOL: Final = EvaluationProtocol(
    _make,
    check=lambda options: (check_soft if options.recipe == TABLE5 else check_settings)(options),
    recipes=(*RECIPES, TABLE5),
    editions={TABLE5: 1},
    published_metric="top1_accuracy",
)
