"""Figures of merit: how well a proxy's ranking of architectures agrees with the true ranking.

They follow DataDAM's supplement (Sajedi et al., ICCV 2023, section 2.3, Tables 4 and 5): Spearman's rho
over all architectures and over the top 20 %, and the performance of the best-ranked one: trained on the whole
set, scored on test.

**Deviations**: the text does not say whose validation accuracy defines the top 20 %: we use the truth's. Nor
does it say on what Table 4's performance is scored; Table 5's is on test, so here both are. A truth that
ddray trains has not seen val: its "whole set" is train without it. Kendall's tau-b, the intervals, and the
counts of ties and of networks at chance are additions.

Intervals are 95 % percentile bootstraps: architectures, and the seeds of a side with more than one, are
drawn with replacement, and the top 20 % is redetermined in every draw. With many ties the point estimate
can fall outside the percentiles: the interval is then widened to include it. A resample of few seeds has
fewer distinct ones, hence noisier means: such intervals are biased low.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ddray.seeding import derive_numpy

Array = NDArray[np.float64]
MIN_ARCHS: Final = 3
ENOUGH_ARCHS: Final = 8
"""Architectures from which a correlation says something to people."""
TOO_FEW: Final = "too few for a correlation"
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
    """Compare a proxy's ranking by val accuracies `scores` [S, A] (or [A]) with the `truth` [T, A] (or [A]).

    NaN marks a failed unit, or an unknown truth; another number of architectures is a ValueError. Both sides
    are means over the seeds that finished. Equal values share their average rank in correlations; top 1, 5
    and 10 are means over all choices among the tied (None where all scores are equal: nothing is ranked), and
    at the border of the top 20 % the tied count in part.

    `chance` is the accuracy of the best constant guess, the share of val's largest class. A mean score counts
    as at chance up to one standard error sqrt(chance (1 - chance) / num_val) above it, without `num_val` (the
    images behind one val accuracy) up to `chance` itself. None: the scores are not accuracies.

    Returns:
        `spearman`, `spearman_ci95`, `spearman_top20`, `spearman_top20_ci95` (intervals of `num_bootstrap`
        draws), `kendall`, `top1_truth_accuracy`, `top5_truth_accuracy`, `top10_truth_accuracy` (best truth
        among the first k), `best_truth_accuracy` (best of all, ranked or not), `num_tied` (architectures that
        share their mean score), `num_at_chance`, `num_archs` (ranked), `num_failed` (left out because score
        or truth is missing), and as given the training's `wall_s` and the proxy's `storage_images`. Undefined
        figures (fewer than 3 architectures, a constant side, no `chance`) are None.
    """
    seed_scores, seed_truth = (np.atleast_2d(np.asarray(side, np.float64)) for side in (scores, truth))
    num_scored, num_true = seed_scores.shape[1], seed_truth.shape[1]
    if num_scored != num_true:
        raise ValueError(f"scores are of {num_scored} architectures, truth of {num_true}")
    complete = np.isfinite(seed_scores).any(0) & np.isfinite(seed_truth).any(0)
    all_true = mean_over_seeds(seed_truth)
    seed_scores, seed_truth = seed_scores[:, complete], seed_truth[:, complete]
    x, y = mean_over_seeds(seed_scores), mean_over_seeds(seed_truth)
    counts = np.unique(x, return_counts=True)[1]
    return {
        **_correlations(seed_scores, seed_truth, num_bootstrap, seed),
        **{f"top{k}_truth_accuracy": _best_of_first(x, y, k) for k in (1, 5, 10)},
        "best_truth_accuracy": float(np.nanmax(all_true)) if np.isfinite(all_true).any() else None,
        "num_tied": int(counts[counts > 1].sum()),
        "num_at_chance": None if chance is None else int((x <= _highest_guess(chance, num_val)).sum()),
        "num_archs": len(x),
        "num_failed": int((~complete).sum()),
        "wall_s": wall_s,
        "storage_images": storage_images,
    }


def is_telling(figures: Mapping[str, Any], name: str) -> bool:
    """Return whether a correlation of a proxy's figures is over enough architectures to be shown.

    Figures that do not say how many were ranked are published ones.
    """
    num = figures.get("num_archs")
    return num is None or (-(-num // _TOP) if name.startswith("spearman_top20") else num) >= ENOUGH_ARCHS


def top1_test_accuracy(scores: ArrayLike, truth: ArrayLike, test: ArrayLike | None) -> float | None:
    """Return the performance of a search on a proxy: its best-ranked architecture's accuracy on test.

    The architecture is that of `top1_truth_accuracy`, chosen by `scores` alone; the mean over several that
    tie. `test` [A] holds test accuracies after training on the whole set, NaN where unknown. None: nothing
    is ranked, or it is unknown.
    """
    x, y = (mean_over_seeds(np.atleast_2d(np.asarray(side, np.float64))) for side in (scores, truth))
    complete = np.isfinite(x) & np.isfinite(y)
    if test is None or not complete.any():
        return None
    value = _best_of_first(x[complete], np.asarray(test, np.float64)[complete], 1)
    return value if value is not None and math.isfinite(value) else None


def _best_of_first(scores: Array, values: Array, num: int) -> float | None:
    """Return the highest of the values [A] of the `num` best scores [A], a mean over all choices among ties.

    None: there are none, or several whose scores are all equal.
    """
    if len(scores) == 0 or (len(scores) > 1 and (scores == scores[0]).all()):
        return None
    border = np.sort(scores)[::-1][min(num, len(scores)) - 1]
    before, tied = values[scores > border], np.sort(values[scores == border])
    chosen_of_tied = min(num, len(scores)) - len(before)
    highest = np.maximum(tied, before.max(initial=-math.inf))
    # Of the equally likely choices of that many, those whose best is no better than the i-th of the tied.
    choices = [math.comb(index, chosen_of_tied) for index in range(len(tied) + 1)]
    shares = np.diff(np.array(choices, dtype=np.float64) / choices[-1])
    return float((shares * highest).sum())


def _correlations(scores: Array, truth: Array, num_bootstrap: int, seed: int) -> dict[str, Any]:
    """Return the rank correlations of scores [S, A] and truth [T, A], with intervals."""
    from scipy import stats  # half a second, which workers that rank nothing need not spend

    x, y = mean_over_seeds(scores), mean_over_seeds(truth)
    whole, fifth = _bootstrap(scores, truth, num_bootstrap, seed) if len(x) >= MIN_ARCHS else ([], [])
    rho, rho_top = _correlation(stats.spearmanr, x, y), _top_correlation(x, y)
    return {
        "spearman": rho,
        "spearman_ci95": _interval(rho, whole),
        "spearman_top20": rho_top,
        "spearman_top20_ci95": _interval(rho_top, fifth),
        "kendall": _correlation(stats.kendalltau, x, y),
    }


def mean_over_seeds(values: Array, times: Array | None = None) -> Array:
    """Return means over seeds [A], seed s counted `times[s]` times; NaN where no seed is finite.

    Means are rounded to 12 digits: the same accuracies summed in another order differ in the last bit and
    would not count as a tie.
    """
    if len(values) == 1:
        return np.where(np.isfinite(values[0]), values[0], np.nan)
    weights = np.isfinite(values) * (np.ones(len(values)) if times is None else times)[:, None]
    counts = weights.sum(0)
    total = (weights * np.where(np.isfinite(values), values, 0.0)).sum(0)
    return np.where(counts > 0, np.round(total / np.maximum(counts, 1), 12), np.nan)


def _correlation(measure: Callable[[Array, Array], Any], x: Array, y: Array) -> float | None:
    """Return a rank correlation of x and y [A], or None where it is undefined."""
    if len(x) < MIN_ARCHS or (x == x[0]).all() or (y == y[0]).all():
        return None
    return float(measure(x, y).statistic)


def _top_correlation(x: Array, y: Array) -> float | None:
    """Return Spearman's rho of x and y [A] over the top 20 % by y, or None where it is undefined."""
    if len(x) < MIN_ARCHS:
        return None
    x_groups, y_groups = (np.unique(side, return_inverse=True)[1].astype(np.intp) for side in (x, y))
    rho = _spearman(x_groups, y_groups, _top_counts(y_groups, np.ones(len(x))))
    return rho if math.isfinite(rho) else None


def _highest_guess(chance: float, num_val: int | None) -> float:
    """Return the highest mean accuracy that counts as guessing."""
    error = math.sqrt(chance * (1 - chance) / num_val) if num_val else 0.0
    return chance + error + 1e-12  # val accuracies are quotients: 1/10 of the images may come out above 0.1


def _interval(point: float | None, draws: list[float]) -> list[float] | None:
    """Return [low, high] from bootstrap draws (NaN: undefined in that draw), widened to include the point."""
    finite = [draw for draw in draws if math.isfinite(draw)]
    if point is None or not finite:
        return None
    low, high = np.quantile(finite, _LEVELS)
    return [min(float(low), point), max(float(high), point)]


def _bootstrap(scores: Array, truth: Array, num_draws: int, seed: int) -> tuple[list[float], list[float]]:
    """Return Spearman's rho over all and over the top 20 % of `num_draws` resamples.

    A resample is stored as the number of times each architecture was drawn: its ranks, ties included, follow
    from cumulative counts over values sorted once, and no resample has to be sorted.
    """
    generator = derive_numpy(seed, "nas", "bootstrap")
    proxy_side, true_side = _Seeds(scores), _Seeds(truth)
    num = scores.shape[1]
    whole, fifth = [], []
    for _ in range(num_draws):
        x, y = proxy_side.draw(generator), true_side.draw(generator)
        drawn = np.bincount(generator.integers(num, size=num), minlength=num).astype(np.float64)
        drawn *= x.finite & y.finite
        whole.append(_spearman(x.groups, y.groups, drawn))
        fifth.append(_spearman(x.groups, y.groups, _top_counts(y.groups, drawn)))
    return whole, fifth


class _Sorted(NamedTuple):
    """Mean values [A], sorted and grouped for ranking."""

    groups: NDArray[np.intp]  # index of each value among the distinct values, ascending [A]
    finite: NDArray[np.bool_]  # mask of the defined values [A]


class _Seeds:
    """One side's values [S, A]; means are sorted only once per resampled multiset of seeds."""

    def __init__(self, values: Array) -> None:
        self._values = values
        self._sorted: dict[bytes, _Sorted] = {}

    def draw(self, generator: np.random.Generator) -> _Sorted:
        """Resample all seeds with replacement; a single seed is used as it is."""
        num = len(self._values)
        drawn = generator.integers(num, size=num) if num > 1 else np.zeros(1, dtype=np.intp)
        times = np.bincount(drawn, minlength=num).astype(np.float64)
        key = times.tobytes()
        if key not in self._sorted:
            mean = mean_over_seeds(self._values, times)
            groups = np.unique(mean, return_inverse=True)[1].astype(np.intp)
            self._sorted[key] = _Sorted(groups, np.isfinite(mean))
        return self._sorted[key]


def _spearman(x_groups: NDArray[np.intp], y_groups: NDArray[np.intp], drawn: Array) -> float:
    """Return Spearman's rho of architectures drawn `drawn[a]` times each; NaN where it is undefined."""
    num = float(drawn.sum())
    if num < MIN_ARCHS:
        return math.nan
    middle = (num + 1) / 2
    x, y = _ranks(x_groups, drawn) - middle, _ranks(y_groups, drawn) - middle
    # Not `@`: BLAS would multithread products of this length, which costs more than it saves.
    weighted_x = drawn * x
    spread = math.sqrt(float((weighted_x * x).sum()) * float((drawn * y * y).sum()))
    return float((weighted_x * y).sum()) / spread if spread > 0 else math.nan


def _ranks(groups: NDArray[np.intp], drawn: Array) -> Array:
    """Return average ranks, from 1, of values in `groups` [A] drawn `drawn[a]` times each."""
    sizes = np.bincount(groups, weights=drawn)
    ranks: Array = (np.cumsum(sizes) - (sizes - 1) / 2)[groups]
    return ranks


def _top_counts(groups: NDArray[np.intp], drawn: Array) -> Array:
    """Return how often each architecture counts among the top 20 % of a resample.

    `groups` [A] are those of the values that the top is by; those that tie at its border count in part.
    """
    sizes = np.bincount(groups, weights=drawn)
    above = sizes.sum() - np.cumsum(sizes)
    inside = np.clip(-(-drawn.sum() // _TOP) - above, 0, sizes)
    share = np.divide(inside, sizes, out=np.zeros_like(sizes), where=sizes > 0)
    counts: Array = drawn * share[groups]
    return counts
