"""IDM's settings and engine, shared with ESFR (Zhao et al., CVPR 2023).

Networks that are trained a little while they are used, and DM's loss plus the cross entropy of the synthetic
images under the drawn one.
"""

from typing import Any, ClassVar, Final, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ddray.distillation.method import DistillContext
from ddray.methods.families.matching.draws import MANY_IMAGES, distinct
from ddray.methods.families.matching.groups import rows_of
from ddray.methods.families.matching.partitioned import PartitionedConfig, PartitionedEngine, by_class
from ddray.methods.families.matching.queue import NetQueue
from ddray.methods.families.state import copy_values
from ddray.nets import Features
from ddray.system.transfer import to_device

IDM_COUPLING: Final = "its queue of networks is trained on images of all classes, one batch after another"
_FIRST_NETS: Final = 3


class IDMConfig(PartitionedConfig):
    """IDM's settings."""

    quick: ClassVar = {**PartitionedConfig.quick, "net_steps": 2, "batch_train": 16}

    lr_img: float = Field(default=0.2, gt=0)
    """Learning rate of the images (SGD)."""
    momentum: float = Field(default=0.5, ge=0, lt=1)
    """Momentum of the images' SGD."""
    augment: Literal["dsa", "dsa_idc", "none"] = "dsa"
    """Siamese augmentation: the same parameters for real and synthetic images, a fresh draw per class."""
    unit_pixels: bool = False
    """Learn pixels in [0, 1], clamped at each step; off: in the pixel space of the run, never clamped."""
    ce_weight: float = Field(default=0.5, ge=0)
    """Weight of the cross entropy, per percent of the network's accuracy."""
    accuracy_window: int = Field(default=100, ge=1)
    """Steps after which the accuracy counts restart."""
    queue_size: int = Field(default=100, ge=1)
    """Maximum number of networks in the queue."""
    push_every: int = Field(default=30, ge=1)
    """Steps between two fresh networks."""
    num_trained: int = Field(default=2, ge=0)
    """Networks of the queue that are trained after each step."""
    net_steps: int = Field(default=10, ge=1)
    """Batches that each of them is trained on."""
    batch_train: int = Field(default=256, ge=1)
    """Real images per batch."""
    lr_net: float = Field(default=0.01, gt=0)
    """Learning rate of the networks."""


def idm_loss(
    real: Tensor, synthetic: Tensor, logits: Tensor, labels: Tensor, *, weight: Tensor | float
) -> Tensor:
    """Return the sum over classes of ||mean real_c - mean syn_c||^2 + weight * CE_c.

    Features are real [K, n, d] and synthetic [K, m, d]; logits [K * m, K] and labels, int64 [K * m], are the
    synthetic images', equally many per class.
    """
    matching = (real.mean(1) - synthetic.mean(1)).square().sum()
    return matching + weight * len(real) * F.cross_entropy(logits, labels)


class IDM(PartitionedEngine):
    """Improved distribution matching."""

    def __init__(self, ctx: DistillContext, config: IDMConfig) -> None:
        super().__init__(ctx, config)
        self._config = config
        self._pairs.net.eval()
        self._labels = ctx.split.labels.to(ctx.device)
        classes = torch.arange(self._pairs.num_classes, device=ctx.device)
        self._class_labels = classes.repeat_interleave(self._pairs.per_class)
        num_steps = ctx.config["steps"] * config.num_trained * config.net_steps
        self._queue = NetQueue(ctx, size=config.queue_size, lr=config.lr_net, num_steps=num_steps)
        for _ in range(_FIRST_NETS):
            self._queue.push()

    def step(self) -> dict[str, Tensor]:
        """Match one batch under a network of the queue, update the images, then train some of the queue."""
        config, pairs, queue = self._config, self._pairs, self._queue
        if self._step % config.push_every == 0:
            queue.push()
        if self._step % config.accuracy_window == 0:
            queue.forget_accuracies()
        self._step += 1
        generator = self._ctx.generator("step", self._step)
        member = queue.members[int(torch.randint(len(queue.members), (), generator=generator))]
        copy_values(pairs.net, member.net.state_dict().values())
        self._learned.clamp()
        weight = config.ce_weight * 100 * member.accuracy()
        loss = self._match(
            pairs.draw(generator),
            lambda classes: (self._class_labels[rows_of(classes, pairs.per_class)], weight),
        )
        self._train(generator)
        return {"loss": loss}

    def _loss(self, images: Tensor, real: Tensor, *others: Tensor) -> Tensor:
        return self._loss_of(self._pairs.net.features(images), images, real, *others)

    def _loss_of(self, features: Features, images: Tensor, real: Tensor, *others: Tensor) -> Tensor:
        """Return the loss of some classes' mini-images from what the network makes of them."""
        labels, weight = others
        return idm_loss(real, by_class(features.embedding, len(real)), features.logits, labels, weight=weight)

    def _train(self, generator: torch.Generator) -> None:
        """Train `num_trained` networks of the queue, drawn without repetition."""
        positions = torch.randperm(len(self._queue.members), generator=generator)[: self._config.num_trained]
        for position in positions.tolist():
            for _ in range(self._config.net_steps):
                index = to_device(self._real_batch(generator), self._labels.device)
                self._queue.train(position, self._pairs.batches.take(index), self._labels[index])

    def _real_batch(self, generator: torch.Generator) -> Tensor:
        """Return indices of `batch_train` different real images."""
        num, batch = len(self._labels), self._config.batch_train
        if num < MANY_IMAGES:
            return torch.randperm(num, generator=generator)[:batch]
        return distinct(torch.tensor([num]), min(num, batch), generator)[0]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "queue": self._queue.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._queue.load_state_dict(state["queue"])
