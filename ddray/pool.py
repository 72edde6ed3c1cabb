"""Model pools: networks that many trials share, trained once and stored under the hash of their spec.

The first process that needs an entry trains it. Others wait, and take over if the trainer dies. `pool_files`
has the layout on disk.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from pydantic import ValidationInfo, field_validator

from ddray.config import Config
from ddray.errors import DdrayError
from ddray.pool_files import DamagedEntryError, EntryLock, PoolFiles
from ddray.runs.ledger import canonical_json
from ddray.system.files import home
from ddray.system.progress import progress

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ddray.data import Dataset

log = logging.getLogger(__name__)

SUPERVISED_RECIPE: Final = {"epochs": 20, "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4, "batch": 256}
"""The usual training of networks to match in (DSDM Sec 4.1; the coresets of DC)."""

_PLAIN: Final = {"schedule": "constant", "augment": "none", "strategy": None, "cutmix": 0.0}


class PoolSpec(Config):
    """Identity of a pool entry; equal specs are the same entry."""

    kind: str
    dataset: str
    """Fingerprint of the dataset."""
    split: str
    """Part of the dataset, such as `train` or `train-val0`."""
    transform: str
    """Pixel space and augmentation the network was trained under."""
    arch: str
    recipe: dict[str, Any]
    seed: int
    image_shape: tuple[int, int, int]
    num_classes: int
    device: str = "cpu"
    """Kind of device it is trained on: random weights differ between kinds."""
    parents: tuple[str, ...] = ()
    """Keys of entries this one was trained from."""

    @field_validator("recipe")
    @classmethod
    def _without_plain_values(cls, recipe: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """Drop default values of a supervised recipe: the same training is the same entry."""
        if info.data.get("kind") != "supervised":
            return recipe
        return {k: v for k, v in recipe.items() if k not in _PLAIN or v != _PLAIN[k]}

    @property
    def key(self) -> str:
        """Sha256 (hex) of the spec's canonical JSON."""
        return hashlib.sha256(canonical_json(self.dump()).encode()).hexdigest()


def supervised_specs(
    dataset: Dataset, *, split: str, arch: str, device: str, recipe: Mapping[str, Any], seed: int, num: int
) -> list[PoolSpec]:
    """Return the specs of `num` networks trained on labels, with seeds `seed`, `seed + 1`, ...

    Args:
        dataset: what they are trained on.
        split: part of the dataset.
        arch: canonical architecture name.
        device: kind of device.
        recipe: fields of `evaluate.training.Recipe` that override `SUPERVISED_RECIPE`.
        seed: seed of the first network.
        num: how many.
    """
    return [
        PoolSpec(
            kind="supervised",
            dataset=dataset.fingerprint,
            split=split,
            transform="normalized",
            arch=arch,
            recipe={**SUPERVISED_RECIPE, **recipe},
            seed=seed + index,
            image_shape=dataset.image_shape,
            num_classes=dataset.num_classes,
            device=device,
        )
        for index in range(num)
    ]


@dataclass(frozen=True)
class PoolEntry:
    """One trained entry.

    Attributes:
        meta: the spec and the measurements of its training.
        tensors: weights under `weights.<name>`, features [N, D] under `features`; large ones memory-mapped.
    """

    meta: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def module(self) -> nn.Module:
        """Return the network with its weights, in eval mode on the CPU."""
        from ddray.nets import build_net

        spec = PoolSpec.parse(self.meta["spec"])
        net = build_net(spec.arch, spec.image_shape, spec.num_classes, seed=0)
        prefix = "weights."
        net.load_state_dict(
            {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}
        )
        return net.eval()


class ModelPool(Protocol):
    """Provides pool entries; missing ones are trained once."""

    def get(self, specs: Sequence[PoolSpec]) -> list[PoolEntry]:
        """Return the entries of `specs`, in order."""
        ...


Trainer = Callable[[PoolSpec], "tuple[Mapping[str, Tensor], Mapping[str, Any]]"]
"""Trains one spec: returns tensors to store, and measurements for the entry's meta."""


def draft_entry(files: PoolFiles, spec: PoolSpec, trainer: Trainer, *, times_trained: int) -> Path:
    """Train a spec and write its entry to a draft folder; return the folder.

    Raises:
        StorageError: the disk is full, or the folder can't be written.
        Exception: raised by the trainer.
    """
    begin = time.perf_counter()
    tensors, measured = trainer(spec)
    facts = {**measured, "spec": spec.dump(), "wall_s": time.perf_counter() - begin}
    return files.draft(spec.key, tensors, facts, times_trained=times_trained)


class LocalPool:
    """A pool in a folder that this machine's processes share.

    Args:
        trainer: trains a missing spec.
        folder: the pool folder; default `$DDRAY_HOME/pool`.
    """

    def __init__(self, trainer: Trainer, folder: Path | None = None) -> None:
        self._trainer = trainer
        self._files = PoolFiles(folder or home() / "pool")

    def get(self, specs: Sequence[PoolSpec]) -> list[PoolEntry]:
        """Return the entries of `specs`, in order; missing and damaged ones are trained.

        Raises:
            InputError: an entry can't be read.
            StorageError: an entry can't be written.
        """
        entries: dict[str, PoolEntry] = {}
        missing: dict[str, PoolSpec] = {}
        for key, spec in {spec.key: spec for spec in specs}.items():
            entry = self._open(key)
            if entry is None:
                missing[key] = spec
            else:
                entries[key] = entry
        if missing:
            self._train(missing, entries)
        return [entries[spec.key] for spec in specs]

    def _train(self, missing: dict[str, PoolSpec], entries: dict[str, PoolEntry]) -> None:
        """Move specs from `missing` to `entries`, starting with those that no other process is training."""
        total = len(missing)
        log.info("pool: training %d of %d models", total, total + len(entries))
        with progress("training the pool", total) as show:
            while missing:
                key, lock = self._next(list(missing))
                with lock:
                    if self._files.mend(key, lock) is None:
                        times = lock.times_trained + 1
                        draft = draft_entry(self._files, missing[key], self._trainer, times_trained=times)
                        self._files.publish(key, draft, lock)
                entry = self._open(key)
                if entry is None:
                    raise DdrayError(f"pool entry {key} was removed while it was being trained; run again")
                entries[key] = entry
                show(total - len(missing) + 1, missing.pop(key).arch)

    def _next(self, keys: Sequence[str]) -> tuple[str, EntryLock]:
        """Lock the first key that is free, or wait for the first key if none is."""
        for key in keys:
            lock = self._files.try_lock(key)
            if lock is not None:
                return key, lock
        log.info("pool: another process is training %s, waiting for it", keys[0][:12])
        return keys[0], self._files.lock(keys[0])

    def _open(self, key: str) -> PoolEntry | None:
        """Return an entry, or None if it is missing or damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            meta = self._files.read(key)
            return None if meta is None else PoolEntry(meta, load_file(self._files.tensors_path(key)))
        except (DamagedEntryError, SafetensorError, FileNotFoundError):  # set aside meanwhile
            return None
