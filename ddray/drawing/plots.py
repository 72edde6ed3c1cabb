"""PNG plots by matplotlib: one look, sizes in pixels, the same bytes for the same data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ddray.system.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK: Final = "#1c2430"
DIM: Final = "#5a6675"
_DPI: Final = 100
_STYLE: Final[Mapping[str, Any]] = {
    "text.parse_math": False,  # a dollar in a file's name is a dollar
    "font.size": 12,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": DIM,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e6ea",
    "xtick.color": DIM,
    "ytick.color": DIM,
    "figure.titlesize": 14,
    "figure.titleweight": "bold",
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.1,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "legend.handlelength": 1.2,
    "legend.handletextpad": 0.4,
    "legend.columnspacing": 1.0,
}


def save_plot(path: Path, size: tuple[int, int], draw: Callable[[Figure], object]) -> None:
    """Write a plot of `size` (width, height) pixels as a PNG, atomically; else StorageError.

    `draw` gets an empty figure in ddray's style, whatever the user's matplotlibrc says.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", dict(_STYLE)]):
        figure = Figure((size[0] / _DPI, size[1] / _DPI), dpi=_DPI, layout="constrained")
        draw(figure)
        # Without the version of matplotlib, the same data give the same bytes.
        write_atomically(path, lambda file: figure.savefig(file, format="png", metadata={"Software": None}))
