"""One file per method or baseline, discovered by name: there is no list to edit.

A method's module ends in `METHOD: Final = Foo`, where `Foo` implements the `Distiller` protocol. A user's own
package offers one through an entry point `name = "package.module"` in the group `ddray.methods`. What methods
are built from is in `toolkit`.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from typing import cast

from ddray.distillation.method import Distiller
from ddray.errors import InputError, unknown


def method_names() -> list[str]:
    """Return the names of all methods, ours and those of installed packages; nothing is imported."""
    return sorted({*builtin_names(), *_theirs()})


def get_method(name: str) -> type[Distiller]:
    """Return the method class called `name`.

    Raises:
        InputError: there is no such method (with the nearest name), or its module has no METHOD.
    """
    if name in builtin_names():
        path = f"{__name__}.{name}"
    elif (path := _theirs().get(name, "")) == "":
        raise unknown("method", name, method_names())
    module = importlib.import_module(path)
    method = getattr(module, "METHOD", None)
    if method is None:
        raise InputError(f"method {name}: its module {module.__name__} must end in METHOD: Final = <class>")
    return cast("type[Distiller]", method)


@cache
def builtin_names() -> frozenset[str]:
    """Return the names of ddray's methods: every module of this package but `toolkit`."""
    modules = pkgutil.iter_modules(__path__)
    return frozenset(module.name for module in modules if not module.ispkg) - {"toolkit"}


def _theirs() -> dict[str, str]:
    """Read the entry points of every installed package: 10 ms, so only for a name that is not ours."""
    return {entry.name: entry.value for entry in entry_points(group="ddray.methods")}
