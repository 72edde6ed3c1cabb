from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from ddray.ranking import figures_of_merit as ranking
from ddray.ranking.figures_of_merit import figures_of_merit, top1_test_accuracy


def figures(scores: Any, truth: Any, **options: Any) -> dict[str, Any]:
    settings = {"storage_images": 100, "wall_s": 2.5, "num_bootstrap": 50} | options
    return figures_of_merit(scores, truth, **settings)


def naive_ranks(values: list[float]) -> list[float]:
    return [sum(v < value for v in values) + (sum(v == value for v in values) + 1) / 2 for value in values]


def naive_spearman(x: list[float], y: list[float]) -> float:
    """Pearson's r of average ranks, computed naively; NaN where undefined."""
    a, b = naive_ranks(x), naive_ranks(y)
    middle = (len(x) + 1) / 2
    top = sum((i - middle) * (j - middle) for i, j in zip(a, b, strict=True))
    left, right = sum((i - middle) ** 2 for i in a), sum((j - middle) ** 2 for j in b)
    return top / math.sqrt(left * right) if left and right and len(x) >= 3 else math.nan


def naive_kendall(x: list[float], y: list[float]) -> float:
    pairs = list(itertools.combinations(range(len(x)), 2))
    signs = [(np.sign(x[i] - x[j]), np.sign(y[i] - y[j])) for i, j in pairs]
    agree = sum(a * b for a, b in signs)
    return float(agree / math.sqrt(sum(a != 0 for a, _ in signs) * sum(b != 0 for _, b in signs)))


class TestCorrelations:
    def test_a_case_worked_by_hand(self) -> None:
        # ranks 1 2 3 4 5 against 2 1 4 3 5: d^2 = 1+1+1+1+0, rho = 1 - 6*4/(5*24) = .8; 8 of 10 pairs agree.
        result = figures([0.1, 0.2, 0.3, 0.4, 0.5], [0.2, 0.1, 0.4, 0.3, 0.5])

        assert result["spearman"] == pytest.approx(0.8)
        assert result["kendall"] == pytest.approx(0.6)
        assert result["num_archs"] == 5
        assert result["num_failed"] == result["num_tied"] == 0
        assert (result["wall_s"], result["storage_images"]) == (2.5, 100)

    def test_ties_worked_by_hand(self) -> None:
        # ranks 1.5 1.5 3 4 against 1 2 3.5 3.5: sums of products and squares about 2.5 are 4.0, 4.5, 4.5.
        result = figures([0.1, 0.1, 0.2, 0.3], [0.5, 0.6, 0.7, 0.7])

        assert result["spearman"] == pytest.approx(4.0 / 4.5)
        assert result["kendall"] == pytest.approx(4 / 5)  # 4 agree; 5 pairs untied on either side
        assert result["num_tied"] == 2

    @pytest.mark.parametrize("seed", range(5))
    def test_they_match_definitions_on_tied_data(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        x, y = (generator.integers(0, 9, 40) / 10 for _ in range(2))

        result = figures(x, y)

        assert result["spearman"] == pytest.approx(naive_spearman(list(x), list(y)))
        assert result["kendall"] == pytest.approx(naive_kendall(list(x), list(y)))
        # 8 of 40: those above the border in full, the tied at it in equal parts, both as whole copies.
        border = sorted(y)[-8]
        above, tied = np.flatnonzero(y > border), np.flatnonzero(y == border)
        top = [*np.repeat(above, len(tied)), *np.repeat(tied, 8 - len(above))]
        assert result["spearman_top20"] == pytest.approx(naive_spearman(list(x[top]), list(y[top])))
        assert result["num_tied"] == sum(list(x).count(value) > 1 for value in x)

    def test_opposite_rankings_are_minus_one(self) -> None:
        result = figures(np.arange(20) / 20, 1 - np.arange(20) / 20)

        assert result["spearman"] == pytest.approx(-1)
        assert result["kendall"] == pytest.approx(-1)
        assert result["spearman_ci95"] == pytest.approx([-1, -1])

    @pytest.mark.parametrize(("num", "top"), [(11, 3), (15, 3), (16, 4), (35, 7), (720, 144)])
    def test_the_top_fifth_is_rounded_up(self, num: int, top: int) -> None:
        y = np.random.default_rng(0).permutation(num)
        counts = ranking._top_counts(y, np.ones(num))
        assert sorted(y[counts == 1]) == list(range(num - top, num))
        assert counts.sum() == top
        x = np.random.default_rng(1).random(num)
        expected = stats.spearmanr(x[counts == 1], y[counts == 1]).statistic
        assert figures(x, y / num)["spearman_top20"] == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize(
        ("scores", "truth"),
        [([0.1, 0.2], [0.1, 0.2]), ([0.1] * 20, list(range(20))), (list(range(20)), [0.5] * 20)],
    )
    def test_an_undefined_correlation_is_none(self, scores: list[float], truth: list[float]) -> None:
        result = figures(scores, truth)

        for key in ("spearman", "spearman_ci95", "spearman_top20", "spearman_top20_ci95", "kendall"):
            assert result[key] is None
        assert result["best_truth_accuracy"] == max(truth)

    def test_a_top_fifth_of_two_has_no_correlation(self) -> None:
        result = figures(np.arange(10) / 10, np.arange(10) / 10)

        assert result["spearman"] == pytest.approx(1)
        assert result["spearman_top20"] is None
        assert result["spearman_top20_ci95"] is None


class TestBestRanked:
    def test_the_best_of_the_first_k(self) -> None:
        truth = np.array([0.50, 0.55, 0.90, 0.60, 0.57, 0.80, 0.52, 0.51, 0.40, 0.70, 0.95, 0.30])
        scores = np.linspace(0.9, 0.1, 12)  # already in ranked order

        result = figures(scores, truth)

        expected = {"top1": 0.50, "top5": 0.90, "top10": 0.90, "best": 0.95}
        assert {key: result[f"{key}_truth_accuracy"] for key in expected} == expected

    def test_of_equal_scores_none_is_first(self) -> None:
        result = figures([0.1, 0.7, 0.7, 0.7], [0.9, 0.3, 0.8, 0.6])
        assert result["top1_truth_accuracy"] == pytest.approx((0.3 + 0.8 + 0.6) / 3)

    @pytest.mark.parametrize("num", [5, 10])
    def test_ties_at_the_border_are_a_mean_over_all_choices(self, num: int) -> None:
        generator = np.random.default_rng(3)
        truth = generator.random(14)
        scores = np.array([0.9, 0.8, *[0.5] * 9, 0.1, 0.1, 0.0])

        best = [
            max(truth[[0, 1, *tied]]) for tied in itertools.combinations(range(2, 11), num - 2) if num <= 11
        ]
        assert figures(scores, truth)[f"top{num}_truth_accuracy"] == pytest.approx(np.mean(best), rel=1e-12)

    def test_no_figure_depends_on_the_order_of_the_architectures(self) -> None:
        generator = np.random.default_rng(4)
        scores, truth = generator.integers(0, 4, 60) / 10, generator.integers(0, 20, 60) / 20
        order = generator.permutation(60)
        names = ("spearman", "spearman_top20", "kendall", *(f"top{k}_truth_accuracy" for k in (1, 5, 10)))
        here, there = figures(scores, truth), figures(scores[order], truth[order])
        for name in names:
            assert here[name] == pytest.approx(there[name], rel=1e-12), name

    def test_equal_scores_rank_nothing(self) -> None:
        result = figures([0.5] * 20, np.linspace(0.1, 0.9, 20))
        assert [result[f"top{k}_truth_accuracy"] for k in (1, 5, 10)] == [None, None, None]
        assert (result["spearman"], result["spearman_top20"], result["num_tied"]) == (None, None, 20)
        assert top1_test_accuracy([0.5] * 3, [0.1, 0.2, 0.3], [0.1, 0.2, 0.3]) is None
        assert figures([0.5], [0.3])["top1_truth_accuracy"] == 0.3, "one that is alone is the first"

    def test_the_best_there_is_need_not_have_been_ranked(self) -> None:
        result = figures([0.1, 0.2, 0.3, np.nan], [0.5, 0.6, 0.7, 0.9])

        assert result["best_truth_accuracy"] == 0.9
        assert result["top10_truth_accuracy"] == 0.7


class TestSeeds:
    def test_scores_are_means_over_the_seeds_that_finished(self) -> None:
        scores = np.array([[0.1, 0.5, np.nan, 0.4, np.nan], [0.3, 0.1, 0.25, np.nan, np.nan]])
        truth = np.array([[0.1, 0.2, 0.3, 0.4, 0.9], [0.3, 0.4, np.nan, 0.8, 0.9]])

        result = figures(scores, truth)

        assert result["spearman"] == pytest.approx(
            naive_spearman([0.2, 0.3, 0.25, 0.4], [0.2, 0.3, 0.3, 0.6])
        )
        assert (result["num_archs"], result["num_failed"]) == (4, 1)

    def test_unknown_truth_and_failed_scores_are_left_out_and_counted(self) -> None:
        result = figures([0.1, np.nan, 0.2, 0.3, 0.4], [0.1, 0.9, np.nan, 0.3, 0.4])

        assert (result["num_archs"], result["num_failed"]) == (3, 2)
        assert result["spearman"] == pytest.approx(1)

    def test_nothing_known_at_all(self) -> None:
        result = figures([np.nan, np.nan], [0.1, 0.2])

        assert (result["num_archs"], result["num_failed"]) == (0, 2)
        assert result["top1_truth_accuracy"] is None
        assert result["best_truth_accuracy"] == 0.2

    def test_the_order_of_seeds_makes_no_tie_into_a_difference(self) -> None:
        a, b, c = 0.1, 0.2, 0.7
        assert a + b + c != c + b + a  # the sums differ in the last bit
        scores = np.array([[a, c, 0.9], [b, b, 0.9], [c, a, 0.9]])

        assert figures(scores, [0.1, 0.2, 0.3])["num_tied"] == 2

    def test_architectures_must_be_the_same(self) -> None:
        with pytest.raises(ValueError, match="4 architectures, truth of 3"):
            figures([0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3])


class TestChance:
    def test_one_standard_error_above_counts(self) -> None:
        # sqrt(.1 * .9 / 144) = .025
        scores = [0.05, 0.1, 0.1249, 0.1251, 0.5]

        assert figures(scores, scores, chance=0.1, num_val=144)["num_at_chance"] == 3
        assert figures(scores, scores, chance=0.1)["num_at_chance"] == 2
        assert figures(scores, scores)["num_at_chance"] is None

    def test_a_tenth_of_the_images_is_at_chance_whatever_its_last_bit(self) -> None:
        assert figures([np.nextafter(0.1, 1), 0.3, 0.4], [0.1, 0.2, 0.3], chance=0.1)["num_at_chance"] == 1


class TestBootstrap:
    @pytest.mark.parametrize("tied", [False, True])
    def test_a_resample_held_as_counts_has_the_figures_of_a_resample_written_out(self, tied: bool) -> None:
        generator = np.random.default_rng(3)
        x, y = generator.random(30), generator.random(30)
        if tied:
            x, y = np.round(x, 1), np.round(y, 1)
        drawn = np.bincount(generator.integers(30, size=30), minlength=30)
        resample = np.repeat(np.arange(30), drawn)
        groups = [np.unique(values, return_inverse=True)[1] for values in (x, y)]

        whole = ranking._spearman(groups[0], groups[1], drawn.astype(float))
        counts = ranking._top_counts(groups[1], drawn.astype(float))

        assert whole == pytest.approx(naive_spearman(list(x[resample]), list(y[resample])))
        border = sorted(y[resample])[-6]
        assert counts.sum() == pytest.approx(6)
        assert (counts[y > border] == drawn[y > border]).all()
        assert (counts[y < border] == 0).all()
        assert len(set(np.round(counts[y == border] / drawn[y == border].clip(1), 12)) - {0.0}) == 1

    def test_intervals_cover_the_true_correlation(self) -> None:
        rho = 0.6
        true_spearman = 6 / math.pi * math.asin(rho / 2)  # of a bivariate normal
        hits, widths = 0, []
        for seed in range(60):
            generator = np.random.default_rng(seed)
            x = generator.standard_normal(80)
            y = rho * x + math.sqrt(1 - rho**2) * generator.standard_normal(80)
            low, high = figures(x, y, num_bootstrap=300, seed=seed)["spearman_ci95"]
            hits += low <= true_spearman <= high
            widths.append(high - low)

        # 95 % of 60 is 57; the percentile interval is a little short. Fisher's z gives a width of about .3.
        assert 51 <= hits <= 60
        assert 0.2 < np.mean(widths) < 0.4

    def test_seeds_are_drawn_too(self) -> None:
        generator = np.random.default_rng(0)
        truth = np.linspace(0, 1, 100)
        scores = truth + 0.5 * generator.standard_normal((3, 100))

        with_seeds = figures(scores, truth, num_bootstrap=400)["spearman_ci95"]
        of_means = figures(scores.mean(0), truth, num_bootstrap=400)["spearman_ci95"]

        # Fewer distinct seeds per draw: noisier scores, so a lower and wider interval.
        assert with_seeds[0] < of_means[0] - 0.02
        assert with_seeds[1] - with_seeds[0] > of_means[1] - of_means[0]

    def test_a_seed_that_failed_somewhere_leaves_the_architecture_out_of_draws_without_another(self) -> None:
        scores = np.array([[0.1, 0.2, 0.3, np.nan, 0.5, 0.6], [0.1, 0.2, 0.3, 0.4, 0.5, np.nan]])
        truth = np.array([[0.1, 0.2, np.nan, 0.4, 0.5, 0.6], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]])

        result = figures(scores, truth, num_bootstrap=200)

        assert result["spearman"] == pytest.approx(1)
        assert result["spearman_ci95"] == pytest.approx([1, 1])

    def test_intervals_hold_the_estimate_and_none_is_nan(self) -> None:
        generator = np.random.default_rng(1)
        for num in (3, 4, 6, 11, 16):
            for _ in range(10):
                scores, truth = generator.integers(0, 3, (2, num)) / 10
                result = figures(scores, truth)
                for key in ("spearman", "spearman_top20"):
                    if result[key] is None:
                        assert result[f"{key}_ci95"] is None
                    else:
                        low, high = result[f"{key}_ci95"]
                        assert -1 <= low <= result[key] <= high <= 1

    def test_draws_depend_on_the_seed_alone(self) -> None:
        generator = np.random.default_rng(2)
        scores, truth = generator.random((2, 3, 40))

        assert figures(scores, truth, seed=5) == figures(scores, truth, seed=5)
        assert figures(scores, truth, seed=5)["spearman_ci95"] != figures(scores, truth)["spearman_ci95"]


class TestPerformance:
    """A search's performance: the architecture that the proxy ranks first, on test."""

    def test_val_alone_chooses(self) -> None:
        # Seeds average to .5, .6 and .4: the second is first, though another is the best on test.
        scores, truth = [[0.4, 0.7, 0.4], [0.6, 0.5, 0.4]], [0.8, 0.7, 0.9]
        assert top1_test_accuracy(scores, truth, [0.81, 0.71, 0.95]) == 0.71
        assert figures([0.5, 0.6, 0.4], truth)["top1_truth_accuracy"] == 0.7

    def test_ties_and_failures_are_those_of_the_truths_figure(self) -> None:
        scores, truth = [math.nan, 0.6, 0.6, 0.9, 0.1], [0.5, 0.4, 0.3, math.nan, 0.9]
        assert figures(scores, truth)["top1_truth_accuracy"] == pytest.approx(0.35)
        assert top1_test_accuracy(scores, truth, [0.1, 0.2, 0.3, 0.4, 0.5]) == pytest.approx(0.25)

    @pytest.mark.parametrize("test", [None, [math.nan, 0.5], [math.nan, math.nan]])
    def test_an_unknown_test_accuracy_is_none(self, test: Any) -> None:
        assert top1_test_accuracy([0.9, 0.1], [0.5, 0.6], test) is None
        assert top1_test_accuracy([math.nan, math.nan], [0.5, 0.6], [0.1, 0.2]) is None
