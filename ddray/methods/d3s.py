"""D3S by its definition: large-scale distillation (Loo et al., ICML 2024) as a later paper reviews it.

Images minimise, averaged over several networks that were trained on the real images, the cross entropy plus
the sum over layers of KL(N(mu_T, S_T) || N(mu_S, S_S)): Gaussians of the real (T) and the distilled (S)
images' activations behind every batch norm, averaged over the pixels, with their full covariances. Soft
labels are the protocol's (`evaluate --protocol soft`). Neither the paper's text nor code was to be had, so
these are never the authors' D3S, and no number of theirs may be set beside one of these.

**Deviations** (definition | ours)

- networks: five ResNet-18 of seeds 0 to 4 in D3HR's evaluation | these by default; all of them in every step.
- weights of the terms: not stated | `kl_weight` on the sum over layers, divided by each layer's channels
  (`per_channel`), as the covariance term grows with them.
- ridge: not stated, but n images have a singular covariance for n <= channels, and a dead channel makes the
  real one singular | `ridge` times the mean real variance of a layer on both diagonals; float64.
- a set larger than a batch: running averages estimate mu_S and S_S | of first and second moments, from 0 and
  corrected for that; their value and the batch's own gradient. Every step goes through all batches.
- soft labels: by these networks | by the protocol's teacher, one ResNet-18 unless `--teacher` names more.
- start, views, optimiser, iterations: not stated | random real images, none, Adam (.5, .9) .1 with a cosine
  to 0, 1,000 steps.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Final, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ddray.artifact.distilled_set import DistilledSet
from ddray.distillation.method import DistillContext, MethodConfig, Target
from ddray.errors import InputError
from ddray.methods.families.activations import (
    ActivationRecipe,
    activation_spec,
    covariance_of,
    entering,
    layer_statistics,
    load_averages,
    moments,
    update_average,
    watched_layers,
    watching,
)
from ddray.methods.families.factory import make_method
from ddray.methods.families.matching.initial import initial_images
from ddray.methods.families.recovery import BETAS, check_batch_norm, pixel_range
from ddray.methods.families.state import cpu_copy, load_optimizer_state, optimizer_state
from ddray.pool.spec import PoolEntry, PoolSpec, teacher_spec
from ddray.training.engine import cosine
from ddray.training.recipe import TeacherRecipe

_STATISTICS: Final = ActivationRecipe(layers="norms", statistics=("covariance",))


class D3SConfig(MethodConfig):
    """D3S's settings; all but the networks are ours."""

    protocol: ClassVar = "soft"
    quick: ClassVar = {"teacher_arch": "convnet2_w8_bn", "num_teachers": 2, "teacher_epochs": 1, "batch": 4}
    search_space: ClassVar = {
        "lr": {"loguniform": [0.01, 0.5]},
        "kl_weight": {"loguniform": [0.001, 1.0]},
        "ridge": {"loguniform": [0.01, 1.0]},
    }
    dataset_settings: ClassVar = {
        "digits": {
            "steps": 500,
            "evaluate": {"epochs": 300},
            "method": {"teacher_arch": "convnet3_w32_bn", "num_teachers": 3, "teacher_epochs": 20},
        }
    }

    teacher_arch: str = "resnet18"
    """The networks; they need batch norm."""
    num_teachers: int = Field(default=5, ge=1)
    """How many, of seeds 0, 1, ..."""
    teacher_epochs: int = Field(default=50, ge=1)
    """Epochs of their training on the real images."""
    teacher_lr: float = Field(default=0.05, gt=0)
    """Its learning rate (SGD, cosine)."""
    lr: float = Field(default=0.1, gt=0)
    """Learning rate of the pixels (Adam .5, .9; cosine to 0)."""
    kl_weight: float = Field(default=1.0, ge=0)
    """Weight of the divergences beside the cross entropy."""
    per_channel: bool = True
    """Whether a layer's divergence is divided by its channels."""
    ridge: float = Field(default=0.1, ge=0)
    """Added to both covariances' diagonals, as a fraction of the layer's mean real variance."""
    batch: int = Field(default=500, ge=1)
    """Images that go through a network at a time; a larger set is estimated by running averages."""
    decay: float = Field(default=0.9, ge=0, lt=1)
    """Factor on these averages before every batch."""
    init: Literal["random", "noise"] = "random"
    """Initial images: random real ones, or Gaussian noise."""


def preset(name: str, target: Target) -> dict[str, Any]:
    """Return our settings for both presets: the definition has none."""
    return {"steps": 1000, "evaluate": {"epochs": 1000, "augment": "dsa"}}


def gaussian_kl(
    mean: Tensor, covariance: Tensor, set_mean: Tensor, set_covariance: Tensor, *, ridge: Tensor | float = 0.0
) -> Tensor:
    """Return KL(N(mean, covariance) || N(set_mean, set_covariance)), a scalar.

    That is .5 [tr(S_S^-1 S_T) + d' S_S^-1 d - D + ln|S_S| - ln|S_T|], d = mu_S - mu_T. Means are [D],
    covariances [D, D], both with `ridge` on their diagonals first; NaN where one is not positive definite.
    """
    eye = ridge * torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
    real, (factor, real_factor) = covariance + eye, map(_factor, (set_covariance + eye, covariance + eye))
    shift = (set_mean - mean)[:, None]
    trace = torch.cholesky_solve(real, factor).diagonal().sum()
    distance = (shift * torch.cholesky_solve(shift, factor)).sum()
    return 0.5 * (trace + distance - len(mean) + _log_determinant(factor) - _log_determinant(real_factor))


def _factor(matrix: Tensor) -> Tensor:
    """Return the Cholesky factor without waiting for the device; NaN if there is none."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return torch.where(failed == 0, factor, torch.nan)


def _log_determinant(factor: Tensor) -> Tensor:
    return 2 * factor.diagonal().log().sum()


class _Network:
    """A network with the real Gaussians of its layers, and running averages of the set's moments.

    Attributes:
        averages: (mean, second moments) of each layer, before the correction for their start at 0.
    """

    def __init__(self, net: nn.Module, entry: PoolEntry, config: D3SConfig) -> None:
        self._net, self._config = net, config
        self._layers = watched_layers(net, "norms")
        device = next(net.parameters()).device
        real = layer_statistics(entry, device, torch.float64)
        self._real = [(mean, covariance_of(mean, second)) for mean, second in real]
        self._ridges = [config.ridge * covariance.diagonal().mean() for _, covariance in self._real]
        self.averages = [[torch.zeros_like(value) for value in values] for values in real]

    def losses(self, images: Tensor, labels: Tensor, share: float | None) -> Tensor:
        """Return the loss of a batch [n, C, H, W].

        `share` is what the batches so far have of the running averages, 1 - decay^t with this one; None: the
        batch is the whole set, and its own moments enter.
        """
        collected: dict[int, tuple[Tensor, Tensor]] = {}
        with watching(
            self._layers, lambda index, maps: collected.update({index: moments(maps)}), outputs=True
        ):
            logits = self._net(images)
        total = torch.zeros((), dtype=torch.float64, device=images.device)
        for index, batch in collected.items():
            mean, second = batch if share is None else self._averaged(index, batch, share)
            divergence = gaussian_kl(
                *self._real[index], mean, covariance_of(mean, second), ridge=self._ridges[index]
            )
            total = total + divergence / (len(mean) if self._config.per_channel else 1)
        return F.cross_entropy(logits, labels) + self._config.kl_weight * total.to(logits.dtype)

    def _averaged(self, index: int, batch: Sequence[Tensor], share: float) -> list[Tensor]:
        entered = []
        for average, value in zip(self.averages[index], batch, strict=True):
            update_average(average, value, self._config.decay)
            entered.append(entering(average / share, value))
        return entered


class D3S:
    """Images learned from the Gaussians of several networks' activations.

    Raises:
        InputError: the networks have no batch norm, or the pixels are whitened or raw.
    """

    def __init__(self, ctx: DistillContext, config: D3SConfig) -> None:
        if ctx.space.kind != "normalized":
            raise InputError(f"d3s needs pixel_space=normalized, got {ctx.space.kind}")
        check_batch_norm(config.teacher_arch, "d3s")
        self._ctx, self._config = ctx, config
        self._nets = _networks(ctx, config)
        self._num_steps = max(1, int(ctx.config["steps"]))
        images, self._labels = initial_images(ctx, config.init)
        self._images = images.requires_grad_(True)
        self._optimizer = torch.optim.Adam([self._images], lr=config.lr, betas=BETAS)
        self._low, self._high = pixel_range(ctx)
        self._num_batches = -(-len(images) // config.batch)
        self._step = 0

    def step(self) -> dict[str, Tensor]:
        """Take one optimiser step over all batches, each of which has images of every class, and networks."""
        config, num = self._config, self._num_batches
        self._optimizer.param_groups[0]["lr"] = config.lr * cosine(self._step, self._num_steps)
        total = torch.zeros((), device=self._images.device)
        gradient = torch.zeros_like(self._images)
        for index in range(num):
            part = slice(index, None, num)  # rows are sorted by class
            images = self._images.detach()[part].contiguous(memory_format=torch.channels_last)
            images.requires_grad_(True)
            share = None if num == 1 else 1 - config.decay ** (self._step * num + index + 1)
            for net in self._nets:
                loss = net.losses(images, self._labels[part], share) / (num * len(self._nets))
                gradient[part] += torch.autograd.grad(loss, images)[0]
                total += loss.detach()
        self._step += 1
        self._images.grad = gradient
        self._optimizer.step()
        with torch.no_grad():
            self._images.clamp_(self._low, self._high)
        return {"loss": total}

    def snapshot(self) -> DistilledSet:
        return self._ctx.make_set(self._images, self._labels)

    def state_dict(self) -> dict[str, Any]:
        """Return images, Adam's moments, the step, and the running averages where the set needs them."""
        state = {"step": self._step, "images": cpu_copy(self._images)}
        averages = [net.averages for net in self._nets] if self._num_batches > 1 else []
        of_adam = optimizer_state(self._optimizer).get(0, {})
        return {**state, "moments": of_adam, "averages": cpu_copy(averages)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step = int(state["step"])
        self._images.copy_(state["images"])
        for net, stored in zip(self._nets, state["averages"], strict=False):
            load_averages(net.averages, stored)
        load_optimizer_state(self._optimizer, {0: state["moments"]} if state["moments"] else {})


def _networks(ctx: DistillContext, config: D3SConfig) -> list[_Network]:
    entries, num = ctx.pool.get(pool_specs(ctx, config)), config.num_teachers
    networks = [entry.module() for entry in entries[:num]]
    return [
        _Network(
            net.requires_grad_(False).to(ctx.device).to(memory_format=torch.channels_last), entry, config
        )
        for net, entry in zip(networks, entries[num:], strict=True)
    ]


def pool_specs(ctx: DistillContext, config: D3SConfig) -> list[PoolSpec]:
    """Return the specs of the networks, then of their real statistics."""
    recipe = TeacherRecipe(epochs=config.teacher_epochs, lr=config.teacher_lr)
    networks = [
        teacher_spec(ctx.dataset, ctx.split_name, config.teacher_arch, recipe, device=ctx.device, seed=seed)
        for seed in range(config.num_teachers)
    ]
    return [*networks, *(activation_spec(network, _STATISTICS) for network in networks)]


_SCHEDULE: Final = "its learning rate falls as a cosine over the steps"
_COUPLING: Final = "it matches covariances of images of all classes together"
METHOD: Final = make_method(
    D3SConfig, preset, D3S, specs_of=pool_specs, depends_on_steps=_SCHEDULE, coupling=_COUPLING
)
