"""One file = one method or baseline; found by name, without a list to edit.

A method's module ends in `METHOD: Final = Foo`, where `Foo` keeps the `Distiller` protocol. A user's own
package offers one through an entry point `name = "package.module"` in the group `ddray.methods`.
"""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points
from typing import cast

from ddray.distill import Distiller
from ddray.errors import InputError, unknown


def method_names() -> list[str]:
    """Return the names of all methods, ours and those of installed packages; nothing is imported."""
    ours = [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]
    return sorted({*ours, *(entry.name for entry in entry_points(group="ddray.methods"))})


def get_method(name: str) -> type[Distiller]:
    """Return the method class called `name`.

    Raises:
        InputError: there is no such method (with the nearest name), or its module has no METHOD.
    """
    if name not in method_names():
        raise unknown("method", name, method_names())
    ours = {module.name for module in pkgutil.iter_modules(__path__)}
    theirs = {entry.name: entry.value for entry in entry_points(group="ddray.methods")}
    module = importlib.import_module(f"{__name__}.{name}" if name in ours else theirs[name])
    method = getattr(module, "METHOD", None)
    if method is None:
        raise InputError(f"method {name}: its module {module.__name__} must end in METHOD: Final = <class>")
    return cast("type[Distiller]", method)
