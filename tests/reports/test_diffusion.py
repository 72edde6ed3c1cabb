"""reports/diffusion: the distance of generated latents to real ones."""

from __future__ import annotations

import numpy as np
import pytest

from reports.diffusion import frechet_distance


def test_the_frechet_distance_of_normals() -> None:
    """Of equal covariances the squared distance of the means; of scaled ones the sum of (1 - scale)^2."""
    rows = np.random.default_rng(0).standard_normal((4000, 3))
    assert frechet_distance(rows, rows) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(rows + np.array([3, 0, 4]), rows) == pytest.approx(25)
    variances = rows.var(0, ddof=1).sum()
    assert frechet_distance(2 * (rows - rows.mean(0)), rows - rows.mean(0)) == pytest.approx(variances)
