"""Protocol `distribution`: where a set lies among the real images, in networks trained on these.

Each network is trained on the real images (defaults: DSDM Sec 5.1, 20 epochs), taken from the pool, and
embeds real and distilled images; `--arch` names it, `--seeds` says how many. Per network, with class means m
and covariances C of real (T) and distilled (S) embeddings of d dimensions:

    prototype_loss  = sum over classes of ||m_T - m_S||^2              DSDM, Eq 4 (Fig 3b)
    covariance_loss = sum over classes of ||C_T - C_S||_F^2 / d        DSDM, Eq 5
    spread          = mean over classes of trace C_S / trace C_T       below 1: bunched (DSDM Fig 7)
    misplaced       = distilled images nearest to another class's m_T, a share (DataDAM's supplement, 3.1)

The accuracy is that of held-out images classified by the nearest m_S. `ddray report` draws the t-SNE plane
of the first network (DataDAM's Fig 9) and, of several, what each makes of one set (DSDM's Fig 3).

**Deviations** (papers | ours)

- sums: over a batch of 256 real images per class | over all real images.
- covariances: / n, as Eq 5 prints; one image has covariance 0.
- DSDM Fig 3: six of its own pre-trained networks | networks of the same recipe, trained on all of train.
- what DataDAM's Fig 9 trains its ResNet-18 on, and for how long, is not printed | the same recipe.
"""

import time
from dataclasses import dataclass
from typing import Any, Final

import torch
from pydantic import Field
from torch import Tensor

from ddray.artifact.distilled_set import DistilledSet, TrainSet
from ddray.config import parse_overrides
from ddray.data import normalized_space
from ddray.evaluation.options import EvaluateOptions
from ddray.evaluation.protocol import (
    EvalContext,
    EvalResult,
    EvaluationProtocol,
    Measure,
    RealImages,
    Scoring,
)
from ddray.nets import check_arch
from ddray.nets.names import resolve_arch
from ddray.pool.spec import SUPERVISED_RECIPE, PoolSpec, features_spec, teacher_spec
from ddray.training.embedding import embed_images
from ddray.training.recipe import Augment, Recipe, Schedule


class DistributionConfig(Recipe):
    """Settings of the protocol: how its networks are trained on the real images."""

    epochs: int = Field(default=int(SUPERVISED_RECIPE["epochs"]), ge=1)
    schedule: Schedule = "constant"
    augment: Augment = "none"
    seeds: int = Field(default=5, ge=1)
    """Networks."""


@dataclass(frozen=True)
class Moments:
    """Class means of embeddings, and what is left of each image without its class's.

    Attributes:
        means: float64 [K, d]; NaN for a class without images.
        centred: per class, float64 [n, d] over the root of n.
    """

    means: Tensor
    centred: tuple[Tensor, ...]

    @classmethod
    def of(cls, embeddings: Tensor, labels: Tensor, num_classes: int) -> "Moments":
        """Return the moments of embeddings [N, d] with int64 labels [N]."""
        rows = [embeddings[labels == label].double() for label in range(num_classes)]
        means = torch.stack([part.mean(0) for part in rows])
        centred = ((part - mean) / max(1, len(part)) ** 0.5 for part, mean in zip(rows, means, strict=True))
        return cls(means, tuple(centred))

    def variances(self) -> Tensor:
        """Return the trace of each class's covariance [K]."""
        return torch.stack([part.square().sum() for part in self.centred])


def covariance_distance(real: Tensor, distilled: Tensor) -> Tensor:
    """Return ||A'A - B'B||_F^2 of centred rows A [n, d] and B [m, d], by the smaller Gram matrices."""
    if real.shape[1] <= len(real) + len(distilled):
        return (real.T @ real - distilled.T @ distilled).square().sum()
    products = (real @ real.T).square().sum() + (distilled @ distilled.T).square().sum()
    return products - 2 * (real @ distilled.T).square().sum()


def nearest_class(embeddings: Tensor, means: Tensor) -> Tensor:
    """Return the class int64 [N] whose mean, of [K, d], is nearest; never one whose mean is NaN."""
    distances = torch.cdist(embeddings.double(), means.nan_to_num())
    return distances.masked_fill(means.isnan().any(1), torch.inf).argmin(1)


def compare(real: Moments, distilled: Moments) -> dict[str, float]:
    """Return `prototype_loss`, `covariance_loss` and `spread` over the classes that both have."""
    both = ~(real.means.isnan() | distilled.means.isnan()).any(1)
    classes = torch.nonzero(both).flatten().tolist()
    covariances = [covariance_distance(real.centred[each], distilled.centred[each]) for each in classes]
    return {
        "prototype_loss": float((real.means - distilled.means)[both].square().sum()),
        "covariance_loss": float(torch.stack(covariances).sum() / real.means.shape[1]),
        "spread": float((distilled.variances() / real.variances().clamp_min(1e-30))[both].mean()),
    }


@dataclass(frozen=True)
class Distribution:
    """The distances of a set from the real images under networks of one recipe.

    Attributes:
        recipe: how the networks are trained.
        real: the real images, and the pool of networks trained on them.
        first_seed: of the evaluation; it has network 0.
        num_networks: after which they are counted from 0 again, for the next of several sets.
    """

    recipe: Recipe
    real: RealImages
    first_seed: int
    num_networks: int

    def spec(self, ctx: EvalContext, arch: str, index: int) -> PoolSpec:
        """Return the pool's spec of network `index`."""
        part = self.real.split_name
        return teacher_spec(ctx.dataset, part, arch, self.recipe, device=ctx.device, seed=index)

    def evaluate(self, train_set: TrainSet, ctx: EvalContext, *, arch: str, seed: int) -> EvalResult:
        """Embed real, distilled and held-out images by one network, and compare."""
        begin, num_classes = time.perf_counter(), ctx.dataset.num_classes
        spec = self.spec(ctx, arch, (seed - self.first_seed) % self.num_networks)
        entry, stored = self.real.pool.get([spec, features_spec(spec)])
        net: Any = entry.module().to(ctx.device)
        encode, real = normalized_space(ctx.dataset).encode, self.real.images
        images, labels = ctx.space.decode(train_set.images), train_set.labels
        embedded, held_out = (
            embed_images(net, pixels, encode, ctx.device) for pixels in (images, ctx.split.images)
        )
        # The pool's own features; of a part of train, those of the rest follow.
        of_real = Moments.of(stored.tensors["features"][: len(real)], real.labels, num_classes)
        of_set = Moments.of(embedded, labels, num_classes)
        misplaced = (nearest_class(embedded, of_real.means) != labels).double().mean()
        right = nearest_class(held_out, of_set.means) == ctx.split.labels
        measures = {**compare(of_real, of_set), "misplaced": float(misplaced)}
        shares = tuple(_share(right[ctx.split.labels == label]) for label in range(num_classes))
        wall_s, accuracy = time.perf_counter() - begin, float(right.double().mean())
        return EvalResult(check_arch(arch), seed, accuracy, len(labels), wall_s, measures, shares)


def _share(right: Tensor) -> float | None:
    return float(right.double().mean()) if len(right) else None


def _make(options: EvaluateOptions, distilled: DistilledSet, ctx: EvalContext, real: RealImages) -> Scoring:
    """Return the comparison; its details name the pool's networks, for the report's planes."""
    counts = options.model_dump(include={"seeds", "epochs", "augment"}, exclude_none=True)
    config = DistributionConfig.parse({**parse_overrides(options.sets), **counts})
    recipe = Recipe.parse(config.model_dump(include=set(Recipe.model_fields)))
    evaluator = Distribution(recipe, real, options.seed, config.seeds)
    archs = [resolve_arch(arch, distilled.meta.image_shape) for arch in options.archs] or [
        distilled.meta.arch
    ]
    specs = {arch: [evaluator.spec(ctx, arch, index).key for index in range(config.seeds)] for arch in archs}
    return Scoring(evaluator, config.seeds, {"networks": specs})


PROTOCOL: Final = EvaluationProtocol(
    _make,
    config_type=DistributionConfig,
    recipes=(),
    without=("recipe",),
    why="its networks have settings of their own",
    measures={
        "prototype_loss": Measure("prototype loss", in_tables=True, is_fraction=False),
        "covariance_loss": Measure("covariance loss", in_tables=True, is_fraction=False),
        "spread": Measure("spread", in_tables=True, is_fraction=False),
        "misplaced": Measure("misplaced", in_tables=True),
    },
)
