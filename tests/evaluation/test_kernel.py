"""Protocol `kernel`: against a solve written anew, of labels by kind; what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ddray.artifact.distilled_set import TrainSet
from ddray.data import normalized_space
from ddray.errors import DivergedError, InputError
from ddray.evaluation import kernel as kernel_protocol
from ddray.evaluation.kernel import Kernel, KernelConfig, regression_targets
from ddray.evaluation.options import EvaluateOptions
from ddray.evaluation.protocol import EvalContext
from ddray.jobs.score import evaluate
from ddray.nets.ntk import gram, ntk

CPU = torch.device("cpu")


def context(toy: Any) -> EvalContext:
    dataset = toy((6, 5, 7), (1, 8, 8))
    return EvalContext(dataset, dataset.test(), normalized_space(dataset), CPU)


def labelled(ctx: EvalContext, num: int = 6) -> TrainSet:
    images = torch.randn(num, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return TrainSet(images, torch.arange(num) % 3)


@pytest.mark.parametrize("name", ["fc2", "conv3"])
def test_held_out_images_are_classified_by_the_regression(name: str, toy: Any) -> None:
    ctx = context(toy)
    train_set = labelled(ctx)
    images, held_out = train_set.images, ctx.space.encode(ctx.split.images)
    square = gram(name, images)
    penalty = 1e-4 * square.trace() / 6 * torch.eye(6).double()
    targets = torch.eye(3).double()[train_set.labels] - 1 / 3
    values = ntk(name, held_out, images) @ torch.linalg.inv(square + penalty) @ targets
    right = values.argmax(1) == ctx.split.labels

    result = Kernel(KernelConfig(kernel=name, ridge=1e-4)).evaluate(train_set, ctx, arch="convnet3", seed=5)

    assert result.accuracy == pytest.approx(float(right.double().mean()))
    assert result.per_class == pytest.approx(
        [float(right[ctx.split.labels == k].double().mean()) for k in range(3)]
    )
    loss = (values - torch.eye(3).double()[ctx.split.labels] + 1 / 3).square().mean() / 2
    assert result.measures["kernel_loss"] == pytest.approx(float(loss), rel=1e-6)
    assert (result.arch, result.seed, result.num_images) == ("convnet3", 5, 6)


def test_chunks_change_nothing(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = context(toy)
    whole = Kernel(KernelConfig()).evaluate(labelled(ctx), ctx, arch="convnet3", seed=0)
    monkeypatch.setattr(kernel_protocol, "memory_budget", lambda device: 1)
    parts = Kernel(KernelConfig()).evaluate(labelled(ctx), ctx, arch="convnet3", seed=0)
    assert parts.accuracy == whole.accuracy
    assert parts.measures["kernel_loss"] == pytest.approx(whole.measures["kernel_loss"], rel=1e-9)


def test_targets_are_one_hot_probabilities_or_values_by_their_kind() -> None:
    labels = torch.tensor([1, 0])
    soft = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    hard = regression_targets(TrainSet(soft, labels), 2)
    probabilities = regression_targets(TrainSet(soft, labels, soft_labels=soft), 2)
    values = regression_targets(TrainSet(soft, labels, soft_labels=soft, regress=True), 2)
    assert hard.tolist() == [[-0.5, 0.5], [0.5, -0.5]]
    assert probabilities.tolist() == [[-0.25, 0.25], [0.0, 0.0]]
    assert values.tolist() == soft.tolist()


def test_a_files_own_kernel_is_the_default(planned: Any, toy: Any, tmp_path: Path) -> None:
    dataset = toy((6, 5, 7), (1, 8, 8))
    method = {"kernel": "fc2", "batch_real": 12, "learn_labels": True, "ridge": 0.3}
    _, ctx, distiller = planned("kip", dataset, steps=1, arch="convnet1_w8", method=method)
    distiller.setup(ctx)
    distiller.step()
    distiller.snapshot().save(tmp_path / "set.pt")

    def scored(*sets: str) -> tuple[str, float]:
        options = EvaluateOptions(protocol="kernel", sets=sets)
        result = evaluate(tmp_path / "set.pt", options, device=CPU, dataset=dataset)
        assert len(result.results[0].per_seed) == 1
        return str(result["kernel"]), result.results[0]["kernel_loss"]

    assert scored("kernel=fc1")[0] == "fc1"
    assert scored() == scored("kernel=fc2", "ridge=0.3")
    assert scored()[1] != scored("ridge=1e-6")[1]


def test_recipes_that_can_not_regress_say_so(
    planned: Any, toy: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = toy((6, 5, 7), (1, 8, 8))
    method = {"kernel": "fc1", "batch_real": 12, "learn_labels": True}
    _, ctx, distiller = planned("kip", dataset, steps=1, arch="convnet1_w8", method=method)
    distiller.setup(ctx)
    distiller.snapshot().save(tmp_path / "set.pt")
    for recipe, message in (
        ("idc", "cutmix is left out"),
        ("table5", "the set's values are not regressed to"),
    ):
        caplog.clear()
        options = EvaluateOptions(recipe=recipe, epochs=1, seeds=1)
        evaluate(tmp_path / "set.pt", options, device=CPU, dataset=dataset)
        assert message in caplog.text


def test_what_it_refuses(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = context(toy)
    with pytest.raises(InputError, match=r"kernel: .*got 'fc9'"):
        EvaluateOptions(protocol="kernel", sets=("kernel=fc9",))
    with pytest.raises(InputError, match="--seeds must be left out with --protocol kernel"):
        EvaluateOptions(protocol="kernel", seeds=3)
    with pytest.raises(InputError, match="--arch must be left out with --protocol kernel"):
        EvaluateOptions(protocol="kernel", archs=("resnet18",))
    slow = Kernel(KernelConfig(kernel="convnet3", max_hours=1e-9))
    with pytest.raises(
        InputError, match="kernel convnet3 of 6 images and 18 held-out ones on cpu takes about"
    ):
        slow.evaluate(labelled(ctx), ctx, arch="convnet3", seed=0)
    with monkeypatch.context() as small:
        small.setattr(kernel_protocol, "available_bytes", lambda device: 4 * 8 * 36 - 1)
        with pytest.raises(
            InputError, match=r"regression on 6 images needs about 0\.0 GiB for its matrices, cpu"
        ):
            Kernel(KernelConfig()).evaluate(labelled(ctx), ctx, arch="convnet3", seed=0)
    broken = replace(labelled(ctx), images=torch.full((6, 1, 8, 8), torch.inf))
    with pytest.raises(DivergedError, match="raise --set ridge=R"):
        Kernel(KernelConfig()).evaluate(broken, ctx, arch="convnet3", seed=0)
