from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ddray.artifact.distilled_set import TrainSet
from ddray.data import Split, fit_zca, normalized_space
from ddray.errors import DivergedError
from ddray.evaluation import protocol, robust
from ddray.evaluation.hard import Hard
from ddray.evaluation.protocol import EvalContext, summarise
from ddray.evaluation.robust import (
    Robust,
    augmentation_robust_score,
    label_robust_score,
    normalised_score,
    whole_set_accuracy,
)
from ddray.training.embedding import Score
from ddray.training.recipe import Recipe

CPU = torch.device("cpu")
ARCH = "convnet1_w8"


def context(dataset: Any, held_out: Split | None = None) -> EvalContext:
    return EvalContext(dataset, held_out or dataset.test(), normalized_space(dataset), CPU)


def whole_of(dataset: Any) -> TrainSet:
    split = dataset.train()
    return TrainSet(normalized_space(dataset).encode(split.images), split.labels)


class TestScores:
    def test_by_hand(self) -> None:
        """Whole set .9, set .6, random .4: HLR .3, IOR .2, alpha = .1 - .15 = -.05."""
        lrs = label_robust_score(0.9 - 0.6, 0.6 - 0.4)
        assert lrs == pytest.approx((0.951229424500714 - 0.367879441171442) / 2.350402387287603, abs=1e-12)
        assert lrs == pytest.approx(0.24819, abs=1e-5)
        # Augmented .6 - .4, plain .5 - .45: beta = .125.
        assert augmentation_robust_score(0.2, 0.05) == pytest.approx(
            (math.exp(0.125) - math.exp(-1)) / (math.exp(1) - math.exp(-1))
        )
        assert augmentation_robust_score(0.2, 0.05) == pytest.approx(0.32559, abs=1e-5)

    def test_limits(self) -> None:
        assert normalised_score(-1) == 0.0
        assert normalised_score(1) == 1.0
        neither = normalised_score(0)
        assert neither == pytest.approx(0.26894, abs=1e-5)
        # As good as the whole set where random images are of no use; random images themselves.
        assert label_robust_score(0.0, 1.0) == pytest.approx(normalised_score(0.5))
        assert label_robust_score(0.0, 0.0) == neither == augmentation_robust_score(0.0, 0.0)
        assert label_robust_score(1.0, -1.0) == 0.0  # useless, where random images are perfect
        assert label_robust_score(-1.0, 1.0) == 1.0
        assert augmentation_robust_score(1.0, 1.0) == 1.0

    def test_weights(self) -> None:
        assert label_robust_score(0.3, 0.2, weight=1.0) == normalised_score(0.2)
        assert label_robust_score(0.3, 0.2, weight=0.0) == normalised_score(-0.3)
        assert augmentation_robust_score(0.3, 0.2, weight=1.0) == normalised_score(0.3)

    def test_they_rise_with_the_sets_accuracy(self) -> None:
        scores = [label_robust_score(0.9 - right / 10, right / 10 - 0.2) for right in range(11)]
        assert scores == sorted(scores)
        assert 0 <= scores[0] < scores[-1] <= 1


class TestRobust:
    def protocol(self, dataset: Any, recipe: Recipe, per_class: int = 2, **options: Any) -> Robust:
        return Robust(recipe, real=dataset.train(), split_name="train", random_per_class=per_class, **options)

    def test_four_trainings_and_the_whole_set_make_the_scores(
        self, toy: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dataset = toy(counts=(9, 9, 9))
        recipe = Recipe(epochs=7, augment="dsa_idc", strategy="color_crop", cutmix=0.5)
        trainings: list[tuple[int, str, float, int]] = []

        def fit(train_set: Any, ctx: Any, recipe: Recipe, *, arch: str, seed: int) -> Any:
            trainings.append((len(train_set.labels), recipe.augment, recipe.cutmix, seed))
            return len(train_set.labels), recipe.augment

        right = {(27, "dsa_idc"): 0.6, (6, "dsa_idc"): 0.4, (27, "none"): 0.5, (6, "none"): 0.45}
        monkeypatch.setattr(robust, "fit", fit)
        monkeypatch.setattr(
            protocol, "score_net", lambda net, *args, **kwargs: Score(right[net], (right[net],) * 3)
        )
        seen: dict[str, Any] = {}
        monkeypatch.setattr(
            robust,
            "whole_set_accuracy",
            lambda real, ctx, recipe, **_: seen.update(recipe=recipe) or 0.9,
        )

        result = self.protocol(dataset, recipe, full_epochs=3).evaluate(
            whole_of(dataset), context(dataset), arch=ARCH, seed=5
        )

        assert sorted(trainings) == [
            (6, "dsa_idc", 0.5, 5),
            (6, "none", 0.0, 5),
            (27, "dsa_idc", 0.5, 5),
            (27, "none", 0.0, 5),
        ]
        assert seen["recipe"].epochs == 3
        assert (result.accuracy, result.num_images, result.per_class) == (0.6, 27, (0.6,) * 3)
        measures = dict(result.measures)
        assert measures.pop("lrs") == pytest.approx(0.24819, abs=1e-5)
        assert measures.pop("ars") == pytest.approx(0.32559, abs=1e-5)
        assert measures == pytest.approx(
            {
                "hlr": 0.3,
                "ior": 0.2,
                "accuracy_full": 0.9,
                "accuracy_random": 0.4,
                "accuracy_plain": 0.5,
                "accuracy_random_plain": 0.45,
            }
        )

    def test_the_whole_set_scores_as_itself_and_as_random_images_of_its_size(self, toy: Any) -> None:
        dataset = toy(counts=(9, 8, 7))
        recipe = Recipe(epochs=2, augment="none", schedule="multistep")
        result = self.protocol(dataset, recipe, per_class=9).evaluate(
            whole_of(dataset), context(dataset), arch=ARCH, seed=0
        )

        assert result.measures["hlr"] == 0.0
        assert result.measures["ior"] == 0.0
        assert result.measures["lrs"] == result.measures["ars"] == normalised_score(0)

    def test_its_accuracy_is_that_of_hard(self, toy: Any) -> None:
        dataset = toy(counts=(9, 9, 9))
        recipe = Recipe(epochs=2, augment="dsa")
        ctx, train_set = context(dataset), whole_of(dataset)
        for seed in range(2):
            hard = Hard(recipe).evaluate(train_set, ctx, arch=ARCH, seed=seed)
            result = self.protocol(dataset, recipe).evaluate(train_set, ctx, arch=ARCH, seed=seed)
            assert result.accuracy == hard.accuracy
            bare = Hard(recipe.without_augmentation()).evaluate(train_set, ctx, arch=ARCH, seed=seed)
            assert result.measures["accuracy_plain"] == bare.accuracy

    def test_every_seed_draws_other_random_images(self, toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        dataset = toy(counts=(9, 9, 9))
        drawn: list[Any] = []
        real_draw = robust.random_subset
        monkeypatch.setattr(
            robust, "random_subset", lambda *args: drawn.append(real_draw(*args)) or drawn[-1]
        )
        protocol = self.protocol(dataset, Recipe(epochs=1, augment="none"))
        for seed in (0, 1, 0):
            protocol.evaluate(whole_of(dataset), context(dataset), arch=ARCH, seed=seed)
        assert torch.equal(drawn[0].images, drawn[2].images)
        assert not torch.equal(drawn[0].images, drawn[1].images)

    def test_a_summary_holds_means_and_deviations(self, toy: Any) -> None:
        dataset = toy(counts=(9, 9, 9))
        protocol = self.protocol(dataset, Recipe(epochs=1, augment="none"))
        results = [
            protocol.evaluate(whole_of(dataset), context(dataset), arch=ARCH, seed=seed) for seed in range(3)
        ]
        summary = summarise(results)
        values = [result.measures["lrs"] for result in results]
        assert summary["lrs"] == pytest.approx(sum(values) / 3)  # type: ignore[arg-type]
        assert summary["lrs_std"] == pytest.approx(float(torch.tensor(values).std()), abs=1e-6)
        assert summary["accuracy_full_std"] == 0.0
        assert summarise(results[:1])["ars_std"] is None


class TestWholeSet:
    def accuracy(self, dataset: Any, ctx: EvalContext | None = None, **options: Any) -> float:
        settings = {"arch": ARCH, "split_name": "train", **options}
        recipe = settings.pop("recipe", Recipe(epochs=2, augment="dsa", cutmix=0.5))
        return whole_set_accuracy(dataset.train(), ctx or context(dataset), recipe, **settings)

    def test_it_is_trained_once(self, toy: Any, monkeypatch: pytest.MonkeyPatch, ddray_home: Path) -> None:
        dataset = toy(counts=(9, 9, 9))
        calls: list[int] = []
        real_fit = robust.fit
        monkeypatch.setattr(robust, "fit", lambda *a, **k: calls.append(1) or real_fit(*a, **k))

        first = self.accuracy(dataset)
        assert self.accuracy(dataset) == first
        assert len(calls) == 1
        (row,) = (ddray_home / "truth" / "ledger").glob("*.json")
        entry = json.loads(row.read_text())
        assert entry["result"] == {"accuracy": first}
        assert entry["kind"] == "truth"

    def test_it_is_hard_training_on_the_whole_set_as_it_is(self, toy: Any) -> None:
        dataset = toy(counts=(9, 9, 9))
        recipe = Recipe(epochs=3, augment="none")
        hard = Hard(recipe).evaluate(whole_of(dataset), context(dataset), arch=ARCH, seed=0)
        assert self.accuracy(dataset, recipe=Recipe(epochs=3, augment="dsa", cutmix=0.5)) == hard.accuracy

    def test_another_question_is_trained_for(self, toy: Any, ddray_home: Path) -> None:
        dataset = toy(counts=(9, 9, 9))
        ctx = context(dataset)
        self.accuracy(dataset)
        self.accuracy(dataset, recipe=Recipe(epochs=1))
        self.accuracy(dataset, split_name="train-val0")
        self.accuracy(dataset, arch="convnet1_w8_bn")
        self.accuracy(dataset, seed=1)
        self.accuracy(dataset, context(dataset, dataset.test().select(torch.arange(20))))
        self.accuracy(toy(counts=(9, 9, 9), seed=1))
        self.accuracy(dataset, EvalContext(dataset, ctx.split, fit_zca(dataset.train()), CPU))
        self.accuracy(dataset, replace(ctx, precision="bf16"))
        self.accuracy(dataset, replace(ctx, deterministic=True))
        assert len(list((ddray_home / "truth" / "ledger").glob("*.json"))) == 10

    def test_a_diverged_training_is_not_kept(self, toy: Any, ddray_home: Path) -> None:
        with pytest.raises(DivergedError, match="on the whole set diverged"):
            self.accuracy(toy(), recipe=Recipe(epochs=30, lr=1e18), arch="convnet2_w8_nonorm")
        assert list((ddray_home / "truth" / "ledger").glob("*.json")) == []
