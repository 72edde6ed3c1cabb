from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddray.artifact.distilled_set import TrainSet
from ddray.data import Split, normalized_space
from ddray.errors import InputError
from ddray.evaluation import continual
from ddray.evaluation.continual import Continual, class_tasks
from ddray.evaluation.protocol import EvalContext, EvalResult, summarise
from ddray.training.embedding import Score
from ddray.training.recipe import Recipe

CPU = torch.device("cpu")
ARCH = "convnet1_w8"


@given(st.integers(2, 30), st.data(), st.integers(0, 9))
def test_tasks_share_the_classes_out_in_a_random_order(num_classes: int, data: Any, seed: int) -> None:
    num_tasks = data.draw(st.integers(2, num_classes))
    tasks = class_tasks(num_classes, num_tasks, seed)

    assert sorted(torch.cat(tasks).tolist()) == list(range(num_classes))
    sizes = [len(task) for task in tasks]
    assert len(sizes) == num_tasks
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


def test_the_seed_decides_the_order() -> None:
    orders = {tuple(torch.cat(class_tasks(10, 5, seed)).tolist()) for seed in range(8)}
    assert len(orders) == 8
    assert torch.equal(torch.cat(class_tasks(10, 5, 3)), torch.cat(class_tasks(10, 10, 3)))


@pytest.mark.parametrize("num_tasks", [-1, 0, 1, 4])
def test_more_tasks_than_classes_are_refused(num_tasks: int) -> None:
    with pytest.raises(InputError, match=rf"--num-tasks must be in 2\.\.3 \(the classes\), got {num_tasks}"):
        class_tasks(3, num_tasks, 0)


class TestContinual:
    def context(self, dataset: Any, held_out: Split | None = None) -> EvalContext:
        return EvalContext(dataset, held_out or dataset.test(), normalized_space(dataset), CPU)

    def train_set(self, dataset: Any) -> TrainSet:
        split = dataset.train()
        return TrainSet(normalized_space(dataset).encode(split.images), split.labels)

    def test_each_step_trains_a_fresh_network_on_all_seen_classes_and_tests_on_them(
        self, toy: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dataset = toy(counts=(4, 5, 6, 7, 8))
        steps: list[tuple[list[int], list[int], int]] = []

        def fit(memory: Any, ctx: Any, recipe: Any, *, arch: str, seed: int) -> Any:
            return memory, seed

        def score_net(net: Any, held_out: Split, space: Any, *, device: Any) -> Score:
            memory, seed = net
            steps.append(
                (
                    torch.bincount(memory.labels, minlength=5).tolist(),
                    torch.bincount(held_out.labels, minlength=5).tolist(),
                    seed,
                )
            )
            return Score(len(steps) / 10, (0.2, 0.4))

        monkeypatch.setattr(continual, "fit", fit)
        monkeypatch.setattr(continual, "score_net", score_net)
        result = Continual(Recipe(), 3).evaluate(
            self.train_set(dataset), self.context(dataset), arch=ARCH, seed=2
        )

        counts, seen = [4, 5, 6, 7, 8], torch.zeros(5, dtype=torch.bool)
        for task, (memory, held_out, _) in zip(class_tasks(5, 3, 2), steps, strict=True):
            seen[task] = True
            expected = [count if is_seen else 0 for count, is_seen in zip(counts, seen.tolist(), strict=True)]
            assert memory == expected
            assert held_out == expected  # toy's test is its train
        assert len({seed for *_, seed in steps}) == 3
        assert (result.accuracy, result.num_images, result.per_class) == (0.3, 30, (0.2, 0.4))
        assert result.measures == {"per_step": (0.1, 0.2, 0.3), "incremental_accuracy": pytest.approx(0.2)}

    def test_it_learns_digits_class_by_class(self, digits: Any) -> None:
        split = digits.train().select(torch.arange(150))
        train_set = TrainSet(normalized_space(digits).encode(split.images), split.labels)
        recipe = Recipe(epochs=20, augment="none", batch=32)

        result = Continual(recipe, 5).evaluate(train_set, self.context(digits), arch="convnet2_w16", seed=0)

        steps = result.measures["per_step"]
        assert isinstance(steps, tuple)
        assert len(steps) == 5
        assert steps[0] > 0.85  # two classes
        assert steps[-1] == result.accuracy > 0.6

    def test_a_seed_decides_everything(self, toy: Any) -> None:
        dataset = toy(counts=(9, 9, 9))

        def steps(seed: int) -> Any:
            protocol = Continual(Recipe(epochs=2, augment="dsa"), 3)
            return protocol.evaluate(
                self.train_set(dataset), self.context(dataset), arch=ARCH, seed=seed
            ).measures["per_step"]

        assert steps(1) == steps(1)
        assert len({steps(seed) for seed in range(4)}) > 1

    def test_a_memory_without_a_class_is_refused(self, toy: Any) -> None:
        dataset = toy(counts=(9, 9, 9))
        whole = self.train_set(dataset)
        mask = whole.labels != 1
        part = TrainSet(whole.images[mask], whole.labels[mask])
        with pytest.raises(InputError, match="a memory must hold images of every class, got none of class 1"):
            Continual(Recipe(epochs=1), 3).evaluate(part, self.context(dataset), arch=ARCH, seed=0)

    def test_a_task_without_held_out_images_is_refused(self, toy: Any) -> None:
        dataset = toy(counts=(9, 9, 9))
        held_out = dataset.test().select((dataset.test().labels != 2).nonzero()[:, 0])
        with pytest.raises(InputError, match=r"held-out images, got none of classes \[2\]"):
            Continual(Recipe(epochs=1), 3).evaluate(
                self.train_set(dataset), self.context(dataset, held_out), arch=ARCH, seed=0
            )


def test_a_summary_holds_a_list_of_steps() -> None:
    values = [(0.9, 0.5), (0.7, 0.4), (0.8, 0.6)]
    results = [
        EvalResult("a", seed, steps[-1], 5, 1.0, {"per_step": steps}) for seed, steps in enumerate(values)
    ]
    summary = summarise(results)
    assert summary["per_step"] == pytest.approx([0.8, 0.5])
    assert summary["per_step_std"] == pytest.approx([0.1, 0.1])
    assert summarise(results[:1])["per_step_std"] == [None, None]
