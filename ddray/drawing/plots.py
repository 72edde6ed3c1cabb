"""PNG plots by matplotlib: one look, sizes in pixels, the same bytes for the same data.

Among them real and distilled representations in the plane (Boost-SSDD Figs 2c, 3c), by t-SNE.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from ddray.seeding import derive, derive_seed
from ddray.system.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK: Final = "#1c2430"
DIM: Final = "#5a6675"
_DPI: Final = 100
_MAX_REAL: Final = 500
_MAX_DISTILLED: Final = 250
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


def project(features: Tensor, *, seed: int) -> Tensor:
    """Return t-SNE points [N, 2] of features [N, D]."""
    from sklearn.manifold import TSNE

    rows = features.double().numpy()
    state = derive_seed(seed, "report", "tsne") % 2**32
    perplexity = min(30.0, max(1.0, (len(rows) - 1) / 3))
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=state, n_jobs=1)
    return torch.from_numpy(tsne.fit_transform(rows)).float()


def save_tsne(real: Tensor, distilled: Tensor, path: Path, *, seed: int) -> None:
    """Write representations `real` [N, D] and `distilled` [M, D] in one t-SNE plane as a PNG, atomically.

    At most 500 real and 250 distilled rows are sampled; `seed` is of the samples and of t-SNE. StorageError
    if the file can't be written.
    """
    generator = derive(seed, "report", "tsne")
    samples = [
        rows[torch.randperm(len(rows), generator=generator)[:most]]
        for rows, most in ((real, _MAX_REAL), (distilled, _MAX_DISTILLED))
    ]
    points = project(torch.cat(samples), seed=seed)

    def draw(figure: Figure) -> None:
        figure.suptitle("t-SNE of representations", x=0.02, ha="left")
        axes = figure.subplots()
        axes.set_axis_off()
        axes.set_aspect("equal", "datalim")
        parts = torch.split(points, [len(rows) for rows in samples])
        styles = (("real", 25, "#9eb0c7"), ("distilled", 45, "#d55e00"))
        for part, (name, area, colour) in zip(parts, styles, strict=True):
            (x, y), label = part.T.numpy(), f"{name} ({len(part)})"
            axes.scatter(x, y, area, colour, label=label, edgecolors="white", linewidths=0.5)
        figure.legend(loc="outside lower center", ncols=2)

    save_plot(path, (640, 640), draw)
