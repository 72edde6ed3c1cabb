"""A DiTPipeline folder before its weights are loaded: what it is, where it lies, whose images it has seen.

A model is known by its fingerprint, never by its place: `$DDRAY_HOME/generators` says where each one was
last used from, so that a folder that was moved repeats nothing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ddray.errors import InputError
from ddray.files import home, write_atomically

log = logging.getLogger(__name__)

INDEX: Final = "model_index.json"
SEEN: Final = "ddray.json"
PARTS: Final = ("transformer", "vae")
_KEPT: Final = (".json", ".safetensors", ".bin")
BROKEN: Final = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)
"""What reading JSON, schedulers and networks of a folder raises where the folder is damaged."""


@dataclass(frozen=True)
class Folder:
    """What a DiTPipeline folder says of itself.

    Attributes:
        path: absolute.
        fingerprint: sha256 over configurations and weights.
        class_names: one per label; empty where they are unknown.
        num_classes: K.
        channels: of the images that its autoencoder takes.
        schedule: configuration of its noise schedule.
        seen: `{"dataset": fingerprint, "split": name}` of the images that ddray trained it on.
    """

    path: Path
    fingerprint: str
    class_names: tuple[str, ...]
    num_classes: int
    channels: int
    schedule: Mapping[str, Any]
    seen: tuple[Mapping[str, str], ...]

    @property
    def num_train_timesteps(self) -> int:
        """Levels of noise that it was trained on."""
        return int(self.schedule.get("num_train_timesteps", 1000))


def absolute(value: str | None) -> str | None:
    """Return a folder's name made absolute at the edge: workers have other working directories."""
    return None if value is None else str(Path(value).expanduser().absolute())


def read_folder(folder: Path) -> Folder:
    """Read what a folder says of itself, without loading weights.

    Raises:
        InputError: it is no DiTPipeline, a file in it is damaged, or its noise schedule does not fit.
    """
    from diffusers import DDIMScheduler

    fingerprint = folder_fingerprint(folder)
    try:
        names = _json(folder / INDEX).get("id2label") or {}
        labels = {int(key): str(name) for key, name in names.items()}
        num_classes = int(_json(folder / "transformer" / "config.json")["num_embeds_ada_norm"])
        channels = int(_json(folder / "vae" / "config.json").get("in_channels", 3))
        schedule = dict(_json(folder / "scheduler" / "scheduler_config.json"))
        DDIMScheduler.from_config(schedule)  # refuses what it does not know, now and not after hours
        seen = _json(folder / SEEN)["seen"] if (folder / SEEN).exists() else []
        seen = tuple({"dataset": str(part["dataset"]), "split": str(part["split"])} for part in seen)
    except BROKEN as error:
        raise damaged(folder, error) from error
    if schedule.get("prediction_type", "epsilon") != "epsilon":
        raise InputError(f"{folder} must predict epsilon, its scheduler says {schedule['prediction_type']!r}")
    known = tuple(labels.get(label, "") for label in range(num_classes)) if labels else ()
    return Folder(folder.absolute(), fingerprint, known, num_classes, channels, schedule, seen)


def damaged(folder: Path, error: Exception) -> InputError:
    """Return the refusal of a folder that could not be read."""
    reason = " ".join(str(error).split())[:200]
    return InputError(
        f"{folder} must be an undamaged DiTPipeline folder: {type(error).__name__}: {reason}; get it again"
    )


def _json(path: Path) -> dict[str, Any]:
    held = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(held, dict):
        raise TypeError(f"{path.name} must hold an object, got {type(held).__name__}")
    return held


def folder_fingerprint(folder: Path) -> str:
    """Return the sha256 over configurations and weights of a DiTPipeline folder.

    Raises:
        InputError: it is no such folder, or a file can't be read.
    """
    if not (folder / INDEX).is_file():
        raise InputError(f"a diffusion model must be a DiTPipeline folder, {folder} has no {INDEX}")
    try:
        files = [(path, path.stat()) for path in sorted(_files(folder))]
        stamp = tuple(
            (str(path.relative_to(folder)), s.st_size, s.st_mtime_ns, s.st_ino) for path, s in files
        )
        return _hashed(folder.absolute(), stamp)
    except OSError as error:
        raise damaged(folder, error) from error


@functools.lru_cache(maxsize=64)  # gigabytes of weights, asked for at every stage of every trial
def _hashed(folder: Path, stamp: tuple[tuple[str, int, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, size, _, _ in stamp:
        digest.update(f"{name}\0{size}\0".encode())
        with (folder / name).open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    for part in ("scheduler", *PARTS):
        yield from (path for path in (folder / part).glob("*") if path.suffix in _KEPT)


def _note(fingerprint: str) -> Path:
    return home() / "generators" / f"{fingerprint}.json"


def remember(found: Folder) -> None:
    """Note where a model lies, for whoever makes a pool entry from it (in another process, of this home).

    Raises:
        StorageError: the note can't be written.
    """
    text = json.dumps({"folder": str(found.path)})
    path = _note(found.fingerprint)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, lambda file: file.write(text.encode()))


def locate(fingerprint: str, place: str | None = None) -> Path:
    """Return the folder that holds a model: `place`, or where it was last used from.

    Raises:
        InputError: neither holds it.
    """
    try:
        noted = str(_json(_note(fingerprint))["folder"])
    except BROKEN:
        noted = None
    places = [Path(held) for held in (place, noted) if held is not None]
    for folder in places:
        if (folder / INDEX).is_file() and folder_fingerprint(folder) == fingerprint:
            return folder
    old = str(places[0]) if places else "its folder"
    raise InputError(
        f"{old} must hold diffusion model {fingerprint[:12]}, it holds another or none; move it back, link "
        f"it there (ln -s NEW {old}), or use it once from its new place: ddray distill --method d3hr "
        "--set method.diffusion=NEW"
    )


def known_names(names: Sequence[str]) -> dict[str, int]:
    """Return the label of each name and synonym ("tench, Tinca tinca") that only one label has."""
    found: dict[str, set[int]] = {}
    for label, name in enumerate(names):
        for part in {name, *(part.strip() for part in name.split(","))} - {""}:
            found.setdefault(part, set()).add(label)
    return {name: min(labels) for name, labels in found.items() if len(labels) == 1}


def resolve_ids(
    known: Sequence[str], num_known: int, class_names: Sequence[str], given: Sequence[int] | None
) -> tuple[int, ...]:
    """Return the model's label of each class of a dataset.

    Args:
        known: names of the model's labels, as far as they are known.
        num_known: how many labels it has.
        class_names: the dataset's.
        given: the labels, where they are told; default: by name where each is known and no two share a label,
            else by number where both have as many.

    Raises:
        InputError: they can't be told.
    """
    num = len(class_names)
    if given is None:
        labels = known_names(known)
        found = [labels[name] for name in class_names if name in labels]
        if len(set(found)) == num:
            return tuple(found)
        given = range(num) if num_known == num else None
    if given is None:
        raise InputError(
            f"the diffusion model has {num_known} classes and the dataset {num} others: give "
            "method.class_ids, or fine-tune it: ddray pool train --kind diffusion --set init=FOLDER"
        )
    if len(given) != num or min(given) < 0 or max(given) >= num_known:
        raise InputError(
            f"class_ids must be {num} labels in 0..{num_known - 1}, one per class, got {list(given)}"
        )
    return tuple(given)


@functools.cache  # once a process: a search plans every trial
def _warn(folder: Path, seen: str, split_name: str) -> None:
    log.warning(
        "%s was trained on split %s, so it has seen images that %s holds out for val: val accuracy will "
        "flatter it; leave method.diffusion (or init) out, and a generator is trained without them",
        folder,
        seen,
        split_name,
    )


def warn_of_leak(found: Folder, dataset: str, split_name: str) -> None:
    """Say on stderr if a model has seen what this split of the dataset (a fingerprint) leaves out for val."""
    for seen in found.seen:
        if split_name.startswith("train-val") and seen["dataset"] == dataset and seen["split"] != split_name:
            _warn(found.path, seen["split"], split_name)
