"""Real and distilled images in the plane: t-SNE of a network's embedding (DataDAM's supplement, Fig 9)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Final

import torch
from torch import Tensor

from ddray.data import Dataset, normalized_space
from ddray.drawing.plots import project
from ddray.errors import InputError
from ddray.nets import Net, build_net, default_arch
from ddray.pool.local import LocalPool
from ddray.pool.spec import PoolSpec
from ddray.report.runs import SetView
from ddray.seeding import derive, derive_seed
from ddray.system.files import home

_REAL_PER_CLASS: Final = 60
_MOST_REAL: Final = 1200
_MOST_DISTILLED: Final = 300
_CHUNK: Final = 128


@dataclass(frozen=True)
class Plane:
    """t-SNE points of real and distilled images, embedded together.

    `distilled` has (row label, points [M, 2], classes [M]) per set; the class is -1 in sets without labels.
    """

    real: Tensor  # [N, 2]
    real_labels: Tensor  # [N]
    distilled: tuple[tuple[str, Tensor, Tensor], ...]
    network: str  # description of the embedding network
    class_names: tuple[str, ...]  # one per label


def make_plane(
    dataset: Dataset, sets: Sequence[SetView], *, network: str | None = None, seed: int = 0
) -> Plane | None:
    """Return the plane of a dataset's train images and sets of one size; None if no set can be read.

    `network` is the pool's key of what embeds them; default: `embedding_net`. The samples and t-SNE are drawn
    from the seed. InputError if the network is not in the pool.
    """
    net, name = embedding_net(dataset) if network is None else pool_net(network)
    split = dataset.train()
    index = _draw(split.labels, dataset.num_classes, seed)
    space = normalized_space(dataset)
    embeddings = [_embed(net, space.encode(split.images[index]))]
    labelled_classes: list[tuple[str, Tensor]] = []
    for view in sets:
        distilled = view.load()
        if distilled is None or distilled.meta.image_shape != dataset.image_shape:
            continue
        train = distilled.decode()
        images = distilled.space().decode(train.images)
        classes = train.labels if len(train.labels) == len(images) else torch.full((len(images),), -1)
        drawn = torch.randperm(len(images), generator=derive(seed, "report", "plane", view.label))
        drawn = drawn[:_MOST_DISTILLED].sort().values
        embeddings.append(_embed(net, space.encode(images[drawn])))
        labelled_classes.append((view.label, classes[drawn]))
    if not labelled_classes:
        return None
    points = project(torch.cat(embeddings), seed=seed)
    real, *distilled_points = torch.split(points, [len(part) for part in embeddings])
    rows = tuple(
        (label, set_points, classes)
        for (label, classes), set_points in zip(labelled_classes, distilled_points, strict=True)
    )
    return Plane(real, split.labels[index], rows, name, dataset.class_names)


def under_networks(
    dataset: Dataset, view: SetView, networks: Sequence[str], *, label: int = 0, seed: int = 0
) -> list[Tensor]:
    """Return a set's images of one class as t-SNE points [M, 2] under each network (DSDM, Fig 3a).

    All are embedded in one plane; `networks` are keys of the pool. Empty if the set can't be read, or has
    less than two images of the class. InputError if a network is not in the pool.
    """
    distilled = view.load()
    if distilled is None:
        return []
    train = distilled.decode()
    pixels = distilled.space().decode(train.images[train.labels == label])[:_MOST_DISTILLED]
    if len(pixels) < 2:
        return []
    encoded = normalized_space(dataset).encode(pixels)
    points = project(torch.cat([_embed(pool_net(key)[0], encoded) for key in networks]), seed=seed)
    return list(torch.split(points, len(pixels)))


def pool_net(key: str) -> tuple[Net, str]:
    """Return a supervised network of the pool, in eval mode, and its description.

    Raises:
        InputError: it is not in the pool.
    """
    path = home() / "pool" / key / "entry.json"
    try:
        spec = PoolSpec.parse(json.loads(path.read_text(encoding="utf-8"))["spec"])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"the pool must hold network {key[:12]} of the run, {path} can't be read") from error
    net: Any = LocalPool(_never).get([spec])[0].module()
    return net, f"{spec.arch}, trained on the real images for {spec.recipe.get('epochs')} epochs"


def embedding_net(dataset: Dataset) -> tuple[Net, str]:
    """Return the pool's longest-trained network for this dataset, else a random one, and its description."""
    candidates = []
    for path in sorted((home() / "pool").glob("*/entry.json")):
        try:
            spec = PoolSpec.parse(json.loads(path.read_text(encoding="utf-8"))["spec"])
        except (OSError, ValueError, KeyError, InputError):
            continue
        if (spec.kind, spec.dataset) == ("supervised", dataset.fingerprint):
            candidates.append((int(spec.recipe.get("epochs", 0)), spec.key))
    if candidates:
        return pool_net(max(candidates, key=itemgetter(0))[1])
    arch = default_arch(dataset.image_shape)
    seed = derive_seed(0, "report", "net")
    return build_net(arch, dataset.image_shape, dataset.num_classes, seed=seed).eval(), f"{arch}, untrained"


def _never(spec: PoolSpec) -> Any:
    raise InputError(f"pool entry {spec.key} was removed while being read; run again")


def _draw(labels: Tensor, num_classes: int, seed: int) -> Tensor:
    """Return indices of sampled real images of every class."""
    most = max(1, min(_REAL_PER_CLASS, _MOST_REAL // num_classes))
    generator = derive(seed, "report", "plane", "real")
    drawn = []
    for label in range(num_classes):
        class_indices = torch.nonzero(labels == label).flatten()
        drawn.append(class_indices[torch.randperm(len(class_indices), generator=generator)[:most]])
    return torch.cat(drawn)[:_MOST_REAL]


@torch.no_grad()
def _embed(net: Net, images: Tensor) -> Tensor:
    """Return the embedding [N, D] of images [N, C, H, W]."""
    return torch.cat([net.embed(part) for part in torch.split(images, _CHUNK)])
