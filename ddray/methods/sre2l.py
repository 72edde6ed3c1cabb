"""SRe2L: squeeze, recover and relabel (Yin et al., NeurIPS 2023, arXiv:2306.13092; Eq 5-9).

Squeeze: a network with batch norm is trained on the real images (a pool entry). Recover: images start as
noise and minimise the network's cross entropy plus the distance of the batch's statistics, in every batch
norm layer, from the running ones. Relabel: soft labels are the protocol's (`evaluate --protocol soft`), whose
recipe `sre2l` is the authors' code.

**Deviations** (paper | authors' code | ours)

- one image per class in a batch, batches one after another | the same | the same batches, all in every step.
- iterations, rate, weight of the statistics: 4,000, .25, .01 for ImageNet | its commands: 1,000, .25, .01 for
  CIFAR, 4,000, .1, 1 for Tiny-ImageNet, 4,000, .25, .01 for ImageNet; tenfold for the first layer | `repo`:
  these, by the images' size (up to 32 px, up to 64, above); `paper`: ImageNet's above 64 px, and up to there
  1,000, .1, .05, the defaults of the code's options, which none of its commands leaves.
- views: random crops for ImageNet | none for CIFAR; for Tiny-ImageNet and ImageNet a random resized crop (8%
  to 100% of the area) and a flip, one draw for the whole batch | `repo`: the code's; `paper`: none.
- jitter: - | the batch rolled along each axis by 0..4 px (CIFAR), -4..4 (Tiny-ImageNet), 0..32 (ImageNet) |
  the code's; `paper` rolls by 0..4 at 64 px too.
- squeezing: - | CIFAR: 200 epochs of SGD .1, batch 128, crop and flip; Tiny-ImageNet: its script trains 50,
  100 and 200 epochs and does not say which is recovered from; ImageNet: torchvision's weights | SGD .05,
  batch 64, DSA; 200 epochs in `repo` up to 32 px, else `teacher_epochs`' default.
- pixels: - | CIFAR-100 with CIFAR-10's mean and deviation; stored as JPEG files | the dataset's own; floats.
- the last image or the best one: - | the last (its "best images" are overwritten by them) | the last.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, Final, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ddray.artifact.distilled_set import DistilledSet
from ddray.config import added
from ddray.data import normalized_space
from ddray.distillation.method import DistillContext, MethodConfig, Target
from ddray.errors import InputError
from ddray.methods.families.factory import make_method
from ddray.methods.families.matching.batches import step_graphs
from ddray.methods.families.matching.groups import image_bytes
from ddray.methods.families.matching.initial import initial_images
from ddray.methods.families.state import cpu_copy, load_optimizer_state, optimizer_state
from ddray.nets import Net
from ddray.pool.spec import teacher_spec
from ddray.system.memory import memory_budget
from ddray.training.crops import draw_boxes, resized_crops
from ddray.training.engine import cosine
from ddray.training.recipe import TeacherRecipe

# The commands that the authors' code ships, with the defaults of options that they leave out.
_SHIPPED: Final[dict[str, dict[str, Any]]] = {
    "cifar": {"steps": 1000, "method": {"lr": 0.25, "bn_weight": 0.01, "jitter": 4, "teacher_epochs": 200}},
    "tiny": {
        "steps": 4000,
        "method": {"lr": 0.1, "bn_weight": 1.0, "jitter": 4, "jitter_both_ways": True, "crop": "fixed"},
    },
    "imagenet": {"steps": 4000, "method": {"lr": 0.25, "bn_weight": 0.01, "jitter": 32, "crop": "fixed"}},
}


class SRe2LConfig(MethodConfig):
    """SRe2L's settings; defaults are those for small images."""

    protocol: ClassVar = "soft"
    quick: ClassVar = {"teacher_arch": "convnet2_w8_bn", "teacher_epochs": 1}

    teacher_arch: str = "resnet18"
    """The squeezed network; it needs batch norm."""
    teacher_epochs: int = Field(default=50, ge=1)
    """Epochs of its training on the real images."""
    lr: float = Field(default=0.1, gt=0)
    """Learning rate of the pixels (Adam .5, .9; cosine)."""
    bn_weight: float = Field(default=0.05, ge=0)
    """Weight of the distance between batch and running statistics."""
    first_bn_factor: float = Field(default=10.0, ge=0)
    """Factor on the first layer's distance."""
    jitter: int = Field(default=4, ge=0)
    """Largest roll of a batch along each axis, in pixels."""
    jitter_both_ways: bool = added(False)
    """Roll by -jitter..jitter instead of 0..jitter."""
    crop: Literal["none", "fixed"] = added("none")
    """`fixed`: before the roll, a random resized crop of 8% to 100% of the area and a flip of the batch."""


class BatchStatistics:
    """Distances between a batch's statistics and the running ones, per batch norm layer of a forward pass."""

    def __init__(self, net: nn.Module) -> None:
        self._layers = [module for module in net.modules() if isinstance(module, _BatchNorm)]
        self._num_batches = 1
        self.distances: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._layers)

    @contextmanager
    def watch(self, num_batches: int = 1) -> Iterator[None]:
        """Collect the distances of the forward pass made inside, in layer order.

        What goes through the network is `num_batches` batches of one size; the distances are their means.
        """
        self.distances, self._num_batches = [], num_batches
        with ExitStack() as hooks:
            for layer in self._layers:
                hooks.enter_context(layer.register_forward_pre_hook(self._note))
            yield

    def _note(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Eq 7: ||mean - running mean|| + ||variance - running variance||, over the layer's channels."""
        first = int(self._num_batches > 1)  # the axis of a batch's images
        maps: Tensor = torch.unflatten(inputs[0], 0, (self._num_batches, -1)) if first else inputs[0]
        axes = [first, *range(first + 2, maps.ndim)]
        mean, variance = maps.mean(axes), maps.var(axes, unbiased=False)
        differences = mean - layer.running_mean, variance - layer.running_var  # type: ignore[operator]
        distance = sum(difference.norm(dim=-1) for difference in differences).mean()
        self.distances.append(distance)


def recover_loss(
    logits: Tensor, labels: Tensor, distances: list[Tensor], *, weight: float, first: float
) -> Tensor:
    """Return the cross entropy plus the weighted distances, the first one times `first` (Eq 6, 8)."""
    total = first * distances[0] + sum(distances[1:], torch.zeros((), device=logits.device))
    return F.cross_entropy(logits, labels) + weight * total


def batch_view(images: Tensor, generator: torch.Generator, *, crop: bool, rolls: tuple[int, int]) -> Tensor:
    """Return a batch [N, C, H, W] as the network sees it; one draw of everything serves all of its images.

    Args:
        images: the batch.
        generator: on the CPU; makes every draw.
        crop: begin with a random resized crop, mirrored in half of the cases.
        rolls: smallest and largest roll along each axis, in pixels.
    """
    if crop:
        box = draw_boxes(1, (images.shape[2], images.shape[3]), generator)
        mirrored = torch.rand(1, generator=generator) < 0.5
        images = resized_crops(images, box.expand(len(images), -1), mirrored.expand(len(images)))
    shifts = torch.randint(rolls[0], rolls[1] + 1, (2,), generator=generator).tolist()
    return torch.roll(images, shifts=shifts, dims=(2, 3))


def preset(name: str, target: Target) -> dict[str, Any]:
    """Return the settings of `paper`, or of the commands that the authors' code ships (`repo`), by size."""
    evaluate = {"epochs": 1000, "augment": "dsa"}
    side = max(target.image_shape[1:])
    if name == "repo":
        size = "cifar" if side <= 32 else "tiny" if side <= 64 else "imagenet"
        return {"evaluate": evaluate, **_SHIPPED[size]}
    if side <= 64:
        return {"steps": 1000, "evaluate": evaluate}
    method = {"lr": 0.25, "bn_weight": 0.01, "jitter": 32}
    return {"steps": 4000, "evaluate": evaluate, "method": method}


class SRe2L:
    """Images recovered from a network's batch norm statistics, from noise on.

    Raises:
        InputError: the network has no batch norm, or the pixels are whitened.
    """

    def __init__(self, ctx: DistillContext, config: SRe2LConfig) -> None:
        if ctx.space.kind != "normalized":
            raise InputError(f"sre2l needs pixel_space=normalized, got {ctx.space.kind}")
        self._ctx, self._config = ctx, config
        self._num_steps = max(1, int(ctx.config["steps"]))
        recipe = TeacherRecipe(epochs=config.teacher_epochs)
        spec = teacher_spec(ctx.dataset, ctx.split_name, config.teacher_arch, recipe, device=ctx.device)
        net = cast(Net, ctx.pool.get([spec])[0].module()).requires_grad_(False)
        self._net = net.to(ctx.device).to(memory_format=torch.channels_last)
        self._statistics = BatchStatistics(self._net)
        if not len(self._statistics):
            raise InputError(
                f"teacher_arch must have batch norm for sre2l, {config.teacher_arch} has none; add _bn"
            )
        images, self._labels = initial_images(ctx, "noise")
        self._images = images.requires_grad_(True)
        self._optimizer = torch.optim.Adam([self._images], lr=config.lr, betas=(0.5, 0.9))
        blank = torch.zeros(1, *ctx.dataset.image_shape)
        space = normalized_space(ctx.dataset)
        self._low, self._high = (space.encode(blank + value).to(ctx.device) for value in (0.0, 1.0))
        self._num_batches = self._batches_at_once()
        self._classes = torch.arange(ctx.dataset.num_classes, device=ctx.device).repeat(self._num_batches)
        self._graphs = step_graphs(ctx)
        self._step = 0

    def step(self) -> dict[str, Tensor]:
        """Take one optimiser step over all batches of one image per class."""
        ctx, config = self._ctx, self._config
        self._optimizer.param_groups[0]["lr"] = config.lr * cosine(self._step, self._num_steps)
        self._step += 1
        generator = ctx.generator("step", self._step)
        total = torch.zeros((), device=ctx.device)
        gradient = torch.empty_like(self._images)
        for first in range(0, ctx.ipc, self._num_batches):
            part = slice(first, first + self._num_batches)
            images = self._by_class(self._images.detach())[:, part].requires_grad_(True)
            views = torch.cat([self._view(batch, generator) for batch in images.unbind(1)])
            loss, outer = self._graphs(self._recover, (views.detach(), self._classes[: len(views)]))
            (self._by_class(gradient)[:, part],) = torch.autograd.grad(views, images, outer)
            total += loss / ctx.ipc
        self._images.grad = gradient
        self._optimizer.step()
        with torch.no_grad():
            self._images.clamp_(self._low, self._high)
        return {"loss": total}

    def _by_class(self, rows: Tensor) -> Tensor:
        """Return class-sorted rows [K * ipc, ...] as [K, ipc, ...], a view."""
        view: Tensor = torch.unflatten(rows, 0, (-1, self._ctx.ipc))
        return view

    def _view(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        config = self._config
        rolls = (-config.jitter if config.jitter_both_ways else 0, config.jitter)
        view = batch_view(batch, generator, crop=config.crop == "fixed", rolls=rolls)
        return view.contiguous(memory_format=torch.channels_last)

    def _recover(self, views: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of the losses of batches [B * K, C, H, W], and its gradient."""
        views = views.detach().requires_grad_(True)
        num_batches = len(views) // self._ctx.dataset.num_classes
        with self._statistics.watch(num_batches):
            logits = self._net(views)
        distances, weight = self._statistics.distances, self._config.bn_weight
        loss = num_batches * recover_loss(
            logits, labels, distances, weight=weight, first=self._config.first_bn_factor
        )
        return loss.detach(), torch.autograd.grad(loss, views)[0]

    def _batches_at_once(self) -> int:
        """Return how many batches go through the network at once: on a CPU one, which the cache holds."""
        ctx = self._ctx
        if ctx.device.type == "cpu":
            return 1
        blank = torch.zeros(2, *ctx.dataset.image_shape, device=ctx.device)
        blank = blank.contiguous(memory_format=torch.channels_last)
        with self._statistics.watch():
            size = image_bytes(self._net, blank, max(self._net.map_bytes()), self._net.parameters())
        batch_bytes = ctx.dataset.num_classes * size
        return max(1, min(ctx.ipc, memory_budget(ctx.device, ctx.memory_budget) // batch_bytes))

    def snapshot(self) -> DistilledSet:
        return self._ctx.make_set(self._images, self._labels)

    def state_dict(self) -> dict[str, Any]:
        """Return images, Adam's moments and the step."""
        moments = optimizer_state(self._optimizer).get(0, {})
        return {"step": self._step, "images": cpu_copy(self._images), "moments": moments}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step = int(state["step"])
        self._images.copy_(state["images"])
        load_optimizer_state(self._optimizer, {0: state["moments"]} if state["moments"] else {})


_SCHEDULE: Final = "its learning rate falls as a cosine over the steps"
_COUPLING: Final = "it matches statistics of batches with an image of every class"
METHOD: Final = make_method(SRe2LConfig, preset, SRe2L, depends_on_steps=_SCHEDULE, coupling=_COUPLING)
