"""ddray: hyperparameter and NAS benchmarking for dataset distillation, on Ray.

As a library: `ddray.distillation.loop("datadam", ipc=1)`, `ddray.load("x.pt")`, `ddray.evaluation.protocol(distilled)`,
`ddray.artifact.export(distilled, "folder")`.
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddray.api import distill as distill
    from ddray.api import evaluate as evaluate
    from ddray.api import export as export
    from ddray.api import load as load

__version__ = "0.1.0"

_FUNCTIONS = ("distill", "evaluate", "export", "load")


class _Callable(ModuleType):
    """A submodule that shares its name with a library function and can be called like it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        from ddray import api as library

        return getattr(library, self.__name__.rpartition(".")[2])(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """The function's parameters, for help() and notebooks."""
        from ddray import api as library

        return inspect.signature(getattr(library, self.__name__.rpartition(".")[2]))


class _Package(ModuleType):
    """This package; torch is imported when a function is first used."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Make a submodule callable when it is imported, so that `ddray.distillation.loop(...)` still works."""
        if name in _FUNCTIONS and isinstance(value, ModuleType):
            value.__class__ = _Callable
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """Return a function of the library."""
        if name not in _FUNCTIONS:
            raise AttributeError(f"module 'ddray' has no attribute {name!r}")
        from ddray import api as library

        return getattr(library, name)

    def __dir__(self) -> list[str]:
        """List the library's functions too."""
        return sorted({*super().__dir__(), *_FUNCTIONS})


sys.modules[__name__].__class__ = _Package
