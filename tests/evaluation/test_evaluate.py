from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddray.artifact.distilled_set import TrainSet
from ddray.data import PixelSpace, Split, normalized_space
from ddray.errors import DivergedError, InputError
from ddray.evaluation.hard import Hard
from ddray.evaluation.protocol import (
    EvalContext,
    EvalResult,
    balance_matters,
    evaluate_archs,
    summarise,
)
from ddray.nets import build_net
from ddray.seeding import derive
from ddray.training import loop as module
from ddray.training.embedding import Score
from ddray.training.loop import augmenter, score_net, train
from ddray.training.recipe import Recipe

CPU = torch.device("cpu")


def toy_net(seed: int = 0, pixels: int = 4, classes: int = 2) -> Any:
    net = nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return net


def toy_data(num: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, 1, 2, 2, generator=generator), torch.randint(0, 2, (num,), generator=generator)


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float, bool]]:
    """Record (which optimiser, its rate, whether it has momentum yet) at every step."""
    steps: list[tuple[int, float, bool]] = []
    optimizers: list[Any] = []

    class Spy(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            if not any(self is optimizer for optimizer in optimizers):
                optimizers.append(self)
            steps.append((len(optimizers), self.param_groups[0]["lr"], bool(self.state)))
            return super().step(closure)

    monkeypatch.setattr(module.torch.optim, "SGD", Spy)
    return steps


def test_vico_runs_502_epochs_at_lr_and_499_at_a_tenth_with_fresh_momentum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The peers' `for ep in range(E + 1)`, with lr / 10 and a new SGD after ep == E // 2 + 1."""
    steps = recorded(monkeypatch)
    images, labels = toy_data()

    train(toy_net(), images, labels, Recipe(epochs=1000, augment="none"), generator=derive(0), augment=None)

    assert [lr for _, lr, _ in steps] == pytest.approx([0.01] * 502 + [0.001] * 499)
    assert [number for number, _, _ in steps] == [1] * 502 + [2] * 499
    assert [i for i, (_, _, has_momentum) in enumerate(steps) if not has_momentum] == [0, 502]


@pytest.mark.parametrize("epochs", [1, 2, 3, 10, 300])
def test_vico_at_any_length_is_the_peers_loop(epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = recorded(monkeypatch)
    images, labels = toy_data()

    assert train(toy_net(), images, labels, Recipe(epochs=epochs), generator=derive(0), augment=None) > 0

    expected, lr = [], 0.01
    for epoch in range(epochs + 1):
        expected.append(lr)
        if epoch == epochs // 2 + 1:
            lr *= 0.1
    assert [rate for _, rate, _ in steps] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        ("step15", lambda epoch: 0.5 ** math.floor(epoch / 15)),
        ("cosine", lambda epoch: (1 + math.cos(math.pi * epoch / 40)) / 2),
        ("constant", lambda epoch: 1.0),
    ],
)
def test_other_schedules_run_the_epochs_with_one_optimiser(
    schedule: Any, factor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = recorded(monkeypatch)
    images, labels = toy_data()
    recipe = Recipe(epochs=40, lr=0.2, schedule=schedule, batch=4)

    train(toy_net(), images, labels, recipe, generator=derive(0), augment=None)

    expected = [0.2 * factor(epoch) for epoch in range(40) for _ in range(2)]  # 6 images: two batches
    assert [rate for _, rate, _ in steps] == pytest.approx(expected, rel=1e-5)
    assert {number for number, _, _ in steps} == {1}


def naive_train(net: Any, images: Tensor, labels: Tensor, recipe: Recipe, generator: Any) -> float:
    """SGD by hand: v = m v + (g + wd w), w = w - lr v; E + 1 epochs, v = 0 and lr / 10 at the drop."""
    weights = list(net.parameters())
    velocity = [torch.zeros_like(w) for w in weights]
    lr, mean = recipe.lr, 0.0
    for epoch in range(recipe.epochs + 1):
        order = torch.randperm(len(labels), generator=generator).tolist()
        mean = 0.0
        for start in range(0, len(order), recipe.batch):
            batch = order[start : start + recipe.batch]
            loss = sum(-F.log_softmax(net(images[i : i + 1]), 1)[0, labels[i]] for i in batch) / len(batch)
            grads = torch.autograd.grad(loss, weights)
            mean += float(loss.detach()) * len(batch) / len(order)
            with torch.no_grad():
                for w, v, g in zip(weights, velocity, grads, strict=True):
                    v.mul_(recipe.momentum).add_(g + recipe.weight_decay * w)
                    w.sub_(lr * v)
        if epoch == recipe.epochs // 2 + 1:
            lr *= 0.1
            velocity = [torch.zeros_like(w) for w in weights]
    return mean


def test_training_is_sgd_by_hand() -> None:
    images, labels = toy_data(7)
    recipe = Recipe(epochs=6, lr=0.3, momentum=0.8, weight_decay=0.05, batch=3)
    ours, reference = toy_net(), toy_net()

    loss = float(train(ours, images, labels, recipe, generator=derive(4, "order"), augment=None))

    assert loss == pytest.approx(naive_train(reference, images, labels, recipe, derive(4, "order")), rel=1e-5)
    for a, b in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not ours.training


def test_every_batch_is_augmented_and_labels_follow() -> None:
    images, labels = torch.arange(6.0).view(6, 1, 1, 1).repeat(1, 1, 2, 2), torch.tensor([0, 1] * 3)
    seen: list[list[float]] = []

    def note(batch: Tensor, generator: torch.Generator) -> Tensor:
        seen.append(batch[:, 0, 0, 0].tolist())
        return batch * 0

    net = toy_net()
    before = [p.clone() for p in net.parameters()]
    recipe = Recipe(epochs=2, batch=4, schedule="constant", weight_decay=0)
    train(net, images, labels, recipe, generator=derive(0), augment=note)

    assert [len(batch) for batch in seen] == [4, 2, 4, 2]
    assert sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3]) == [0, 1, 2, 3, 4, 5]
    assert seen[:2] != seen[2:]
    weight, bias = net.parameters()
    assert torch.equal(weight, before[0])  # it saw zeros only
    assert not torch.equal(bias, before[1])


@pytest.mark.parametrize("num", [1, 5, 32, 70])
@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_accuracy_is_the_share_of_right_answers(num: int, chunk: int | None, toy: Any) -> None:
    dataset = toy(counts=(30, 25, 15))
    split = dataset.train().select(torch.arange(num))
    space = normalized_space(dataset)
    net = build_net("convnet1_w8", (3, 16, 16), 3, seed=0).eval()

    actual = score_net(net, split, space, device=CPU, chunk=chunk)

    right, by_class = 0, torch.zeros(3)
    for image, label in zip(split.images, split.labels.tolist(), strict=True):
        pixels = (image.float() / 255 - torch.tensor(dataset.mean).view(3, 1, 1)) / torch.tensor(
            dataset.std
        ).view(3, 1, 1)
        scores = net(pixels[None])[0].tolist()
        right += scores.index(max(scores)) == label
        by_class[label] += scores.index(max(scores)) == label
    assert actual.accuracy == right / num
    counts = torch.bincount(split.labels, minlength=3)
    assert actual.per_class == tuple(
        None if count == 0 else float(hits) / int(count) for hits, count in zip(by_class, counts, strict=True)
    )
    seen = [share for share in actual.per_class if share is not None]
    assert actual.balanced_accuracy == pytest.approx(sum(seen) / len(seen))


def test_accuracy_of_a_perfect_and_a_useless_network() -> None:
    class Reads(nn.Module):
        """Predicts the class written into the pixel."""

        def forward(self, x: Tensor) -> Tensor:
            return F.one_hot((x[:, 0, 0, 0] * 255).round().long(), 3).float()

    labels = torch.arange(3).repeat(50)
    written = labels.to(torch.uint8).view(-1, 1, 1, 1).contiguous()
    net: Any = Reads()

    assert score_net(net, Split(written, labels), PixelSpace(), device=CPU) == Score(1.0, (1.0,) * 3)
    assert score_net(net, Split((written + 1) % 3, labels), PixelSpace(), device=CPU).accuracy == 0.0


def test_a_long_tail_weighs_as_much_in_the_balanced_accuracy_and_every_image_is_seen_once() -> None:
    """90 right of class 0, none of 10 of class 1, none there of class 2: 90 %, balanced 50 %."""
    passes: list[int] = []

    class Zero(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            passes.append(len(x))
            return torch.tensor([1.0, 0.0, 0.0]).repeat(len(x), 1)

    labels = torch.tensor([0] * 90 + [1] * 10)
    net: Any = Zero()
    images = torch.zeros(100, 1, 2, 2, dtype=torch.uint8)

    score = score_net(net, Split(images, labels), PixelSpace(), device=CPU)

    assert (score.accuracy, score.per_class, score.balanced_accuracy) == (0.9, (1.0, 0.0, None), 0.5)
    assert sum(passes) == 100


class TestAugmenter:
    space = PixelSpace("normalized", (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))

    def batch(self, num: int = 6) -> Tensor:
        pixels = torch.randint(0, 256, (num, 3, 16, 16), generator=derive(0), dtype=torch.uint8)
        return self.space.encode(pixels)

    def test_none_is_none(self) -> None:
        assert augmenter("none", can_flip=True, space=self.space) is None

    @pytest.mark.parametrize("name", ["dsa", "dsa_idc", "autoaugment", "randaugment", "crop_flip"])
    def test_it_changes_images_as_the_generator_says_and_nothing_else(self, name: Any) -> None:
        apply = augmenter(name, can_flip=True, space=self.space)
        assert apply is not None
        batch = self.batch()
        original, before = batch.clone(), torch.get_rng_state()

        first, second = apply(batch, derive(1)), apply(batch, derive(1))
        others = [apply(batch, derive(seed)) for seed in range(2, 6)]

        assert first.shape == batch.shape
        assert first.dtype == torch.float32
        assert torch.isfinite(first).all()
        assert torch.equal(first, second)
        assert not all(torch.equal(first, other) for other in others)
        assert torch.equal(batch, original)
        assert torch.equal(torch.get_rng_state(), before)

    def test_dsa_draws_one_operation_per_batch_and_parameters_per_sample(self) -> None:
        apply = augmenter("dsa", can_flip=True, space=self.space)
        assert apply is not None
        same = self.batch(1).repeat(8, 1, 1, 1)
        changed = [apply(same, derive(seed)) for seed in range(6)]

        assert any(not torch.equal(out[0], out[i]) for out in changed for i in range(1, 8))

    @pytest.mark.parametrize("name", ["autoaugment", "randaugment"])
    def test_a_policy_works_on_the_decoded_8_bit_pixels(
        self, name: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With a policy that inverts, the result is the encoded inverse."""
        from torchvision.transforms import v2

        for policy in ("AutoAugment", "RandAugment"):
            monkeypatch.setattr(v2, policy, lambda *args: lambda image: 255 - image)
        apply = augmenter(name, can_flip=False, space=self.space)
        assert apply is not None

        out = apply(self.batch(), derive(0))

        pixels = torch.randint(0, 256, (6, 3, 16, 16), generator=derive(0), dtype=torch.uint8)
        torch.testing.assert_close(out, self.space.encode(255 - pixels))


class TestHard:
    def context(self, dataset: Any) -> EvalContext:
        return EvalContext(dataset, dataset.test(), normalized_space(dataset), CPU)

    def train_set(self, dataset: Any) -> TrainSet:
        split = dataset.train()
        return TrainSet(normalized_space(dataset).encode(split.images), split.labels)

    def test_it_learns_what_can_be_learned(self, digits: Any) -> None:
        split = digits.train().select(torch.arange(300))
        train_set = TrainSet(normalized_space(digits).encode(split.images), split.labels)
        recipe = Recipe(epochs=12, augment="none", batch=32)

        result = Hard(recipe).evaluate(train_set, self.context(digits), arch="convnet2_w16", seed=0)

        assert result.accuracy > 0.8
        assert (result.arch, result.seed, result.num_images) == ("convnet2_w16", 0, 300)
        assert result.wall_s > 0

    def test_a_seed_decides_everything_and_the_set_is_left_alone(self, toy: Any) -> None:
        dataset = toy(counts=(9, 9, 9))
        train_set = self.train_set(dataset)
        original = copy.deepcopy(train_set)
        hard = Hard(Recipe(epochs=3, augment="dsa"))

        def scores(seed: int) -> list[float]:
            torch.rand(seed + 1)
            return [
                hard.evaluate(train_set, self.context(dataset), arch=arch, seed=seed).accuracy
                for arch in ("convnet1_w8", "convnet2_w8_bn")
            ]

        assert scores(0) == scores(0)
        assert len({tuple(scores(seed)) for seed in range(5)}) > 1
        assert torch.equal(train_set.images, original.images)

    def test_a_diverged_training_is_no_score(self, toy: Any) -> None:
        dataset = toy()
        recipe = Recipe(epochs=30, lr=1e18, augment="none")

        with pytest.raises(DivergedError, match="training convnet2_w8_nonorm on the set diverged"):
            Hard(recipe).evaluate(
                self.train_set(dataset), self.context(dataset), arch="convnet2_w8_nonorm", seed=0
            )

    def test_an_unknown_arch_is_refused(self, toy: Any) -> None:
        dataset = toy()
        with pytest.raises(InputError, match="resnet19"):
            Hard(Recipe()).evaluate(self.train_set(dataset), self.context(dataset), arch="resnet19", seed=0)


def test_a_summary_has_mean_sample_std_and_every_seed() -> None:
    results = [EvalResult("a", seed, value, 10, 0.5) for seed, value in enumerate([0.1, 0.2, 0.6])]

    summary = summarise(results)

    assert summary["accuracy_mean"] == pytest.approx(0.3)
    assert summary["accuracy_std"] == pytest.approx(math.sqrt((0.04 + 0.01 + 0.09) / 2))
    assert summary["per_seed"] == [0.1, 0.2, 0.6]
    assert (summary["arch"], summary["num_images"], summary["wall_s"]) == ("a", 10, 1.5)
    assert summarise(results[:1])["accuracy_std"] is None
    assert not {"per_class", "balanced_accuracy_mean"} & summary.keys(), "nothing was measured by class"


def test_a_summary_has_classes_and_their_balanced_accuracy() -> None:
    shares = ((1.0, 0.2, None), (0.5, 0.1, None))
    results = [EvalResult("a", seed, 0.7, 10, 0.5, per_class=each) for seed, each in enumerate(shares)]

    summary = summarise(results)

    assert summary["per_class"] == [0.75, pytest.approx(0.15), None]
    assert summary["balanced_accuracy_mean"] == pytest.approx((0.6 + 0.3) / 2)
    assert summary["balanced_accuracy_std"] == pytest.approx(0.3 / math.sqrt(2))


def test_balance_is_worth_a_column_from_half_a_point_on() -> None:
    assert not balance_matters([{"accuracy_mean": 0.5}, {"accuracy_mean": None}])
    assert not balance_matters([{"accuracy_mean": 0.5, "balanced_accuracy_mean": 0.504}])
    assert balance_matters([{"accuracy_mean": 0.5}, {"accuracy_mean": 0.5, "balanced_accuracy_mean": 0.495}])


def test_every_arch_is_scored_with_consecutive_seeds() -> None:
    class Fake:
        def evaluate(self, train_set: Any, ctx: Any, *, arch: str, seed: int) -> EvalResult:
            return EvalResult(arch, seed, seed / 10, 1, 1.0)

    seen: list[EvalResult] = []
    nothing: Any = None
    ctx = EvalContext(nothing, nothing, nothing, CPU)
    summaries = evaluate_archs(
        Fake(), nothing, ctx, archs=["b", "a"], num_seeds=3, seed=4, on_result=seen.append
    )

    assert [(result.arch, result.seed) for result in seen] == [(a, s) for a in "ba" for s in (4, 5, 6)]
    assert [summary["arch"] for summary in summaries] == ["b", "a"]
    assert summaries[0]["per_seed"] == [0.4, 0.5, 0.6]


@pytest.mark.parametrize("precision", ["tf32", "bf16", "auto"])
def test_networks_are_trained_in_the_precision_that_the_summary_names(precision: Any, toy: Any) -> None:
    dataset = toy()
    space, split = normalized_space(dataset), dataset.train()
    train_set = TrainSet(space.encode(split.images), split.labels)
    seen: set[torch.dtype] = set()

    class Spy(Hard):
        def evaluate(self, train_set: TrainSet, ctx: EvalContext, *, arch: str, seed: int) -> EvalResult:
            hook = torch.nn.modules.module.register_module_forward_hook(
                lambda module, inputs, output: (
                    seen.add(output.dtype) if isinstance(module, nn.Linear) else None
                )
            )
            with hook:
                return super().evaluate(train_set, ctx, arch=arch, seed=seed)

    ctx = EvalContext(dataset, split, space, CPU, precision)
    summary = evaluate_archs(Spy(Recipe(epochs=2)), train_set, ctx, archs=("convnet2_w8",), num_seeds=2)[0]
    assert summary["precision"] in {"tf32": ("fp32",), "bf16": ("bf16",), "auto": ("fp32", "bf16")}[precision]
    assert (torch.bfloat16 in seen) is (precision != "tf32")  # a probe tries it too
    assert torch.float32 in seen  # scoring


def test_networks_that_are_evaluated_together_are_those_that_are_evaluated_alone(toy: Any) -> None:
    dataset = toy()
    space, split = normalized_space(dataset), dataset.train()
    train_set = TrainSet(space.encode(split.images), split.labels)
    ctx, evaluator = EvalContext(dataset, split, space, CPU), Hard(Recipe(epochs=2))
    together = evaluator.evaluate_together(train_set, ctx, arch="convnet2_w8", seeds=[3, 4])
    alone = [evaluator.evaluate(train_set, ctx, arch="convnet2_w8", seed=seed) for seed in (3, 4)]
    assert [(one.seed, one.per_class) for one in together] == [(one.seed, one.per_class) for one in alone]
