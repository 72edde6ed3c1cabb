from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddray import artifact
from ddray.artifact import DistilledSet
from ddray.data import Split
from ddray.errors import InputError
from ddray.methods import _d3hr_stages as stages
from ddray.methods._diffusion import DiffusionModel, Levels, open_pipeline, save_pipeline
from ddray.methods.d3hr import D3HRConfig, group_scores, plan_stages
from tests.methods.diffusion_models import TINY, trained_on, untrained

BASE = {"num_candidates": 7, "num_inference_steps": 2, "generator": TINY}


@pytest.fixture
def folder(tmp_path: Path) -> str:
    save_pipeline(untrained((3, 16, 16)), tmp_path / "dit")
    return str(tmp_path / "dit")


@pytest.fixture
def run(planned: Any, toy: Any) -> Any:
    """Distils toy images with D3HR; returns the set, or the context and the method."""

    def go(ipc: int = 2, seed: int = 0, *, whole: bool = True, **method: Any) -> Any:
        _, ctx, distiller = planned("d3hr", toy(), ipc=ipc, seed=seed, method={**BASE, **method})
        distiller.setup(ctx)
        if not whole:
            return ctx, distiller
        for _ in range(distiller.num_steps):
            distiller.step()
        return distiller.snapshot()

    return go


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts images that are encoded and inverted."""
    counts = {"encode": 0, "invert": 0}
    for name in counts:
        real = getattr(DiffusionModel, name)

        def count(self: Any, images: Any, *more: Any, _name: str = name, _real: Any = real) -> Any:
            counts[_name] += len(images)
            return _real(self, images, *more)

        monkeypatch.setattr(DiffusionModel, name, count)
    return counts


def test_statistics_are_numpys(toy: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1, 0, 2, 0, 1])
    latents = 5 + torch.randn(6, 4, generator=generator)

    mean, variance = stages.class_statistics(latents, labels, 3)

    held = latents.double().numpy()
    for label in (0, 1):
        own = held[labels.numpy() == label]
        assert np.allclose(mean[label].numpy(), own.mean(0), atol=1e-6)
        assert np.allclose(variance[label].numpy(), own.var(0, ddof=1), atol=1e-6)
    assert torch.equal(mean[2], latents[3])
    assert torch.equal(variance[2], torch.zeros(4))


def test_the_runs_statistics_are_those_of_the_inverted_images(run: Any, folder: str) -> None:
    ctx, method = run(whole=False, diffusion=folder, guidance=3.0)
    model, levels = open_pipeline(Path(folder)), method._config.levels()
    clean = model.encode(ctx.split.images.float() / 255, "mode")

    top = model.invert(clean, ctx.split.labels, levels)

    own = top[ctx.split.labels == 1].double().numpy()
    assert levels.num_steps == 1
    assert np.allclose(method._statistics["mean"][1].numpy(), own.mean(0), atol=1e-4)
    assert np.allclose(method._statistics["variance"][1].numpy(), own.var(0, ddof=1), atol=1e-4)


def test_what_comes_after_the_inversion_never_repeats_it(run: Any, counted: dict[str, int]) -> None:
    run(diffusion=None)
    assert counted == {"encode": 24, "invert": 24}

    run(ipc=3), run(seed=4)
    for changes in (
        {"num_candidates": 3},
        {"lambda_mean": 0.5},
        {"lambda_skew": 2.0},
        {"form": "repo"},
        {"variance_scale": 1.5},
        {"store": "statistics"},
        {"sampling": "random"},
    ):
        run(**changes)
    assert counted == {"encode": 24, "invert": 24}

    run(guidance=2.0)
    assert counted == {"encode": 24, "invert": 48}
    run(mapping="ddpm", sampling="random")
    assert counted == {"encode": 24, "invert": 48}


def test_a_killed_inversion_loses_one_batch(
    run: Any, counted: dict[str, int], monkeypatch: pytest.MonkeyPatch, ddray_home: Path
) -> None:
    monkeypatch.setattr(stages, "batch_size", lambda device, spec: 5)
    invert = DiffusionModel.invert

    def killed(self: Any, *given: Any) -> Any:
        if counted["invert"] >= 10:
            raise KeyboardInterrupt
        return invert(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(DiffusionModel, "invert", killed)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert counted["invert"] == 10
    # The encoded latents are whole, the inverted ones have two batches of five.
    torn = [path for path in ddray_home.glob("parts/*/000001.pt") if len(list(path.parent.iterdir())) == 2]
    assert len(torn) == 1
    torn[0].write_bytes(b"half")

    resumed = run()

    assert counted["invert"] == 10 + 5 + 14  # the torn batch, and the rest
    assert not list(ddray_home.glob("parts/*/*"))
    shutil.rmtree(ddray_home / "pool")
    assert torch.equal(run().images, resumed.images)


def test_the_loss_is_the_score_per_dimension(run: Any, folder: str) -> None:
    _, method = run(ipc=4, whole=False, diffusion=folder)
    losses = [float(method.step()["loss"]) for _ in range(method.num_steps)]

    held, chosen = method._statistics, method._chosen.unflatten(0, (3, 4)).double()
    wanted = [
        float(group_scores(chosen[c : c + 1], held["mean"][c].double(), held["variance"][c].sqrt().double()))
        / 256
        for c in range(3)
    ]
    assert losses[:3] == pytest.approx([sum(wanted[: c + 1]) / (c + 1) for c in range(3)], rel=1e-5)
    assert losses[3:] == [losses[2]] * (method.num_steps - 3)


def test_more_candidates_score_better_and_the_draws_may_be_shared(run: Any, folder: str) -> None:
    def chosen(**method: Any) -> tuple[torch.Tensor, float]:
        _, made = run(ipc=4, whole=False, diffusion=folder, **method)
        for _ in range(3):
            loss = float(made.step()["loss"])
        z = (made._chosen.unflatten(0, (3, 4)) - made._statistics["mean"][:, None]) / made._statistics[
            "variance"
        ][:, None].sqrt()
        return z, loss

    _, few = chosen(num_candidates=1)
    apart, many = chosen(num_candidates=300)
    together, _ = chosen(num_candidates=1, shared_draws=True)

    assert many < few
    assert torch.allclose(together[0], together[1], atol=1e-3)
    assert not torch.allclose(apart[0], apart[1], atol=1e-3)


def test_a_scaled_variance_spreads_the_latents(run: Any, folder: str) -> None:
    def spread(scale: float) -> torch.Tensor:
        _, made = run(ipc=4, whole=False, diffusion=folder, sampling="random", variance_scale=scale)
        for _ in range(3):
            made.step()
        held: torch.Tensor = made._chosen.unflatten(0, (3, 4)) - made._statistics["mean"][:, None]
        return held

    assert torch.allclose(spread(2.25), 1.5 * spread(1.0), rtol=1e-3, atol=1e-4)


def test_kmeans_starts_from_noised_centres_of_clean_latents(run: Any, folder: str) -> None:
    ctx, method = run(ipc=1, whole=False, diffusion=folder, sampling="kmeans", num_inference_steps=4)
    for _ in range(3):
        method.step()

    clean = ctx.pool.get([plan_stages(ctx, method._config)[1][0]])[0].tensors["latents"]
    levels = method._config.levels()
    centre = clean[ctx.split.labels == 2].mean(0)
    noise = torch.randn(1, 256, generator=ctx.generator("noise", 2))
    wanted = method._sampler.model.add_noise(centre[None], noise, levels)
    assert torch.allclose(method._chosen[2], wanted[0], atol=1e-4)


def test_a_set_of_statistics_generates_any_ipc_without_the_dataset(run: Any, tmp_path: Path) -> None:
    images = run(ipc=2)
    made = run(ipc=2, store="statistics")
    made.save(tmp_path / "s.pt")

    held = artifact.load(tmp_path / "s.pt")
    stored = torch.load(tmp_path / "s.pt", weights_only=True)

    assert set(stored) == {"format_version", "mean", "variance", "meta"}
    meta = json.loads(stored["meta"])
    assert (meta["decoder"], meta["storage_floats"]) == ("d3hr", 2 * 3 * 256)
    assert meta["generator"] == images.meta.generator
    assert torch.equal(held.generated().images, images.images)
    more = held.generated(5)
    assert more.images.shape == (15, 3, 16, 16)
    assert more.labels.tolist() == [label for label in range(3) for _ in range(5)]
    assert more.meta.ipc_decoded == 5
    assert torch.equal(held.decode().images, images.images)
    more.validate()


def test_a_set_of_images_generates_nothing(run: Any) -> None:
    made = run()
    assert made.generated() is made
    with pytest.raises(InputError, match="--ipc is for sets that hold statistics"):
        made.generated(3)


def test_a_set_without_its_generator_says_where_it_was(run: Any, ddray_home: Path, folder: str) -> None:
    own, given = run(store="statistics"), run(store="statistics", diffusion=folder)

    save_pipeline(untrained((3, 16, 16), depth=2), Path(folder))
    with pytest.raises(InputError, match="holds another diffusion model than before"):
        given.generated(1)
    shutil.rmtree(folder)
    with pytest.raises(InputError, match="must be a DiTPipeline folder"):
        given.generated(1)
    shutil.rmtree(ddray_home / "pool" / own.meta.generator)
    with pytest.raises(InputError, match=r"the set needs its generator, .* does not hold it"):
        own.generated(1)


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
def test_broken_statistics_are_refused(run: Any, change: Any, reason: str) -> None:
    made: DistilledSet = run(store="statistics")
    with pytest.raises(InputError, match=reason):
        replace(made, compact=change(made.compact)).validate()


def test_settings_that_do_not_go_together_are_refused(planned: Any, toy: Any) -> None:
    with pytest.raises(InputError, match="store=statistics needs sampling=group or random"):
        D3HRConfig.parse({"store": "statistics", "sampling": "kmeans"})
    with pytest.raises(InputError, match="steps must be 0 for d3hr, got 7"):
        planned("d3hr", toy(), steps=7, method=BASE)


def test_the_folder_is_made_absolute_and_must_be_there(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert D3HRConfig.parse({"diffusion": "dit"}).diffusion == str(tmp_path / "dit")
    with pytest.raises(InputError, match=r"must be a DiTPipeline folder, .*dit has no model_index.json"):
        run(diffusion="dit")


def test_a_generator_of_other_classes_needs_to_be_told(run: Any, tmp_path: Path) -> None:
    save_pipeline(untrained((3, 16, 16), num_classes=5), tmp_path / "five")
    assert run(diffusion=str(tmp_path / "five")).images.shape == (6, 3, 16, 16)  # known by their names
    with pytest.raises(InputError, match="class_ids must be 3 labels"):
        run(diffusion=str(tmp_path / "five"), class_ids=(0, 1))


def test_spectrograms_are_refused(planned: Any, toy: Any) -> None:
    dataset = toy()
    split = dataset.train()
    _, ctx, method = planned("d3hr", dataset, method=BASE)
    ctx = replace(ctx, split=Split(split.images.float(), split.labels))
    with pytest.raises(InputError, match="uint8 images, got spectrograms"):
        stages.train_stage(
            stages.generator_spec(plan_stages(ctx, method._config)[1][0], D3HRConfig.parse(BASE).generator),
            dataset,
            ctx.split,
            ctx.device,
            ctx.pool,
        )


@pytest.mark.parametrize(("steps", "wanted"), [(50, 31), (10, 6), (20, 12), (1, 1)])
def test_the_level_is_31_of_50_in_proportion(steps: int, wanted: int) -> None:
    assert D3HRConfig.parse({"num_inference_steps": steps}).levels().num_steps == wanted
    assert D3HRConfig.parse({"num_inference_steps": 50, "inversion_steps": 20}).levels().num_steps == 20


def test_presets_are_the_papers_and_the_codes(planned: Any, toy: Any) -> None:
    for size, candidates in ((32, 5_000_000), (64, 1_000_000), (224, 100_000)):
        dataset = toy(shape=(3, size, size), name=f"x{size}")
        plans = [
            planned("d3hr", dataset, preset=preset, arch="auto")[0].config.method
            for preset in ("paper", "repo")
        ]
        assert [plan.num_candidates for plan in plans] == [candidates, 1000 * candidates]
        assert [plan.form for plan in plans] == ["paper", "repo"]
        assert [plan.lambda_skew for plan in plans] == [0.5, 0.1]
        assert [plan.encoding for plan in plans] == ["mode", "sample"]
        assert [plan.shared_draws for plan in plans] == [False, True]


def test_inverted_latents_are_nearer_to_a_gaussian(digits: Any) -> None:
    """Lemma 4.1, measured here: .45 of a class's dimensions fail D'Agostino's test before, .37 after."""
    from scipy.stats import normaltest

    model, split = trained_on(digits, 600, epochs=12, vae_epochs=6, lr=2e-3, vae_lr=3e-3)
    clean = model.encode(split.images.float() / 255, "mode")

    def rejected(latents: torch.Tensor) -> float:
        own = [latents[split.labels == label].double().numpy() for label in range(10)]
        return float(np.mean([normaltest(held, axis=0).pvalue < 0.05 for held in own]))

    for guidance in (1.0, 4.0):
        how = Levels(num_inference_steps=20, num_steps=12, guidance=guidance)
        assert rejected(model.invert(clean, split.labels, how)) < rejected(clean)
