"""What a space of architectures is and brings, and samples of one."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from ddray.config import merge
from ddray.errors import InputError
from ddray.nets.build import Net
from ddray.ranking import get_definition, space_names
from ddray.ranking.options import NasConfig, NasOptions
from ddray.ranking.result import ArchList
from ddray.seeding import derive_numpy

if TYPE_CHECKING:
    from ddray.ranking.truth import Truth

Shape = tuple[int, int, int]
"""(C, H, W) of images."""
Device = str | torch.device


class NasSpace(Protocol):
    """A fixed, ordered list of architectures; an index out of range is an `InputError`.

    Attributes:
        name: its name for `--space`.
    """

    name: str

    def __len__(self) -> int: ...

    def choices(self, index: int) -> dict[str, Any]:
        """Return the design choices of an architecture, as JSON values."""
        ...

    def arch_name(self, index: int) -> str:
        """Return the name shown in tables."""
        ...

    def describe(self, index: int) -> dict[str, Any]:
        """Return index, name, choices, `params_m` and `flops_m` (millions)."""
        ...

    def build(
        self, index: int, image_shape: Shape, num_classes: int, *, seed: int, device: Device = "cpu"
    ) -> Net:
        """Build an architecture for images of `image_shape`; `seed` determines every weight."""
        ...

    def cost(self, index: int, image_shape: Shape, num_classes: int) -> float:
        """Return the multiply-adds of one image's forward pass, in millions.

        Raises:
            InputError: the image is too small for the architecture.
        """
        ...


TruthSource = Callable[[Sequence[int], str | None, Path], "Truth"]
"""Returns the truth of indices, from a column (None: the default) of a file (for `api:FILE` and the like)."""


@dataclass(frozen=True)
class SpaceDefinition:
    """What a module in `ddray/ranking/`, or a module that a package offers, brings as `SPACE`.

    Attributes:
        architectures: makes the space; takes the options below.
        recipe: how its architectures are trained: fields of `NasRecipe`.
        whole_epochs: epochs of the baseline `whole`; None: the recipe's.
        config_type: `NasConfig`, with a section for the space's own options if it has any (`--set`).
        options: names of the options.
        truths: sources of true accuracies by the name that `--truth` takes: `table`, or `api:FILE`.
        truth_columns: their column for each dataset that they have accuracies of; first, where none is known.
        harnesses: for `--compat`: faults of another harness, each by label with what it changes in a proxy.
        published: paper and table of its published figures (reports/published.csv).
        published_options: the `NasOptions` that the paper states for them; None for an option left unset.
        published_in_text: published figures in no table, by method and name.
    """

    architectures: Callable[..., NasSpace]
    recipe: Mapping[str, Any]
    whole_epochs: int | None = None
    config_type: type[NasConfig] = NasConfig
    options: tuple[str, ...] = ()
    truths: Mapping[str, TruthSource] = field(default_factory=dict)
    truth_columns: Mapping[str, str] = field(default_factory=dict)
    harnesses: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    published: tuple[str, str] | None = None
    published_options: Mapping[str, Any] = field(default_factory=dict)
    published_in_text: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def owners(name: str, offered: Callable[[SpaceDefinition], Container[str]]) -> str:
    """Return the spaces with `name` among what they offer, for a message."""
    return " or ".join(space for space in space_names() if name in offered(get_definition(space)))


def get_space(name: str, **options: Any) -> NasSpace:
    """Return a space by name; an option of its own that is None is left out.

    Raises:
        InputError: an unknown name, an option out of range, or one that does not apply to the space.
    """
    definition = get_definition(name)
    options = {option: value for option, value in options.items() if value is not None}
    if wrong := [option for option in options if option not in definition.options]:
        raise InputError(
            f"{', '.join(wrong)} must be left out for --space {name}, "
            f"which takes {', '.join(definition.options) or 'no options'}"
        )
    return definition.architectures(**options)


def resolve_config(options: NasOptions, layers: Sequence[Mapping[str, Any]] = ()) -> NasConfig:
    """Return the training settings: the space's own, then --epochs and --truth-epochs, then --set.

    Recipe settings of `--set` apply to the truth too, except for the epochs. Epochs set by the user apply to
    the baseline `whole` too, unless `whole_epochs` is set.

    Raises:
        InputError: an unknown name, an invalid value, or options of another space.
    """
    definition = get_definition(options.space)
    changes = merge(*layers)
    for section in changes.keys() - definition.config_type.model_fields.keys():
        if spaces := owners(section, attrgetter("config_type.model_fields")):
            raise InputError(
                f"--set {section}.* needs --space {spaces}, got --space {options.space}, "
                f"which has no {section}"
            )
    recipe_changes = changes["recipe"] if isinstance(changes.get("recipe"), Mapping) else {}
    epochs = {"epochs": options.epochs} if options.epochs else {}
    truth_epochs = {"epochs": options.truth_epochs} if options.truth_epochs else {}
    numerics = numeric_settings(options)
    shared = {name: value for name, value in recipe_changes.items() if name != "epochs"}
    settings: dict[str, Any] = {
        "recipe": {**definition.recipe, **epochs, **numerics},
        "truth_recipe": {**definition.recipe, **epochs, **truth_epochs, **numerics, **shared},
    }
    if not epochs and "epochs" not in recipe_changes:
        settings["whole_epochs"] = definition.whole_epochs
    return definition.config_type.parse(merge(settings, changes))


def numeric_settings(options: NasOptions) -> dict[str, Any]:
    """Return the recipe's settings for --precision and --deterministic, if these are set."""
    settings = options.numerics()
    if options.precision is not None:
        is_full = options.precision in ("tf32", "fp32")
        settings["precision"] = "fp32" if is_full else options.precision
        settings["tf32"] = options.precision != "fp32"
    return settings


def sample(
    space: NasSpace,
    num: int | None,
    *,
    seed: int,
    image_shape: Shape,
    num_classes: int,
    max_mflops: float | None = None,
    uniform: bool = False,
) -> list[int]:
    """Draw architectures of all costs: one from each of `num` strata of equal size; None takes all.

    `uniform` draws them with equal chances instead, whatever they cost. Those of more than `max_mflops`
    (million multiply-adds per image of `image_shape`) are left out.

    Returns:
        Distinct indices, ascending.

    Raises:
        InputError: `num` is less than 1 or more than the space has.
    """
    costs = np.array([space.cost(index, image_shape, num_classes) for index in range(len(space))])
    order = np.argsort(costs, kind="stable")
    limit = ""
    if max_mflops is not None:
        order, limit = order[costs[order] <= max_mflops], f" up to {max_mflops:g} million FLOPs"
    if num is None and len(order):
        return sorted(order.tolist())
    if num is None or not 1 <= num <= len(order):
        raise InputError(f"--sample must be in 1..{len(order)} for {space.name}{limit}, got {num}")
    if uniform:
        draws = derive_numpy(seed, "nas", "uniform", space.name, num)
        return sorted(draws.choice(np.sort(order), num, replace=False).tolist())
    generator = derive_numpy(seed, "nas", "sample", space.name, num)
    return sorted(int(generator.choice(stratum)) for stratum in np.array_split(order, num))


def parse_indices(text: str, space: NasSpace) -> list[int]:
    """Return the indices in a text, in its order: `"all"`, or such as `"1,5,7"`.

    Raises:
        InputError: malformed text, an index out of range, or a duplicate.
    """
    if text.strip() == "all":
        return list(range(len(space)))
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise InputError(f"architectures must be all, or indices such as 1,5,7, got {text!r}")
    indices = [int(part) for part in parts]
    for index in indices:
        if index >= len(space):
            raise InputError(f"indices of {space.name} must be in 0..{len(space) - 1}, got {index}")
    if len(set(indices)) < len(indices):
        raise InputError(f"indices of {space.name} must differ, got {text!r}")
    return indices


def described(archs: str, space: str) -> ArchList:
    """Return architectures of a space with their sizes and choices: `ddray nas --describe`."""
    nas_space = get_space(space)
    return ArchList(archs=[nas_space.describe(index) for index in parse_indices(archs, nas_space)])
