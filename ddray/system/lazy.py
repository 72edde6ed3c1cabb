"""Packages whose names are imported when they are first used: --help and completion do not wait for torch."""

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def lazy(package: str, modules: Mapping[str, Iterable[str]]) -> Callable[[str], Any]:
    """Return a package's `__getattr__`, by its modules with the names that it takes from each."""
    module_of = {name: module for module, names in modules.items() for name in names}

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{module_of[name]}"), name)

    return get
