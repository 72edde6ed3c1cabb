"""Training on a distilled set against what others do, and against the least that can be done, in one run."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ddray.artifact.distilled_set import TrainSet
from ddray.data import normalized_space, open_dataset
from ddray.evaluation.hard import Hard
from ddray.evaluation.protocol import EvalContext, evaluate_archs
from ddray.nets import build_net
from ddray.ranking.options import NasRecipe
from ddray.ranking.spaces import get_space, sample
from ddray.ranking.training import train_seeds
from ddray.seeding import derive
from ddray.system.memory import reuse_freed_memory
from ddray.system.numerics import applied
from ddray.training.dsa import Dsa, DsaPlan, dsa_for
from ddray.training.loop import train
from ddray.training.recipe import Recipe
from tests.benchmarks.conftest import best_of

pytestmark = pytest.mark.benchmark
CPU, LAST, BATCH = torch.device("cpu"), torch.channels_last, 256
ROUNDS = 3


class EveryOperation:
    """DSA whose batches take the operations by turns, so that all loops augment alike."""

    def __init__(self) -> None:
        self._dsa, self._batch = dsa_for(True), -1

    def draw(self, num: int, generator: torch.Generator, *, shared_op: bool = True) -> DsaPlan:
        self._batch += 1
        params = self._dsa.draw(num, generator, shared_op=shared_op).params
        return DsaPlan(torch.full((num,), self._batch % 6), params)

    def apply(self, images: Tensor, plan: DsaPlan) -> Tensor:
        return self._dsa.apply(images, plan)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        return self.apply(images, self.draw(len(images), generator))


def peers(net: Any, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Train as `epoch('train', ...)` of the code of DC, DSA and DM does, in the contiguous format."""
    loader = DataLoader(TensorDataset(images, labels), batch_size=BATCH, shuffle=True, num_workers=0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=0.0005)
    criterion, augment, generator = torch.nn.CrossEntropyLoss(), EveryOperation(), derive(0)
    for _ in range(epochs):
        loss_sum, num_right, num = 0.0, 0, 0
        net.train()
        for batch, targets in loader:
            output = net(augment(batch.float(), generator))
            loss = criterion(output, targets.long())
            num_right += int(np.sum(np.equal(np.argmax(output.data.numpy(), axis=-1), targets.numpy())))
            loss_sum += loss.item() * len(targets)
            num += len(targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def bare(num: int) -> Callable[[], None]:
    """Return the convolutions and the classifier of a step on `num` images, forward and backward, no more."""
    maps = [(3, 32), (128, 16), (128, 8)]
    inputs = [
        torch.randn(num, channels, side, side).contiguous(memory_format=LAST) for channels, side in maps
    ]
    grads = [torch.randn(num, 128, side, side).contiguous(memory_format=LAST) for _, side in maps]
    weights = [torch.randn(128, channels, 3, 3).contiguous(memory_format=LAST) for channels, _ in maps]
    bias, embedding, linear, grad = (
        torch.zeros(128),
        torch.randn(num, 2048),
        torch.randn(2048, 10),
        torch.randn(num, 10),
    )
    shape = ((1, 1), (1, 1), (1, 1), False, (0, 0), 1)

    def run() -> None:
        for images, weight, out in zip(inputs, weights, grads, strict=True):
            mask = (weight.shape[1] > 3, True, True)
            for part, part_grad in zip(images.split(64), out.split(64), strict=True):
                torch.convolution(part, weight, bias, *shape)
                torch.ops.aten.convolution_backward(part_grad, part, weight, [128], *shape, mask)
        torch.mm(embedding, linear), torch.mm(embedding.t(), grad), torch.mm(grad, linear.t())

    return run


def evaluation(ipc: int, threads: int) -> dict[str, float]:
    """Return seconds of a step of each loop, on ipc images of each of 10 classes."""
    torch.set_num_threads(threads)
    reuse_freed_memory()
    num, epochs = 10 * ipc, 12 if ipc == 10 else 3
    images, labels = torch.randn(num, 3, 32, 32), torch.arange(num) % 10
    sizes = [len(part) for part in labels.split(BATCH)]
    recipe = Recipe(epochs=epochs, batch=BATCH, schedule="constant")
    units = [bare(size) for size in sizes]

    def fresh() -> Any:
        return build_net("convnet3", (3, 32, 32), 10, seed=0)

    def ours(precision: Any) -> None:
        with applied(precision):
            train(fresh(), images, labels, recipe, generator=derive(0), augment=EveryOperation())

    def least() -> None:
        for unit in units * epochs:
            unit()

    loops = (
        lambda: peers(fresh(), images, labels, epochs),
        least,
        partial(ours, "tf32"),
        partial(ours, "bf16"),
    )
    seconds = best_of(*loops, rounds=ROUNDS)
    names = ("peers", "bare", "ours", "bf16")
    return {name: value / (epochs * len(sizes)) for name, value in zip(names, seconds, strict=True)}


def in_a_process(function: Callable[..., dict[str, float]], *args: Any) -> dict[str, float]:
    """Return what a function measures in a fresh process: settings of memory can't be undone."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, (*args, torch.get_num_threads()))


def has_bf16() -> bool:
    """Return whether the processor computes in bfloat16."""
    return bool(torch.cpu._is_avx512_bf16_supported())


@pytest.mark.parametrize("ipc", [10, 50])
def test_a_step_against_peers_and_bare_convolutions(figures: dict[str, Any], ipc: int) -> None:
    """Bars: >= 1.3 times as fast as the peers, >= 1.7 times in bf16; measured at ipc 10.

    The bar of 1.2 times the bare convolutions is not reached: it is a figure, `of_bare`.
    """
    seconds = in_a_process(evaluation, ipc)
    ratios = {
        "of_bare": seconds["ours"] / seconds["bare"],
        "times_faster": seconds["peers"] / seconds["ours"],
        "bf16_times_faster": seconds["peers"] / seconds["bf16"],
    }
    figures.update({"seconds_per_step": seconds, "ratios": ratios})
    assert ratios["times_faster"] >= 1.3, (seconds, ratios)
    assert ratios["bf16_times_faster"] >= 1.7 or not has_bf16(), (seconds, ratios)


def nas(threads: int) -> dict[str, float]:
    """Return seconds of the peers' loop and of ours in both precisions, summed over architectures."""
    torch.set_num_threads(threads)
    reuse_freed_memory()
    space = get_space("convnet720")
    indices = sample(space, 6, seed=0, image_shape=(3, 32, 32), num_classes=10)
    images, labels = torch.randn(100, 3, 32, 32), torch.arange(100) % 10
    last = images.contiguous(memory_format=LAST)
    augment: Dsa = EveryOperation()  # type: ignore[assignment]
    total = dict.fromkeys(("peers", "ours", "bf16"), 0.0)

    def ours(index: int, recipe: NasRecipe) -> None:
        net = space.build(index, (3, 32, 32), 10, seed=0, device=CPU)
        with applied(recipe.numerics):
            train_seeds([net], (last, labels), recipe, seeds=[0], dsa=augment)

    def loop(index: int) -> None:
        peers(space.build(index, (3, 32, 32), 10, seed=0, device=CPU), images, labels, 4)

    for index in indices:
        recipes = [NasRecipe(epochs=4, precision=precision) for precision in ("fp32", "bf16")]
        runs = (partial(loop, index), *(partial(ours, index, recipe) for recipe in recipes))
        for name, value in zip(total, best_of(*runs, rounds=1), strict=True):
            total[name] += value
    return total


def test_nas_training_in_bf16_against_peers(figures: dict[str, Any]) -> None:
    """Bar: >= 1.7 times as fast as the peers' loop in bf16, over 6 architectures of all costs."""
    seconds = in_a_process(nas)
    ratios = {name: seconds["peers"] / seconds[name] for name in ("ours", "bf16")}
    figures.update({"seconds": seconds, "times_faster": ratios})
    assert ratios["bf16"] >= 1.7 or not has_bf16(), (seconds, ratios)


def test_bf16_reaches_the_same_accuracy(figures: dict[str, Any]) -> None:
    """Bar: 12 networks each way differ by no more than seed noise, three standard errors."""
    dataset = open_dataset("digits")
    train_split, space = dataset.train(), normalized_space(dataset)
    index = torch.cat([(train_split.labels == label).nonzero()[:10, 0] for label in range(10)])
    train_set = TrainSet(space.encode(train_split.images[index]), train_split.labels[index])
    evaluator, results = Hard(Recipe(epochs=150)), {}
    for precision in ("tf32", "bf16"):
        ctx = EvalContext(dataset, dataset.test(), space, CPU, precision)  # type: ignore[arg-type]
        summary = evaluate_archs(evaluator, train_set, ctx, archs=("convnet2_w64",), num_seeds=12)[0]
        results[str(summary["precision"])] = summary["per_seed"]
    means = {name: statistics.fmean(values) for name, values in results.items()}
    deviations = {name: statistics.stdev(values) for name, values in results.items()}
    figures.update({"accuracy": means, "deviation": deviations})
    error = (sum(value**2 for value in deviations.values()) / 12) ** 0.5
    assert means["fp32"] > 0.8
    assert abs(means["bf16"] - means["fp32"]) < 3 * error + 1e-3, (means, deviations)
