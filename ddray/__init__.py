"""ddray: hyperparameter and NAS benchmarking for dataset distillation, on Ray.

As a library: `ddray.distill("datadam", ipc=1)`, `ddray.load("x.pt")`, `ddray.evaluate(distilled)`,
`ddray.export(distilled, "folder")`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddray.api import distill as distill
    from ddray.api import evaluate as evaluate
    from ddray.api import export as export
    from ddray.api import load as load

__version__ = "0.1.0"

_FUNCTIONS = ("distill", "evaluate", "export", "load")


def __getattr__(name: str) -> Any:
    """Return a function of the library; torch is loaded when one is first asked for."""
    if name not in _FUNCTIONS:
        raise AttributeError(f"module 'ddray' has no attribute {name!r}")
    from ddray import api

    return getattr(api, name)


def __dir__() -> list[str]:
    """List the library's functions too."""
    return sorted({*globals(), *_FUNCTIONS})
