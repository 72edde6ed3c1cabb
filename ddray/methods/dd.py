"""DD: dataset distillation (Wang et al. 2018; Algorithm 1, Eq 2 and Sec 3.4).

Images and learning rates are learned together so that a network that takes a few steps of plain SGD on the
images, in a fixed order and each step at its own rate, has a low loss on real images. The initialisation is
random (each iteration draws fresh networks) or fixed (one network, which the set is for). The gradient goes
through the steps exactly, in constant memory (`families/unrolled`). Sets are scored by protocol `steps`: by a
usual recipe they fail.

**Deviations** (paper | authors' code | ours)

- networks per iteration: not given | 1, its documentation says 4 | `num_nets`, 1.
- the learning rate halves: every 40 epochs | one epoch early on today's torch | every `decay_every`
  iterations, by preset 40 epochs' worth.
- real batch: drawn by epochs | by epochs | afresh for each step, without repetition within it.
- loss on the real batch: in eval mode | the same | networks with batch norm are refused.
- network: LeNet for MNIST, "AlexNet" for CIFAR-10 | `lenet`, `alexcifar` by preset, Xavier's initialisation |
  the same; on other datasets the default ConvNet, with PyTorch's initialisation.
- pixels: mean and std of train | the same | ddray's constants of the dataset (CIFAR-10's are the DC family's,
  whose standard deviations are a fifth smaller).
- settings of `dataset_settings` are ours.
- score: 200 held-out networks | 1 | `evaluate.seeds`.
"""

import logging
from collections.abc import Sequence
from typing import Any, ClassVar, Final, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ddray.artifact.distilled_set import DistilledSet
from ddray.artifact.schedule import Schedule
from ddray.data.packed import resident
from ddray.distillation.method import DistillContext, MethodConfig, SetExtras, Target
from ddray.errors import InputError
from ddray.methods.families.factory import make_method
from ddray.methods.families.matching.initial import initial_images
from ddray.methods.families.state import cpu_copy, load_optimizer_state, optimizer_state
from ddray.methods.families.unrolled import sweep
from ddray.nets import build_net, is_per_sample, reinitialize
from ddray.seeding import derive_seed
from ddray.system.transfer import to_device
from ddray.training.operations import crop_and_flip
from ddray.training.student import Student, flat_parameters, ordered_loss

log = logging.getLogger(__name__)

_PADDING: Final = 4  # pixels
_EPOCHS: Final = 400
_COUPLING: Final = "its networks are trained on the images of all classes"


class DDConfig(MethodConfig):
    """DD's settings; defaults are those of MNIST."""

    search_space: ClassVar = {
        "lr_img": {"loguniform": [0.001, 0.1]},
        "rate_start": {"loguniform": [0.001, 0.1]},
        "distill_epochs": {"choice": [1, 3, 5]},
        "num_nets": {"choice": [1, 2, 4]},
    }
    protocol: ClassVar = "steps"
    dataset_settings: ClassVar = {
        "digits": {
            "steps": 1500,
            "arch": "lenet",
            "method": {
                "batch_real": 256,
                "decay_every": 500,
                "lr_img": 0.05,
                "rate_start": 0.1,
            },
        },
        "digits_ipc1": {"method": {"distill_epochs": 10}},
    }
    quick: ClassVar = {"batch_real": 8, "distill_epochs": 2}
    orders_steps: ClassVar = True

    net_init: Literal["random", "fixed"] = "random"
    """What the steps start from: fresh random networks, or one network, drawn by the run's seed."""
    images_per_step: int = Field(default=1, ge=1)
    """Images of each class in a step; ipc / images_per_step steps pass over the set."""
    distill_epochs: int = Field(default=3, ge=1)
    """Passes over the set; each step of each has a rate of its own."""
    rate_start: float = Field(default=0.02, gt=0)
    """Rate of every step at the start."""
    lr_img: float = Field(default=0.01, gt=0)
    """Learning rate of images and rates (Adam, betas .5 and .999)."""
    decay_every: int = Field(default=2360, ge=1)
    """Iterations after which it halves, again and again."""
    batch_real: int = Field(default=1024, ge=1)
    """Real images per iteration; never more than there are."""
    num_nets: int = Field(default=1, ge=1)
    """Random networks per iteration, whose gradients are averaged."""
    init: Literal["noise", "random"] = "noise"
    """Initial images: Gaussian noise, or random real ones."""
    augment_real: Literal["crop_flip", "none"] = "none"
    """Augmentation of the real batch: reflected borders of 4 pixels, random crop, and flip where it keeps the
    class."""

    def work_per_step(self, num_images: int, num_classes: int, *network: Any) -> float:
        """Return an iteration's multiply-adds: each network's passes, and its batch of all classes."""
        num_nets = 1 if self.net_init == "fixed" else self.num_nets
        return num_nets * super().work_per_step(self.distill_epochs * num_images, 1, *network)


def step_rows(num_classes: int, ipc: int, images_per_step: int, epochs: int) -> list[list[int]]:
    """Return the rows, of class-sorted images, of each step: the same images of every class.

    The last step of a pass has what is left, if `images_per_step` does not divide ipc.
    """
    steps = [
        [label * ipc + column for label in range(num_classes) for column in range(first, end)]
        for first in range(0, ipc, images_per_step)
        for end in [min(ipc, first + images_per_step)]
    ]
    return steps * epochs


def inverse_softplus(value: float) -> Tensor:
    """Return the float64 scalar r with log(1 + exp(r)) = `value` > 0."""
    rate = torch.tensor(value, dtype=torch.float64)
    return rate + torch.log(-torch.expm1(-rate))


class Distillation:
    """Images and rates, and what learns them."""

    def __init__(self, ctx: DistillContext, config: DDConfig) -> None:
        self._ctx, self._config, self._step = ctx, config, 0
        shape, num_classes = ctx.dataset.image_shape, ctx.dataset.num_classes
        fixed = config.net_init == "fixed"  # drawn on the CPU, so that every device has the same network
        place = torch.device("cpu") if fixed else ctx.device
        self._net = build_net(ctx.arch, shape, num_classes, seed=ctx.seed, device=place).to(ctx.device)
        if not is_per_sample(self._net):
            raise InputError(
                f"dd needs a network without batch norm, got {ctx.arch}: a few steps give it no statistics; "
                "use another --arch"
            )
        self._fixed = flat_parameters(self._net) if fixed else None
        self._student = Student(self._net)
        _warn_of_the_unused(ctx, config)
        images, labels = initial_images(ctx, config.init)
        self._rows = step_rows(num_classes, ctx.ipc, config.images_per_step, config.distill_epochs)
        order = [torch.tensor(rows, device=ctx.device) for rows in self._rows]
        self._images, self._labels = images.contiguous().requires_grad_(True), labels
        raw = inverse_softplus(config.rate_start).to(ctx.device, torch.float32)
        self._raw_rates = raw.repeat(len(order)).requires_grad_(True)
        self._loss_of_step = ordered_loss(self._student, order, labels)
        learned = [self._images, self._raw_rates]
        self._optimizer = torch.optim.Adam(learned, lr=config.lr_img, betas=(0.5, 0.999))
        self._real, self._space = resident(ctx.split.images, ctx.device), ctx.space.to(ctx.device)
        self._real_labels = ctx.split.labels.to(ctx.device)

    def step(self) -> dict[str, Tensor]:
        """Take one step of Adam on images and rates."""
        self._step += 1
        config, num = self._config, 1 if self._fixed is not None else self._config.num_nets
        real, labels = self._real_batch(self._ctx.generator("step", self._step))

        def end_gradient(end: Tensor) -> tuple[Tensor, Tensor]:
            point = end.detach().requires_grad_(True)
            loss = F.cross_entropy(self._student.logits(point, real), labels)
            return loss, torch.autograd.grad(loss, point)[0]

        raw = self._raw_rates.detach()
        results = [
            sweep(self._loss_of_step, [self._images], self._start(number), F.softplus(raw), end_gradient)
            for number in range(num)
        ]
        self._images.grad = _mean([result.leaves[0] for result in results])
        self._raw_rates.grad = _mean([result.rates for result in results]) * torch.sigmoid(raw)
        halvings = (self._step - 1) // config.decay_every
        self._optimizer.param_groups[0]["lr"] = config.lr_img * 0.5**halvings
        self._optimizer.step()
        return {"loss": _mean([result.loss for result in results])}

    def _start(self, number: int) -> Tensor:
        """Return the first parameters of the iteration's network `number`."""
        if self._fixed is not None:
            return self._fixed
        reinitialize(self._net, derive_seed(self._ctx.seed, "distill", "net", self._step, number))
        return flat_parameters(self._net)

    def _real_batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return real images [N, C, H, W] in the pixel space, and their labels, on the device."""
        num = min(self._config.batch_real, len(self._real))
        index = torch.randperm(len(self._real), generator=generator)[:num]
        rows = to_device(index, self._real_labels.device)
        stored = to_device(self._real[to_device(index, self._real.device)], rows.device)
        images = self._space.encode(stored)
        if self._config.augment_real == "crop_flip" and not self._ctx.split.is_audio:
            bordered = F.pad(images, (_PADDING,) * 4, mode="reflect")
            shifted = crop_and_flip(bordered, generator, can_flip=self._ctx.dataset.can_flip)
            images = shifted[..., _PADDING:-_PADDING, _PADDING:-_PADDING]
        return images, self._real_labels[rows]

    def snapshot(self) -> DistilledSet:
        rates = F.softplus(self._raw_rates.detach()).clamp(min=torch.finfo(torch.float32).tiny).tolist()
        init_seed = None if self._fixed is None else self._ctx.seed
        schedule = Schedule(
            order=tuple(map(tuple, self._rows)),
            rates=tuple(rates),
            init=self._config.net_init,
            init_seed=init_seed,
        )
        return self._ctx.make_set(self._images, self._labels, extras=SetExtras(schedule=schedule))

    def state_dict(self) -> dict[str, Any]:
        """Return images, rates before softplus, Adam's averages, and the step count."""
        learned = {"images": self._images, "raw_rates": self._raw_rates}
        return {"step": self._step, **cpu_copy(learned), "optimizer": optimizer_state(self._optimizer)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step = int(state["step"])
        self._images.copy_(state["images"])
        self._raw_rates.copy_(state["raw_rates"])
        load_optimizer_state(self._optimizer, state["optimizer"])


def _warn_of_the_unused(ctx: DistillContext, config: DDConfig) -> None:
    if config.net_init == "fixed" and config.num_nets > 1:
        log.warning("num_nets=%d is not used: a fixed initialisation is one network", config.num_nets)
    if config.augment_real != "none" and ctx.split.is_audio:
        log.warning("augment_real=%s is not used: spectrograms are not augmented", config.augment_real)


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.stack(list(tensors)).mean(0)


def preset(name: str, target: Target) -> dict[str, Any]:
    """Return the settings of the paper's MNIST, or of its CIFAR-10 for colour images; both presets agree."""
    per_epoch = 49 if target.image_shape[0] == 3 else 59  # batches of 1,024
    method: dict[str, Any] = {"decay_every": 40 * per_epoch}
    if target.image_shape[0] == 3:
        method |= {"rate_start": 0.001, "augment_real": "crop_flip"}
    settings = {
        "steps": _EPOCHS * per_epoch,
        "pixel_space": "normalized",
        "evaluate": {"epochs": 1000, "augment": "none"},
        "method": method,
    }
    archs = {"mnist": "lenet", "fashion_mnist": "lenet", "cifar10": "alexcifar"}
    return {**settings, **({"arch": archs[target.dataset]} if target.dataset in archs else {})}


METHOD: Final = make_method(DDConfig, preset, Distillation, coupling=_COUPLING)
