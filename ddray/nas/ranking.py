"""Figures of merit: how well a proxy's ranking of architectures agrees with the ranking by the truth.

The figures of DataDAM's supplement (Sajedi et al., ICCV 2023, section 2.3, Tables 4 and 5): Spearman's rho
over all architectures and over the top 20 %, and the whole-set accuracy that the best-ranked one reaches.

**Deviations**: the text does not say whose validation accuracy chooses the top 20 %: ours is the truth's.
Kendall's tau-b, intervals, and the counts of ties and of networks at chance are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from ddray.seeding import derive_numpy

Array = NDArray[np.float64]
MIN_ARCHS: Final = 3
_TOP: Final = 5  # the top fifth
_LEVELS: Final = (0.025, 0.975)


def figures_of_merit(
    scores: ArrayLike,
    truth: ArrayLike,
    *,
    storage_images: float | None,
    wall_s: float | None,
    chance: float | None = None,
    num_val: int | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare a proxy's ranking with the truth's.

    Both sides are means over the seeds that finished. Equal values share their average rank in correlations;
    where one architecture has to come first (top 1, 5, 10, the border of the top 20 %), the earlier one does.

    Intervals are 95 % percentile bootstraps: architectures, and the seeds of a side that has several, are
    drawn with replacement, and the top 20 % is chosen anew in every draw. Under heavy ties the percentiles
    can lie beside the point estimate: the interval is then widened to hold it. A draw of few seeds has fewer
    distinct ones, hence noisier means: such intervals lean low.

    Args:
        scores: proxy val accuracies [S, A] (or [A]), NaN for a failed unit.
        truth: accuracies [T, A] (or [A]) that the ranking is compared with, NaN where unknown.
        storage_images: images that the proxy stores; reported as given.
        wall_s: seconds that the proxy's training took; reported as given.
        chance: accuracy of the best constant guess, the share of val's largest class; None (scores that are
            no accuracies) leaves `num_at_chance` undefined.
        num_val: images behind one val accuracy: a mean score at most one standard error
            sqrt(chance (1 - chance) / num_val) above chance counts as at chance; None allows none.
        num_bootstrap: draws per interval.
        seed: what the draws depend on.

    Returns:
        `spearman`, `spearman_ci95`, `spearman_top20`, `spearman_top20_ci95`, `kendall`,
        `top1_truth_accuracy`, `top5_truth_accuracy`, `top10_truth_accuracy` (best truth among the k first),
        `best_truth_accuracy` (the best there is, ranked or not), `num_ties` (architectures that share their
        mean score), `num_at_chance`, `num_archs` (ranked), `num_failed` (left out for want of a score or a
        truth), `wall_s` and `storage_images`. What is undefined (fewer than 3 architectures, a constant side)
        is None.

    Raises:
        ValueError: scores and truth are not of the same architectures.
    """
    held, true = _by_seed(scores), _by_seed(truth)
    if held.shape[1] != true.shape[1]:
        raise ValueError(f"scores are of {held.shape[1]} architectures, truth of {true.shape[1]}")
    known = np.isfinite(held).any(0) & np.isfinite(true).any(0)
    all_true = mean_over_seeds(true)
    best = float(np.nanmax(all_true)) if np.isfinite(all_true).any() else None
    held, true = held[:, known], true[:, known]
    x, y = mean_over_seeds(held), mean_over_seeds(true)
    top = _first(y, -(-len(y) // _TOP))
    whole, fifth = _bootstrap(held, true, num_bootstrap, seed) if len(x) >= MIN_ARCHS else ([], [])
    rho, rho_top = _correlation(stats.spearmanr, x, y), _correlation(stats.spearmanr, x[top], y[top])
    ranked = y[_first(x, len(x))]
    return {
        "spearman": rho,
        "spearman_ci95": _interval(rho, whole),
        "spearman_top20": rho_top,
        "spearman_top20_ci95": _interval(rho_top, fifth),
        "kendall": _correlation(stats.kendalltau, x, y),
        **{f"top{k}_truth_accuracy": float(ranked[:k].max()) if len(x) else None for k in (1, 5, 10)},
        "best_truth_accuracy": best,
        "num_ties": _num_ties(x),
        "num_at_chance": None if chance is None else int((x <= _highest_guess(chance, num_val)).sum()),
        "num_archs": len(x),
        "num_failed": int((~known).sum()),
        "wall_s": wall_s,
        "storage_images": storage_images,
    }


def _by_seed(values: ArrayLike) -> Array:
    """Return values as float64 [S, A]."""
    held = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if held.ndim != 2:
        raise ValueError(f"values must be [A] or [seeds, A], got {list(held.shape)}")
    return held


def mean_over_seeds(values: Array, times: Array | None = None) -> Array:
    """Return means over seeds [A], seed s counted `times[s]` times; NaN where no seed is finite.

    Means of the same accuracies summed in another order differ in the last bit, and would pass for no tie:
    they are rounded to 12 digits.
    """
    if len(values) == 1:
        return np.where(np.isfinite(values[0]), values[0], np.nan)
    weights = np.isfinite(values) * (np.ones(len(values)) if times is None else times)[:, None]
    number = weights.sum(0)
    total = (weights * np.where(np.isfinite(values), values, 0.0)).sum(0)
    return np.where(number > 0, np.round(total / np.maximum(number, 1), 12), np.nan)


def _first(values: Array, num: int) -> NDArray[np.intp]:
    """Return the places of the `num` highest values, highest first, equal ones in their order."""
    return np.argsort(-values, kind="stable")[:num]


def _correlation(measure: Callable[[Array, Array], Any], x: Array, y: Array) -> float | None:
    """Return a rank correlation of x and y [A], or None where it is undefined."""
    if len(x) < MIN_ARCHS or (x == x[0]).all() or (y == y[0]).all():
        return None
    return float(measure(x, y).statistic)


def _num_ties(x: Array) -> int:
    """Return how many values have an equal one."""
    counts = np.unique(x, return_counts=True)[1]
    return int(counts[counts > 1].sum())


def _highest_guess(chance: float, num_val: int | None) -> float:
    """Return the highest mean accuracy that counts as guessing."""
    error = math.sqrt(chance * (1 - chance) / num_val) if num_val else 0.0
    return chance + error + 1e-12  # val accuracies are quotients: 1/10 of the images may come out above 0.1


def _interval(point: float | None, draws: list[float]) -> list[float] | None:
    """Return [low, high] from bootstrap draws (NaN: undefined in that draw), widened to hold the point."""
    finite = [draw for draw in draws if math.isfinite(draw)]
    if point is None or not finite:
        return None
    low, high = np.quantile(finite, _LEVELS)
    return [min(float(low), point), max(float(high), point)]


def _bootstrap(scores: Array, truth: Array, num_draws: int, seed: int) -> tuple[list[float], list[float]]:
    """Return Spearman's rho over all and over the top 20 % of `num_draws` resamples.

    A resample is held as how often each architecture was drawn, so that its ranks come from cumulative counts
    over values that were sorted once, ties included, instead of from sorting every resample.
    """
    generator = derive_numpy(seed, "nas", "bootstrap")
    proxy_side, true_side = _Seeds(scores), _Seeds(truth)
    num = scores.shape[1]
    whole, fifth = [], []
    for _ in range(num_draws):
        x, y = proxy_side.draw(generator), true_side.draw(generator)
        drawn = np.bincount(generator.integers(num, size=num), minlength=num).astype(np.float64)
        drawn *= x.known & y.known
        whole.append(_spearman(x.groups, y.groups, drawn))
        fifth.append(_spearman(x.groups, y.groups, _top_counts(y.descending, drawn)))
    return whole, fifth


@dataclass(frozen=True)
class _Sorted:
    """Mean values [A] as what ranks need.

    Attributes:
        groups: number of the value among the distinct values, ascending [A].
        descending: places, highest value first, equal ones in their order [A].
        known: whether the value is there [A].
    """

    groups: NDArray[np.intp]
    descending: NDArray[np.intp]
    known: NDArray[np.bool_]


class _Seeds:
    """One side's values [S, A]; the means of a resample of seeds are sorted once per multiset of seeds."""

    def __init__(self, values: Array) -> None:
        self._values = values
        self._held: dict[bytes, _Sorted] = {}

    def draw(self, generator: np.random.Generator) -> _Sorted:
        """Draw as many seeds as there are, with replacement; a single one is not drawn."""
        num = len(self._values)
        drawn = generator.integers(num, size=num) if num > 1 else np.zeros(1, dtype=np.intp)
        times = np.bincount(drawn, minlength=num).astype(np.float64)
        key = times.tobytes()
        if key not in self._held:
            mean = mean_over_seeds(self._values, times)
            groups = np.unique(mean, return_inverse=True)[1].astype(np.intp)
            self._held[key] = _Sorted(groups, _first(mean, len(mean)), np.isfinite(mean))
        return self._held[key]


def _spearman(x_groups: NDArray[np.intp], y_groups: NDArray[np.intp], drawn: Array) -> float:
    """Return Spearman's rho of architectures drawn `drawn[a]` times each; NaN where it is undefined."""
    num = float(drawn.sum())
    if num < MIN_ARCHS:
        return math.nan
    middle = (num + 1) / 2
    x, y = _ranks(x_groups, drawn) - middle, _ranks(y_groups, drawn) - middle
    # Not `@`: BLAS gives products of this length to threads, which cost more than they do.
    own = drawn * x
    spread = math.sqrt(float((own * x).sum()) * float((drawn * y * y).sum()))
    return float((own * y).sum()) / spread if spread > 0 else math.nan


def _ranks(groups: NDArray[np.intp], drawn: Array) -> Array:
    """Return average ranks from 1 of values given as groups [A] and drawn `drawn[a]` times each."""
    sizes = np.bincount(groups, weights=drawn)
    ranks: Array = (np.cumsum(sizes) - (sizes - 1) / 2)[groups]
    return ranks


def _top_counts(descending: NDArray[np.intp], drawn: Array) -> Array:
    """Return how often each architecture counts among the top 20 % of a resample."""
    ordered = drawn[descending]
    before = np.cumsum(ordered) - ordered
    kept = np.empty_like(drawn)
    kept[descending] = np.clip(-(-drawn.sum() // _TOP) - before, 0, ordered)
    return kept
