"""The self-supervised teacher: Barlow Twins (Zbontar et al., ICML 2021) on images without labels.

A pool entry of kind `ssl` holds the network's weights and its features of the whole split. Nothing here takes
a label: the entry is keyed by a hash of the images, and one-class networks have no head to train.

**Deviations** (solo-learn's CIFAR recipe, which Boost-SSDD's teacher is trained with | ours)

- optimiser: LARS, lr .3 | AdamW; their factor .1 on the loss, which AdamW would cancel, is left out.
- warm-up: 10 epochs of 1,000, linear, then cosine to 0 | `repo`: the same; `paper`: a tenth of the steps (no
  paper prints it).
- random resized crop: 8% to 100% of the area | `repo`: the same; `paper`: from 20% (no paper prints it).
- first convolution: padding 2, as in KRR-ST's code | `repo`: the same; `paper`: 1.
- views: kornia or torchvision on single images | the operations of solo-learn's CIFAR recipe on the batch, on
  the device: random resized crop, flip where the dataset allows it, colour jitter (.8), greyscale (.2), and
  solarisation of the second view (.2); no blur.
- the last, incomplete batch of an epoch is dropped in both.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ddray.config import Config, added
from ddray.data import Dataset, PixelSpace, Split
from ddray.data.packed import parts_of, resident
from ddray.errors import DivergedError, InputError
from ddray.nets import Net, build_net
from ddray.pool.spec import PoolEntry, PoolSpec
from ddray.seeding import derive, derive_seed, forked_global
from ddray.system.numerics import has_bf16
from ddray.system.transfer import to_device
from ddray.training.embedding import embed_images
from ddray.training.engine import Batch, Order, Rule, Step, cosine, run
from ddray.training.operations import luma

KIND: Final = "ssl"
SOLO_LEARN: Final = {"stem_padding": 2, "crop_area": 0.08, "warmup_epochs": 10}
"""Settings of solo-learn's recipe for CIFAR that differ from the defaults, which trained teachers keep."""
# Columns of a view's uniform draws.
_AREA, _RATIO, _TOP, _LEFT, _FLIP, _JITTER = range(6)
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _GREY, _SOLAR = range(6, 12)


class TeacherConfig(Config):
    """How the self-supervised teacher is trained."""

    arch: str = "resnet18"
    """Its stem for small images is a 3x3 convolution without pooling."""
    epochs: int = Field(default=1000, ge=1)
    batch: int = Field(default=256, ge=2)
    lr: float = Field(default=1e-3, gt=0)
    """Of AdamW; linear warm-up, then cosine to 0."""
    warmup_epochs: int | None = added(None, ge=0)
    """Epochs of the warm-up; default: a tenth of all steps."""
    weight_decay: float = Field(default=1e-4, ge=0)
    projector: int = Field(default=2048, ge=1)
    """Width of the projector's three layers."""
    off_diagonal: float = Field(default=0.0051, ge=0)
    """Weight of the redundancy term (Barlow Twins' lambda)."""
    crop_area: float = Field(default=0.2, gt=0, le=1)
    """Smallest area of a random resized crop."""
    solarize: float = Field(default=0.2, ge=0, le=1)
    """Share of the second views that are solarised."""
    stem_padding: int = Field(default=1, ge=0, le=3)
    """Padding of the first convolution: 1 | 2 (KRR-ST's and solo-learn's code)."""
    seed: int = Field(default=0, ge=0)
    """The teacher's own: runs of all seeds share one teacher, as in the papers."""


def ssl_teacher_spec(
    config: TeacherConfig, dataset: Dataset, split: Split, *, split_name: str, device: torch.device
) -> PoolSpec:
    """Return the pool's spec of a teacher for the images of a split, whose labels play no part.

    Raises:
        InputError: the split holds spectrograms, for which the views make no sense.
    """
    if split.images.dtype != torch.uint8:
        raise InputError(f"a self-supervised teacher needs 8-bit images, {dataset.name} holds spectrograms")
    recipe = config.dump()
    arch, seed = recipe.pop("arch"), recipe.pop("seed")
    return PoolSpec(
        kind=KIND,
        dataset=image_fingerprint(split.images),
        split=split_name,
        transform="normalized",
        arch=arch,
        recipe={**recipe, "flip": dataset.can_flip, "mean": list(dataset.mean), "std": list(dataset.std)},
        seed=seed,
        image_shape=dataset.image_shape,
        num_classes=1,
        device=device.type,
    )


def image_fingerprint(images: Tensor) -> str:
    """Return the sha256 of images [N, C, H, W] alone: labels and class names play no part."""
    head = {"shape": list(images.shape), "dtype": str(images.dtype)}
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for part in parts_of(images):
        digest.update(part.contiguous().numpy().data)
    return digest.hexdigest()


def teacher_net(entry: PoolEntry) -> Net:
    """Return an entry's network in eval mode on the CPU; `embed` gives the representations."""
    padding = PoolSpec.parse(entry.meta["spec"]).recipe["stem_padding"]
    return _with_stem(entry.module(), int(padding)).eval()  # type: ignore[arg-type]


def _with_stem(net: Net, padding: int) -> Net:
    """Set the padding of a torchvision network's first convolution; the weights are the same."""
    if padding != 1:
        stem = next(module for module in net.modules() if isinstance(module, nn.Conv2d))
        stem.padding = (padding, padding)
    return net


def barlow_twins_loss(a: Tensor, b: Tensor, off_diagonal: float) -> Tensor:
    """Return sum_i (1 - C_ii)^2 + lambda * sum_{i != j} C_ij^2 (Barlow Twins Eq 1-2).

    `off_diagonal` is lambda, C the cross-correlation of both views' projections [B, D] along the batch. The
    sum of its squares is taken from the B x B Gram matrices, ||A'B||^2 = <AA', BB'>, which costs 2B/D of the
    D x D form.
    """
    # Batch norm without parameters: columns of mean 0 and variance 1.
    a, b = (F.batch_norm(z, None, None, training=True) for z in (a, b))
    num = len(a)
    diagonal = (a * b).sum(0) / num
    squares = ((a @ a.T) * (b @ b.T)).sum() / num**2
    off = squares - diagonal.square().sum()
    return (1 - diagonal).square().sum() + off_diagonal * off


def projector(dim: int, width: int) -> nn.Sequential:
    """Return the three-layer projector [N, dim] -> [N, width]."""
    layers: list[nn.Module] = []
    for size in (dim, width):
        layers += [nn.Linear(size, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(width, width, bias=False))


def random_view(
    pixels: Tensor, generator: torch.Generator, *, crop_area: float, flip: bool, solarize: float = 0.0
) -> Tensor:
    """Return one random view of each image, float32 [N, C, H, W] in [0, 1], computed on their device.

    The CPU generator makes every draw. A crop takes at least `crop_area` of the area, sides in a ratio of 3/4
    to 4/3; `flip` mirrors half of the views; `solarize` is the share of them whose bright half is inverted.
    """
    u = to_device(torch.rand(len(pixels), _SOLAR + 1, generator=generator), pixels.device)
    area = crop_area + (1 - crop_area) * u[:, _AREA]
    ratio = torch.exp((2 * u[:, _RATIO] - 1) * math.log(4 / 3))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    mirrored = torch.where(u[:, _FLIP] < 0.5, -width, width) if flip else width
    theta = pixels.new_zeros(len(pixels), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = mirrored, height
    theta[:, 0, 2] = (1 - width) * (2 * u[:, _LEFT] - 1)
    theta[:, 1, 2] = (1 - height) * (2 * u[:, _TOP] - 1)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    views = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)
    views = torch.where(_drawn(u, _JITTER, 0.8), _jitter(views, u), views)
    if views.shape[1] == 3:
        views = torch.where(_drawn(u, _GREY, 0.2), luma(views).expand_as(views), views)
    return torch.where(_drawn(u, _SOLAR, solarize) & (views >= 0.5), 1 - views, views) if solarize else views


def _drawn(u: Tensor, column: int, share: float) -> Tensor:
    """Return the mask [N, 1, 1, 1] of the samples that an operation applies to."""
    return (u[:, column] < share)[:, None, None, None]


def _jitter(views: Tensor, u: Tensor) -> Tensor:
    """Jitter brightness and contrast by +-.4, in colour images also saturation by +-.2 and hue by +-.1."""

    def factor(column: int, strength: float) -> Tensor:
        return (1 + (2 * u[:, column] - 1) * strength)[:, None, None, None]

    views = (views * factor(_BRIGHTNESS, 0.4)).clamp(0, 1)
    mean = views.mean((1, 2, 3), keepdim=True)
    views = ((views - mean) * factor(_CONTRAST, 0.4) + mean).clamp(0, 1)
    if views.shape[1] != 3:
        return views
    from kornia.enhance import adjust_hue

    grey = luma(views)
    views = ((views - grey) * factor(_SATURATION, 0.2) + grey).clamp(0, 1)
    hued: Tensor = adjust_hue(views, (2 * u[:, _HUE] - 1) * 0.1 * 2 * math.pi)
    return hued


@dataclass(frozen=True)
class SslTrainer:
    """Trains the pool's self-supervised teachers on a split's images, uint8 [N, C, H, W].

    The name of the dataset is recorded in the entry; its key does not depend on it.
    """

    images: Tensor
    device: torch.device
    dataset_name: str | None = None

    def __call__(self, spec: PoolSpec) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """Return weights and features [N, D] of a teacher, and the mean loss of its first and last epoch.

        Raises:
            DivergedError: the loss became NaN or infinite.
        """
        recipe = dict(spec.recipe)
        space = PixelSpace("normalized", tuple(recipe.pop("mean")), tuple(recipe.pop("std")))
        flip = bool(recipe.pop("flip"))
        config = TeacherConfig.parse({**recipe, "arch": spec.arch, "seed": spec.seed}, prefix="teacher.")
        seed = derive_seed(spec.seed, "pool", spec.kind)
        net = build_net(spec.arch, spec.image_shape, spec.num_classes, seed=seed, device=self.device)
        net = _with_stem(net, config.stem_padding).to(memory_format=torch.channels_last)
        losses = self._train(net, config, space, seed, flip)
        if not math.isfinite(losses[-1]):
            raise DivergedError(f"the teacher's loss must stay finite, got {losses[-1]}; lower teacher.lr")
        weights = {f"weights.{name}": tensor for name, tensor in net.state_dict().items()}
        features = embed_images(net, self.images, space.encode, self.device)
        name = {} if self.dataset_name is None else {"dataset_name": self.dataset_name}
        return {**weights, "features": features}, {"first_loss": losses[0], "final_loss": losses[-1], **name}

    def _train(
        self, net: Net, config: TeacherConfig, space: PixelSpace, seed: int, flip: bool
    ) -> list[float]:
        """Train `net` in place; return the mean loss of every epoch."""
        device, num = self.device, len(self.images)
        pixels = resident(self.images, device)
        with torch.no_grad():
            dim = net.eval().embed(torch.zeros(1, *net.image_shape, device=device)).shape[1]
        with forked_global(derive_seed(seed, "projector"), device), torch.device(device):
            head = projector(dim, config.projector)
        views = _TwoViews(net, head).train()
        order = Order(num, min(config.batch, num), last="drop")
        generator = derive(seed, "views")
        losses: list[Tensor] = []
        epoch = len(order.sizes)
        steps = config.epochs * epoch
        warm = max(1, steps // 10) if config.warmup_epochs is None else config.warmup_epochs * epoch

        def batch(index: Tensor) -> Batch:
            raw = to_device(pixels[index], device).float() / 255
            view = partial(random_view, raw, generator, crop_area=config.crop_area, flip=flip)
            return (torch.stack([space.encode(view(solarize=s)) for s in (0.0, config.solarize)], 1),)

        rule = Rule(
            lambda views: barlow_twins_loss(views[0], views[1], config.off_diagonal),
            partial(torch.optim.AdamW, weight_decay=config.weight_decay),
            bf16=has_bf16(device),
        )
        run(
            Step([views], rule, num_steps=steps),
            map(batch, order.indices(generator, pixels.device)),
            lr=lambda step: config.lr * schedule(step, steps, warm),
            epoch=epoch,
            on_epoch=losses.append,
        )
        net.eval()
        means: list[float] = torch.stack(losses).tolist()
        return means


class _TwoViews(nn.Module):
    """Projections [2, N, D] of views [N, 2, C, H, W]; each view passes batch norm on its own."""

    def __init__(self, net: Net, head: nn.Module) -> None:
        super().__init__()
        self.net, self.head = net, head

    def forward(self, views: Tensor) -> Tensor:
        inputs = [view.contiguous(memory_format=torch.channels_last) for view in views.unbind(1)]
        return torch.stack([self.head(self.net.embed(view)) for view in inputs])


def schedule(step: int, steps: int, warm: int) -> float:
    """Return the factor on lr at a step of `steps`: linear warm-up over `warm` steps, then cosine to 0."""
    if step < warm:
        return (step + 1) / warm
    return cosine(step - warm, max(1, steps - warm))
