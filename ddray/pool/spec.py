"""Pool entries: the spec whose hash is the key, the entry itself, the pool that provides it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from pydantic import ValidationInfo, field_validator

from ddray.config import Config
from ddray.data import Dataset
from ddray.nets import check_arch
from ddray.runs.ledger import canonical_json
from ddray.training.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor, nn

FEATURES: Final = "features"
"""Kind of the entries with a network's features of real images; many times as large as the network."""
SUPERVISED_RECIPE: Final = {"epochs": 20, "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4, "batch": 256}
_PLAIN: Final = {"schedule": "constant", "augment": "none", "strategy": None, "cutmix": 0.0}


def teacher_spec(
    dataset: Dataset, split_name: str, arch: str, recipe: Recipe, *, device: torch.device, seed: int = 0
) -> PoolSpec:
    """Return the spec of a network trained on the part of a dataset called `split_name`."""
    fields = recipe.dump()
    return supervised_specs(
        dataset, split=split_name, arch=check_arch(arch), device=device.type, recipe=fields, seed=seed, num=1
    )[0]


def transform_of(dataset: Dataset, pixels: str) -> str:
    """Return `PoolSpec.transform`: the pixels' space, and what the dataset's name sets of trainings."""
    return ", ".join([pixels, *(f"{name}={value}" for name, value in dataset.overrides.items())])


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
        recipe: fields of `training.recipe.Recipe` that override `SUPERVISED_RECIPE`.
        seed: seed of the first network.
        num: how many.
    """
    return [
        PoolSpec(
            kind="supervised",
            dataset=dataset.fingerprint,
            split=split,
            transform=transform_of(dataset, "normalized"),
            arch=arch,
            recipe={**SUPERVISED_RECIPE, **recipe},
            seed=seed + index,
            image_shape=dataset.image_shape,
            num_classes=dataset.num_classes,
            device=device,
        )
        for index in range(num)
    ]


def features_spec(network: PoolSpec) -> PoolSpec:
    """Return the spec of a supervised network's features [N, D] of the images of its split.

    For a network trained on `train-val<seed>`, the rows of val [M, D] follow.
    """
    update = {"kind": FEATURES, "recipe": {"network": network.dump()}, "parents": (network.key,)}
    return network.model_copy(update=update)


@dataclass(frozen=True)
class PoolEntry:
    """One trained entry.

    The meta has the spec and the measurements of its training. Weights are under `weights.<name>`; an entry
    of features, or of a self-supervised network, has them [N, D] under `features`. Large ones are
    memory-mapped.
    """

    meta: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def module(self) -> nn.Module:
        """Return the network with its weights, in eval mode on the CPU."""
        from ddray.nets import build_net

        spec = PoolSpec.parse(self.meta["spec"])
        net = build_net(spec.arch, spec.image_shape, spec.num_classes, seed=0)
        weights = {k: v for k, v in self.tensors.items() if k.startswith("weights.")}
        net.load_state_dict({k.removeprefix("weights."): v for k, v in weights.items()})
        return net.eval()


class ModelPool(Protocol):
    """Provides pool entries; missing ones are trained once."""

    def get(self, specs: Sequence[PoolSpec]) -> list[PoolEntry]:
        """Return the entries of `specs`, in order."""
        ...


class PoolSource(Protocol):
    """Names a pool that is served elsewhere; can be sent to a worker."""

    def connect(self, trainer: Trainer) -> ModelPool:
        """Return the pool; `trainer` trains the entries that are missing."""
        ...


Trainer = Callable[[PoolSpec], "tuple[Mapping[str, Tensor], Mapping[str, Any]]"]
