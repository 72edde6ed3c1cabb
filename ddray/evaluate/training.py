"""Training a network on a small or real set: the one loop behind the `hard` protocol and the pool's networks.

Data stays on the device, augmentation runs there, and nothing syncs per step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from ddray.config import Config
from ddray.data import Dsa, PixelSpace, Split, dsa_for
from ddray.errors import unknown
from ddray.evaluate.cutmix import cutmix
from ddray.nets import Net, training_format
from ddray.seeding import derive_seed, forked_global

Augment = Literal["dsa", "dsa_idc", "autoaugment", "randaugment", "none"]
Schedule = Literal["vico", "step15", "multistep", "cosine", "constant"]
Augmenter = Callable[[Tensor, torch.Generator], Tensor]
RECIPES: Final[Mapping[str, Mapping[str, Any]]] = {
    "vico": {
        "epochs": 1000,
        "lr": 0.01,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "batch": 256,
        "schedule": "vico",
        "augment": "dsa",
        "strategy": None,
        "cutmix": 0.0,
    },
    "idc": {
        "epochs": 1500,
        "lr": 0.01,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "batch": 64,
        "schedule": "multistep",
        "augment": "dsa_idc",
        "strategy": "color_crop_flip_scale_rotate",
        "cutmix": 0.5,
    },
}
"""Whole recipes by name: `vico` of DC, DSA, DM and their kin; `idc` of IDC and DSDM (DSDM's 1,500 epochs)."""


class Recipe(Config):
    """How a network is trained (SGD, cross entropy)."""

    epochs: int = Field(default=1000, ge=1)
    """E; the `vico` schedule runs E + 1, as the peers' loop does."""
    lr: float = Field(default=0.01, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    batch: int = Field(default=256, ge=1)
    schedule: Schedule = "vico"
    """`vico`: E + 1 epochs, after epoch E // 2 + 1 the rate falls tenfold and momentum is reset (DC, DM,
    DataDAM code); `step15`: x.5 every 15 epochs (DataDAM supplement Table 2); `multistep`: x.2 after 2/3 and
    5/6 of the epochs (IDC, DSDM); `cosine` to 0; `constant`."""
    augment: Augment = "dsa"
    """Augmentation of pictures; spectrograms have none."""
    strategy: str | None = None
    """Operations of `dsa` and `dsa_idc`, joined by "_" (flip is left out where it changes the class);
    default: all of them."""
    cutmix: float = Field(default=0.0, ge=0, le=1)
    """Probability that a batch of pictures is mixed with itself by CutMix (IDC: .5, without cutout)."""

    @field_validator("strategy")
    @classmethod
    def _known_operations(cls, value: str | None) -> str | None:
        if value is not None:
            Dsa(value)
        return value

    def without_augmentation(self) -> Self:
        """Return the same training on the images as they are."""
        return self.model_copy(update={"augment": "none", "strategy": None, "cutmix": 0.0})

    def on(self, split: Split) -> Self:
        """Return the recipe for a split: picture augmentations do not apply to spectrograms (IDC, DSDM)."""
        return self.without_augmentation() if split.is_audio else self


def named_recipe(values: Mapping[str, Any], *, dataset: str = "", factor: int = 1) -> dict[str, Any]:
    """Return evaluation settings with the name under `recipe` replaced by its fields; the other settings win.

    Args:
        values: settings by name; `recipe`, if it is there, is one of `RECIPES`.
        dataset: the set's dataset: `idc` has exceptions.
        factor: parts along each axis that its stored images are cut into.

    Raises:
        InputError: no recipe has this name.
    """
    rest = dict(values)
    if rest.get("recipe") is None:
        return rest
    name = str(rest.pop("recipe"))
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    exceptions = {"cutmix": 0.0} if name == "idc" and not idc_mixes(dataset, factor) else {}
    return {**RECIPES[name], **exceptions, **rest}


def idc_mixes(dataset: str, factor: int) -> bool:
    """Return whether IDC and DSDM's code mixes the images by CutMix: not MNIST's at factor 2."""
    return not (dataset == "mnist" and factor == 2)


def train(
    net: Net,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    *,
    generator: torch.Generator,
    augment: Augmenter | None,
    on_epoch: Callable[[Tensor], None] | None = None,
) -> float:
    """Train `net` in place and leave it in eval mode.

    Args:
        net: the network, on the images' device.
        images: float32 [N, C, H, W] in their pixel space.
        labels: int64 [N], or float32 [N, D]: targets of the outputs, under the mean squared error.
        recipe: epochs, rates, batch, schedule.
        generator: CPU generator of the batches' order and the augmentation.
        augment: applied to every batch, before CutMix; None leaves it as it is.
        on_epoch: called with each epoch's mean loss, a scalar on the device.

    Returns:
        The mean loss of the last epoch.
    """
    form = training_format(net, images.device)
    images = images.contiguous(memory_format=form)
    net.to(memory_format=form).train()
    optimizer = _sgd(net, recipe, recipe.lr)
    loss = torch.zeros((), device=images.device)
    total = recipe.epochs + 1 if recipe.schedule == "vico" else recipe.epochs
    for epoch in range(total):
        if recipe.schedule != "vico":
            optimizer.param_groups[0]["lr"] = recipe.lr * _factor(recipe, epoch)
        order = torch.randperm(len(labels), generator=generator).to(images.device, non_blocking=True)
        loss = torch.zeros((), device=images.device)
        for index in torch.split(order, recipe.batch):
            batch = images[index]
            if augment is not None:
                batch = augment(batch, generator)
            step_loss = _loss(net, batch, labels[index], recipe.cutmix, generator)
            optimizer.zero_grad(set_to_none=True)
            step_loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            loss += step_loss.detach() * len(index)
        if on_epoch is not None:
            on_epoch(loss / len(labels))
        if recipe.schedule == "vico" and epoch == recipe.epochs // 2 + 1:
            # The peers re-create the optimiser here, which also resets the momentum.
            optimizer = _sgd(net, recipe, recipe.lr * 0.1)
    net.to(memory_format=torch.channels_last).eval()
    return float(loss / len(labels))


def _loss(net: Net, batch: Tensor, labels: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Return the cross entropy, after CutMix with `probability`; for float targets the mean squared error."""
    if labels.is_floating_point():
        return F.mse_loss(net(batch), labels)
    mixed = cutmix(batch, probability, generator) if probability > 0 else None
    if mixed is None:
        return F.cross_entropy(net(batch), labels)
    logits = net(mixed.images)
    own_loss, partner_loss = F.cross_entropy(logits, labels), F.cross_entropy(logits, labels[mixed.partner])
    return mixed.share * own_loss + (1 - mixed.share) * partner_loss


def _sgd(net: Net, recipe: Recipe, lr: float) -> torch.optim.SGD:
    return torch.optim.SGD(
        net.parameters(), lr=lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )


def _factor(recipe: Recipe, epoch: int) -> float:
    """Return the schedule's factor on lr in an epoch counted from 0."""
    if recipe.schedule == "step15":
        return float(0.5 ** (epoch // 15))
    if recipe.schedule == "multistep":
        return float(0.2 ** sum(epoch >= recipe.epochs * sixths // 6 for sixths in (4, 5)))
    if recipe.schedule == "cosine":
        return 0.5 * (1.0 + float(torch.cos(torch.tensor(torch.pi * epoch / recipe.epochs))))
    return 1.0


@torch.no_grad()
def accuracy(
    net: Net, split: Split, space: PixelSpace, *, device: torch.device, chunk: int | None = None
) -> float:
    """Return the fraction of a split that `net` (in eval mode) classifies correctly.

    Args:
        net: the network, on `device`.
        split: real images, uint8 [N, C, H, W].
        space: the pixel space the network was trained in.
        device: where to compute.
        chunk: images at once; default 32 on a CPU (they fit the cache there), 1,024 on a GPU.
    """
    chunk = chunk or (32 if device.type == "cpu" else 1024)
    space = space.to(device)
    right = torch.zeros((), dtype=torch.int64, device=device)
    for start in range(0, len(split), chunk):
        images = space.encode(split.images[start : start + chunk].to(device, non_blocking=True))
        labels = split.labels[start : start + chunk].to(device, non_blocking=True)
        logits = net(images.contiguous(memory_format=torch.channels_last))
        right += (logits.argmax(1) == labels).sum()
    return float(right) / len(split)


def augmenter(
    name: Augment, *, can_flip: bool, space: PixelSpace, strategy: str | None = None
) -> Augmenter | None:
    """Return the augmentation called `name` for batches [N, C, H, W] in `space`.

    `dsa` and `dsa_idc`: per-sample parameters, one op for a batch (`dsa`) as at the peers' evaluation.
    `autoaugment` and `randaugment`: torchvision's policies on the pixels as 8-bit images, image by image
    (DataDAM supplement, Fig 4).

    Args:
        name: which one; `none` gives None.
        can_flip: whether mirrored images keep their class.
        space: pixel space of the batches.
        strategy: operations of `dsa` and `dsa_idc`; None: all of them.

    Raises:
        InputError: the strategy names an unknown operation.
    """
    if name == "none":
        return None
    if name in ("dsa", "dsa_idc"):
        dsa = _dsa("dsa" if name == "dsa" else "dsa_idc", strategy, can_flip=can_flip)
        if dsa is None:
            return None

        def apply(batch: Tensor, generator: torch.Generator) -> Tensor:
            return dsa.apply(batch, dsa.draw(len(batch), generator, shared_op=True))

        return apply
    return _policy(name, space)


def _dsa(variant: Literal["dsa", "dsa_idc"], strategy: str | None, *, can_flip: bool) -> Dsa | None:
    """Return DSA with the strategy's operations; None where none is left."""
    if strategy is None:
        return dsa_for(can_flip, variant)
    names = [name for name in strategy.split("_") if can_flip or name != "flip"]
    return Dsa("_".join(names), variant=variant) if names else None


def _policy(name: str, space: PixelSpace) -> Augmenter:
    """Return torchvision's AutoAugment or RandAugment on batches in `space`."""
    from torchvision.transforms import v2

    transform = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10) if name == "autoaugment" else v2.RandAugment()

    spaces: dict[torch.device, PixelSpace] = {}  # a whitening's inverse is computed once, not per batch

    def apply(batch: Tensor, generator: torch.Generator) -> Tensor:
        device_space = spaces.setdefault(batch.device, space.to(batch.device))
        pixels = (device_space.decode(batch).clamp(0, 1) * 255).round().to(torch.uint8)
        seed = int(torch.randint(2**62, (), generator=generator))
        with forked_global(derive_seed(seed, "augment")):
            changed = torch.stack([transform(image) for image in pixels])
        return device_space.encode(changed).contiguous(memory_format=torch.channels_last)

    return apply
