"""ddray: hyperparameter and NAS benchmarking for dataset distillation, on Ray.

As a library: `ddray.distill("datadam", ipc=1)`, `ddray.load("x.pt")`, `ddray.evaluate(distilled)`,
`ddray.export(distilled, "folder")`, `ddray.tune("datadam", ipc=1)`, `ddray.nas(distilled)`,
`ddray.bench("x.yaml")`, `ddray.claims("x.yaml")`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddray.system.lazy import lazy

if TYPE_CHECKING:
    from ddray.api import bench, claims, distill, evaluate, export, load, nas, tune

__all__ = ["bench", "claims", "distill", "evaluate", "export", "load", "nas", "tune"]
__version__ = "0.1.0"

__getattr__ = lazy(__name__, {"api": __all__})


def __dir__() -> list[str]:
    """List the library's functions too."""
    return sorted({*globals(), *__all__})
