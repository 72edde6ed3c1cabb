"""ddray: hyperparameter and NAS benchmarking for dataset distillation, on Ray.

As a library: `ddray.distill("datadam", ipc=1)`, `ddray.load("x.pt")`, `ddray.evaluate(distilled)`,
`ddray.export(distilled, "folder")`, `ddray.tune("datadam", ipc=1)`, `ddray.nas(distilled)`,
`ddray.bench("x.yaml")`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddray.system.lazy import lazy

if TYPE_CHECKING:
    from ddray.api import bench as bench
    from ddray.api import distill as distill
    from ddray.api import evaluate as evaluate
    from ddray.api import export as export
    from ddray.api import load as load
    from ddray.api import nas as nas
    from ddray.api import tune as tune

__version__ = "0.1.0"

_FUNCTIONS = ("bench", "distill", "evaluate", "export", "load", "nas", "tune")

__getattr__ = lazy(__name__, {"api": _FUNCTIONS})


def __dir__() -> list[str]:
    """List the library's functions too."""
    return sorted({*globals(), *_FUNCTIONS})
