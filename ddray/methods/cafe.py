"""CAFE: learning to condense by aligning features (Wang et al., CVPR 2022; Sec 3.2-3.4).

Along a network's training on the synthetic images, each step moves them so that the class means of all
layers' features match the real ones' (layer-wise alignment), and real images are told apart by their product
with the synthetic class means (discrimination loss). How long a network is trained between two steps, and
when a fresh one is taken, follows its accuracy on real images (dynamic bi-level optimisation).

**Deviations** (authors' code | ours)

- a step: all updates under one network, 2,000 of them | one update of the images, 20,000 of them: a network
  serves for ten or more.
- loops end by their accuracies alone | also after `max_outer` and `max_inner` turns.
- accuracies: each adds a tenth of the one before (the sum is never reset) | plain.
- rate of the images: halved after 1,200, 1,600 and 1,800 of 2,000 networks | at the same fractions of the
  steps.
- layer weights: .1, .1, 1 for ConvNet-3's maps, 1 + 1 for the embedding | the same; `early_weight` for all
  but the last map of a deeper one.
- augmentation and network seeds: wall clock | derived from the run's seed. `augment=dsa` is CAFE+DSA.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ddray.distillation.method import DistillContext, Target
from ddray.methods.families.factory import make_method
from ddray.methods.families.matching.batches import ClassBatches, ImagesConfig, ImagesEngine, chunks
from ddray.methods.families.matching.partitioned import by_class
from ddray.methods.families.state import copy_values, cpu_copy
from ddray.nets import Net

_MILESTONES: Final = (0.6, 0.8, 0.9)


class CAFEConfig(ImagesConfig):
    """CAFE's settings."""

    quick: ClassVar = {"batch_real": 8, "batch_train": 16, "batch_query": 4, "max_inner": 3, "window": 2}
    uses_maps: ClassVar = True

    early_weight: float = Field(default=0.1, ge=0)
    """Weight of the alignment of every map but the last."""
    discrimination: float = Field(default=0.01, ge=0)
    """Weight of the discrimination loss, summed over the real images."""
    outer_gap: float = Field(default=0.04, ge=0)
    """A network is replaced when its accuracy varied by less than this over the window (lambda 1)."""
    inner_gap: float = Field(default=0.03, ge=0)
    """Its training pauses when its accuracy varied by more than this over the window (lambda 2)."""
    window: int = Field(default=10, ge=1)
    """Number of latest accuracies that are compared."""
    max_outer: int = Field(default=50, ge=1)
    """Maximum number of steps under one network."""
    max_inner: int = Field(default=50, ge=1)
    """Maximum number of its training epochs between two steps."""
    batch_query: int = Field(default=128, ge=1)
    """Real images per class that an accuracy is measured on."""
    lr_net: float = Field(default=0.01, gt=0)
    """Learning rate of the network (SGD without momentum)."""
    batch_train: int = Field(default=256, ge=1)
    """Synthetic images per batch of its training."""


def cafe_loss(
    real: Sequence[Tensor],
    synthetic: Sequence[Tensor],
    embedded: Tensor,
    labels: Tensor,
    *,
    early_weight: float,
    discrimination: float,
) -> Tensor:
    """Return the layer-wise alignment plus the weighted discrimination loss.

    `real` and `synthetic` are class means of every map [K, D_l], then of the embedding [K, d]. Every map but
    the last weighs `early_weight`; the last counts once, the embedding twice. `discrimination` weighs the
    cross entropy of <embedding, synthetic class mean>, summed over the real images, whose embeddings are
    `embedded` [N, d] and whose labels are int64 [N].
    """
    weights = [*[early_weight] * (len(real) - 2), 1.0, 2.0]
    total = F.cross_entropy(embedded @ synthetic[-1].T, labels, reduction="sum") * discrimination
    for weight, a, b in zip(weights[-len(real) :], real, synthetic, strict=True):
        total = total + weight * (a - b).square().sum()
    return total


def preset(name: str, target: Target) -> dict[str, Any]:
    """Return the settings of the authors' code, for both presets."""
    return {"steps": 20_000, "evaluate": {"epochs": 600, "augment": "none"}}


class Accuracies:
    """The latest `window` accuracies of a network on `num` images; waited for only where they decide."""

    def __init__(self, window: int, num: int) -> None:
        self.num, self._window = num, window
        self._read: list[float] = []
        self._unread: list[Tensor] = []

    def add(self, num_right: Tensor) -> None:
        """Add how many images were classified correctly, a scalar on the device."""
        self._unread.append(num_right)

    def values(self) -> list[float]:
        """Return the accuracies, the oldest first."""
        if self._unread:
            latest = torch.stack(self._unread).tolist()
            self._read = [*self._read, *(right / self.num for right in latest)][-self._window :]
            self._unread = []
        return list(self._read)

    def spread(self, otherwise: float) -> float:
        """Return the largest less the smallest of a full window, `otherwise` of fewer."""
        if len(self._read) + len(self._unread) < self._window:
            return otherwise
        return max(self.values()) - min(self.values())

    def load(self, values: Sequence[float]) -> None:
        """Begin with accuracies."""
        self._read, self._unread = [float(value) for value in values], []


class CAFE(ImagesEngine):
    """Condensing by aligning features."""

    def __init__(self, ctx: DistillContext, config: CAFEConfig) -> None:
        super().__init__(ctx, config)
        self._config, self._num_steps = config, int(ctx.config["steps"])
        self._net = self._branch.net
        self._queries = ClassBatches(ctx, config.batch_query)
        self._labels_cpu = self._labels.cpu()
        self._num_nets = self._turns = 0
        self._accuracies = Accuracies(config.window, len(self._queries.labels))

    def step(self) -> dict[str, Tensor]:
        """Update the images under the current network, then train it on them, or replace it."""
        config = self._config
        self._step += 1
        generator = self._ctx.generator("step", self._step)
        if self._turns == 0:
            self._num_nets += 1
            self._branch.renew(self._num_nets)
        loss = self._update_images(generator)
        self._turns += 1
        self._accuracies.add(self._num_right(generator))
        if self._turns == config.max_outer or self._accuracies.spread(math.inf) < config.outer_gap:
            self._turns = 0
            self._accuracies.load([])
        else:
            self._train_net(generator)
        return {"loss": loss}

    def _update_images(self, generator: torch.Generator) -> Tensor:
        """Align features of one batch; return the loss."""
        branch, config, num_classes = self._branch, self._config, self._ctx.dataset.num_classes
        embedded: list[Tensor] = []

        def statistics(net: Net, images: Tensor) -> tuple[Tensor, ...]:
            _, embedding, maps = net.features(images)
            embedded.append(embedding)
            return tuple(values.flatten(1) for values in (*maps, embedding))

        index, plan = branch.draw(generator)
        real = branch.class_means(index, plan, statistics)
        embedded_real = torch.cat(embedded)
        synthetic = statistics(self._net, branch.augmented(self._images, plan, self._labels_cpu))
        loss = cafe_loss(
            real,
            [by_class(values, num_classes).mean(1) for values in synthetic],
            embedded_real,
            branch.batches.labels,
            early_weight=config.early_weight,
            discrimination=config.discrimination,
        )
        halved = sum(self._step - 1 >= part * self._num_steps for part in _MILESTONES)
        self._optimizer.param_groups[0]["lr"] = config.lr_img * 0.5**halved
        (self._images.grad,) = torch.autograd.grad(loss, self._images)
        self._optimizer.step()
        return loss.detach()

    def _train_net(self, generator: torch.Generator) -> None:
        """Train the network on the images until its accuracy has moved."""
        config, images = self._config, self._images.detach()
        accuracies = Accuracies(config.window, self._accuracies.num)
        for _ in range(config.max_inner):
            self._branch.train(
                images, self._labels, generator, epochs=1, lr=config.lr_net, batch=config.batch_train
            )
            self._net.train()
            accuracies.add(self._num_right(generator))
            if accuracies.spread(0.0) > config.inner_gap:
                break

    @torch.no_grad()
    def _num_right(self, generator: torch.Generator) -> Tensor:
        """Return how many real images, equally many of every class, the network classifies correctly."""
        index = self._queries.draw(generator)
        device = self._queries.labels.device
        right = torch.zeros((), device=device)
        for rows in chunks(len(index), self._branch.sample_bytes, device):
            images = self._queries.take(index[rows]).contiguous(memory_format=torch.channels_last)
            right += (self._net(images).argmax(1) == self._queries.labels[rows]).sum()
        return right

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "net": cpu_copy(list(self._net.state_dict().values())),
            "made": self._num_nets,
            "turns": self._turns,
            "accuracies": self._accuracies.values(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._num_nets, self._turns = int(state["made"]), int(state["turns"])
        self._accuracies.load(state["accuracies"])
        copy_values(self._net, state["net"])


_SCHEDULE: Final = "its learning rate is halved after 60, 80 and 90 % of the steps"
_COUPLING: Final = "its network is trained on the images of all classes, and its loss compares classes"
METHOD: Final = make_method(CAFEConfig, preset, CAFE, depends_on_steps=_SCHEDULE, coupling=_COUPLING)
