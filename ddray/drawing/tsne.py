"""Real and distilled representations in the plane (Boost-SSDD Figs 2c, 3c), by t-SNE."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from ddray.drawing.plots import save_plot
from ddray.seeding import derive, derive_seed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_REAL: Final = 500
_MAX_DISTILLED: Final = 250


def project(features: Tensor, *, seed: int) -> Tensor:
    """Return t-SNE points [N, 2] of features [N, D]."""
    from sklearn.manifold import TSNE

    rows = features.double().numpy()
    state = derive_seed(seed, "report", "tsne") % 2**32
    perplexity = min(30.0, max(1.0, (len(rows) - 1) / 3))
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=state, n_jobs=1)
    return torch.from_numpy(tsne.fit_transform(rows)).float()


def save_tsne(real: Tensor, distilled: Tensor, path: Path, *, seed: int) -> None:
    """Write a scatter plot of representations in one t-SNE plane as a PNG, atomically.

    Args:
        real: [N, D]; at most 500 rows are sampled.
        distilled: [M, D]; at most 250 rows are sampled.
        path: the file.
        seed: of the samples and of t-SNE.

    Raises:
        StorageError: the file can't be written.
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
        for name, part, area, colour in (
            ("real", points[: len(samples[0])], 25, "#9eb0c7"),
            ("distilled", points[len(samples[0]) :], 45, "#d55e00"),
        ):
            x, y = part.T.numpy()
            axes.scatter(
                x, y, area, colour, label=f"{name} ({len(part)})", edgecolors="white", linewidths=0.5
            )
        figure.legend(loc="outside lower center", ncols=2)

    save_plot(path, (640, 640), draw)
