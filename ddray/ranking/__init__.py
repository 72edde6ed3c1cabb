"""Neural architecture search on distilled sets: spaces of architectures, training, truth and ranking.

A space's module ends in `SPACE: Final = SpaceDefinition(...)`. A user's own package offers one through an
entry point `name = "package.module"` in the group `ddray.spaces`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ddray.system.registry import Registry

if TYPE_CHECKING:
    from ddray.ranking.spaces import SpaceDefinition

DEFAULT_SPACE: Final = "convnet720"
_SPACES: Final = Registry("space", __name__, "SPACE", "ddray.spaces")


def space_names() -> list[str]:
    """Return the names of all spaces, ours and those of installed packages; nothing is imported."""
    return _SPACES.names()


def get_definition(name: str) -> SpaceDefinition:
    """Return what a space brings; InputError if there is no such space."""
    definition: SpaceDefinition = _SPACES.get(name, "--space")
    return definition
