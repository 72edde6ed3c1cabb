"""D3HR: inversion, statistics of latents, and the choice among candidates."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddray.methods.d3hr import group_sample, group_scores, plan_stages
from ddray.methods.families.diffusion import stages
from ddray.methods.families.diffusion.model import DiffusionModel, Levels, open_pipeline, save_pipeline
from ddray.seeding import derive
from tests.methods.diffusion_models import BASE, TINY, trained_on, untrained


def test_statistics_are_numpys(toy: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1, 0, 2, 0, 1])
    latents = 5 + torch.randn(6, 4, generator=generator)

    mean, variance = stages.class_statistics(latents, labels, 3)

    reference = latents.double().numpy()
    for label in (0, 1):
        class_latents = reference[labels.numpy() == label]
        assert np.allclose(mean[label].numpy(), class_latents.mean(0), atol=1e-6)
        assert np.allclose(variance[label].numpy(), class_latents.var(0, ddof=1), atol=1e-6)
    assert torch.equal(mean[2], latents[3])
    assert torch.equal(variance[2], torch.zeros(4))


def test_the_runs_statistics_are_those_of_the_inverted_images(d3hr: Any, dit: str) -> None:
    ctx, method = d3hr(whole=False, diffusion=dit, guidance=3.0)
    model, levels = open_pipeline(Path(dit)), method._config.levels()
    clean = model.encode(ctx.split.images.float() / 255, "mode")

    top = model.invert(clean, ctx.split.labels, levels)

    class_latents = top[ctx.split.labels == 1].double().numpy()
    assert levels.num_steps == 1
    assert np.allclose(method._engine._statistics["mean"][1].numpy(), class_latents.mean(0), atol=1e-4)
    assert np.allclose(
        method._engine._statistics["variance"][1].numpy(), class_latents.var(0, ddof=1), atol=1e-4
    )


def test_what_comes_after_the_inversion_never_repeats_it(d3hr: Any, counted: dict[str, int]) -> None:
    d3hr(diffusion=None)
    assert counted == {"encode": 24, "invert": 24}

    d3hr(ipc=3), d3hr(seed=4)
    for changes in (
        {"num_candidates": 3},
        {"lambda_mean": 0.5},
        {"lambda_skew": 2.0},
        {"form": "repo"},
        {"variance_scale": 1.5},
        {"store": "statistics"},
        {"sampling": "random"},
    ):
        d3hr(**changes)
    assert counted == {"encode": 24, "invert": 24}

    d3hr(guidance=2.0)
    assert counted == {"encode": 24, "invert": 48}
    d3hr(mapping="ddpm", sampling="random")
    assert counted == {"encode": 24, "invert": 48}


def test_a_killed_inversion_loses_one_batch(
    d3hr: Any, counted: dict[str, int], monkeypatch: pytest.MonkeyPatch, ddray_home: Path
) -> None:
    monkeypatch.setattr(stages, "batch_size", lambda device, image_size: 5)
    invert = DiffusionModel.invert

    def killed(self: Any, *args: Any) -> Any:
        if counted["invert"] >= 10:
            raise KeyboardInterrupt
        return invert(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(DiffusionModel, "invert", killed)
        with pytest.raises(KeyboardInterrupt):
            d3hr()
    assert counted["invert"] == 10
    # The encoded latents are whole, the inverted ones have two batches of five.
    torn = [path for path in ddray_home.glob("parts/*/000001.pt") if len(list(path.parent.iterdir())) == 2]
    assert len(torn) == 1
    torn[0].write_bytes(b"half")

    resumed = d3hr()

    assert counted["invert"] == 10 + 5 + 14  # the torn batch, and the rest
    assert not list(ddray_home.glob("parts/*/*"))
    shutil.rmtree(ddray_home / "pool")
    assert torch.equal(d3hr().images, resumed.images)


def test_the_loss_is_the_score_per_dimension(d3hr: Any, dit: str) -> None:
    _, method = d3hr(ipc=4, whole=False, diffusion=dit)
    losses = [float(method.step()["loss"]) for _ in range(method.num_steps)]

    statistics, latents = method._engine._statistics, method._engine._latents.unflatten(0, (3, 4)).double()
    expected = [
        float(
            group_scores(
                latents[c : c + 1], statistics["mean"][c].double(), statistics["variance"][c].sqrt().double()
            )
        )
        / 256
        for c in range(3)
    ]
    assert losses[:3] == pytest.approx([sum(expected[: c + 1]) / (c + 1) for c in range(3)], rel=1e-5)
    assert losses[3:] == [losses[2]] * (method.num_steps - 3)


def test_more_candidates_score_better_and_the_draws_may_be_shared(d3hr: Any, dit: str) -> None:
    def draws(**method: Any) -> tuple[torch.Tensor, float]:
        _, distiller = d3hr(ipc=4, whole=False, diffusion=dit, **method)
        for _ in range(3):
            loss = float(distiller.step()["loss"])
        z = (
            distiller._engine._latents.unflatten(0, (3, 4)) - distiller._engine._statistics["mean"][:, None]
        ) / distiller._engine._statistics["variance"][:, None].sqrt()
        return z, loss

    _, few = draws(num_candidates=1)
    apart, many = draws(num_candidates=300)
    together, _ = draws(num_candidates=1, shared_draws=True)

    assert many < few
    assert torch.allclose(together[0], together[1], atol=1e-3)
    assert not torch.allclose(apart[0], apart[1], atol=1e-3)


def test_a_scaled_variance_spreads_the_latents(d3hr: Any, dit: str) -> None:
    def spread(scale: float) -> torch.Tensor:
        _, distiller = d3hr(ipc=4, whole=False, diffusion=dit, sampling="random", variance_scale=scale)
        for _ in range(3):
            distiller.step()
        deviations: torch.Tensor = (
            distiller._engine._latents.unflatten(0, (3, 4)) - distiller._engine._statistics["mean"][:, None]
        )
        return deviations

    assert torch.allclose(spread(2.25), 1.5 * spread(1.0), rtol=1e-3, atol=1e-4)


def test_group_sampling_chooses_by_the_scaled_population(d3hr: Any, dit: str) -> None:
    """Table A5: draws and score use the scaled variance."""
    _, distiller = d3hr(ipc=4, whole=False, diffusion=dit, variance_scale=2.25, num_candidates=40)
    statistics, expected = distiller._engine._statistics, 0.0
    for label in range(3):
        score = distiller.step()["loss"]
        latents, exact = group_sample(
            statistics["mean"][label],
            1.5 * statistics["variance"][label].sqrt(),
            ipc=4,
            num_candidates=40,
            generator=derive(0, "distill", "group", label),
        )
        expected = (expected * label + exact / 256) / (label + 1)
        assert torch.allclose(
            distiller._engine._latents[4 * label : 4 * label + 4], latents, rtol=1e-4, atol=1e-4
        )
        assert float(score) == pytest.approx(expected, rel=1e-4)


def test_kmeans_starts_from_noised_centres_of_clean_latents(
    d3hr: Any, dit: str, counted: dict[str, int]
) -> None:
    ctx, method = d3hr(ipc=2, whole=False, diffusion=dit, sampling="kmeans", num_inference_steps=4)
    assert counted == {"encode": 24, "invert": 0}  # clean latents are all it needs
    clean = ctx.pool.get([plan_stages(ctx, method._config)[1][0]])[0].tensors["latents"]
    assert torch.equal(method._engine._clean, clean)
    rows = torch.nonzero(ctx.split.labels == 2).flatten()
    near, far = rows[1::2], rows[::2]
    method._engine._clean = clean.clone()
    method._engine._clean[far] += 100  # two well-separated clusters
    for _ in range(3):
        method.step()

    model, levels = method._engine._sampler.model, method._config.levels()
    noise = torch.randn(2, 256, generator=ctx.generator("noise", 2))
    share = model.add_noise(torch.ones(1, 1), torch.zeros(1, 1), levels)
    centres = (method._engine._latents[4:6] - model.add_noise(torch.zeros(2, 256), noise, levels)) / share
    clusters = torch.stack([method._engine._clean[near].mean(0), method._engine._clean[far].mean(0)])
    assert torch.allclose(centres[centres.mean(1).argsort()], clusters, atol=1e-3)


def test_a_folder_that_was_moved_repeats_nothing(d3hr: Any, counted: dict[str, int], dit: str) -> None:
    first = d3hr(diffusion=dit)
    moved = shutil.move(dit, dit + " moved")

    again = d3hr(diffusion=moved)

    assert counted == {"encode": 24, "invert": 24}
    assert torch.equal(again.images, first.images)


def test_other_labels_of_the_classes_are_another_inversion(
    d3hr: Any, counted: dict[str, int], dit: str
) -> None:
    """The fingerprint covers the weights, not the names of the labels."""
    d3hr(diffusion=dit)
    index = Path(dit) / "model_index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({**content, "id2label": {"0": "class 1", "1": "class 0", "2": "class 2"}}))

    ctx, method = d3hr(whole=False, diffusion=dit)

    assert counted == {"encode": 24, "invert": 48}
    assert plan_stages(ctx, method._config)[1][1].recipe["class_ids"] == [1, 0, 2]


def test_a_start_is_known_by_its_content_wherever_it_lies(
    planned: Any, toy: Any, dit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, below = Path(dit).parent, Path(dit).parent / "below"

    def spec(where: Path) -> Any:
        monkeypatch.chdir(where)
        method = {**BASE, "generator": {**TINY, "init": "dit"}}
        _, ctx, distiller = planned("d3hr", toy(), method=method)
        monkeypatch.chdir("/")  # as a worker
        distiller.setup(ctx)
        return plan_stages(ctx, distiller._config)[0]["spec"]

    first = spec(here)
    below.mkdir()
    shutil.move(dit, below / "dit")
    assert spec(below) == first
    save_pipeline(untrained((3, 16, 16), depth=2), below / "dit")
    assert spec(below) != first


@pytest.mark.parametrize(("size", "expected"), [(32, 1024), (64, 1024), (128, 256), (256, 64), (512, 16)])
def test_a_gpus_batch_is_of_the_models_size(size: int, expected: int) -> None:
    assert stages.batch_size(torch.device("cuda"), size) == expected
    assert stages.batch_size(torch.device("cpu"), size) == 64


def test_batches_are_asked_for_by_the_models_size(
    d3hr: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(stages, "batch_size", lambda device, image_size: sizes.append(image_size) or 64)
    save_pipeline(untrained((3, 64, 64)), tmp_path / "large")

    d3hr(whole=False, diffusion=str(tmp_path / "large"))  # the images have 16 px

    assert sizes == [64, 64]


def test_a_checkpoint_holds_what_is_made_and_is_rarer_the_larger_the_set(
    d3hr: Any, planned: Any, toy: Any, dit: str
) -> None:
    _, method = d3hr(ipc=4, whole=False, batch=5, diffusion=dit)
    sizes = []
    for _ in range(method.num_steps):
        method.step()
        state = method.state_dict()
        sizes.append((len(state["latents"]), len(state["images"])))
    assert sizes == [(4, 0), (8, 0), (12, 0), (7, 5), (2, 10), (0, 12)]
    small, large = (
        planned("d3hr", toy(counts=(50,) * 3, shape=(3, size, size), name=f"c{size}"), ipc=50, arch="auto")[0]
        for size in (32, 224)
    )
    assert small.config.checkpoint_every == 1
    assert large.config.checkpoint_every == 6  # 2 x 86 MiB of pixels, by 32 MiB


def test_the_report_holds_the_parts_that_were_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(__file__).parents[2] / "reports"
    monkeypatch.syspath_prepend(str(folder))
    for name in ("regenerate", "tables"):  # tests/golden has a script of the first name
        monkeypatch.delitem(sys.modules, name, raising=False)
    spec = importlib.util.spec_from_file_location("diffusion_report", folder / "diffusion.py")
    report = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(report)  # type: ignore[union-attr]

    monkeypatch.setattr(report, "HERE", tmp_path)
    monkeypatch.setitem(report.PARTS, "selection", lambda: report.selection(dim=64, ipc=4, num=200))
    monkeypatch.setattr("sys.argv", ["diffusion.py", "selection"])
    report.main()

    text = (tmp_path / "d3hr.md").read_text()
    assert "(D=64, ipc 4, m=200)" in text
    assert "| paper mean |" in text
    assert "round trip" not in text, "that part was not measured"
    monkeypatch.setattr("sys.argv", ["diffusion.py", "selecton"])
    with pytest.raises(SystemExit, match="a part must be one of sweeps, selection"):
        report.main()


def test_inverted_latents_are_nearer_to_a_gaussian(digits: Any) -> None:
    """Lemma 4.1, measured here: .45 of a class's dimensions fail D'Agostino's test before, .37 after."""
    from scipy.stats import normaltest

    model, split = trained_on(digits, 600, epochs=12, vae_epochs=6, lr=2e-3, vae_lr=3e-3)
    clean = model.encode(split.images.float() / 255, "mode")

    def rejected(latents: torch.Tensor) -> float:
        by_class = [latents[split.labels == label].double().numpy() for label in range(10)]
        return float(np.mean([normaltest(class_latents, axis=0).pvalue < 0.05 for class_latents in by_class]))

    for guidance in (1.0, 4.0):
        levels = Levels(num_inference_steps=20, num_steps=12, guidance=guidance)
        assert rejected(model.invert(clean, split.labels, levels)) < rejected(clean)
