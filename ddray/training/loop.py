"""Training a network by a recipe, augmented by name: for protocols, the pool and methods' inner loops."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.data import PixelSpace, Split
from ddray.nets import Net, training_format
from ddray.seeding import derive_seed, forked_global
from ddray.training.cutmix import cutmix, mixed_cross_entropy
from ddray.training.dsa import siamese
from ddray.training.embedding import Score, score
from ddray.training.engine import Batch, Order, Rule, Step, run
from ddray.training.recipe import Augment, Recipe

Augmenter = Callable[[Tensor, torch.Generator], Tensor]


def train(
    net: Net,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    *,
    generator: torch.Generator,
    augment: Augmenter | None,
    on_epoch: Callable[[Tensor], None] | None = None,
    regress: bool = False,
) -> Tensor:
    """Train `net` in place, leave it in eval mode, and return the mean loss of the last epoch.

    The loss is a scalar on the device, which nothing has waited for.

    Args:
        net: the network, on the images' device.
        images: float32 [N, C, H, W] in their pixel space, or what `augment` takes.
        labels: int64 [N], float32 [N, K] (soft labels, probabilities), or targets [N, D] if `regress`.
        recipe: epochs, rates, batch, schedule, CutMix; not its augmentation.
        generator: CPU generator of the batches' order and the augmentation.
        augment: applied to every batch, before CutMix; None leaves it as it is.
        on_epoch: called with each epoch's mean loss, a scalar on the device.
        regress: train on the mean squared error from the targets, instead of on the cross entropy.
    """
    form = training_format(net, images.device)
    images = images.contiguous(memory_format=form)
    net.to(memory_format=form).train()
    epoch = len(Order(len(labels), recipe.batch).sizes)
    loss = torch.zeros(())
    for rates in _phases(recipe):
        loss = run(
            training_step(net, recipe, len(rates) * epoch, regress=regress),
            training_batches(images, labels, recipe, generator=generator, augment=augment, regress=regress),
            lr=lambda step, rates=rates: rates[step // epoch],  # type: ignore[misc]
            epoch=epoch,
            on_epoch=on_epoch,
        )
    net.to(memory_format=torch.channels_last).eval()
    return loss


def training_batches(
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    *,
    generator: torch.Generator,
    augment: Augmenter | None,
    regress: bool = False,
) -> Iterator[Batch]:
    """Yield the batches of a training, without end, in random order, augmented and mixed; see `train`."""
    for index in Order(len(labels), recipe.batch).indices(generator, images.device):
        inputs = images[index]
        if augment is not None:
            inputs = augment(inputs, generator)
        mixed = cutmix(inputs, recipe.cutmix, generator) if recipe.cutmix > 0 and not regress else None
        yield (inputs, labels[index]) if mixed is None else (mixed.images, *mixed.targets(labels[index]))


def training_step(net: Net, recipe: Recipe, num_steps: int, *, regress: bool = False) -> Step:
    """Return the engine's step that trains `net` by a recipe, `num_steps` times in all trainings together.

    Of several trainings, each begins with the momentum that the one before has left.
    """
    optimizer = partial(torch.optim.SGD, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    return Step([net], Rule(F.mse_loss if regress else mixed_cross_entropy, optimizer), num_steps=num_steps)


def _phases(recipe: Recipe) -> list[list[float]]:
    """Return the rate of every epoch, in phases: a phase has an optimiser of its own, so fresh momentum."""
    if recipe.schedule == "vico":  # the peers re-create the optimiser after epoch E // 2 + 1 of E + 1
        first = min(recipe.epochs // 2 + 2, recipe.epochs + 1)
        phases = [recipe.lr] * first, [recipe.lr * 0.1] * (recipe.epochs + 1 - first)
        return [rates for rates in phases if rates]
    return [[recipe.lr * _factor(recipe, epoch) for epoch in range(recipe.epochs)]]


def _factor(recipe: Recipe, epoch: int) -> float:
    """Return the schedule's factor on lr in an epoch counted from 0."""
    if recipe.schedule == "step15":
        return float(0.5 ** (epoch // 15))
    if recipe.schedule == "multistep":
        return float(0.2 ** sum(epoch >= recipe.epochs * sixths // 6 for sixths in (4, 5)))
    if recipe.schedule == "cosine":
        return 0.5 * (1.0 + float(torch.cos(torch.tensor(torch.pi * epoch / recipe.epochs))))
    return 1.0


def score_net(
    net: Net, split: Split, space: PixelSpace, *, device: torch.device, chunk: int | None = None
) -> Score:
    """Return the fractions of a split that `net` (in eval mode, trained in `space`) classifies correctly."""
    return score(net, split.images, split.labels, space.to(device).encode, device, chunk=chunk)


def augmenter(
    name: Augment, *, can_flip: bool, space: PixelSpace, strategy: str | None = None
) -> Augmenter | None:
    """Return the augmentation called `name` for batches [N, C, H, W] in `space`; None if it does nothing.

    `dsa` and `dsa_idc`: per-sample parameters, one op for a batch (`dsa`) as at the peers' evaluation; of all
    operations or those of `strategy`, without flip unless mirrored images keep their class (`can_flip`).
    `autoaugment` and `randaugment`: torchvision's policies on the pixels as 8-bit images, image by image
    (DataDAM supplement, Fig 4).

    Raises:
        InputError: the strategy names an unknown operation.
    """
    if name == "autoaugment" or name == "randaugment":
        return _policy(name, space)
    dsa = siamese(can_flip, name, strategy)
    if dsa is None:
        return None

    def apply(batch: Tensor, generator: torch.Generator) -> Tensor:
        return dsa.apply(batch, dsa.draw(len(batch), generator, shared_op=True))

    return apply


def _policy(name: str, space: PixelSpace) -> Augmenter:
    """Return torchvision's AutoAugment or RandAugment on batches in `space`."""
    from torchvision.transforms import v2

    transform = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10) if name == "autoaugment" else v2.RandAugment()
    spaces: dict[torch.device, PixelSpace] = {}  # a whitening's inverse is computed once, not per batch

    def apply(batch: Tensor, generator: torch.Generator) -> Tensor:
        if (device := batch.device) not in spaces:
            spaces[device] = space.to(device)
        device_space = spaces[device]
        pixels = (device_space.decode(batch).clamp(0, 1) * 255).round().to(torch.uint8)
        seed = int(torch.randint(2**62, (), generator=generator))
        with forked_global(derive_seed(seed, "augment")):
            changed = torch.stack([transform(image) for image in pixels])
        return device_space.encode(changed).contiguous(memory_format=torch.channels_last)

    return apply
