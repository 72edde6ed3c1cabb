"""Where a method's generator comes from: a DiTPipeline folder, or one that is trained on its images."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ddray.distillation.method import DistillContext
from ddray.errors import InputError
from ddray.methods.families.diffusion import stages
from ddray.methods.families.diffusion.folder import read_folder, record_folder, resolve_ids, warn_of_leak
from ddray.methods.families.diffusion.train import SCHEDULE, DiffusionRecipe
from ddray.pool.spec import PoolSpec


class GeneratorSettings(Protocol):
    """The settings of a method that say which generator it samples."""

    @property
    def diffusion(self) -> str | None: ...
    @property
    def generator(self) -> DiffusionRecipe: ...
    @property
    def class_ids(self) -> tuple[int, ...] | None: ...


@dataclass(frozen=True)
class Source:
    """A generator, before its weights are loaded."""

    recipe: Mapping[str, Any]
    """As specs name it: `{"spec": ...}` of a pool entry, or `{"fingerprint": ...}` of a folder."""
    ids: tuple[int, ...]
    """Its label of each class."""
    num_train_timesteps: int
    """Noise levels it is trained on."""

    @property
    def specs(self) -> list[PoolSpec]:
        """The pool entry that it is; none for a folder."""
        return [PoolSpec.parse(self.recipe["spec"])] if "spec" in self.recipe else []

    @property
    def parent(self) -> str:
        """The key of the pool entry, or the fingerprint of the folder."""
        return self.specs[0].key if "spec" in self.recipe else str(self.recipe["fingerprint"])


def resolve_source(ctx: DistillContext, config: GeneratorSettings) -> Source:
    """Return a method's generator; everything about it is checked here, before anything is computed.

    Raises:
        InputError: the folder can't be read, or does not fit the images or classes.
    """
    dataset = ctx.dataset
    if config.diffusion is None:
        base = stages.base_spec(dataset, ctx.split_name, ctx.device)
        recipe: dict[str, Any] = {"spec": stages.generator_spec(base, config.generator).dump()}
        names, num, timesteps = dataset.class_names, dataset.num_classes, SCHEDULE["num_train_timesteps"]
        if config.generator.init is not None:  # it keeps its own schedule
            timesteps = read_folder(Path(config.generator.init)).num_train_timesteps
    else:
        folder = read_folder(Path(config.diffusion))
        if folder.channels < dataset.image_shape[0]:
            raise InputError(
                f"a diffusion model of {dataset.name}'s images must have {dataset.image_shape[0]} channels, "
                f"{folder.path} has {folder.channels}; leave method.diffusion out to train one"
            )
        record_folder(folder)
        warn_of_leak(folder, dataset.fingerprint, ctx.split_name)
        recipe = {"fingerprint": folder.fingerprint}
        names, num, timesteps = folder.class_names, folder.num_classes, folder.num_train_timesteps
    ids = resolve_ids(names, num, dataset.class_names, config.class_ids)
    return Source(recipe, ids, timesteps)
