"""What `ddray pool` does, as functions: train a pool's networks, list and show what is there."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from ddray.data import Dataset
from ddray.errors import InputError, unknown
from ddray.evaluate.training import Recipe
from ddray.files import home
from ddray.nets import check_arch
from ddray.plan import resolve, resolve_arch
from ddray.pool import SUPERVISED_RECIPE, LocalPool, supervised_specs
from ddray.pool_files import DamagedEntryError, PoolFiles
from ddray.pool_training import PoolTrainer

log = logging.getLogger(__name__)

KINDS: Final[Mapping[str, frozenset[str]]] = {
    "supervised": frozenset({"--arch", "--num-models", "--seed"}),
    "ssl": frozenset({"--arch", "--seed"}),
    "diffusion": frozenset(),
}
"""Kinds of entries, and which of the options that not all of them have are theirs."""


def check_kind(kind: str, given: Iterable[str] = ()) -> None:
    """Refuse a kind of entry that there is not, and options that it does not have.

    Args:
        kind: of entry.
        given: the options of `KINDS` that the user gave.

    Raises:
        InputError: with the nearest name, or with the option.
    """
    if kind not in KINDS:
        raise unknown("--kind", kind, KINDS)
    for option in given:
        if option not in KINDS[kind]:
            others = " or ".join(name for name, options in KINDS.items() if option in options)
            raise InputError(f"{option} must go with --kind {others}, got --kind {kind}; leave it out")


def train_pool(
    dataset: Dataset,
    *,
    arch: str,
    recipe: Mapping[str, Any],
    seed: int,
    num_models: int,
    device: torch.device,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Train the supervised networks that are not there yet, on all of train.

    Args:
        dataset: the opened dataset.
        arch: architecture name; `auto` is the field's ConvNet.
        recipe: changes of `SUPERVISED_RECIPE`, fields of `Recipe`.
        seed: of the first network; the others count up.
        num_models: how many.
        device: where to compute.
        folder: the pool's folder; default `$DDRAY_HOME/pool`.

    Returns:
        `{"key", "folder", "keys"}`: the first entry's key and folder, and all keys.

    Raises:
        InputError: an unknown architecture or field, or a value that breaks its rule.
        StorageError: an entry can't be written.
    """
    if num_models < 1:
        raise InputError(f"--num-models must be >= 1, got {num_models}")
    plain = {"schedule": "constant", "augment": "none", **SUPERVISED_RECIPE}
    specs = supervised_specs(
        dataset,
        split="train",
        arch=resolve_arch(arch, dataset.image_shape),
        device=device.type,
        recipe=Recipe.parse({**plain, **recipe}).dump(),
        seed=seed,
        num=num_models,
    )
    folder = folder or home() / "pool"
    LocalPool(PoolTrainer(dataset, dataset.train(), device), folder).get(specs)
    keys = [spec.key for spec in specs]
    return {"key": keys[0], "folder": str(folder / keys[0]), "keys": keys}


def train_teacher(
    dataset: Dataset,
    *,
    arch: str,
    recipe: Mapping[str, Any],
    seed: int,
    device: torch.device,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Train the self-supervised teacher, if it is not there yet, that KRR-ST and Boost-SSDD ask for.

    Args:
        dataset: the opened dataset; all of train is used, without its labels.
        arch: architecture name; `auto` is the methods' default.
        recipe: changes of the methods' settings for this dataset, fields of `TeacherConfig`.
        seed: the teacher's own; 0 is the methods' default.
        device: where to compute.
        folder: the pool's folder; default `$DDRAY_HOME/pool`.

    Returns:
        `{"key", "folder", "keys"}`: the entry's key and folder.

    Raises:
        InputError: a dataset of sounds, an unknown architecture or field, or a value that breaks its rule.
        StorageError: an entry can't be written.
    """
    from ddray.ssl import SslTrainer, teacher_spec

    split = dataset.train()
    given: dict[str, Any] = {"seed": seed, **recipe}
    if arch != "auto":
        check_arch(arch)
        given["arch"] = arch
    plan = resolve("boost_ssdd", dataset, budget=dataset.num_classes, layers=[{"method": {"teacher": given}}])
    spec = teacher_spec(plan.config.method.teacher, dataset, split, split_name="train", device=device)
    folder = folder or home() / "pool"
    LocalPool(SslTrainer(split.images, device, dataset.name), folder).get([spec])
    return {"key": spec.key, "folder": str(folder / spec.key), "keys": [spec.key]}


def train_diffusion(
    dataset: Dataset, *, recipe: Mapping[str, Any], device: torch.device, out: Path | None = None
) -> dict[str, Any]:
    """Train the generator that D3HR uses on a dataset, if it is not there yet, and write it as a pipeline.

    Args:
        dataset: the opened dataset; all of train is used.
        recipe: changes of the defaults for its images' size, fields of `DiffusionRecipe`.
        device: where to compute.
        out: the DiTPipeline folder; default `$DDRAY_HOME/diffusion/<key>`.

    Returns:
        `{"key", "folder", "keys"}`: the pool entry's key, and the folder that diffusers opens.

    Raises:
        InputError: an unknown field, a value that breaks its rule, or a folder of something else.
        StorageError: a file can't be written.
    """
    from ddray.methods import _d3hr_stages as stages
    from ddray.methods._diffusion import save_pipeline
    from ddray.methods._diffusion_train import DiffusionRecipe, default_recipe

    settled = DiffusionRecipe.parse({**default_recipe(dataset.image_shape), **recipe})
    spec = stages.generator_spec(stages.base_spec(dataset, "train", device), settled)
    folder = out or home() / "diffusion" / spec.key
    if folder.exists() and not (folder / "model_index.json").is_file() and any(folder.iterdir()):
        raise InputError(f"--out must be a new folder or an old DiTPipeline, {folder} holds something else")
    pool = LocalPool(PoolTrainer(dataset, dataset.train(), device))
    save_pipeline(stages.entry_generator(pool.get([spec])[0]), folder)
    stages.forget_parts([spec])
    return {"key": spec.key, "folder": str(folder), "keys": [spec.key]}


def list_pool() -> dict[str, Any]:
    """Return `{"models": [{"key", "kind", "dataset", "arch", "epochs", "times_trained", "size_bytes"}]}`.

    `epochs` is None for entries without a number of epochs. Damaged entries are logged and left out.
    """
    files = PoolFiles(home() / "pool")
    found = []
    for key in files.known():
        try:
            meta = files.describe(key)
            size = sum(path.stat().st_size for path in (files.folder / key).iterdir())
        except FileNotFoundError:  # set aside by another process since it was listed
            continue
        except DamagedEntryError as error:
            log.warning("pool entry %s is damaged (%s): trained again when asked for", key[:12], error)
            continue
        spec = meta["spec"]
        found.append(
            {
                "key": key,
                "kind": spec.get("kind"),
                "dataset": meta.get("dataset_name") or spec.get("dataset"),
                "arch": spec.get("arch"),
                "epochs": spec.get("recipe", {}).get("epochs"),
                "times_trained": meta.get("times_trained", 1),
                "size_bytes": size,
            }
        )
    return {"models": found}


def show_entry(prefix: str) -> dict[str, Any]:
    """Return what an entry is.

    Args:
        prefix: its key, or as many first characters as tell it from the others.

    Returns:
        `{"key", "folder", "meta", "tensors": {name: {"dtype", "shape"}}}`.

    Raises:
        InputError: no entry or several begin with `prefix`, or the entry is damaged.
    """
    from safetensors import safe_open

    files = PoolFiles(home() / "pool")
    keys = [key for key in files.known() if key.startswith(prefix)]
    if len(keys) != 1:
        known = ", ".join(key[:12] for key in (keys or files.known())[:8]) or "none"
        raise InputError(
            f"key must begin one entry of {files.folder}, {len(keys)} begin with {prefix!r}; there: {known}"
        )
    (key,) = keys
    try:
        meta = files.read(key)
    except DamagedEntryError as error:
        raise InputError(
            f"pool entry {files.folder / key} must be undamaged: {error}; it is trained again when asked for"
        ) from error
    with safe_open(files.tensors_path(key), framework="numpy") as file:
        slices = {name: file.get_slice(name) for name in sorted(file.keys())}
        tensors = {
            name: {"dtype": held.get_dtype(), "shape": held.get_shape()} for name, held in slices.items()
        }
    return {"key": key, "folder": str(files.folder / key), "meta": meta, "tensors": tensors}
