"""The functions behind `ddray pool`: train a pool's networks, list and show its entries."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from ddray.config import Result
from ddray.data import Dataset
from ddray.errors import InputError, unknown
from ddray.jobs.plan import resolve
from ddray.jobs.trainers import PoolTrainer
from ddray.nets import check_arch
from ddray.nets.names import resolve_arch
from ddray.pool.local import LocalPool
from ddray.pool.spec import SUPERVISED_RECIPE, supervised_specs
from ddray.system.files import home
from ddray.training.recipe import Recipe

log = logging.getLogger(__name__)

KINDS: Final[Mapping[str, frozenset[str]]] = {
    "supervised": frozenset({"--arch", "--num-models", "--seed"}),
    "ssl": frozenset({"--arch", "--seed"}),
    "diffusion": frozenset(),
}
"""Kinds of entries, and the options that only some kinds take."""


class PoolResult(Result):
    """What `ddray pool train` returns."""

    key: str
    """The first entry's."""
    folder: str
    """The first entry's; of `diffusion`, the pipeline that diffusers opens."""
    keys: list[str]


def check_kind(kind: str, user_options: Iterable[str] = ()) -> None:
    """Reject an unknown kind of entry, and options that the kind does not take.

    Args:
        kind: kind of entry.
        user_options: options of `KINDS` that the user set.

    Raises:
        InputError: names the closest kind, or the option.
    """
    if kind not in KINDS:
        raise unknown("--kind", kind, KINDS)
    for option in user_options:
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
) -> PoolResult:
    """Train missing supervised networks on all of train.

    Args:
        dataset: the opened dataset.
        arch: architecture name; `auto` is the field's ConvNet.
        recipe: fields of `Recipe` that override `SUPERVISED_RECIPE`.
        seed: seed of the first network; the others count up.
        num_models: how many.
        device: where to compute.
        folder: the pool's folder; default `$DDRAY_HOME/pool`.

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
    return PoolResult(key=keys[0], folder=str(folder / keys[0]), keys=keys)


def train_teacher(
    dataset: Dataset,
    *,
    arch: str,
    recipe: Mapping[str, Any],
    seed: int,
    device: torch.device,
    folder: Path | None = None,
) -> PoolResult:
    """Train the self-supervised teacher that KRR-ST and Boost-SSDD use, if it is missing.

    Args:
        dataset: the opened dataset; all of train is used, without its labels.
        arch: architecture name; `auto` is the methods' default.
        recipe: fields of `TeacherConfig` that override the methods' settings for this dataset.
        seed: the teacher's seed; 0 is the methods' default.
        device: where to compute.
        folder: the pool's folder; default `$DDRAY_HOME/pool`.

    Raises:
        InputError: an audio dataset, an unknown architecture or field, or a value that breaks its rule.
        StorageError: an entry can't be written.
    """
    from ddray.methods.families.ssl.teacher import SslTrainer, ssl_teacher_spec

    split = dataset.train()
    teacher_settings: dict[str, Any] = {"seed": seed, **recipe}
    if arch != "auto":
        check_arch(arch)
        teacher_settings["arch"] = arch
    plan = resolve(
        "boost_ssdd", dataset, budget=dataset.num_classes, layers=[{"method": {"teacher": teacher_settings}}]
    )
    spec = ssl_teacher_spec(plan.config.method.teacher, dataset, split, split_name="train", device=device)
    folder = folder or home() / "pool"
    LocalPool(SslTrainer(split.images, device, dataset.name), folder).get([spec])
    return PoolResult(key=spec.key, folder=str(folder / spec.key), keys=[spec.key])


def train_diffusion(
    dataset: Dataset, *, recipe: Mapping[str, Any], device: torch.device, out: Path | None = None
) -> PoolResult:
    """Train the generator that D3HR uses on a dataset, if it is missing, and write it as a pipeline.

    Args:
        dataset: the opened dataset; all of train is used.
        recipe: fields of `DiffusionRecipe` that override the defaults for the image size.
        device: where to compute.
        out: the DiTPipeline folder; default `$DDRAY_HOME/diffusion/<key>`.

    Raises:
        InputError: an unknown field, a value that breaks its rule, or a folder with other content.
        StorageError: a file can't be written.
    """
    from ddray.methods.families.diffusion import stages
    from ddray.methods.families.diffusion.model import save_pipeline
    from ddray.methods.families.diffusion.train import DiffusionRecipe, default_recipe

    full_recipe = DiffusionRecipe.parse({**default_recipe(dataset.image_shape), **recipe})
    spec = stages.generator_spec(stages.base_spec(dataset, "train", device), full_recipe)
    folder = out or home() / "diffusion" / spec.key
    if folder.exists() and not (folder / "model_index.json").is_file() and any(folder.iterdir()):
        raise InputError(f"--out must be a new folder or an old DiTPipeline, {folder} has other content")
    pool = LocalPool(PoolTrainer(dataset, dataset.train(), device))
    save_pipeline(stages.entry_generator(pool.get([spec])[0]), folder)
    stages.forget_parts([spec])
    return PoolResult(key=spec.key, folder=str(folder), keys=[spec.key])
