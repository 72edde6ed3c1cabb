"""d3hr's preset d4m and mini-batch k-means: centres against scikit-learn's, and by hand of blobs apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import MiniBatchKMeans

from ddray.errors import InputError
from ddray.jobs.plan import resolve
from ddray.methods.families.diffusion.decoder import D3HRConfig
from ddray.methods.families.selection import minibatch_centroids
from ddray.seeding import derive_seed
from tests.methods.diffusion_models import BASE


def blobs(num: int, size: int, seed: int = 0) -> torch.Tensor:
    """`num` blobs far apart, [num * size, 3], one sample of each in turn."""
    generator = torch.Generator().manual_seed(seed)
    centres = 100.0 * torch.eye(num, 3)
    return (centres.repeat(size, 1) + torch.randn(num * size, 3, generator=generator)).contiguous()


@pytest.mark.parametrize("batch", [3, 6, 9, 40])
def test_centres_are_scikit_learns(batch: int) -> None:
    features = torch.randn(40, 5, generator=torch.Generator().manual_seed(1))
    reference = MiniBatchKMeans(n_clusters=3, random_state=7, n_init="auto")
    for start in range(0, 40, batch):
        reference.partial_fit(features[start : start + batch].numpy())

    centres = minibatch_centroids(features, 3, 7, batch=batch)

    assert torch.equal(centres, torch.from_numpy(reference.cluster_centers_))


@pytest.mark.parametrize("batch", [1, 3, 6, 7])
def test_centres_of_blobs_are_running_means_of_all_samples(batch: int) -> None:
    """A batch of fewer than the centres is as large as they are."""
    features = blobs(3, 8)

    centres = minibatch_centroids(features, 3, 0, batch=batch)

    expected = features.double().view(8, 3, 3).mean(0)
    ordered = centres.double()[centres.argmax(1).argsort()]
    torch.testing.assert_close(ordered, expected, rtol=1e-4, atol=1e-4)


def test_fewer_samples_than_centres_are_all_centres() -> None:
    features = torch.randn(2, 4)

    centres = minibatch_centroids(features, 5, 0, batch=5)

    assert sorted(centres.tolist()) == sorted(features.tolist())


def test_a_run_takes_such_centres_of_each_classs_latents(d3hr: Any, dit: str) -> None:
    settings = {"sampling": "kmeans", "km_expand": 2, "num_inference_steps": 4, "diffusion": dit}
    ctx, method = d3hr(ipc=2, whole=False, **settings)
    engine = method._engine
    for _ in range(3):
        method.step()

    for label in range(3):
        latents = engine._clean[ctx.split.labels == label]
        seed = derive_seed(ctx.seed, "distill", "centres", label)
        reference = MiniBatchKMeans(n_clusters=2, random_state=seed % 2**32, n_init="auto")
        for part in torch.split(latents, 4):
            reference.partial_fit(part.numpy())
        noise = torch.randn(2, latents.shape[1], generator=ctx.generator("noise", label))
        expected = engine._sampler.model.add_noise(
            torch.from_numpy(reference.cluster_centers_), noise, method._config.levels()
        )
        assert np.allclose(engine._latents[2 * label : 2 * label + 2].numpy(), expected.numpy(), atol=1e-6)


def test_the_preset_is_d4ms_over_the_papers_and_the_datasets(toy: Any, digits: Any) -> None:
    settings = {"sampling": "kmeans", "km_expand": 1, "encoding": "sample"}
    settings |= {"num_inference_steps": 50, "inversion_steps": 35, "guidance": 8.0}
    for dataset in (toy(), digits):
        paper = resolve("d3hr", dataset, ipc=2).config
        config = resolve("d3hr", dataset, ipc=2, preset="d4m").config

        assert config.method.dump() == {**paper.method.dump(), **settings}
        assert config.evaluate == paper.evaluate
        assert config.method.levels().num_steps == 35
    changed = resolve("d3hr", toy(), ipc=2, preset="d4m", layers=[{"method": {"guidance": 2.0}}])
    assert changed.config.method.guidance == 2.0


def test_it_is_no_preset_of_other_methods(toy: Any) -> None:
    with pytest.raises(InputError, match=r"^preset must be one of paper, repo, got 'd4m'$"):
        resolve("dm", toy(), ipc=2, preset="d4m")
    with pytest.raises(InputError, match=r"^preset must be one of d4m, paper, repo, got 'd4'; did you mean"):
        resolve("d3hr", toy(), ipc=2, preset="d4")


def test_mini_batches_need_k_means() -> None:
    with pytest.raises(InputError, match="km_expand=1 needs sampling=kmeans, got group"):
        D3HRConfig.parse({"km_expand": 1})


def test_the_preset_runs_resumes_and_says_what_it_is(planned: Any, toy: Any) -> None:
    quick = {**BASE, "num_inference_steps": 2, "inversion_steps": 1}
    runs = []
    for cut in (0, 4):
        _, ctx, method = planned("d3hr", toy(), ipc=2, preset="d4m", method=quick)
        method.setup(ctx)
        for _ in range(cut):
            method.step()
        if cut:
            state = method.state_dict()
            _, ctx, method = planned("d3hr", toy(), ipc=2, preset="d4m", method=quick)
            method.setup(ctx)
            method.load_state_dict(state)
        for _ in range(method.num_steps - cut):
            method.step()
        runs.append(method.snapshot())

    assert torch.equal(runs[0].images, runs[1].images)
    assert runs[0].meta.config["method"]["sampling"] == "kmeans"
    assert runs[0].meta.config["method"]["km_expand"] == 1
