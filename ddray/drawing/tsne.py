"""Real and distilled representations in the plane (Boost-SSDD Figs 2c, 3c), by t-SNE."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from ddray.seeding import derive, derive_seed
from ddray.system.files import write_atomically

_MAX_REAL: Final = 500
_MAX_DISTILLED: Final = 250
_SIDE: Final = 640
_MARGIN: Final = 20
_REAL_COLOUR: Final = (158, 176, 199)
_DISTILLED_COLOUR: Final = (200, 60, 40)


def tsne(real: Tensor, distilled: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
    """Return real and distilled representations as points in one t-SNE plane.

    Args:
        real: [N, D]; at most 500 rows are sampled.
        distilled: [M, D]; at most 250 rows are sampled.
        seed: of the samples and of t-SNE.

    Returns:
        Points [n, 2] and [m, 2].
    """
    from sklearn.manifold import TSNE

    generator = derive(seed, "report", "tsne")
    drawn = [
        rows[torch.randperm(len(rows), generator=generator)[:most]]
        for rows, most in ((real, _MAX_REAL), (distilled, _MAX_DISTILLED))
    ]
    together = torch.cat(drawn).double().numpy()
    perplexity = min(30.0, max(1.0, (len(together) - 1) / 3))
    state = derive_seed(seed, "report", "tsne") % 2**32
    points = torch.from_numpy(
        TSNE(perplexity=perplexity, init="pca", random_state=state, n_jobs=1).fit_transform(together)
    )
    return points[: len(drawn[0])], points[len(drawn[0]) :]


def scatter(real: Tensor, distilled: Tensor) -> bytes:
    """Return a PNG scatter plot of points [n, 2] (grey-blue) and [m, 2] (red)."""
    from PIL import Image, ImageDraw

    together = torch.cat([real, distilled])
    low, high = together.amin(0), together.amax(0)
    scale = (_SIDE - 2 * _MARGIN) / (high - low).clamp_min(1e-9)
    picture = Image.new("RGB", (_SIDE, _SIDE), "white")
    draw = ImageDraw.Draw(picture)
    for points, colour, radius in ((real, _REAL_COLOUR, 3), (distilled, _DISTILLED_COLOUR, 4)):
        for x, y in ((points - low) * scale + _MARGIN).tolist():
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    draw.text((_MARGIN, 4), "t-SNE of representations: real (blue), distilled (red)", fill="black")
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def save_tsne(real: Tensor, distilled: Tensor, path: Path, *, seed: int) -> None:
    """Write the scatter of real [N, D] and distilled [M, D] representations as a PNG, atomically.

    Raises:
        StorageError: the file can't be written.
    """
    picture = scatter(*tsne(real, distilled, seed=seed))
    write_atomically(path, lambda file: file.write(picture))
