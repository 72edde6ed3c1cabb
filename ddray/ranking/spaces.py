"""What a space of architectures is and brings, and samples of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ddray.config import merge
from ddray.errors import InputError
from ddray.nets.build import Net
from ddray.ranking import get_definition, space_names
from ddray.ranking.options import NasConfig, NasOptions
from ddray.seeding import derive_numpy

if TYPE_CHECKING:
    from ddray.ranking.truth import Truth


class NasSpace(Protocol):
    """A fixed, ordered list of architectures.

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
        self,
        index: int,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        seed: int,
        device: str | torch.device = "cpu",
    ) -> Net:
        """Build an architecture for images of `image_shape` (C, H, W); `seed` determines every weight."""
        ...

    def cost(self, index: int, image_shape: tuple[int, int, int], num_classes: int) -> float:
        """Return the multiply-adds of one image's forward pass, in millions."""
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
        harnesses: for `--compat`: faults of another harness, each by label with what it changes in a proxy.
        published: paper and table of its published figures (reports/published.csv).
        published_in_text: published figures in no table, by method and name.
    """

    architectures: Callable[..., NasSpace]
    recipe: Mapping[str, Any]
    whole_epochs: int | None = None
    config_type: type[NasConfig] = NasConfig
    options: tuple[str, ...] = ()
    truths: Mapping[str, TruthSource] = field(default_factory=dict)
    harnesses: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    published: tuple[str, str] | None = None
    published_in_text: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def owners(fits: Callable[[SpaceDefinition], bool]) -> str:
    """Return the names of the spaces whose definition fits, for a message."""
    return " or ".join(name for name in space_names() if fits(get_definition(name)))


def get_space(name: str, **options: Any) -> NasSpace:
    """Return a space by name.

    Args:
        name: one of `space_names()`.
        options: the space's own; None leaves one out.

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

    Epochs set by the user apply to the baseline `whole` too, unless `whole_epochs` is set.

    Raises:
        InputError: an unknown name, an invalid value, or options of another space.
    """
    definition = get_definition(options.space)
    for section in {name for layer in layers for name in layer} - set(definition.config_type.model_fields):
        if spaces := owners(partial(_has_section, section)):
            raise InputError(
                f"--set {section}.* needs --space {spaces}, got --space {options.space}, "
                f"which has no {section}"
            )
    defaults = definition.recipe
    overrides = {} if options.epochs is None else {"epochs": options.epochs}
    recipe = {**defaults, **overrides}
    truth = {**recipe, **({} if options.truth_epochs is None else {"epochs": options.truth_epochs})}
    shared = merge(
        {"recipe": recipe, "truth_recipe": truth}, *({"truth_recipe": _shared(layer)} for layer in layers)
    )
    if not overrides and not any("epochs" in _recipe_of(layer) for layer in layers):
        shared["whole_epochs"] = definition.whole_epochs
    return definition.config_type.parse(merge(shared, *layers))


def _has_section(section: str, definition: SpaceDefinition) -> bool:
    """Return whether `--set` takes the section for a space."""
    return section in definition.config_type.model_fields


def _shared(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the recipe settings of a --set layer that apply to the truth too: all but the epochs."""
    return {name: value for name, value in _recipe_of(layer).items() if name != "epochs"}


def _recipe_of(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    recipe = layer.get("recipe", {})
    return recipe if isinstance(recipe, Mapping) else {}


def sample(
    space: NasSpace,
    num: int | None,
    *,
    seed: int,
    image_shape: tuple[int, int, int],
    num_classes: int,
    max_mflops: float | None = None,
) -> list[int]:
    """Draw architectures of all costs: one from each of `num` strata of equal size.

    Args:
        space: the space to draw from.
        num: how many; None takes all.
        seed: seed of the draw.
        image_shape: (C, H, W) of the images for which the cost is computed.
        num_classes: K.
        max_mflops: leave out architectures that need more multiply-adds per image (millions).

    Returns:
        Distinct indices, ascending.

    Raises:
        InputError: `num` is less than 1 or more than the space has.
    """
    import numpy as np

    costs = np.array([space.cost(index, image_shape, num_classes) for index in range(len(space))])
    order = np.argsort(costs, kind="stable")
    limit = ""
    if max_mflops is not None:
        order, limit = order[costs[order] <= max_mflops], f" up to {max_mflops:g} million FLOPs"
    if num is None and len(order):
        return sorted(order.tolist())
    if num is None or not 1 <= num <= len(order):
        raise InputError(f"--sample must be in 1..{len(order)} for {space.name}{limit}, got {num}")
    strata = np.array_split(order, num)
    generator = derive_numpy(seed, "nas", "sample", space.name, num)
    return sorted(int(generator.choice(stratum)) for stratum in strata)


def parse_indices(text: str, space: NasSpace) -> list[int]:
    """Return the indices in a text, in its order.

    Args:
        text: `"all"`, or indices such as `"1,5,7"`.
        space: the space that they index.

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
