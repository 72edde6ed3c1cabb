"""A DiTPipeline folder before its weights are loaded: metadata, location, and the images it was trained on.

A model is identified by its fingerprint, never by its path: `$DDRAY_HOME/generators` records where each one
was last used from, so that moving a folder repeats no work.
"""

import functools
import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ddray.data import SplitName
from ddray.errors import InputError, one_line
from ddray.system.files import home, write_atomically

log = logging.getLogger(__name__)

INDEX: Final = "model_index.json"
SEEN: Final = "ddray.json"
PARTS: Final = ("transformer", "vae")
_SUFFIXES: Final = (".json", ".safetensors", ".bin")
BROKEN: Final = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)
"""Exceptions raised by reading JSON, schedulers and networks of a damaged folder."""


@dataclass(frozen=True)
class Folder:
    """Metadata of a DiTPipeline folder."""

    path: Path
    """Absolute."""
    fingerprint: str
    """Sha256 over configurations and weights."""
    class_names: tuple[str, ...]
    """One per label; empty where unknown."""
    num_classes: int
    channels: int
    """Of its autoencoder's input images."""
    schedule: Mapping[str, Any]
    seen: tuple[Mapping[str, str], ...]
    """`{"dataset": fingerprint, "split": name}` of the images that ddray trained it on."""

    @property
    def num_train_timesteps(self) -> int:
        """Noise levels it was trained on."""
        return int(self.schedule.get("num_train_timesteps", 1000))


def absolute(value: str | None) -> str | None:
    """Return a folder's absolute path: workers have other working directories."""
    return None if value is None else str(Path(value).expanduser().absolute())


def read_folder(folder: Path) -> Folder:
    """Read a folder's metadata, without loading weights.

    InputError if it is not a DiTPipeline, a file in it is damaged, or its noise schedule does not fit.
    """
    from diffusers import DDIMScheduler

    fingerprint = folder_fingerprint(folder)
    try:
        names = _json(folder / INDEX).get("id2label") or {}
        labels = {int(key): str(name) for key, name in names.items()}
        num_classes = int(_json(folder / "transformer" / "config.json")["num_embeds_ada_norm"])
        channels = int(_json(folder / "vae" / "config.json").get("in_channels", 3))
        schedule = dict(_json(folder / "scheduler" / "scheduler_config.json"))
        DDIMScheduler.from_config(schedule)  # rejects unknown values now, not after hours
        seen = _json(folder / SEEN)["seen"] if (folder / SEEN).exists() else []
        seen = tuple({"dataset": str(part["dataset"]), "split": str(part["split"])} for part in seen)
    except BROKEN as error:
        raise damaged(folder, error) from error
    if schedule.get("prediction_type", "epsilon") != "epsilon":
        raise InputError(f"{folder} must predict epsilon, its scheduler says {schedule['prediction_type']!r}")
    class_names = tuple(labels.get(label, "") for label in range(num_classes)) if labels else ()
    return Folder(folder.absolute(), fingerprint, class_names, num_classes, channels, schedule, seen)


def weights_variant(part: Path) -> str | None:
    """Return the variant, such as fp16, of the weights in a part's folder; None where the plain ones are."""
    variants = {_variant(path) for path in part.glob("*") if path.suffix in _SUFFIXES[1:]}
    return min(variants, default=None) or None


def weight_files(part: Path) -> list[Path]:
    """Return the safetensors files in a part's folder, of the variant that is loaded."""
    variant = weights_variant(part) or ""
    return [path for path in sorted(part.glob("*.safetensors")) if _variant(path) == variant]


def _variant(path: Path) -> str:
    """Return the variant in a weight file's name, without the number of its part; empty for plain ones."""
    stem = path.name.split(".")[1:-1]
    return re.sub(r"-\d+-of-\d+$", "", stem[0]) if stem else ""


def damaged(folder: Path, error: Exception) -> InputError:
    """Return the error for a folder that could not be read."""
    reason = f"{type(error).__name__}: {one_line(error, 200)}"
    return InputError(f"{folder} must be an undamaged DiTPipeline folder: {reason}; get it again")


def _json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise TypeError(f"{path.name} must hold an object, got {type(content).__name__}")
    return content


def folder_fingerprint(folder: Path) -> str:
    """Return the sha256 over configurations and weights of a DiTPipeline folder; InputError if it is none."""
    if not (folder / INDEX).is_file():
        raise InputError(f"a diffusion model must be a DiTPipeline folder, {folder} has no {INDEX}")
    try:
        paths = (path for part in ("scheduler", *PARTS) for path in (folder / part).glob("*"))
        files = [(path, path.stat()) for path in sorted(paths) if path.suffix in _SUFFIXES]
        stamp = tuple(
            (str(path.relative_to(folder)), s.st_size, s.st_mtime_ns, s.st_ino) for path, s in files
        )
        return _hashed(folder.absolute(), stamp)
    except OSError as error:
        raise damaged(folder, error) from error


@functools.lru_cache(maxsize=64)  # gigabytes of weights, needed at every stage of every trial
def _hashed(folder: Path, stamp: tuple[tuple[str, int, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, size, _, _ in stamp:
        digest.update(f"{name}\0{size}\0".encode())
        with (folder / name).open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def _note(fingerprint: str) -> Path:
    return home() / "generators" / f"{fingerprint}.json"


def record_folder(folder: Folder) -> None:
    """Record a model's folder, for other processes of this home that make pool entries from it."""
    text = json.dumps({"folder": str(folder.path)})
    path = _note(folder.fingerprint)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, lambda file: file.write(text.encode()))


def locate(fingerprint: str, preferred: str | None = None) -> Path:
    """Return the folder that holds a model: `preferred`, or where it was last used from; else InputError."""
    try:
        noted = str(_json(_note(fingerprint))["folder"])
    except BROKEN:
        noted = None
    candidates = [Path(name) for name in (preferred, noted) if name is not None]
    for folder in candidates:
        if (folder / INDEX).is_file() and folder_fingerprint(folder) == fingerprint:
            return folder
    old = str(candidates[0]) if candidates else "its folder"
    raise InputError(
        f"{old} must hold diffusion model {fingerprint[:12]}, it holds another or none; move it back, link "
        f"it there (ln -s NEW {old}), or use it once from its new location: ddray distill --method d3hr "
        "--set method.diffusion=NEW"
    )


def known_names(names: Sequence[str]) -> dict[str, int]:
    """Return the label of each name and synonym ("tench, Tinca tinca") that belongs to only one label."""
    labels_of: dict[str, set[int]] = {}
    for label, name in enumerate(names):
        for synonym in _synonyms(name):
            labels_of.setdefault(synonym, set()).add(label)
    return {name: min(labels) for name, labels in labels_of.items() if len(labels) == 1}


def resolve_ids(
    model_names: Sequence[str], num_labels: int, class_names: Sequence[str], ids: Sequence[int] | None
) -> tuple[int, ...]:
    """Return the model's label of each class of a dataset: `ids`, or where they are None by name or number.

    By name if all classes are among `model_names` (the model's, as far as known) and no two share a label;
    by number if the model has as many labels as the dataset classes and no name speaks against it. InputError
    if neither, such as where only some names are the model's, or if `ids` does not fit.
    """
    num = len(class_names)
    if ids is None:
        labels = known_names(model_names)
        matched = [labels[name] for name in class_names if name in labels]
        if len(set(matched)) == num:
            return tuple(matched)
        advice = "method.class_ids, or fine-tune it: ddray pool train --kind diffusion --set init=FOLDER"
        if num_labels != num:
            raise InputError(
                f"the diffusion model has {num_labels} classes and the dataset {num} others: give {advice}"
            )
        pairs = list(enumerate(zip(class_names, model_names, strict=False)))
        others = [label for label, pair in pairs if all(pair) and not _synonyms(pair[0]) & _synonyms(pair[1])]
        if matched and others:
            ours, theirs = pairs[others[0]][1]
            raise InputError(
                f"the dataset's class names must all be the diffusion model's, {len(matched)} of {num} are, "
                f"but class {others[0]} is {ours!r} here and {theirs!r} there: give {advice}"
            )
        ids = range(num)
    if len(ids) != num or min(ids) < 0 or max(ids) >= num_labels:
        raise InputError(
            f"class_ids must be {num} labels in 0..{num_labels - 1}, one per class, got {list(ids)}"
        )
    return tuple(ids)


def _synonyms(name: str) -> set[str]:
    """Return a class's name and its parts, as in "tench, Tinca tinca"."""
    return {name, *(synonym.strip() for synonym in name.split(","))} - {""}


@functools.cache  # once per process: a search plans every trial
def _warn(folder: Path, seen: str, split_name: str) -> None:
    log.warning(
        "%s was trained on split %s, so it has seen images that %s holds out for val: val accuracy will "
        "be too high; leave out method.diffusion (or init) to train a generator without them",
        folder,
        seen,
        split_name,
    )


def warn_of_leak(folder: Folder, dataset: str, split_name: str) -> None:
    """Warn if a model has seen images that this split of the dataset (a fingerprint) holds out for val."""
    name = SplitName.parse(split_name)
    if name is None or name.val_seed is None:
        return
    for seen in folder.seen:
        if seen["dataset"] == dataset and seen["split"] != split_name:
            _warn(folder.path, seen["split"], split_name)
