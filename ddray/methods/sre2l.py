"""SRe2L: squeeze, recover and relabel (Yin et al., NeurIPS 2023, arXiv:2306.13092; Eq 5-9).

Squeeze: a network with batch norm is trained on the real images (a pool entry). Recover: images start as
noise and minimise the network's cross entropy plus the distance of the batch's statistics, in every batch
norm layer, from the running ones. Relabel: soft labels are the protocol's (`evaluate --protocol soft`), whose
recipe `sre2l` is the authors' code.

Options that later work adds, all off by default: real images at the start (`init=random`), a weight of the
variances' distance (`r_var`; both DWA's), and CDA's curriculum of crops (Yin & Shen, TMLR 2024,
arXiv:2311.18838): `crop=cosine` with `milestone=1` is what its commands run, with lr, bn_weight, jitter .25,
.01, 32 on ImageNet and .4, .05, 4 on Tiny-ImageNet, 4,000 steps each. Call it sre2l with CDA's curriculum,
and compare it with `crop=fixed`, which SRe2L's own commands have there; for CIFAR neither code crops.

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
  100 and 200 epochs and does not say which is recovered from; ImageNet: torchvision's weights | `repo` up to
  32 px: the code's (`squeeze=crop_flip`); else SGD .05, batch 64, DSA for `teacher_epochs`' default.
- labels: by the squeezed network | the same | by the protocol's teacher, trained anew.
- flips: - | whatever the dataset | where a mirrored image keeps its class.
- pixels: - | CIFAR-100 with CIFAR-10's mean and deviation; stored as JPEG files | the dataset's own; floats.
- the last image or the best one: - | the last (its "best images" are overwritten by them) | the last.
"""

from typing import Any, Final, Literal

import torch
from torch import Tensor

from ddray.artifact.distilled_set import DistilledSet
from ddray.config import added
from ddray.distillation.method import DistillContext, Target
from ddray.methods.families.factory import make_method
from ddray.methods.families.matching.batches import step_graphs
from ddray.methods.families.matching.groups import image_bytes
from ddray.methods.families.matching.initial import initial_images
from ddray.methods.families.recovery import BETAS, Recovery, RecoveryConfig, pixel_range
from ddray.methods.families.state import cpu_copy, load_optimizer_state, optimizer_state
from ddray.system.memory import memory_budget
from ddray.training.engine import cosine

# The commands that the authors' code ships, with the defaults of options that they leave out.
_SHIPPED: Final[dict[str, dict[str, Any]]] = {
    "cifar": {
        "steps": 1000,
        "method": {
            **{"lr": 0.25, "bn_weight": 0.01, "jitter": 4},
            **{"teacher_epochs": 200, "squeeze": "crop_flip"},
        },
    },
    "tiny": {
        "steps": 4000,
        "method": {"lr": 0.1, "bn_weight": 1.0, "jitter": 4, "jitter_both_ways": True, "crop": "fixed"},
    },
    "imagenet": {"steps": 4000, "method": {"lr": 0.25, "bn_weight": 0.01, "jitter": 32, "crop": "fixed"}},
}


class SRe2LConfig(RecoveryConfig):
    """SRe2L's settings; defaults are those for small images."""

    init: Literal["noise", "random"] = added("noise")
    """Initial images: Gaussian noise, or random real ones."""

    @property
    def edition(self) -> int:
        """1 with crops, which once were mirrored whatever the dataset."""
        return int(self.crop != "none")


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
    """Images recovered from a network's batch norm statistics, from noise or real images on.

    Raises:
        InputError: the network has no batch norm, or the pixels are whitened.
    """

    def __init__(self, ctx: DistillContext, config: SRe2LConfig) -> None:
        self._ctx, self._config = ctx, config
        self._num_steps = max(1, int(ctx.config["steps"]))
        self._recovery = Recovery(ctx, config)
        images, self._labels = initial_images(ctx, config.init)
        self._images = images.requires_grad_(True)
        self._optimizer = torch.optim.Adam([self._images], lr=config.lr, betas=BETAS)
        self._low, self._high = pixel_range(ctx)
        self._num_batches = self._batches_at_once()
        self._classes = torch.arange(ctx.dataset.num_classes, device=ctx.device).repeat(self._num_batches)
        self._graphs = step_graphs(ctx)
        self._step = 0

    def step(self) -> dict[str, Tensor]:
        """Take one optimiser step over all batches of one image per class."""
        ctx, recovery = self._ctx, self._recovery
        progress = self._step / self._num_steps
        self._optimizer.param_groups[0]["lr"] = self._config.lr * cosine(self._step, self._num_steps)
        self._step += 1
        generator = ctx.generator("step", self._step)
        total = torch.zeros((), device=ctx.device)
        gradient = torch.empty_like(self._images)
        for first in range(0, ctx.ipc, self._num_batches):
            part = slice(first, first + self._num_batches)
            images = self._by_class(self._images.detach())[:, part].requires_grad_(True)
            views = torch.cat([recovery.view(batch, generator, progress) for batch in images.unbind(1)])
            loss, outer = self._graphs(recovery.gradient, (views.detach(), self._classes[: len(views)]))
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

    def _batches_at_once(self) -> int:
        """Return how many batches go through the network at once: on a CPU one, which the cache holds."""
        ctx, net = self._ctx, self._recovery.net
        if ctx.device.type == "cpu":
            return 1
        blank = torch.zeros(2, *ctx.dataset.image_shape, device=ctx.device)
        blank = blank.contiguous(memory_format=torch.channels_last)
        with self._recovery.statistics.watch():
            size = image_bytes(net, blank, max(net.map_bytes()), net.parameters())
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
