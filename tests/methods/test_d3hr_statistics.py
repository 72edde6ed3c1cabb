"""Sets of D3HR that store statistics and generate their images on use."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ddray.artifact.distilled_set import DistilledSet
from ddray.artifact.reading import load
from ddray.errors import InputError
from ddray.evaluation.options import EvaluateOptions
from ddray.jobs.score import evaluate
from ddray.methods.families.diffusion import stages
from ddray.methods.families.diffusion.model import save_pipeline
from tests.methods.diffusion_models import untrained


def test_a_set_of_statistics_generates_any_ipc_without_the_dataset(d3hr: Any, tmp_path: Path) -> None:
    images = d3hr(ipc=2)
    distilled = d3hr(ipc=2, store="statistics")
    distilled.save(tmp_path / "s.pt")

    loaded = load(tmp_path / "s.pt")
    stored = torch.load(tmp_path / "s.pt", weights_only=True)

    assert set(stored) == {"format_version", "mean", "variance", "meta"}
    meta = json.loads(stored["meta"])
    assert (meta["decoder"], meta["storage_floats"]) == ("d3hr", 2 * 3 * 256)
    assert meta["generator"] == images.meta.generator
    assert torch.equal(loaded.generated().images, images.images)
    larger = loaded.generated(5)
    assert larger.images.shape == (15, 3, 16, 16)
    assert larger.labels.tolist() == [label for label in range(3) for _ in range(5)]
    assert larger.meta.ipc_decoded == 5
    assert torch.equal(loaded.decode().images, images.images)
    larger.validate()


def test_a_set_of_statistics_that_does_not_fit_is_refused_before_it_generates(
    d3hr: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    d3hr(store="statistics").save(tmp_path / "s.pt")
    monkeypatch.setattr(DistilledSet, "generated", lambda self, *_: pytest.fail("images were made"))

    with pytest.raises(InputError, match="evaluate it on the dataset it was distilled from"):
        evaluate(tmp_path / "s.pt", EvaluateOptions(dataset="digits"), device=torch.device("cpu"))


def test_a_set_of_images_generates_nothing(d3hr: Any) -> None:
    distilled = d3hr()
    assert distilled.generated() is distilled
    with pytest.raises(InputError, match="--ipc is for sets that store statistics"):
        distilled.generated(3)


def test_a_set_without_its_generator_says_where_it_was(d3hr: Any, ddray_home: Path, dit: str) -> None:
    from_pool, from_folder = d3hr(store="statistics"), d3hr(store="statistics", diffusion=dit)

    expected = from_folder.generated(1).images
    moved = shutil.move(dit, dit + " moved")
    save_pipeline(untrained((3, 16, 16), depth=2), Path(dit))
    for _ in range(2):
        with pytest.raises(InputError, match=r"must hold diffusion model .*another or none; .*diffusion=NEW"):
            from_folder.generated(1)
        shutil.rmtree(dit, ignore_errors=True)
    d3hr(whole=False, diffusion=moved)  # using it once records its new location
    assert torch.equal(from_folder.generated(1).images, expected)
    shutil.rmtree(ddray_home / "pool" / from_pool.meta.generator)
    with pytest.raises(InputError, match=r"the set needs its generator, .* does not hold it"):
        from_pool.generated(1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: {"mean": s["mean"]}, "must come with float32 mean and variance"),
        (lambda s: {**s, "mean": s["mean"].double()}, "must come with float32 mean and variance"),
        (lambda s: {**s, "mean": s["mean"][:2]}, "must be finite"),
        (lambda s: {**s, "mean": s["mean"] / 0}, "must be finite"),
        (lambda s: {**s, "variance": s["variance"] - 100}, "variance must be >= 0"),
        (lambda s: {name: value[:, :5] for name, value in s.items()}, "storage_floats must be 30, got 1536"),
        (lambda s: {}, "must come with float32 mean and variance, got "),
    ],
)
def test_broken_statistics_are_refused(d3hr: Any, change: Any, reason: str) -> None:
    distilled: DistilledSet = d3hr(store="statistics")
    with pytest.raises(InputError, match=reason):
        replace(distilled, compact=change(distilled.compact)).validate()


@pytest.mark.parametrize("place", ["pool", "folder"])
def test_the_storage_with_the_generator_and_the_seconds_of_sampling_are_measured(
    place: str, d3hr: Any, dit: str
) -> None:
    """Fig A2, Tables A2-A4: the weights are counted anew on the loaded networks."""
    source = {"diffusion": dit} if place == "folder" else {}
    _, images = d3hr(whole=False, **source)
    ctx, statistics = d3hr(whole=False, store="statistics", **source)
    assert images.measures == {}
    images.step()

    assert images.measures.keys() == {"sampling_seconds_per_class"}
    assert images.measures["sampling_seconds_per_class"] > 0
    fingerprint = statistics.snapshot().meta.generator
    model = stages.load_generator(statistics._engine._source, ctx.pool)
    networks = (model.transformer, model.vae)
    num = sum(t.numel() for net in networks for t in net.state_dict().values())
    assert stages.generator_floats(fingerprint) == num
    assert statistics.measures == {"storage_with_generator_floats": 2 * 3 * 256 + num}
    assert stages.generator_floats("gone") is None
