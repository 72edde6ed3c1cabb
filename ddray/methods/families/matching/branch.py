"""The real side of a matching method: batches by class, augmented as the synthetic images are, in chunks."""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ddray.distillation.method import DistillContext
from ddray.methods.families.matching.batches import ClassBatches, chunks, largest_map_bytes
from ddray.nets import Net, build_net, reinitialize
from ddray.seeding import derive_seed
from ddray.training.dsa import DsaPlan, siamese
from ddray.training.loop import train
from ddray.training.policies import augmenter
from ddray.training.recipe import Recipe

Statistics = Callable[[Net, Tensor], tuple[Tensor, ...]]
"""Per-sample statistics, each [N, D_l], of images [N, C, H, W] under a network."""


class RealBranch:
    """Batches of real images under a working network, and the augmentation they share with synthetic ones.

    Args:
        ctx: what to work on.
        batch_real: real images per class and step; capped by the smallest class.
        augment: `dsa` | `dsa_idc` | `none`.
        strategy: operations of the augmentation, joined by "_"; None: all of them.

    Attributes:
        batches: draws real images.
        net: the working network, in train mode; its weights are swapped in place.
        sample_bytes: of one image's largest map in it.
    """

    def __init__(
        self,
        ctx: DistillContext,
        batch_real: int,
        augment: Literal["dsa", "dsa_idc", "none"],
        strategy: str | None = None,
    ) -> None:
        self._ctx, self._augment = ctx, augment
        self.batches = ClassBatches(ctx, batch_real)
        self._dsa = siamese(ctx.dataset.can_flip, augment, strategy)
        shape, num_classes = ctx.dataset.image_shape, ctx.dataset.num_classes
        net = build_net(ctx.arch, shape, num_classes, seed=0, device=ctx.device)
        self.net = net.to(memory_format=torch.channels_last).train()
        self.sample_bytes = largest_map_bytes(net, ctx)

    def renew(self, net_index: int) -> None:
        """Give the network the fresh random weights of number `net_index`."""
        reinitialize(self.net, derive_seed(self._ctx.seed, "distill", "net", net_index))

    def train(
        self, images: Tensor, labels: Tensor, generator: torch.Generator, epochs: int, lr: float, batch: int
    ) -> None:
        """Train the network on synthetic images, augmented as for matching: SGD at one rate, no momentum."""
        recipe = Recipe(
            epochs=epochs,
            lr=lr,
            momentum=0.0,
            weight_decay=0.0,
            batch=batch,
            schedule="constant",
            augment=self._augment,
        )
        augment = augmenter(self._augment, can_flip=self._ctx.dataset.can_flip, space=self._ctx.space)
        train(self.net, images, labels.to(images.device), recipe, generator=generator, augment=augment)

    def draw(self, generator: torch.Generator) -> tuple[Tensor, DsaPlan | None]:
        """Return indices of real images [K * n], class-sorted, and augmentation parameters for each class."""
        index = self.batches.draw(generator)
        num_classes = self.batches.num_classes
        return index, self._dsa.draw(num_classes, generator, shared_op=False) if self._dsa else None

    def augmented(self, images: Tensor, plan: DsaPlan | None, labels: Tensor) -> Tensor:
        """Return images [N, C, H, W] under their classes' parameters, channels last; `labels` on the CPU."""
        if plan is not None and self._dsa is not None:
            images = self._dsa.apply(images, plan, labels)
        return images.contiguous(memory_format=torch.channels_last)

    def chunks(
        self, index: Tensor, plan: DsaPlan | None, labels: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows of `index` with their images, augmented: in chunks that fit a CPU's cache.

        Batch norm in train mode mixes samples: networks with it get one batch (as in other DM code).

        Args:
            index: real images [N].
            plan: the augmentation's parameters.
            labels: of the images, on the CPU; default: those of a whole draw.
        """
        labels = self.batches.labels_cpu if labels is None else labels
        mixes = any(isinstance(module, _BatchNorm) and module.training for module in self.net.modules())
        whole = [slice(0, len(index))]
        for rows in whole if mixes else chunks(len(index), self.sample_bytes, index.device):
            yield rows, self.augmented(self.batches.take(index[rows]), plan, labels[rows])

    @torch.no_grad()
    def class_means(self, index: Tensor, plan: DsaPlan | None, statistics: Statistics) -> list[Tensor]:
        """Return the class means [K, D_l] of the statistics of a draw's real images."""
        batches = self.batches
        sums: list[Tensor] = []
        for rows, images in self.chunks(index, plan):
            chunk = statistics(self.net, images)
            if not sums:
                sums = [values.new_zeros(batches.num_classes, values.shape[1]) for values in chunk]
            for total, values in zip(sums, chunk, strict=True):
                total.index_add_(0, batches.labels[rows], values)
        return [total.div_(batches.per_class) for total in sums]
