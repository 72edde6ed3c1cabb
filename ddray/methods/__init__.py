"""One file per method or baseline, found by name: there is no list to edit.

A method's module ends in `METHOD: Final = Foo`, where `Foo` implements the `Distiller` protocol. A user's own
package offers one through an entry point `name = "package.module"` in the group `ddray.methods`. What methods
are built from is in `toolkit`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

from ddray.system.registry import Registry

if TYPE_CHECKING:
    from ddray.distillation.method import Distiller

REGISTRY: Final = Registry("method", __name__, "METHOD", "ddray.methods")


def method_names() -> list[str]:
    """Return the names of all methods, ours and those of installed packages; nothing is imported."""
    return REGISTRY.names()


def get_method(name: str) -> type[Distiller]:
    """Return the method class called `name`.

    Raises:
        InputError: there is no such method (with the nearest name), or its module has no METHOD.
    """
    return cast("type[Distiller]", REGISTRY.get(name))
