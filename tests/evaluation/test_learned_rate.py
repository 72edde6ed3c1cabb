"""`evaluate.lr=learned`, and training on what a set has learned."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ddray.artifact.distilled_set import DistilledSet, TrainSet
from ddray.data import PixelSpace, Split
from ddray.distillation.method import SetExtras
from ddray.errors import InputError
from ddray.evaluation import hard
from ddray.evaluation.options import EvaluateConfig, EvaluateOptions, evaluation_config, learned_rate
from ddray.evaluation.protocol import EvalContext
from ddray.jobs.score import evaluate
from ddray.training.loop import train
from ddray.training.recipe import Recipe

CPU = torch.device("cpu")
SETTINGS = {"evaluate": {"lr": "learned", "epochs": 2, "seeds": 1}, "arch": "convnet1_w8", "compile": "off"}


@pytest.fixture
def learned(planned: Any, digits: Any) -> Any:
    """Makes a set of digits, scored at its learned rate."""

    def make(extras: SetExtras) -> DistilledSet:
        _, ctx, _ = planned("random", digits, ipc=1, **SETTINGS)
        distilled: DistilledSet = ctx.make_set(torch.randn(10, 1, 16, 16), torch.arange(10), extras=extras)
        return distilled

    return make


@pytest.mark.parametrize(
    ("sets", "rate"),
    [((), 0.0213), (("lr=0.01",), 0.01), (("evaluate.lr=0.01",), 0.01), (("epochs=3",), 0.0213)],
)
def test_networks_are_trained_at_the_sets_rate_unless_another_is_set(
    sets: tuple[str, ...], rate: float, learned: Any, caplog: pytest.LogCaptureFixture
) -> None:
    distilled, options = learned(SetExtras(learned_lr=0.0213)), EvaluateOptions(sets=sets)

    assert evaluation_config(distilled, options).as_recipe().lr == rate
    with caplog.at_level(logging.INFO):
        details = learned_rate(distilled, options)
    assert details == ({"learned_lr": 0.0213} if rate == 0.0213 else {})
    assert ("at the set's learned rate, 0.0213" in caplog.text) == (rate == 0.0213)


def test_a_named_recipe_has_its_own_rate(learned: Any) -> None:
    options = EvaluateOptions(recipe="vico")
    assert evaluation_config(learned(SetExtras(learned_lr=0.0213)), options).lr == 0.01


def test_a_set_without_a_learned_rate_can_not_be_trained_at_it(learned: Any) -> None:
    with pytest.raises(InputError, match=r"evaluate\.lr must be a number for a set without a learned rate"):
        evaluation_config(learned(SetExtras()), EvaluateOptions())


@pytest.mark.parametrize("rate", [0, -1, "fast", float("nan"), None])
def test_other_rates_are_refused(rate: Any) -> None:
    with pytest.raises(InputError, match=r"evaluate\.lr: must be a number > 0, or learned, got "):
        EvaluateConfig.parse({"lr": rate}, prefix="evaluate.")


@pytest.mark.parametrize("protocol", ["hard", "linear", "continual"])
def test_results_say_that_the_rate_was_learned(protocol: str, learned: Any, tmp_path: Path) -> None:
    learned(SetExtras(learned_lr=0.02)).save(tmp_path / "a.pt")
    sets = ("probe.steps=2",) if protocol == "linear" else ()

    result = evaluate(tmp_path / "a.pt", EvaluateOptions(protocol=protocol, sets=sets), device=CPU)
    another = evaluate(
        tmp_path / "a.pt", EvaluateOptions(protocol=protocol, sets=(*sets, "lr=0.01")), device=CPU
    )

    assert result["learned_lr"] == 0.02
    assert "learned_lr" not in another


@pytest.mark.parametrize("kind", ["logits", "values"])
def test_networks_learn_what_the_set_holds(
    kind: Any, learned: Any, digits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits by cross entropy against their softmax, values by the mean squared error: one step by hand."""
    soft = torch.randn(10, 10, generator=torch.Generator().manual_seed(1)) + 3 * torch.eye(10)
    train_set: TrainSet = learned(SetExtras(soft, kind)).decode()
    recipe = Recipe(epochs=1, lr=0.1, momentum=0, weight_decay=0, schedule="constant", augment="none")
    space = PixelSpace("normalized", digits.mean, digits.std)
    ctx = EvalContext(digits, Split(digits.test().images[:4], digits.test().labels[:4]), space, CPU)

    net = hard.fit(train_set, ctx, recipe, arch="convnet1_w8", seed=0)

    reference = ctx.fresh_net("convnet1_w8", train_set.images, seed=0).train()
    outputs = reference(train_set.images)
    loss = (
        F.mse_loss(outputs, soft)
        if kind == "values"
        else -(soft.softmax(1) * outputs.log_softmax(1)).sum(1).mean()
    )
    weights = list(reference.parameters())
    gradients = torch.autograd.grad(loss, weights)
    for actual, weight, gradient in zip(net.parameters(), weights, gradients, strict=True):
        torch.testing.assert_close(actual, weight - 0.1 * gradient, rtol=1e-4, atol=1e-6)


def test_a_class_is_what_cross_entropy_learns_of_values() -> None:
    """Protocols with a loss of their own, such as a NAS sweep, take classes."""
    values = torch.tensor([[0.9, -0.1], [-0.2, 0.3]])
    train_set = TrainSet(torch.randn(2, 1, 2, 2), values.argmax(1), soft_labels=values, regress=True)
    net: Any = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    recipe = Recipe(epochs=2, augment="none")
    loss = train(net, train_set.images, train_set.classes, recipe, generator=torch.Generator(), augment=None)
    assert train_set.classes.tolist() == [0, 1]
    assert torch.isfinite(loss)
