"""Protocol `robust`: DD-Ranking's label-robust and augmentation-robust scores (arXiv:2505.13300).

With accuracies as fractions, and w = gamma = 1/2 as on their leaderboard:

    HLR = acc(whole set) - acc(set)                         hard-label recovery
    IOR = acc(set) - acc(random images at its storage)      improvement over random
    alpha = w IOR - (1 - w) HLR
    beta = gamma (set - random, augmented) + (1 - gamma) (set - random, not augmented)
    LRS = (e^alpha - e^-1) / (e - e^-1), and ARS likewise from beta

Both lie in [0, 1]; a set no better than random and as good as the whole scores .2689 (alpha = 0).

**Deviations** (paper | package `ddranking` | ours)

- units: LRS and ARS in [0, 1] | alpha and beta are computed from percentages, so that e^alpha explodes |
  fractions, as in the paper.
- learning rate: not given | tuned for the set and for random images, by test accuracy | one recipe for all.
- accuracy: not given | the best on test over training | the last epoch's.
- the whole set: not given | un-augmented, with a recipe per dataset, or a stored number | un-augmented, with
  the set's own recipe, once for all seeds and stored (`--full-epochs` shortens it).
- random images: same images per class | likewise | same storage: a set that decodes one stored image to four
  is compared with one random image, not with four. A fresh draw per seed.
"""

import logging
import math
import time
from dataclasses import KW_ONLY, dataclass
from itertools import chain
from typing import Final

import torch
from torch import Tensor

from ddray.artifact.distilled_set import DistilledSet, TrainSet
from ddray.data import Split
from ddray.data.packed import parts_of
from ddray.errors import InputError
from ddray.evaluation.hard import fit
from ddray.evaluation.options import EvaluateOptions, check_settings, evaluation_config, learned_rate
from ddray.evaluation.protocol import (
    EvalContext,
    EvalResult,
    EvaluationProtocol,
    Measure,
    RealImages,
    Scoring,
)
from ddray.evaluation.subsets import random_subset
from ddray.nets import check_arch
from ddray.nets.names import is_registered
from ddray.runs.ledger import Ledger, Row, Unit
from ddray.seeding import derive
from ddray.system.files import home, storage_errors
from ddray.system.tensors import sha256_of
from ddray.system.transfer import to_device
from ddray.training.embedding import Score
from ddray.training.recipe import Recipe

log = logging.getLogger(__name__)


def normalised_score(value: float) -> float:
    """Return (e^value - e^-1) / (e - e^-1): [-1, 1] onto [0, 1]."""
    return (math.exp(value) - math.exp(-1)) / (math.e - math.exp(-1))


def label_robust_score(hlr: float, ior: float, weight: float = 0.5) -> float:
    """Return LRS from hard-label recovery and improvement over random, differences of fractions."""
    return normalised_score(weight * ior - (1 - weight) * hlr)


def augmentation_robust_score(augmented: float, plain: float, weight: float = 0.5) -> float:
    """Return ARS from the accuracies' differences, set - random, with augmentation and without."""
    return normalised_score(weight * augmented + (1 - weight) * plain)


@dataclass(frozen=True)
class Robust:
    """LRS and ARS of a set.

    Attributes:
        recipe: how networks are trained on the set, and on the random images.
        real: the dataset's images: random ones are drawn from them, and one network is trained on all.
        split_name: which part of the dataset they are.
        random_per_class: random images per class at the set's storage.
        full_epochs: epochs on the whole set; None: the recipe's.
    """

    recipe: Recipe
    _: KW_ONLY
    real: Split
    split_name: str
    random_per_class: int
    full_epochs: int | None = None

    def evaluate(self, train_set: TrainSet, ctx: EvalContext, *, arch: str, seed: int) -> EvalResult:
        """Train on the set and on random images, with and without augmentation, and score all four."""
        begin = time.perf_counter()
        generator = derive(seed, "evaluate", "robust", "random")
        random = random_subset(self.real, self.random_per_class, ctx.space, generator)

        def scores(recipe: Recipe) -> list[Score]:
            nets = (fit(images, ctx, recipe, arch=arch, seed=seed) for images in (train_set, random))
            return [ctx.score(net) for net in nets]

        recipe = self.recipe.on(self.real)
        plain = recipe.without_augmentation()
        of_sets = scores(recipe)
        augmented = [score.accuracy for score in of_sets]
        bare = augmented if plain == recipe else [score.accuracy for score in scores(plain)]
        whole = self.recipe.model_copy(update={"epochs": self.full_epochs or self.recipe.epochs})
        full = whole_set_accuracy(self.real, ctx, whole, arch=arch, split_name=self.split_name)
        hlr, ior = full - augmented[0], augmented[0] - augmented[1]
        measures = {
            "lrs": label_robust_score(hlr, ior),
            "ars": augmentation_robust_score(ior, bare[0] - bare[1]),
            "hlr": hlr,
            "ior": ior,
            "accuracy_full": full,
            "accuracy_random": augmented[1],
            "accuracy_plain": bare[0],
            "accuracy_random_plain": bare[1],
        }
        wall_s, num, per_class = time.perf_counter() - begin, len(train_set.labels), of_sets[0].per_class
        return EvalResult(check_arch(arch), seed, augmented[0], num, wall_s, measures, per_class)


def whole_set_accuracy(
    real: Split, ctx: EvalContext, recipe: Recipe, *, arch: str, split_name: str, seed: int = 0
) -> float:
    """Return the accuracy of a network trained on all real images, un-augmented.

    The result is stored in the ledger in `$DDRAY_HOME/truth`: the same call again trains nothing, unless the
    network is this process's own.
    `split_name` says which part of the dataset `real` is.

    Raises:
        InputError: the architecture is unknown or does not fit the images.
        DivergedError: the training loss became NaN.
        StorageError: the row can't be written.
    """
    recipe = recipe.without_augmentation()
    unit = _unit(ctx, recipe, arch=arch, split_name=split_name, seed=seed)
    folder = home() / "truth"
    with storage_errors(folder):
        (folder / "ledger").mkdir(parents=True, exist_ok=True)
    ledger = Ledger(folder)
    row = None if is_registered(arch) else ledger.row(unit.key)
    if row is None:
        log.info(
            "training %s on all %d images of %s, once; stored in %s",
            *(arch, len(real), ctx.dataset.name, ledger.folder),
        )
        begin, space = time.perf_counter(), ctx.space.to(ctx.device)

        # Batches are encoded one by one: as bytes the whole set takes a quarter of the memory.
        def encode(batch: Tensor, generator: torch.Generator) -> Tensor:
            encoded = space.encode(to_device(batch, ctx.device))
            return encoded.contiguous(memory_format=torch.channels_last)

        train_set = TrainSet(real.images, real.labels)
        net = fit(train_set, ctx, recipe, arch=arch, seed=seed, augment=encode, name="whole set")
        score = ctx.score(net)
        row = Row.done(unit, {"accuracy": score.accuracy}, time.perf_counter() - begin)
        if not is_registered(arch):
            ledger.publish(unit, row, epoch=0)
    return float(row.result["accuracy"])


def _unit(ctx: EvalContext, recipe: Recipe, *, arch: str, split_name: str, seed: int) -> Unit:
    """Return the ledger's unit: everything that the accuracy depends on."""
    space = ctx.space
    whitening = [tensor for tensor in (space.zca_mean, space.zca_matrix) if tensor is not None]
    zca = {"zca": sha256_of(whitening)} if whitening else {}
    spec = {
        "dataset": ctx.dataset.fingerprint,
        "split": split_name,
        "held_out": sha256_of(chain(parts_of(ctx.split.images), [ctx.split.labels])),
        "space": {"kind": space.kind, "mean": list(space.mean), "std": list(space.std), **zca},
        "arch": check_arch(arch),
        "recipe": recipe.dump(),
        "device": ctx.device.type,
        "seed": seed,
        # At their defaults they are left out, as in older rows.
        **({} if ctx.precision == "tf32" else {"precision": ctx.precision}),
        **({"deterministic": True} if ctx.deterministic else {}),
    }
    return Unit(kind="truth", spec=spec)


def images_at_storage(distilled: DistilledSet) -> int:
    """Return how many real images per class fit the storage of a set."""
    per_class = len(distilled.meta.class_names) * math.prod(distilled.meta.image_shape)
    return max(1, distilled.meta.storage_floats // per_class)


def _check(options: EvaluateOptions) -> None:
    """Refuse a part of the set: it is compared with random images at its storage."""
    if options.train_limit is not None:
        raise InputError(
            "--train-limit must be left out with --protocol robust: it compares at equal storage"
        )
    check_settings(options)


def _make(options: EvaluateOptions, distilled: DistilledSet, ctx: EvalContext, real: RealImages) -> Scoring:
    config = evaluation_config(distilled, options)
    per_class = images_at_storage(distilled)
    evaluator = Robust(
        config.as_recipe(),
        real=real.images,
        split_name=real.split_name,
        random_per_class=per_class,
        full_epochs=options.full_epochs,
    )
    details = {
        "full_epochs": options.full_epochs or config.epochs,
        "random_per_class": per_class,
        **learned_rate(distilled, options),
    }
    return Scoring(evaluator, config.seeds, details)


PROTOCOL: Final = EvaluationProtocol(
    _make,
    check=_check,
    options=("full_epochs",),
    measures={
        "lrs": Measure("LRS", in_tables=True),
        "ars": Measure("ARS", in_tables=True),
        "accuracy_full": Measure("whole set"),
        "accuracy_random": Measure("random"),
        "accuracy_plain": Measure("plain"),
        "accuracy_random_plain": Measure("random, plain"),
    },
    trains_for_all_seeds=True,
    published_metric="top1_accuracy",  # it reports the accuracy of `hard` beside its scores
)
