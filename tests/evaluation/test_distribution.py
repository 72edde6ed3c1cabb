"""Protocol `distribution`: its distances against NumPy's means and covariances, and where they are 0 or 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddray.artifact.distilled_set import TrainSet
from ddray.data import Dataset, normalized_space
from ddray.errors import InputError
from ddray.evaluation.distribution import Distribution, Moments, covariance_distance, nearest_class
from ddray.evaluation.options import EvaluateOptions
from ddray.evaluation.protocol import EvalContext, RealImages, summarise
from ddray.jobs.trainers import PoolTrainer
from ddray.pool.local import LocalPool
from ddray.training.recipe import Recipe

CPU = torch.device("cpu")
RECIPE = Recipe(epochs=1, schedule="constant", augment="none")


def evaluator_of(dataset: Dataset, num: int = 2, first_seed: int = 7) -> tuple[Distribution, EvalContext]:
    real = dataset.train()
    images = RealImages(real, "train", LocalPool(PoolTrainer(dataset, real, CPU)))
    ctx = EvalContext(dataset, dataset.test(), normalized_space(dataset), CPU)
    return Distribution(RECIPE, images, first_seed, num), ctx


def test_every_measure_is_that_of_means_and_covariances_written_anew(toy: Any) -> None:
    dataset = toy()
    evaluator, ctx = evaluator_of(dataset)
    real = dataset.train()
    index = torch.cat([torch.nonzero(real.labels == label)[:3, 0] for label in range(3)])
    pixels = ctx.space.encode(real.images)
    learned = pixels[index] + 0.3 * torch.randn(9, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = real.labels[index]

    result = evaluator.evaluate(TrainSet(learned, labels), ctx, arch="convnet1_w8", seed=8)

    net: Any = evaluator.real.pool.get([evaluator.spec(ctx, "convnet1_w8", 1)])[0].module()
    with torch.no_grad():
        f, g = (net.embed(images).double().numpy() for images in (pixels, learned))
    y, z = real.labels.numpy(), labels.numpy()
    d = f.shape[1]
    m_real, m_set = (np.stack([v[k == c].mean(0) for c in range(3)]) for v, k in ((f, y), (g, z)))
    covariances = [[np.cov(v[k == c].T, bias=True) for c in range(3)] for v, k in ((f, y), (g, z))]
    spread = [np.trace(b) / np.trace(a) for a, b in zip(*covariances, strict=True)]
    expected = {
        "prototype_loss": ((m_real - m_set) ** 2).sum(),
        "covariance_loss": sum(((a - b) ** 2).sum() for a, b in zip(*covariances, strict=True)) / d,
        "spread": np.mean(spread),
        "misplaced": np.mean(
            [((m_real - row) ** 2).sum(1).argmin() != c for row, c in zip(g, z, strict=True)]
        ),
    }
    assert result.measures == pytest.approx(expected, rel=1e-4)
    right = [((m_set - row) ** 2).sum(1).argmin() == c for row, c in zip(f, y, strict=True)]
    assert result.accuracy == pytest.approx(np.mean(right))
    assert result.per_class == pytest.approx([np.mean(np.array(right)[y == c]) for c in range(3)])


def test_the_real_images_themselves_lie_at_no_distance(toy: Any) -> None:
    dataset = toy()
    evaluator, ctx = evaluator_of(dataset)
    real = dataset.train()
    whole = TrainSet(ctx.space.encode(real.images), real.labels)

    results = [evaluator.evaluate(whole, ctx, arch="convnet1_w8", seed=seed) for seed in (7, 8, 9)]

    for result in results:
        assert result.measures["prototype_loss"] == pytest.approx(0, abs=1e-6)
        assert result.measures["covariance_loss"] == pytest.approx(0, abs=1e-6)
        assert result.measures["spread"] == pytest.approx(1, rel=1e-4)
    assert results[0].measures == results[2].measures != results[1].measures  # the networks are counted anew
    summary = summarise(results[:2])
    assert summary["measures_per_seed"]["spread"] == [one.measures["spread"] for one in results[:2]]


def test_one_image_of_a_class_has_no_spread_and_a_class_without_images_counts_nowhere(toy: Any) -> None:
    dataset = toy()
    evaluator, ctx = evaluator_of(dataset)
    real = dataset.train()
    first = int(torch.nonzero(real.labels == 1)[0])
    one = TrainSet(ctx.space.encode(real.images[first : first + 1]), real.labels[first : first + 1])

    result = evaluator.evaluate(one, ctx, arch="convnet1_w8", seed=7)

    assert result.measures["spread"] == 0
    assert np.isfinite(list(result.measures.values())).all()
    assert result.per_class == (0.0, 1.0, 0.0)


@pytest.mark.parametrize("dims", [3, 40])
def test_the_distance_of_covariances_is_the_same_by_either_gram_matrix(dims: int) -> None:
    rows = torch.randn(9, dims, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    real, learned = (Moments.of(part, torch.zeros(len(part)).long(), 1) for part in (rows[:5], rows[5:]))

    distance = covariance_distance(real.centred[0], learned.centred[0])

    expected = np.cov(rows[:5].T.numpy(), bias=True) - np.cov(rows[5:].T.numpy(), bias=True)
    assert float(distance) == pytest.approx((expected**2).sum())


def test_no_image_is_nearest_to_a_class_without_images() -> None:
    means = torch.tensor([[0.0, 0.0], [float("nan")] * 2, [5.0, 5.0]], dtype=torch.float64)
    assert nearest_class(torch.tensor([[0.1, 0.0], [4.0, 4.0]]), means).tolist() == [0, 2]


def test_the_command_names_the_networks_it_embedded_with(
    run_command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_command("distill", "--method", "random", "--dataset", "digits", "--ipc", "2", "--out", "r.pt")
    arguments = ("evaluate", "r.pt", "--protocol", "distribution", "--arch", "convnet1_w8", "--seeds", "2")

    result = run_command(*arguments, "--epochs", "1")

    (row,) = result["results"]
    entries = [
        json.loads(path.read_text())["spec"] | {"key": path.parent.name}
        for path in (tmp_path / "home" / "pool").glob("*/entry.json")
    ]
    networks = [entry["key"] for entry in entries if entry["kind"] == "supervised"]
    assert len(networks) == 2
    assert sorted(result["networks"]["convnet1_w8"]) == sorted(networks)
    assert len(row["measures_per_seed"]["misplaced"]) == 2
    with pytest.raises(InputError, match="epochs"):
        EvaluateOptions(protocol="distribution", sets=("epochs=0",))
