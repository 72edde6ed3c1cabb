"""The functions behind `ddray pool train`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from ddray.config import Result
from ddray.data import Dataset, SplitName, open_dataset
from ddray.errors import InputError, unknown
from ddray.jobs.plan import resolve
from ddray.jobs.trainers import PoolTrainer
from ddray.methods.families.ssl.teacher import ssl_teacher_spec
from ddray.nets import check_arch
from ddray.nets.names import resolve_arch
from ddray.pool import trajectories
from ddray.pool.local import LocalPool
from ddray.pool.spec import SUPERVISED_RECIPE, PoolSpec, Trainer, supervised_specs
from ddray.system.files import home
from ddray.system.worker import worker_device
from ddray.training.experts import ExpertRecipe
from ddray.training.recipe import Recipe

KINDS: Final[Mapping[str, frozenset[str]]] = {
    "supervised": frozenset({"--arch", "--num-models", "--seed", "--num-workers"}),
    "ssl": frozenset({"--arch", "--seed"}),
    "diffusion": frozenset(),
    trajectories.KIND: frozenset({"--arch", "--num-models", "--seed", "--num-workers"}),
}
"""Kinds of entries, and the options that only some kinds take."""
_PIXEL_SPACES: Final = ("normalized", "raw", "zca")
_WHY_NOT: Final = {
    ("--num-workers", "ssl"): "its loss compares all images of a batch with each other",
    ("--num-workers", "diffusion"): "its training is one process's",
}


class PoolResult(Result):
    """What `ddray pool train` returns."""

    key: str
    """The first entry's."""
    folder: str
    """The first entry's; of `diffusion`, the pipeline that diffusers opens."""
    keys: list[str]


def check_kind(kind: str, user_options: Iterable[str] = ()) -> None:
    """Reject an unknown kind of entry, and options (of `KINDS`) that the kind does not take."""
    if kind not in KINDS:
        raise unknown("--kind", kind, KINDS)
    for option in user_options:
        if option not in KINDS[kind]:
            others = " or ".join(name for name, options in KINDS.items() if option in options)
            reason = f" ({why})" if (why := _WHY_NOT.get((option, kind))) else ""
            raise InputError(
                f"{option} must go with --kind {others}, got --kind {kind}{reason}; leave it out"
            )


def train_pool(
    dataset: Dataset,
    *,
    arch: str,
    recipe: Mapping[str, Any],
    seed: int,
    num_models: int,
    device: torch.device,
    folder: Path | None = None,
    trainer: Trainer | None = None,
) -> PoolResult:
    """Train missing supervised networks on all of train, their seeds counting up from `seed`.

    Arch `auto` is the field's ConvNet; `recipe` overrides fields of `SUPERVISED_RECIPE`; the default folder
    is `$DDRAY_HOME/pool`; the default trainer trains in this process, on `device`. InputError for an unknown
    architecture or field, or a bad value; StorageError if an entry can't be written.
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
    return _train(specs, trainer or PoolTrainer(dataset, dataset.train(), device), folder)


def _train(specs: list[PoolSpec], trainer: Trainer, folder: Path | None) -> PoolResult:
    folder = folder or home() / "pool"
    LocalPool(trainer, folder).get(specs)
    keys = [spec.key for spec in specs]
    return PoolResult(key=keys[0], folder=str(folder / keys[0]), keys=keys)


def expert_specs(
    dataset: Dataset, *, arch: str, recipe: Mapping[str, Any], seed: int, num_models: int, device: str
) -> list[PoolSpec]:
    """Return the specs of experts whose trajectories MTT and DATM match, their seeds counting up from `seed`.

    They are trained without val, as runs of all seeds and searches with seed 0 use them. Arch `auto` is the
    field's ConvNet; `recipe` overrides fields of `ExpertRecipe`, and may name the `pixel_space`, by default
    normalized; `device` is a kind. InputError as for `train_pool`.
    """
    if num_models < 1:
        raise InputError(f"--num-models must be >= 1, got {num_models}")
    audio = {"augment": "none"} if dataset.train().is_audio else {}  # as the methods train them
    fields: dict[str, Any] = {"pixel_space": "normalized", **audio, **recipe}
    if (kind := fields.pop("pixel_space")) not in _PIXEL_SPACES:
        raise unknown("pixel_space", str(kind), _PIXEL_SPACES)
    return trajectories.trajectory_specs(
        dataset,
        split=str(SplitName(0)),
        pixel_space=str(kind),
        arch=resolve_arch(arch, dataset.image_shape),
        device=device,
        recipe=ExpertRecipe.parse(fields),
        seed=seed,
        num=num_models,
    )


def train_experts(
    dataset: Dataset,
    *,
    arch: str,
    recipe: Mapping[str, Any],
    seed: int,
    num_models: int,
    device: torch.device,
    folder: Path | None = None,
) -> PoolResult:
    """Train the missing ones of `expert_specs`, one after another in this process.

    InputError as there, DivergedError if a loss is not finite, StorageError if an entry can't be written.
    """
    specs = expert_specs(
        dataset, arch=arch, recipe=recipe, seed=seed, num_models=num_models, device=device.type
    )
    return _train(specs, PoolTrainer(dataset, dataset.train(), device), folder)


@dataclass(frozen=True)
class EntryJob:
    """What the workers know that train entries side by side, each its own.

    Attributes:
        dataset: name that the dataset is opened by.
        opening: with which options.
        folder: the pool, which all nodes share.
        device: kind of device of the workers.
    """

    dataset: str
    opening: Mapping[str, Any]
    folder: Path
    device: str


def train_entry(job: EntryJob, spec: Mapping[str, Any]) -> None:
    """Train an entry as one of the workers of a job, unless another process has.

    Raises:
        InputError: this node's dataset is not the driver's; and as `PoolTrainer` does.
    """
    pool_spec, dataset = PoolSpec.parse(spec), open_dataset(job.dataset, **job.opening)
    if dataset.fingerprint != pool_spec.dataset:
        raise InputError(
            f"{job.dataset} must be the same on every node, this one has {dataset.fingerprint[:12]}, the "
            f"driver {pool_spec.dataset[:12]}; give all nodes the same --data-dir"
        )
    trainer = PoolTrainer(dataset, dataset.train(), worker_device(job.device))
    LocalPool(trainer, job.folder).get([pool_spec])


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

    It is trained on all of train, without labels. Arch `auto` and seed 0 are the methods' defaults; `recipe`
    overrides their `TeacherConfig` for this dataset; the default folder is `$DDRAY_HOME/pool`.
    InputError as for `train_pool`, and for an audio dataset.
    """
    teacher_settings: dict[str, Any] = {"seed": seed, **recipe}
    if arch != "auto":
        check_arch(arch)
        teacher_settings["arch"] = arch
    plan = resolve(
        "boost_ssdd", dataset, budget=dataset.num_classes, layers=[{"method": {"teacher": teacher_settings}}]
    )
    teacher, split = plan.config.method.teacher, dataset.train()
    spec = ssl_teacher_spec(teacher, dataset, split, split_name="train", device=device)
    return _train([spec], PoolTrainer(dataset, split, device), folder)


def train_diffusion(
    dataset: Dataset, *, recipe: Mapping[str, Any], device: torch.device, out: Path | None = None
) -> PoolResult:
    """Train the generator that D3HR uses on all of train, if it is missing, and write it as a DiTPipeline.

    `recipe` overrides fields of the image size's `DiffusionRecipe`; the pipeline's folder is by default
    `$DDRAY_HOME/diffusion/<key>`. InputError for an unknown field, a bad value, or a folder with other
    content; StorageError if a file can't be written.
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
