"""Model pools: networks that many trials share, trained once and kept under the hash of what they are.

An entry is a folder `$DDRAY_HOME/pool/<key>/` with `entry.json` and `tensors.safetensors`, made beside its
final name and moved there whole: whoever finishes first wins, and both have trained the same bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from ddray.config import Config
from ddray.errors import InputError
from ddray.files import storage_errors
from ddray.ledger import canonical_json

_ENTRY = "entry.json"
_TENSORS = "tensors.safetensors"


class PoolSpec(Config):
    """What a pool entry is; equal specs are the same entry."""

    kind: str
    dataset: str
    """Fingerprint of the dataset."""
    split: str
    """Which part of it, such as `train` or `train-val0`."""
    transform: str
    """Pixel space and augmentation the network was trained under."""
    arch: str
    recipe: dict[str, Any]
    seed: int
    image_shape: tuple[int, int, int]
    num_classes: int
    device: str = "cpu"
    """Kind of device it is trained on: weights drawn on another differ."""
    parents: tuple[str, ...] = ()
    """Keys of entries this one was trained from."""

    @property
    def key(self) -> str:
        """Sha256 (hex) of the spec's canonical JSON."""
        return hashlib.sha256(canonical_json(self.dump()).encode()).hexdigest()


@dataclass(frozen=True)
class PoolEntry:
    """One trained entry.

    Attributes:
        meta: the spec, and what training measured.
        tensors: memory-mapped tensors: weights under `weights.<name>`, features [N, D] under `features`.
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
    """Gives pool entries; whatever is missing is trained once."""

    def get(self, specs: Sequence[PoolSpec]) -> list[PoolEntry]:
        """Return the entries of `specs`, in order."""
        ...


Trainer = Callable[[PoolSpec], tuple[Mapping[str, Tensor], Mapping[str, Any]]]
"""Trains one spec: tensors to keep, and measurements for the entry's meta."""


def home() -> Path:
    """Return `$DDRAY_HOME` (default `~/.cache/ddray`), made absolute."""
    return Path(os.environ.get("DDRAY_HOME") or Path.home() / ".cache" / "ddray").expanduser().absolute()


class LocalPool:
    """A pool in a folder of this machine.

    Args:
        trainer: trains a spec that is not there yet.
        folder: where entries live; default `$DDRAY_HOME/pool`.
    """

    def __init__(self, trainer: Trainer, folder: Path | None = None) -> None:
        self._trainer = trainer
        self._folder = folder or home() / "pool"

    def get(self, specs: Sequence[PoolSpec]) -> list[PoolEntry]:
        """Return the entries of `specs`, in order; missing ones are trained.

        Raises:
            InputError: an entry on disk is damaged (the message says which folder to remove).
            StorageError: an entry can't be written.
        """
        return [self._read(spec) or self._train(spec) for spec in specs]

    def _read(self, spec: PoolSpec) -> PoolEntry | None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = self._folder / spec.key
        if not folder.exists():
            return None
        try:
            meta = json.loads((folder / _ENTRY).read_text(encoding="utf-8"))
            return PoolEntry(meta, load_file(folder / _TENSORS))
        except (OSError, ValueError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"pool entry {folder} must be undamaged: {reason}; remove the folder") from error

    def _train(self, spec: PoolSpec) -> PoolEntry:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors, measured = self._trainer(spec)
        final = self._folder / spec.key
        with storage_errors(final):
            self._folder.mkdir(parents=True, exist_ok=True)
            draft = Path(tempfile.mkdtemp(prefix=f".{spec.key[:12]}.", suffix=".tmp", dir=self._folder))
            try:
                held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
                try:
                    save_file(held, draft / _TENSORS)
                except SafetensorError as error:  # its Rust side wraps the OSError
                    raise OSError(errno.EIO, f"{error}") from error
                text = json.dumps(
                    {"key": spec.key, "spec": spec.dump(), **measured}, indent=2, sort_keys=True
                )
                (draft / _ENTRY).write_text(text + "\n", encoding="utf-8")
                try:
                    draft.rename(final)
                except OSError:
                    if not final.exists():  # else another process was first, with the same bytes
                        raise
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        entry = self._read(spec)
        if entry is None:
            raise InputError(f"pool entry {final} was removed while it was being trained; run again")
        return entry
