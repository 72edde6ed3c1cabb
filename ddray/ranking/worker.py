"""Units of a NAS sweep: one architecture trained on one set with one seed; nothing here needs Ray."""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor

from ddray.data import Dataset, PixelSpace, Split
from ddray.data.packed import Images, PackedImages, copied, parts_of, shared
from ddray.nets import Net
from ddray.ranking.options import NasRecipe
from ddray.ranking.spaces import get_space
from ddray.ranking.training import train_seeds
from ddray.runs.ledger import Ledger, Row, Unit
from ddray.seeding import derive_seed
from ddray.system import numerics
from ddray.system.files import home
from ddray.system.memory import peak_bytes, reset_peak
from ddray.system.worker import worker_device
from ddray.training.dsa import dsa_for
from ddray.training.embedding import score

Array = np.ndarray[Any, Any]
CODE_VERSION: Final = 2  # raised when results change, so that stored truth of older code is not reused


@dataclass(frozen=True)
class TrainingSet:
    """A set that architectures are trained on, as NumPy arrays (docs/ray.md, 11).

    Attributes:
        images: float32 [N, C, H, W] in the pixel space, or uint8 [N, C, H, W] of real images; packed ones are
            sent by name.
        labels: int64 [N], or soft labels float32 [N, K].
        space: pixel space as plain values: kind, mean, std, and zca_mean [D], zca_matrix [D, D] if whitened.
    """

    images: Images
    labels: Array
    space: Mapping[str, Any]

    @property
    def is_encoded(self) -> bool:
        """Whether the images are in the pixel space; otherwise they are as stored."""
        return "uint8" not in str(self.images.dtype)

    @cached_property
    def key(self) -> str:
        """Sha256 (hex) of the content."""
        images = self.images
        dtype = str(images.dtype).removeprefix("torch.")
        digest = hashlib.sha256(f"{dtype}{tuple(images.shape)}{self.space['kind']}".encode())
        for name in ("mean", "std"):
            digest.update(repr(self.space[name]).encode())
        pixels = map(Tensor.numpy, parts_of(images)) if isinstance(images, PackedImages) else [images]
        whitening = self.space.get("zca_mean"), self.space.get("zca_matrix")
        for array in chain(pixels, (self.labels, *whitening)):
            if array is not None:
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def training_set(images: Tensor, labels: Tensor, space: PixelSpace) -> TrainingSet:
    """Return images (encoded float32, or uint8) and labels ([N], or soft [N, K]) as a `TrainingSet`."""
    space_values: dict[str, Any] = {"kind": space.kind, "mean": space.mean, "std": space.std}
    if space.zca_mean is not None and space.zca_matrix is not None:
        space_values |= {"zca_mean": space.zca_mean.numpy(), "zca_matrix": space.zca_matrix.numpy()}
    return TrainingSet(shared(images), labels.numpy(), space_values)


def real_set(split: Split, dataset: Dataset) -> TrainingSet:
    """Return real images as a `TrainingSet` in the dataset's normalised space."""
    return training_set(split.images, split.labels, PixelSpace("normalized", dataset.mean, dataset.std))


@dataclass(frozen=True)
class SweepData:
    """The arrays that every worker of a sweep needs.

    Attributes:
        sets: training sets by name.
        val: uint8 [M, C, H, W] (spectrograms: float32; packed: by name) and labels [M] to rank by.
        test: likewise, for the last column; None if it is not used.
        can_flip: whether a mirrored image keeps its class.
    """

    sets: Mapping[str, TrainingSet]
    val: tuple[Images, Array]
    test: tuple[Images, Array] | None
    num_classes: int
    can_flip: bool


@dataclass(frozen=True)
class NasTask:
    """Units of one architecture on one set that are trained together, one per seed.

    Attributes:
        index: the architecture.
        set_name: the sweep's set to train on.
        recipe: `NasRecipe` as plain values.
        space: name and options for `get_space`.
        num_steps: optimiser steps; None for the recipe's epochs.
        shuffle: False for an unshuffled loader.
        cost: expected work, in a unit common to all tasks.
    """

    units: tuple[Unit, ...]
    index: int
    set_name: str
    seeds: tuple[int, ...]
    recipe: Mapping[str, Any]
    space: Mapping[str, Any]
    num_steps: int | None = None
    shuffle: bool = True
    cost: float = 1.0

    @property
    def key(self) -> str:
        """Key of the first unit; identifies the task."""
        return self.units[0].key


class Workbench:
    """One worker's copy of a sweep's data on its device; the sweep's arrays are never modified."""

    def __init__(self, data: SweepData, device: torch.device) -> None:
        self._data, self.device = data, device
        self._copies: dict[str, tuple[Tensor, Tensor]] = {}

    def run(self, task: NasTask) -> list[dict[str, Any]]:
        """Train a task's networks and score them on val (and truth on test); one result per unit."""
        recipe = NasRecipe.parse(task.recipe)
        device = self.device.type
        with numerics.applied(recipe.numerics, deterministic=recipe.deterministic, device=device) as applied:
            results = self._run(task, recipe)
        return [{**result, "precision": applied.used()} for result in results]

    def _run(self, task: NasTask, recipe: NasRecipe) -> list[dict[str, Any]]:
        data = self._data
        train_set = data.sets[task.set_name]
        images, labels = self._on_device(f"train {task.set_name}", train_set, encoded=train_set.is_encoded)
        shape = (images.shape[1], images.shape[2], images.shape[3])
        space = get_space(**task.space)
        nets = [
            space.build(
                task.index, shape, data.num_classes, seed=derive_seed(seed, "nas", "net"), device=self.device
            )
            for seed in task.seeds
        ]
        dsa = dsa_for(data.can_flip) if recipe.augment == "dsa" else None
        num_steps = task.num_steps or recipe.num_steps(len(labels))
        mode = train_seeds(
            nets,
            (images, labels),
            recipe,
            seeds=task.seeds,
            dsa=dsa,
            num_steps=num_steps,
            shuffle=task.shuffle,
        )
        results = []
        for net in nets:
            diverged = not all(bool(torch.isfinite(param).all()) for param in net.parameters())
            scores = {"val_accuracy": self._accuracy(net, "val", train_set)}
            if task.units[0].kind == "truth" and data.test is not None:
                scores["test_accuracy"] = self._accuracy(net, "test", train_set)
            counts = {"num_images": len(labels), "num_steps": num_steps}
            results.append({**scores, **counts, "mode": mode, "diverged": diverged})
        return results

    def _accuracy(self, net: Net, split: Literal["val", "test"], train_set: TrainingSet) -> float:
        """Return a network's accuracy on val or test, in the pixel space of the set it was trained on."""
        arrays = self._data.val if split == "val" or self._data.test is None else self._data.test
        # Sets with the same space share the copy.
        space_key = TrainingSet(np.zeros(0, np.float32), np.zeros(0, np.int64), train_set.space).key
        held_out = TrainingSet(*arrays, train_set.space)
        if isinstance(arrays[0], PackedImages):  # read and encoded part by part
            encode = _pixel_space(train_set.space).to(self.device).encode
            return score(net, arrays[0], torch.tensor(arrays[1]), encode, self.device).accuracy
        images, labels = self._on_device(f"{split} {space_key}", held_out, encoded=False)
        return score(net, images, labels, lambda part: part, images.device).accuracy

    def _on_device(self, name: str, arrays: TrainingSet, *, encoded: bool) -> tuple[Tensor, Tensor]:
        """Return encoded images in channels_last, and labels, on the device; computed once per name."""
        if name not in self._copies:
            # torch.tensor copies: the object store's memory must not be modified (docs/ray.md, 11).
            images, labels = copied(arrays.images), torch.tensor(arrays.labels)
            images = images.to(self.device)
            if not encoded:
                images = _pixel_space(arrays.space).to(self.device).encode(images)
            images = images.contiguous(memory_format=torch.channels_last)
            self._copies[name] = (images, labels.to(self.device))
        return self._copies[name]


def _pixel_space(space: Mapping[str, Any]) -> PixelSpace:
    zca: dict[str, Any] = {
        name: torch.tensor(space[name]) for name in ("zca_mean", "zca_matrix") if name in space
    }
    return PixelSpace(space["kind"], tuple(space["mean"]), tuple(space["std"]), **zca)


@dataclass(frozen=True)
class SweepJob:
    """What all tasks of a sweep share.

    Attributes:
        run_dir: absolute path of the run.
        epoch: run epoch to publish under.
        data_key: identifies the sweep's data, so that a worker copies it once.
        device: kind of device of the workers.
    """

    run_dir: str
    epoch: int
    data_key: str
    device: str


_latest: tuple[str, Workbench] | None = None


def run_task(job: SweepJob, data: SweepData, task: NasTask) -> None:
    """Run a task and publish its rows; truth is published under `$DDRAY_HOME` too, for other runs.

    Raises:
        Exception: a crash or out of memory; the caller retries.
    """
    global _latest
    if _latest is None or _latest[0] != job.data_key:
        _latest = (job.data_key, Workbench(data, worker_device(job.device)))
    begin, device = time.perf_counter(), _latest[1].device
    reset_peak(device)
    results = [{**result, "peak_memory_bytes": peak_bytes(device)} for result in _latest[1].run(task)]
    wall_s = (time.perf_counter() - begin) / len(results)
    ledger = Ledger(Path(job.run_dir))
    for unit, result in zip(task.units, results, strict=True):
        row = Row.done(unit, result, wall_s)
        if unit.kind == "truth":
            truth_ledger().publish(unit, row, epoch=0)
        ledger.publish(unit, row, epoch=job.epoch)


def truth_ledger() -> Ledger:
    """Return the ledger of whole-set trainings that all runs share, under `$DDRAY_HOME`."""
    folder = home() / "nas"
    (folder / "ledger").mkdir(parents=True, exist_ok=True)
    return Ledger(folder)
