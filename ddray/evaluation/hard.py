"""Protocol `hard` (DC, DSA, DM, DataDAM): train a fresh network on the set's own labels and score it.

The last epoch's network is scored once; the peers score on test up to 400 times and report the best score.
"""

import math
import time
from dataclasses import dataclass
from typing import Final

from ddray.artifact.distilled_set import DistilledSet, TrainSet
from ddray.errors import DivergedError
from ddray.evaluation.options import EvaluateOptions, check_settings, evaluation_config
from ddray.evaluation.protocol import EvalContext, EvalResult, EvaluationProtocol, RealImages, Scoring
from ddray.evaluation.soft import Soft, check_soft, soft_config
from ddray.evaluation.soft_recipes import TABLE5
from ddray.nets import Net, check_arch
from ddray.seeding import derive
from ddray.training.loop import Augmenter, augmenter, score_net, train
from ddray.training.recipe import RECIPES, Recipe


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
    recipe, can_flip = recipe.on(ctx.split), ctx.dataset.can_flip
    net = ctx.fresh_net(arch, train_set.images, seed=seed)
    trained_loss = train(
        net,
        train_set.images.to(ctx.device),
        train_set.supervision.to(ctx.device),
        recipe,
        generator=derive(seed, "evaluate", "train"),
        augment=augment
        or augmenter(recipe.augment, can_flip=can_flip, space=ctx.space, strategy=recipe.strategy),
    )
    if not math.isfinite(loss := float(trained_loss)):
        raise DivergedError(f"training {arch} on the {name} diverged: its loss is {loss}; lower evaluate.lr")
    return net


@dataclass(frozen=True)
class Hard:
    """Training by a recipe on hard labels, or on the soft ones that a set holds (DATM)."""

    recipe: Recipe

    def evaluate(self, train_set: TrainSet, ctx: EvalContext, *, arch: str, seed: int) -> EvalResult:
        """Train one network and score it."""
        begin = time.perf_counter()
        net = fit(train_set, ctx, self.recipe, arch=arch, seed=seed)
        score, num = score_net(net, ctx.split, ctx.space, device=ctx.device), len(train_set.labels)
        wall_s = time.perf_counter() - begin
        return EvalResult(check_arch(arch), seed, score.accuracy, num, wall_s, per_class=score.per_class)


def _make(options: EvaluateOptions, distilled: DistilledSet, ctx: EvalContext, real: RealImages) -> Scoring:
    """Return training by the set's recipe, or as in D3HR's Table 5."""
    if options.recipe == TABLE5:
        table5 = soft_config(options, distilled, (TABLE5,))
        return Scoring(Soft(table5, None), table5.seeds)
    config = evaluation_config(distilled, options)
    return Scoring(Hard(config.as_recipe()), config.seeds)


PROTOCOL: Final = EvaluationProtocol(
    _make,
    check=lambda options: (check_soft if options.recipe == TABLE5 else check_settings)(options),
    recipes=(*RECIPES, TABLE5),
    editions={TABLE5: 1},
    published_metric="top1_accuracy",
)
