"""Things found by name: modules of ours, and those that installed packages offer; no list to edit."""

import importlib
import importlib.util
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from ddray.errors import InputError, unknown


class Registry:
    """The modules of one of our packages that end in `<ATTRIBUTE>: Final = ...`, by their names.

    A user's own package offers one through an entry point `name = "package.module"` of a group. `kind` is
    what a message calls one of them, such as `method`; `attribute` is, for example, `METHOD`.
    """

    def __init__(self, kind: str, package: str, attribute: str, group: str) -> None:
        self._kind, self._package, self._attribute, self._group = kind, package, attribute, group

    def names(self) -> list[str]:
        """Return all names, ours and those of installed packages; nothing is imported."""
        return sorted({*self.builtin_names(), *self._offered()})

    def builtin_names(self) -> list[str]:
        """Return the names of our own package's modules."""
        return sorted(_modules(self._package, self._attribute))

    def get(self, name: str, option: str | None = None) -> Any:
        """Return what the module or entry point called `name` ends in; a message calls the name `option`.

        Raises:
            InputError: there is no such name (with the nearest one), or its module ends in no such thing.
        """
        module = self.module(name, option)
        if not hasattr(module, self._attribute):
            ending = f"{self._attribute}: Final = ..."
            raise InputError(f"{self._kind} {name}: its module {module.__name__} must end in {ending}")
        return getattr(module, self._attribute)

    def module(self, name: str, option: str | None = None) -> ModuleType:
        """Return the module or entry point called `name`; InputError as for `get` if there is none."""
        if name in _modules(self._package, self._attribute):
            path = f"{self._package}.{name}"
        elif (path := self._offered().get(name, "")) == "":
            raise unknown(option or self._kind, name, self.names())
        return importlib.import_module(path)

    def _offered(self) -> dict[str, str]:
        """Read the entry points of every installed package: 10 ms, so only for a name that is not ours."""
        return {entry.name: entry.value for entry in entry_points(group=self._group)}


@cache
def _modules(package: str, attribute: str) -> frozenset[str]:
    """Return the modules of a package that end in the attribute, read from their sources, not imported."""
    names = []
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
        spec = importlib.util.find_spec(module.name)
        source = getattr(spec.loader, "get_source", lambda name: None)(module.name) if spec else None
        if f"\n{attribute}: Final = " in (source or ""):
            names.append(module.name.rpartition(".")[2])
    return frozenset(names)
