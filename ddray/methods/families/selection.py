"""Shared by the coresets: a method that is one selection, and features of a network trained on train."""

import logging
from collections.abc import Callable
from typing import Any, ClassVar, Final

import torch
from pydantic import Field
from torch import Tensor

from ddray.config import Config
from ddray.distillation.method import DistillContext, Distiller, MethodConfig, Target
from ddray.methods.families.factory import Coupling, PoolSpecs, Selected, make_method
from ddray.pool.spec import PoolSpec, features_spec, supervised_specs

log = logging.getLogger(__name__)
Choose = Callable[[DistillContext, Any], tuple[Tensor, Tensor]]
_MAX_NAMED: Final = 5  # classes in a warning


class FeatureConfig(MethodConfig):
    """The network whose embedding the selection is made in."""

    quick: ClassVar = {"feature_epochs": 1}

    feature_epochs: int = Field(default=20, ge=1)
    """Epochs of training on train (SGD .01, momentum .9, weight decay 5e-4, batch 256, no augmentation)."""


def apart(config: Config, arch: str) -> None:
    """Say that the classes of a method are independent, whatever its settings: for `coupling`."""


def selection_method(
    config_class: type[Config],
    choose: Choose,
    coupling: Coupling | None = None,
    specs_of: PoolSpecs | None = None,
) -> type[Distiller]:
    """Return a method without steps whose set is `choose(ctx, config)`.

    Args:
        config_class: its settings.
        choose: chooses or makes images [K * ipc, C, H, W], in the context's pixel space, and their labels;
            fewer of a class that has fewer, which is warned of.
        coupling: as `make_method` takes it; default: not declared.
        specs_of: likewise; default: the network of a `FeatureConfig`.
    """

    def preset(name: str, target: Target) -> dict[str, Any]:
        return {"steps": 0, "evaluate": {"epochs": 1000, "augment": "dsa"}}

    def specs(ctx: DistillContext, config: Config) -> list[PoolSpec]:
        return feature_specs(ctx, config.feature_epochs) if isinstance(config, FeatureConfig) else []

    def start(ctx: DistillContext, config: Config) -> Selected:
        images, labels = choose(ctx, config)
        _warn_of_tail(ctx, labels.cpu())
        return Selected(ctx.make_set(images, labels))

    return make_method(
        config_class, preset, start, specs_of=specs_of or specs, has_steps=False, coupling=coupling
    )


def _warn_of_tail(ctx: DistillContext, labels: Tensor) -> None:
    """Warn of classes that a selection has fewer than ipc images of."""
    counts = torch.bincount(labels, minlength=ctx.dataset.num_classes).tolist()
    present = {ctx.dataset.class_names[label]: counts[label] for label in ctx.classes}
    short = [f"{name} {count}" for name, count in present.items() if count < ctx.ipc]
    if short:
        others = f" and {len(short) - _MAX_NAMED} more" if len(short) > _MAX_NAMED else ""
        log.warning(
            "%d of %d classes of %s give fewer than %d images, all that they have: %s%s",
            *(len(short), len(present), ctx.dataset.name, ctx.ipc, ", ".join(short[:_MAX_NAMED]), others),
        )


def coreset_method(
    config_class: type[FeatureConfig],
    order: Callable[[DistillContext, Tensor], Tensor],
    coupling: Coupling | None = None,
) -> type[Distiller]:
    """Return a selection of real images, class by class, in the features of a network trained on train.

    Args:
        config_class: its settings.
        order: picks `ipc` positions, or all, among the features [n, D] of one class.
        coupling: as `make_method` takes it; default: not declared.
    """

    def choose(ctx: DistillContext, config: FeatureConfig) -> tuple[Tensor, Tensor]:
        features, labels = pool_features(ctx, config.feature_epochs), ctx.split.labels
        present = labels - ctx.classes.start
        index = per_class(present, len(ctx.classes), ctx.ipc, lambda rows: order(ctx, features[rows]))
        return take(ctx, index)

    return selection_method(config_class, choose, coupling=coupling)


def take(ctx: DistillContext, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return the real images of `index` [M] in the context's pixel space, and their labels."""
    return ctx.space.encode(ctx.split.images[index]), ctx.split.labels[index]


def pool_features(ctx: DistillContext, epochs: int = 20) -> Tensor:
    """Return features [N, D] of the split's images by a network of the pool, trained for `epochs`.

    It is in eval mode, and nothing is augmented.
    """
    features = ctx.pool.get(feature_specs(ctx, epochs))[0].tensors["features"]
    if ctx.shard is not None:
        return features[ctx.shard.rows]
    return features[: len(ctx.split)]  # val's come after them


def feature_specs(ctx: DistillContext, epochs: int = 20) -> list[PoolSpec]:
    """Return the spec of the features of one network, which is trained on the split that is distilled."""
    recipe, device = {"epochs": epochs}, ctx.device.type
    (network,) = supervised_specs(
        ctx.dataset, split=ctx.split_name, arch=ctx.arch, device=device, recipe=recipe, seed=ctx.seed, num=1
    )
    return [features_spec(network)]


def per_class(labels: Tensor, num_classes: int, ipc: int, choose: Callable[[Tensor], Tensor]) -> Tensor:
    """Return indices [K * ipc]: `choose` picks `ipc` positions, or all, of each class's members [n_c]."""
    members = [torch.nonzero(labels == label).flatten() for label in range(num_classes)]
    return torch.cat([rows[choose(rows)[:ipc]] for rows in members])


def herding_order(features: Tensor, ipc: int) -> Tensor:
    """Return `ipc` positions, or all, of one class's features [n, D] in herding's order (Welling 2009).

    Each is the argmin over unused f of ||(k+1) mean - sum - f||.
    """
    features = features.double()
    mean, total = features.mean(0), torch.zeros_like(features[0])
    unused = torch.ones(len(features), dtype=torch.bool)
    order: list[int] = []
    for k in range(min(ipc, len(features))):
        distance = ((k + 1) * mean - total - features).norm(dim=1)
        order.append(int(distance.masked_fill(~unused, torch.inf).argmin()))
        unused[order[-1]] = False
        total = total + features[order[-1]]
    return torch.tensor(order)


def kcenter_order(features: Tensor, ipc: int) -> Tensor:
    """Return `ipc` positions, or all, of one class's features [n, D] by k-center (Sener & Savarese 2018).

    The first is the nearest to the mean, then farthest-first (greedy).
    """
    features = features.double()
    order = [int((features - features.mean(0)).norm(dim=1).argmin())]
    nearest = (features - features[order[0]]).norm(dim=1)
    for _ in range(min(ipc, len(features)) - 1):
        nearest[order[-1]] = -1.0
        order.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, (features - features[order[-1]]).norm(dim=1))
    return torch.tensor(order)


def centroids(features: Tensor, num: int, seed: int, *, num_starts: int = 1) -> Tensor:
    """Return the centres [num, D], or n, of k-means on features [n, D] (scikit-learn, k-means++)."""
    from sklearn.cluster import KMeans

    num = min(num, len(features))
    fit = KMeans(n_clusters=num, n_init=num_starts, random_state=seed % 2**32).fit(features.numpy())
    return torch.from_numpy(fit.cluster_centers_).to(features.dtype)


def minibatch_centroids(features: Tensor, num: int, seed: int, *, batch: int) -> Tensor:
    """Return the centres [num, D], or n, of mini-batch k-means on features [n, D] (scikit-learn).

    One pass in order, `batch` features at a time, or `num` where that is more; the last batch is the rest.
    """
    from sklearn.cluster import MiniBatchKMeans

    num = min(num, len(features))
    fit = MiniBatchKMeans(n_clusters=num, n_init="auto", random_state=seed % 2**32)
    for part in torch.split(features, max(batch, num)):
        fit.partial_fit(part.numpy())
    return torch.from_numpy(fit.cluster_centers_).to(features.dtype)


def kmeans_order(features: Tensor, num: int, seed: int, *, num_starts: int = 1) -> Tensor:
    """Return `num` positions, or all: to each centroid the nearest of the features [n, D] not yet taken."""
    free = torch.ones(len(features), dtype=torch.bool)
    order: list[int] = []
    for centre in centroids(features, num, seed, num_starts=num_starts):
        distance = (features - centre).square().sum(1).masked_fill(~free, torch.inf)
        order.append(int(distance.argmin()))
        free[order[-1]] = False
    return torch.tensor(order)
