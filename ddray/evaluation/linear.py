"""Protocol `linear` (Boost-SSDD Sec 3.4, A.1): pre-train on the set, freeze, train a linear classifier.

A fresh network is trained on the set's targets (mean squared error) or labels (cross entropy); its
embeddings of un-augmented target images are computed once, and a linear probe is trained on them. Source and
target may be different datasets: target images are resized to the set's shape.

KRR-ST's own tables fine-tune the whole network instead (`finetune`).

**Deviations** (paper | ours)

- supervised sets: pre-trained by cross entropy, the recipe is not given | by the set's own recipe (for the DC
  family KRR-ST's code does the same: lr .01, x.1 at half time, DSA).
- another dataset's images: how they are normalised is not said; KRR-ST's code takes the target's own mean and
  std | the distilled set's, in which the network was pre-trained; whitened sets have no other space.
- fine-tuning: 10,000 steps on CIFAR and Tiny ImageNet, 5,000 on others | 10,000 from 50,000 images
  on, else 5,000.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddray.artifact.distilled_set import DistilledSet, TrainSet
from ddray.data import Dataset, Split
from ddray.data.catalog import KNOWN
from ddray.data.packed import resident
from ddray.data.reference import DatasetRef
from ddray.errors import DivergedError, InputError
from ddray.evaluation.options import EvaluateOptions, evaluation_config, learned_rate
from ddray.evaluation.protocol import EvalContext, EvalResult, EvaluationProtocol, RealImages, Scoring
from ddray.evaluation.subsets import limited_set
from ddray.nets import Net, build_net, check_arch
from ddray.seeding import derive, derive_seed, forked_global
from ddray.system.memory import available_bytes
from ddray.system.transfer import to_device
from ddray.training.embedding import Score, embed_images, score
from ddray.training.engine import Batch, Order, Rule, Step, cosine, run
from ddray.training.loop import augmenter, train
from ddray.training.operations import crop_and_flip, luma
from ddray.training.recipe import FinetuneConfig, ProbeConfig, Recipe

_LARGE: Final = 50_000


@dataclass(frozen=True)
class Linear:
    """Pre-training on a set, scored by a linear probe, or by fine-tuning.

    Attributes:
        recipe: of pre-training.
        probe: how the classifier on frozen embeddings is trained.
        real: the target's images that the classifier is trained on.
        can_flip: whether mirrored images of the set keep their class (for the recipe's augmentation).
        finetune: fine-tune the whole network this way instead of probing.
    """

    recipe: Recipe
    probe: ProbeConfig
    _: KW_ONLY
    real: Split
    can_flip: bool
    finetune: FinetuneConfig | None = None

    def evaluate(self, train_set: TrainSet, ctx: EvalContext, *, arch: str, seed: int) -> EvalResult:
        """Pre-train one network and score it."""
        begin = time.perf_counter()
        net, first, last = self._pretrained(train_set, ctx, arch, seed)
        finetune = self.finetune
        result = self._finetuned(net, ctx, finetune, seed) if finetune else self._probed(net, ctx, seed)
        measures = {"pretrain_loss_first": first, "pretrain_loss_last": last}
        wall_s, num = time.perf_counter() - begin, len(train_set.images)
        return EvalResult(check_arch(arch), seed, result.accuracy, num, wall_s, measures, result.per_class)

    def _pretrained(
        self, train_set: TrainSet, ctx: EvalContext, arch: str, seed: int
    ) -> tuple[Net, float, float]:
        """Return a network trained on the set, and the mean losses of its first and last epoch."""
        recipe, can_flip, targets = self.recipe.on(self.real), self.can_flip, train_set.targets
        supervision = train_set.supervision
        outputs = supervision.shape[1] if supervision.ndim == 2 else int(supervision.max()) + 1
        net = ctx.fresh_net(arch, train_set.images, seed=seed, outputs=outputs)
        check_memory(net.eval(), 0 if self.finetune else len(self.real), ctx.device)
        losses: list[Tensor] = []
        train(
            net,
            train_set.images.to(ctx.device),
            supervision.to(ctx.device),
            recipe,
            generator=derive(seed, "evaluate", "train"),
            augment=augmenter(recipe.augment, can_flip=can_flip, space=ctx.space, strategy=recipe.strategy),
            on_epoch=losses.append,
            regress=targets is not None or train_set.regress,
        )
        first, last = float(losses[0]), float(losses[-1])
        if not math.isfinite(last):
            raise DivergedError(f"pre-training {arch} diverged: its loss is {last}; lower evaluate.lr")
        return net, first, last

    def _probed(self, net: Net, ctx: EvalContext, seed: int) -> Score:
        """Return the score of a linear classifier on the frozen network's embeddings."""
        real, labels = embeddings(net, self.real, ctx), self.real.labels.to(ctx.device)
        generator = derive(seed, "evaluate", "probe")
        classifier = train_probe(real, labels, ctx.dataset.num_classes, self.probe, generator)
        return _score(lambda images: classifier(net.embed(images)), net.image_shape, ctx)

    def _finetuned(self, net: Net, ctx: EvalContext, config: FinetuneConfig, seed: int) -> Score:
        """Return the score after fine-tuning the whole network on the target with a new last layer."""
        num_classes, device = ctx.dataset.num_classes, ctx.device
        seed = derive_seed(seed, "evaluate", "finetune")
        tuned = build_net(net.arch, net.image_shape, num_classes, seed=seed, device=device)
        heads = net.head_names()
        body_weights = {name: t for name, t in net.state_dict().items() if not name.startswith(heads)}
        tuned.load_state_dict(body_weights, strict=False)
        tuned.to(memory_format=torch.channels_last).train()
        steps = config.steps or (10_000 if len(self.real) >= _LARGE else 5_000)
        generator = derive(seed, "batches")
        images, labels = resident(self.real.images, device), self.real.labels.to(device)

        def batch(rows: Tensor) -> Batch:
            pixels = adapted(to_device(images[rows], device), net.image_shape)
            pixels = crop_and_flip(pixels, generator, can_flip=ctx.dataset.can_flip)
            inputs = ctx.space.encode(pixels).contiguous(memory_format=torch.channels_last)
            return inputs, labels[to_device(rows, device)]

        order = Order(len(labels), config.batch).indices(generator, images.device)
        _descend(tuned, config, steps, map(batch, order))
        return _score(tuned.eval(), net.image_shape, ctx)


def adapted(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Return images as float pixels of `shape` (C, H, W): resized, grey repeated to colour, colour to grey.

    They are uint8 [N, C, H, W], or float in their own units; C is 1 or 3.
    """
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images
    if pixels.shape[1] == 3 and shape[0] == 1:
        pixels = luma(pixels)
    if pixels.shape[2:] != shape[1:]:
        pixels = F.interpolate(pixels, size=shape[1:], mode="bilinear", antialias=True)
    return pixels.expand(-1, shape[0], -1, -1)


def embeddings(net: Net, split: Split, ctx: EvalContext) -> Tensor:
    """Return the embeddings [N, D] of a split's un-augmented images, on the device; `net` is in eval mode."""
    encode = _encoding(net.image_shape, ctx)
    return embed_images(net, split.images, encode, ctx.device, result_device=ctx.device)


def _encoding(shape: tuple[int, int, int], ctx: EvalContext) -> Callable[[Tensor], Tensor]:
    """Return what takes images of any shape to `shape`, in the space that the network was trained in."""
    space = ctx.space.to(ctx.device)
    return lambda images: space.encode(adapted(images, shape))


def _score(apply: Callable[[Tensor], Tensor], shape: tuple[int, int, int], ctx: EvalContext) -> Score:
    """Return the fractions of the context's split that `apply`'s logits get right."""
    return score(apply, ctx.split.images, ctx.split.labels, _encoding(shape, ctx), ctx.device)


def check_memory(net: Net, num_images: int, device: torch.device) -> None:
    """Refuse to hold more embeddings than the device has memory for, and say what it would take."""
    with torch.no_grad():
        dim = net.embed(torch.zeros(1, *net.image_shape, device=device)).shape[1]
    needed, available = 4 * num_images * dim, available_bytes(device)
    if needed > 0.8 * available:
        raise InputError(
            f"the linear protocol needs {needed / 2**30:.1f} GiB for {num_images} embeddings of {net.arch}, "
            f"{device} has {available / 2**30:.1f}: use --train-limit N, or another --arch"
        )


def train_probe(
    features: Tensor, labels: Tensor, num_classes: int, config: ProbeConfig, generator: torch.Generator
) -> nn.Linear:
    """Return a linear classifier trained on cached features [N, D]; nothing syncs per step.

    Features and labels int64 [N] are on the device; the generator (of weights and batches) is on the CPU.
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    with forked_global(seed, features.device), torch.device(features.device):
        classifier = nn.Linear(features.shape[1], num_classes)
    order = Order(len(labels), config.batch).indices(generator, features.device)
    batches = ((features.index_select(0, rows), labels[rows]) for rows in order)
    _descend(classifier, config, config.steps, batches)
    return classifier


def _descend(
    net: nn.Module, config: ProbeConfig | FinetuneConfig, steps: int, batches: Iterator[Batch]
) -> None:
    """Train `net` by SGD on cross entropy, the rate along a cosine to 0."""
    weight_decay = config.weight_decay if isinstance(config, FinetuneConfig) else 0.0
    optimizer = partial(torch.optim.SGD, momentum=config.momentum, weight_decay=weight_decay)
    step = Step([net], Rule(F.cross_entropy, optimizer), num_steps=steps)
    run(step, batches, lr=lambda index: config.lr * cosine(index, steps))


def _can_flip(name: str, target: Dataset) -> bool:
    """Return whether mirrored images of a set of dataset `name` keep their class.

    If it is the target's own dataset, the target says so, with its options; else the name, or the catalog.
    """
    reference = DatasetRef.parse(name)
    if reference.base == target.base:
        return target.can_flip
    if reference.can_flip is not None:
        return reference.can_flip
    return reference.base in KNOWN and KNOWN[reference.base].can_flip


def _make(options: EvaluateOptions, distilled: DistilledSet, ctx: EvalContext, real: RealImages) -> Scoring:
    config = evaluation_config(distilled, options)
    train_set = limited_set(TrainSet(real.images.images, real.images.labels), options)
    evaluator = Linear(
        config.as_recipe(),
        config.probe,
        real=Split(train_set.images, train_set.labels),
        can_flip=_can_flip(distilled.meta.dataset, ctx.dataset),
        finetune=config.finetune if options.finetune else None,
    )
    return Scoring(evaluator, config.seeds, learned_rate(distilled, options))


PROTOCOL: Final = EvaluationProtocol(
    _make, options=("finetune",), trains_on_target=True, published_metric="linear_probe_accuracy"
)
