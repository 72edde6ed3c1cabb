"""Settings of D3HR and what its generator must have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ddray.data import Split
from ddray.distillation.method import Target
from ddray.errors import InputError
from ddray.methods.d3hr import plan_stages, preset
from ddray.methods.families.diffusion import stages
from ddray.methods.families.diffusion.decoder import D3HRConfig
from ddray.methods.families.diffusion.model import open_pipeline, save_pipeline
from tests.methods.diffusion_models import BASE, TINY, untrained


def test_settings_that_do_not_go_together_are_refused(planned: Any, toy: Any) -> None:
    with pytest.raises(InputError, match="store=statistics needs sampling=group or random"):
        D3HRConfig.parse({"store": "statistics", "sampling": "kmeans"})
    with pytest.raises(InputError, match="steps must be 0 for d3hr, got 7"):
        planned("d3hr", toy(), steps=7, method=BASE)


def test_the_folder_is_made_absolute_and_must_be_there(
    d3hr: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert D3HRConfig.parse({"diffusion": "dit"}).diffusion == str(tmp_path / "dit")
    with pytest.raises(InputError, match=r"must be a DiTPipeline folder, .*dit has no model_index.json"):
        d3hr(diffusion="dit")


def test_a_model_of_grey_images_makes_no_coloured_ones(planned: Any, toy: Any, tmp_path: Path) -> None:
    save_pipeline(untrained((1, 16, 16)), tmp_path / "grey")
    settings = {**BASE, "diffusion": str(tmp_path / "grey")}
    _, ctx, distiller = planned("d3hr", toy(), ipc=2, method=settings)
    with pytest.raises(InputError, match=r"must have 3 channels, .*grey has 1; leave method.diffusion out"):
        distiller.setup(ctx)
    _, ctx, distiller = planned("d3hr", toy(shape=(1, 16, 16)), ipc=2, method=settings)
    distiller.setup(ctx)


def test_a_generator_that_has_seen_val_is_said(
    planned: Any, toy: Any, dit: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`ddray pool train --kind diffusion` trains on all of train; a search holds a tenth of it out."""
    dataset = toy()
    same_dataset, other_dataset = Path(dit), tmp_path / "strange"
    for path, fingerprint in ((same_dataset, dataset.fingerprint), (other_dataset, "another dataset")):
        model = untrained((3, 16, 16))
        model.seen = ({"dataset": fingerprint, "split": "train"},)
        save_pipeline(model, path)

    def warning(split_name: str, **method: Any) -> str:
        caplog.clear()
        _, ctx, distiller = planned("d3hr", dataset, method={**BASE, **method})
        distiller.pool_specs(replace(ctx, split_name=split_name))
        return caplog.text

    assert warning("train", diffusion=dit) == ""
    assert warning("train-val0", diffusion=str(other_dataset)) == ""
    assert "it has seen images that train-val0 holds out for val" in warning("train-val0", diffusion=dit)
    assert warning("train-val0", diffusion=dit) == ""  # once
    assert "train-val1 holds out" in warning("train-val1", generator={**TINY, "init": dit})


def test_a_trained_generator_says_what_it_has_seen(d3hr: Any, tmp_path: Path) -> None:
    ctx, method = d3hr(whole=False)
    model = stages.load_generator(method._engine._source, ctx.pool)
    expected = {"dataset": ctx.dataset.fingerprint, "split": "train"}
    assert model.seen == (expected,)

    save_pipeline(model, tmp_path / "own")
    assert open_pipeline(tmp_path / "own").seen == (expected,)
    ctx, method = d3hr(whole=False, generator={**TINY, "init": str(tmp_path / "own")})
    assert stages.load_generator(method._engine._source, ctx.pool).seen == (expected, expected)


def test_a_trained_generator_keeps_the_scale_of_its_latents(d3hr: Any, tmp_path: Path) -> None:
    """diffusers' from_config drops what a configuration calls a default, though it was changed since."""
    ctx, method = d3hr(whole=False)
    model = stages.load_generator(method._engine._source, ctx.pool)
    pixels, generator = ctx.dataset.train().images.float() / 255, torch.Generator().manual_seed(0)
    latents = model.encode(pixels, "sample", generator)
    assert float(latents.std()) == pytest.approx(1, abs=0.05)
    assert model.vae.config.scaling_factor != pytest.approx(0.18215)

    save_pipeline(model, tmp_path / "own")
    opened = open_pipeline(tmp_path / "own").vae.config.scaling_factor
    assert opened == model.vae.config.scaling_factor


def test_what_an_earlier_generator_made_is_made_anew(planned: Any, toy: Any, dit: str) -> None:
    _, ctx, distiller = planned("d3hr", toy(), method=BASE)
    derived = [spec for spec in distiller.pool_specs(ctx) if spec.kind != "diffusion"]
    assert derived
    assert all("'edition': 1" in str(spec.dump()) for spec in derived)
    editions = [D3HRConfig.parse(changes).edition for changes in ({}, {"form": "repo"}, {"diffusion": dit})]
    assert editions == [1, 2, 0]


def test_what_the_generator_does_not_have_is_refused_before_anything_is_made(
    planned: Any, toy: Any, dit: str, counted: dict[str, int], ddray_home: Path
) -> None:
    with pytest.raises(InputError, match=r"inversion_steps must be <= num_inference_steps \(2\), got 3"):
        D3HRConfig.parse({"num_inference_steps": 2, "inversion_steps": 3})
    for where in ({}, {"diffusion": dit}):
        for changes, reason in (
            ({"class_ids": (0, 1)}, "class_ids must be 3 labels"),
            ({"num_inference_steps": 1001}, "num_inference_steps <= 1000, got 621 and 1001"),
        ):
            _, ctx, distiller = planned("d3hr", toy(), method={**BASE, **where, **changes})
            with pytest.raises(InputError, match=reason):
                distiller.pool_specs(ctx)
    assert counted == {"encode": 0, "invert": 0}
    assert not list(ddray_home.glob("pool/*"))


def test_a_generator_of_other_classes_needs_to_be_told(d3hr: Any, tmp_path: Path) -> None:
    save_pipeline(untrained((3, 16, 16), num_classes=5), tmp_path / "five")
    assert d3hr(diffusion=str(tmp_path / "five")).images.shape == (6, 3, 16, 16)  # matched by name
    with pytest.raises(InputError, match="class_ids must be 3 labels"):
        d3hr(diffusion=str(tmp_path / "five"), class_ids=(0, 1))


def test_spectrograms_are_refused(planned: Any, toy: Any) -> None:
    dataset = toy()
    split = dataset.train()
    _, ctx, method = planned("d3hr", dataset, method=BASE)
    ctx = replace(ctx, split=Split(split.images.float(), split.labels))
    with pytest.raises(InputError, match="uint8 images, got spectrograms"):
        stages.StageTrainer(dataset, ctx.split, ctx.device, ctx.pool)(
            stages.generator_spec(plan_stages(ctx, method._config)[1][0], D3HRConfig.parse(BASE).generator)
        )


@pytest.mark.parametrize(("steps", "expected"), [(50, 31), (10, 6), (20, 12), (1, 1)])
def test_the_level_is_31_of_50_in_proportion(steps: int, expected: int) -> None:
    assert D3HRConfig.parse({"num_inference_steps": steps}).levels().num_steps == expected
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


@pytest.mark.parametrize(
    ("name", "size", "candidates"),
    [
        ("imagenet", 64, 100_000),
        ("imagenet", 224, 100_000),
        ("imagenet", 32, 100_000),
        ("tiny_imagenet", 64, 1_000_000),
        ("tiny_imagenet", 32, 1_000_000),
        ("cifar10", 32, 5_000_000),
        ("cifar100", 64, 5_000_000),
        ("imagewoof", 128, 100_000),  # not in Appendix B: as ImageNet, by its size
        ("pictures", 64, 1_000_000),
    ],
)
def test_candidates_are_those_of_the_dataset_at_any_size(name: str, size: int, candidates: int) -> None:
    """Appendix B names datasets, not resolutions."""
    target = Target(name, (3, size, size), 10, 10)
    assert [preset(p, target)["method"]["num_candidates"] for p in ("paper", "repo")] == [
        candidates,
        1000 * candidates,
    ]


def test_options_of_a_datasets_name_do_not_change_its_candidates(planned: Any, toy: Any) -> None:
    dataset = toy(shape=(3, 64, 64), name="imagenet?image_size=64")
    assert planned("d3hr", dataset, arch="auto")[0].config.method.num_candidates == 100_000


def test_an_inversion_without_fixed_point_has_the_key_of_before(planned: Any, toy: Any, dit: str) -> None:
    def inverted(**method: Any) -> Any:
        _, ctx, distiller = planned("d3hr", toy(), method={**BASE, "diffusion": dit, **method})
        return plan_stages(ctx, distiller._config)[1][1]

    before = {"class_ids", "guidance", "latents", "mapping", "num_inference_steps", "num_steps"}
    assert set(inverted().recipe) == before
    assert inverted(fixed_point=5).recipe == {**inverted().recipe, "fixed_point": 5}
    noised = [inverted(mapping="ddpm", fixed_point=number).key for number in (0, 5)]
    assert noised[0] == noised[1], "added noise inverts nothing"
