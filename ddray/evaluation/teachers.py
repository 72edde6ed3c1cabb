"""Teachers of soft labels: networks of the model pool, their accuracy checked before use."""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ddray.data import PixelSpace, normalized_space
from ddray.errors import DdrayError
from ddray.evaluation.protocol import EvalContext
from ddray.evaluation.soft_recipes import Average
from ddray.nets import Net, check_arch
from ddray.pool.spec import ModelPool, teacher_spec
from ddray.training.loop import score_net
from ddray.training.recipe import Recipe


@dataclass(frozen=True)
class Teachers:
    """Networks whose probabilities are averaged (D3HR Sec 6.5), and their accuracy.

    Attributes:
        nets: on one device, in eval mode; batch norms may use the statistics of their batch (`set_up`).
        space: pixel space that they were trained in.
        arch: their names, joined by "+".
        accuracy: of the averaged probabilities on the context's split.
        each: one {"arch", "accuracy"} per network.
        average: what is averaged: the softened probabilities, or the logits before they are softened, also
            scaled so that each teacher's of a batch have the same norm.
    """

    nets: Sequence[Net]
    space: PixelSpace
    arch: str
    accuracy: float
    each: Sequence[dict[str, Any]]
    average: Average = "probabilities"

    def set_up(self, mode: Literal["eval", "train"], average: Average) -> Self:
        """Return teachers that label in this way; under `train` they are copies.

        `train`: batch norms normalise by the statistics of the batch, as in SRe2L's CIFAR code, which leaves
        its teacher in train mode. That moves its running averages too, which nothing reads; these stay.
        """
        nets = self.nets
        if mode == "train":
            nets = [copy.deepcopy(net) for net in nets]
            for norm in (m for net in nets for m in net.modules() if isinstance(m, _BatchNorm)):
                norm.train()
                norm.track_running_stats = False
        return replace(self, nets=nets, average=average)

    @torch.no_grad()
    def probabilities(self, images: Tensor, space: PixelSpace, temperature: float) -> Tensor:
        """Return soft labels [N, K] of images [N, C, H, W] that are in `space`."""
        each = [logits / temperature for logits in self._each(images, space)]
        if self.average != "probabilities":
            return F.softmax(self._mean(each), 1)
        return reduce(torch.add, (F.softmax(logits, 1) for logits in each)) / len(each)

    @torch.no_grad()
    def logits(self, images: Tensor, space: PixelSpace) -> Tensor:
        """Return the teachers' mean logits [N, K] of images [N, C, H, W] that are in `space`."""
        return self._mean(list(self._each(images, space)))

    def _mean(self, each: Sequence[Tensor]) -> Tensor:
        """Return the mean of the teachers' logits; `scaled_logits`: of logits scaled to their mean norm."""
        if self.average == "scaled_logits":
            norms = torch.stack([logits.norm() for logits in each])
            each = [logits * (norms.mean() / norm) for logits, norm in zip(each, norms, strict=True)]
        return reduce(torch.add, each) / len(each)

    def _each(self, images: Tensor, space: PixelSpace) -> Iterator[Tensor]:
        """Yield each teacher's logits [N, K]."""
        encoded = space.kind == self.space.kind == "normalized" and space.mean == self.space.mean
        if not (encoded and space.std == self.space.std):
            images = self.space.encode(space.decode(images))
        images = images.contiguous(memory_format=torch.channels_last)
        yield from (net(images) for net in self.nets)

    def describe(self) -> dict[str, Any]:
        """Return the command's JSON: arch and accuracy, and those of each teacher if there are several."""
        summary = {"arch": self.arch, "accuracy": self.accuracy}
        return {**summary, "each": list(self.each)} if len(self.each) > 1 else summary


def get_teachers(
    pool: ModelPool, archs: Sequence[str], recipe: Recipe, ctx: EvalContext, *, split_name: str
) -> Teachers:
    """Return teachers from the pool, their accuracy on the context's split measured and checked.

    `recipe` trains them on the part of the dataset called `split_name`. The same name twice in `archs`
    gives two networks with different seeds.

    Raises:
        DdrayError: a teacher is no better than chance: its labels would teach nothing.
    """
    names = [check_arch(arch) for arch in archs]
    specs = [
        teacher_spec(ctx.dataset, split_name, name, recipe, device=ctx.device, seed=names[:index].count(name))
        for index, name in enumerate(names)
    ]
    nets: list[Any] = [entry.module().to(ctx.device) for entry in pool.get(specs)]
    space = normalized_space(ctx.dataset)
    accuracies = [score_net(net, ctx.split, space, device=ctx.device).accuracy for net in nets]
    each = [{"arch": name, "accuracy": value} for name, value in zip(names, accuracies, strict=True)]
    least = least_accuracy(ctx.dataset.num_classes, len(ctx.split))
    for name, value in zip(names, accuracies, strict=True):
        if value <= least:  # a wrong label order is the usual reason, and makes students look broken
            raise DdrayError(
                f"teacher {name} must be better than chance before it teaches: its accuracy on "
                f"{ctx.dataset.name} is {value:.3f}, needed {least:.3f}; train it longer: "
                "--set teacher.epochs=N"
            )
    teachers = Teachers(nets, space.to(ctx.device), "+".join(names), accuracies[0], each)
    if len(nets) == 1:
        return teachers
    averaged: Any = partial(teachers.probabilities, space=teachers.space, temperature=1.0)
    score = score_net(averaged, ctx.split, space, device=ctx.device)
    return replace(teachers, accuracy=score.accuracy)


def least_accuracy(num_classes: int, num_images: int) -> float:
    """Return the accuracy that guessing hardly exceeds on `num_images`: chance + 3 standard errors."""
    if num_classes < 2:
        return 0.0
    chance = 1 / num_classes
    return min(0.9, chance + 3 * math.sqrt(chance * (1 - chance) / num_images))
