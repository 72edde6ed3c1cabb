"""Accuracy of a network trained on the whole dataset: trained once, stored under `$DDRAY_HOME/truth`."""

import hashlib
import logging
import time

import torch
from torch import Tensor

from ddray.artifact.distilled_set import TrainSet
from ddray.data import PixelSpace, Split
from ddray.evaluation.hard import fit
from ddray.evaluation.protocol import EvalContext
from ddray.nets import check_arch
from ddray.runs.ledger import Ledger, Row, Unit
from ddray.system.files import home, storage_errors
from ddray.training.loop import accuracy
from ddray.training.recipe import Recipe

log = logging.getLogger(__name__)


def whole_set_accuracy(
    real: Split, ctx: EvalContext, recipe: Recipe, *, arch: str, split_name: str, seed: int = 0
) -> float:
    """Return the accuracy of a network trained on all real images, un-augmented.

    The result is stored in the ledger in `$DDRAY_HOME/truth`: the same call again trains nothing.

    `split_name` says which part of the dataset `real` is.

    Raises:
        InputError: the architecture is unknown or does not fit the images.
        DivergedError: the training loss became NaN.
        StorageError: the row can't be written.
    """
    recipe = recipe.without_augmentation()
    unit = _unit(ctx, recipe, arch=arch, split_name=split_name, seed=seed)
    ledger = _ledger()
    row = ledger.row(unit.key)
    if row is None:
        log.info(
            "training %s on all %d images of %s, once; stored in %s",
            *(arch, len(real), ctx.dataset.name, ledger.folder),
        )
        begin = time.perf_counter()
        score = _train(real, ctx, recipe, arch=arch, seed=seed)
        row = Row.done(unit, {"accuracy": score}, time.perf_counter() - begin)
        ledger.publish(unit, row, epoch=0)
    return float(row.result["accuracy"])


def _unit(ctx: EvalContext, recipe: Recipe, *, arch: str, split_name: str, seed: int) -> Unit:
    """Return the ledger's unit: everything that the accuracy depends on."""
    spec = {
        "dataset": ctx.dataset.fingerprint,
        "split": split_name,
        "held_out": _digest(ctx.split.images, ctx.split.labels),
        "space": _describe(ctx.space),
        "arch": check_arch(arch),
        "recipe": recipe.dump(),
        "device": ctx.device.type,
        "seed": seed,
    }
    return Unit(kind="truth", spec=spec)


def _train(real: Split, ctx: EvalContext, recipe: Recipe, *, arch: str, seed: int) -> float:
    """Train one network on the real images and score it."""
    space = ctx.space.to(ctx.device)

    def encode(batch: Tensor, generator: torch.Generator) -> Tensor:
        return space.encode(batch).contiguous(memory_format=torch.channels_last)

    # Batches are encoded one by one: as bytes the whole set takes a quarter of the memory.
    train_set = TrainSet(real.images, real.labels)
    net = fit(train_set, ctx, recipe, arch=arch, seed=seed, augment=encode, name="whole set")
    return accuracy(net, ctx.split, ctx.space, device=ctx.device)


def _ledger() -> Ledger:
    """Return the ledger of whole-set trainings, creating its folder if needed."""
    folder = home() / "truth"
    with storage_errors(folder):
        (folder / "ledger").mkdir(parents=True, exist_ok=True)
    return Ledger(folder)


def _describe(space: PixelSpace) -> dict[str, object]:
    """Return everything that defines a pixel space, as JSON types."""
    description: dict[str, object] = {"kind": space.kind, "mean": list(space.mean), "std": list(space.std)}
    if space.zca_mean is not None and space.zca_matrix is not None:
        description["zca"] = _digest(space.zca_mean, space.zca_matrix)
    return description


def _digest(*tensors: Tensor) -> str:
    """Return the sha256 (hex) of tensors' bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()
