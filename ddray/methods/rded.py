"""RDED: realistic, diverse and efficient distillation (Sun et al., CVPR 2024, arXiv:2312.03526; Algorithm 1).

Random crops of real images are scored by a teacher's cross entropy; the best crop of each image is kept, then
the ipc * factor^2 best of these in each class, and factor x factor of them are stitched into one image.

**Deviations** (paper | authors' code | ours)

- crops per image: 1 to 5 by dataset, from 300 images per class | 5 or 1, 300 by its scripts | 5 and 300; a
  class with fewer images gives all of them.
- scoring: crops are padded with zeros to the full size | the same, in normalised pixels | the same.
- a class with fewer images than ipc * factor^2: an error | an error | second-best crops of its images follow;
  where all of its crops make fewer than ipc images, it has as many as they make.
- resizing crops: bilinear, anti-aliased | the same | the same.
- factor: 1 for small images, 2 for ImageNet | the same | 1 up to 64 px, 2 above.
- soft labels are the protocol's (`evaluate --protocol soft`), whose recipe `rded` is the authors' code: it
  shuffles the stitched parts and crops 1/factor to all of the area.
"""

from typing import ClassVar, Final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ddray.artifact.partition import default_factor
from ddray.data import normalized_space
from ddray.distillation.method import DistillContext, MethodConfig
from ddray.errors import InputError
from ddray.methods.families.selection import apart, selection_method
from ddray.pool.spec import PoolSpec, teacher_spec
from ddray.system.transfer import to_device
from ddray.training.crops import batched_crops, draw_boxes
from ddray.training.recipe import TeacherRecipe

_CHUNK: Final = 256


class RDEDConfig(MethodConfig):
    """RDED's settings."""

    protocol: ClassVar = "soft"
    quick: ClassVar = {"teacher_arch": "convnet2_w8_bn", "teacher_epochs": 1}

    teacher_arch: str = "resnet18"
    """The network that scores crops."""
    teacher_epochs: int = Field(default=50, ge=1)
    """Epochs of its training on the real images."""
    factor: int | None = Field(default=None, ge=1, le=3)
    """Crops along each side of a stored image; default: 1 up to 64 px, 2 above."""
    num_crops: int = Field(default=5, ge=1)
    """Crops of each image that are scored."""
    images_per_class: int = Field(default=300, ge=1)
    """Real images of each class that are cropped; never more than it has."""


def crop(images: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the box of each of N images, top, left, height, width, resized to `size` (h, w).

    Pixels are raw, float [N, C, H, W], boxes int64 [N, 4] on the CPU; resizing is bilinear, anti-aliased.
    """
    if images.device.type == "cpu":
        parts = [
            image[None, :, top : top + rows, left : left + columns]
            for image, (top, left, rows, columns) in zip(images, boxes.tolist(), strict=True)
        ]
        return torch.cat([F.interpolate(part, size, mode="bilinear", antialias=True) for part in parts])
    return batched_crops(images, boxes, size)


@torch.no_grad()
def crop_losses(net: nn.Module, crops: Tensor, label: int, size: tuple[int, int]) -> Tensor:
    """Return the cross entropy [N] of a class's normalised crops [N, C, h, w], zero-padded to `size`."""
    height, width = size[0] - crops.shape[2], size[1] - crops.shape[3]
    padding = (width // 2, width - width // 2, height // 2, height - height // 2)
    losses = []
    for part in torch.split(crops, _CHUNK):
        logits = net(F.pad(part, padding).contiguous(memory_format=torch.channels_last))
        labels = torch.full((len(part),), label, device=part.device)
        losses.append(F.cross_entropy(logits, labels, reduction="none"))
    return torch.cat(losses)


def choose(losses: Tensor, num: int) -> Tensor:
    """Return `num` of m crops of each of M images, losses [M, m], as flat indices.

    Each image's best comes first, by loss, then the second-best ones, ...
    """
    ranked, crop_index = losses.sort(1)
    flat = torch.arange(len(losses), device=losses.device)[:, None] * losses.shape[1] + crop_index
    order = ranked.argsort(dim=0, stable=True)  # within each rank, the images by loss
    return flat.gather(0, order).T.flatten()[:num]


def stitch(crops: Tensor, factor: int) -> Tensor:
    """Return images [n, C, f*h, f*w] of crops [f*f*n, C, h, w]: the first n fill the first tile of each."""
    parts: Tensor = torch.unflatten(crops, 0, (factor, factor, -1))  # [f, f, n, C, h, w]
    return parts.permute(2, 3, 0, 4, 1, 5).flatten(4, 5).flatten(2, 3)


def choose_images(ctx: DistillContext, config: RDEDConfig) -> tuple[Tensor, Tensor]:
    """Return the stitched images and their labels.

    Raises:
        InputError: the factor does not divide the image, or a class has too few crops for one image, or every
            class for ipc.
    """
    height, width = ctx.dataset.image_shape[1:]
    factor = config.factor or default_factor(ctx.dataset.image_shape)
    if height % factor or width % factor:
        raise InputError(f"factor must divide the image's sides of {height} x {width} px, got {factor}")
    counts = _images_of_classes(ctx, config, factor)
    net = ctx.pool.get(pool_specs(ctx, config))[0].module().to(ctx.device)
    space = normalized_space(ctx.dataset).to(ctx.device)
    stitched = []
    for label in ctx.classes:
        generator = ctx.generator("crops", label)
        rows = torch.nonzero(ctx.split.labels == label).flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)[: config.images_per_class]]
        boxes = draw_boxes(len(rows) * config.num_crops, (height, width), generator, ratio=(1.0, 1.0))
        images = to_device(ctx.split.images[rows], ctx.device)
        crops = _crops(images, boxes, (height // factor, width // factor))
        losses = crop_losses(net, space.encode(crops), label, (height, width))
        best = choose(losses.view(-1, config.num_crops), int(counts[label]) * factor**2)
        stitched.append(stitch(crops[best], factor))
    labels = torch.arange(len(counts)).repeat_interleave(counts)
    images = ctx.space.encode(torch.cat(stitched).cpu())
    return images, labels[(labels >= ctx.classes.start) & (labels < ctx.classes.stop)]


def pool_specs(ctx: DistillContext, config: RDEDConfig) -> list[PoolSpec]:
    """Return the spec of the teacher."""
    recipe = TeacherRecipe(epochs=config.teacher_epochs)
    return [teacher_spec(ctx.dataset, ctx.split_name, config.teacher_arch, recipe, device=ctx.device)]


def _crops(images: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return equally many crops of each of M images, M * m in their order, as raw float pixels."""
    sources = torch.arange(len(images)).repeat_interleave(len(boxes) // len(images))
    crops = []
    for source, part in zip(torch.split(sources, _CHUNK), torch.split(boxes, _CHUNK), strict=True):
        pixels = images.index_select(0, to_device(source, images.device))
        crops.append(crop(pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels, part, size))
    return torch.cat(crops)


def _images_of_classes(ctx: DistillContext, config: RDEDConfig, factor: int) -> Tensor:
    """Return how many images the crops of each class make, int64 [K], at most ipc; InputError if too few."""
    num_real = ctx.counts.clamp(max=config.images_per_class)
    counts = num_real * config.num_crops // factor**2
    for label, least in ((int(counts.argmin()), 1), (int(counts.argmax()), ctx.ipc)):
        if counts[label] < least:
            num_crops = -(-least * factor**2 // int(num_real[label]))
            raise InputError(
                f"num_crops must be >= {num_crops} for ipc {ctx.ipc} and factor {factor}: class {label} has "
                f"{num_real[label]} images, got {config.num_crops}"
            )
    return counts.clamp(max=ctx.ipc)


METHOD: Final = selection_method(RDEDConfig, choose_images, coupling=apart, specs_of=pool_specs)
