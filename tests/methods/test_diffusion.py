from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ddray.errors import DivergedError, InputError
from ddray.methods.families.diffusion import fit as _diffusion_fit
from ddray.methods.families.diffusion.folder import (
    folder_fingerprint,
    resolve_ids,
    weights_variant,
)
from ddray.methods.families.diffusion.model import (
    DiffusionModel,
    Levels,
    open_pipeline,
    save_pipeline,
)
from ddray.methods.families.diffusion.train import (
    DiffusionRecipe,
    build,
    default_recipe,
    relabel,
    train_generator,
)
from tests.methods.diffusion_models import TINY, tiny_recipe, trained_on, untrained

CPU = torch.device("cpu")


def ids_of(
    model: DiffusionModel, class_names: tuple[str, ...], explicit_ids: tuple[int, ...] | None
) -> tuple[int, ...]:
    return resolve_ids(model.class_names, model.num_classes, class_names, explicit_ids)


def levels(steps: int = 50, num: int = 31, guidance: float = 1.0) -> Levels:
    return Levels(num_inference_steps=steps, num_steps=num, guidance=guidance)


@pytest.fixture(scope="module")
def learned(digits: Any) -> tuple[DiffusionModel, Any]:
    return trained_on(digits, 300, epochs=40, vae_epochs=15, lr=2e-3, vae_lr=3e-3)


def round_trip(learned: tuple[DiffusionModel, Any], how: Levels) -> float:
    """Return the relative error of latents that were inverted and sampled back."""
    model, split = learned
    clean = model.encode(split.images[:64].float() / 255, "mode")
    labels = split.labels[:64]
    back = model.sample(model.invert(clean, labels, how), labels, how)
    return float((back - clean).norm() / clean.norm())


def test_inversion_then_sampling_is_the_identity_up_to_the_step_size(learned: Any) -> None:
    """At CFG 1; measured here: .05 at 50 steps, a quarter of it at 200."""
    coarse, fine = round_trip(learned, levels(50, 31)), round_trip(learned, levels(200, 124))

    assert coarse < 0.1
    assert fine < 0.5 * coarse


def test_under_guidance_4_the_way_back_is_worse(learned: Any) -> None:
    """The code's own setting; measured here: .089 against .079 (100 epochs: .20, .14)."""
    plain, guided = round_trip(learned, levels(20, 12)), round_trip(learned, levels(20, 12, 4.0))

    assert guided > plain


def test_it_has_learned_the_images(learned: Any) -> None:
    model, split = learned
    pixels = split.images[:64].float() / 255

    again = model.decode(model.encode(pixels, "mode"), (1, 16, 16))

    assert float((again - pixels).square().mean()) < 0.2 * float(pixels.var())
    assert float(model.encode(pixels, "sample", torch.Generator().manual_seed(0)).std()) == pytest.approx(
        1, abs=0.25
    )


def test_one_step_is_equation_2_and_its_inverse_equation_3() -> None:
    model = untrained()
    z = torch.randn(4, model.latent_shape[0] * 64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0])
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    high, low = alphas[20], alphas[0]
    noise = model.predict(z, 20, labels, 1.0).double()

    up = model.invert(z, labels, levels(50, 2))
    down = model.sample(z, labels, levels(50, 2))

    def move(z: torch.Tensor, before: Any, after: Any, noise: torch.Tensor) -> torch.Tensor:
        root = lambda x: (1 / x - 1) ** 0.5  # noqa: E731
        return (after / before) ** 0.5 * z + after**0.5 * (root(after) - root(before)) * noise

    clean = torch.tensor(1.0, dtype=torch.float64)
    expected = move(z.double(), high, low, noise)
    expected = move(expected, low, clean, model.predict(expected.float(), 0, labels, 1.0).double())
    assert torch.allclose(down.double(), expected, atol=1e-4)
    first = move(z.double(), clean, low, model.predict(z, 0, labels, 1.0).double())
    expected = move(first, low, high, model.predict(first.float(), 20, labels, 1.0).double())
    assert torch.allclose(up.double(), expected, atol=1e-4)


def test_guidance_leads_away_from_the_null_label_k() -> None:
    model = untrained(num_classes=3)
    z = torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 2])
    conditional, free = (
        model.predict(z, 300, condition, 1.0) for condition in (labels, torch.tensor([3, 3]))
    )

    guided = model.predict(z, 300, labels, 4.0)

    assert not torch.allclose(conditional, free)
    assert torch.allclose(guided, free + 4 * (conditional - free), atol=1e-5)


def test_added_noise_is_equation_1_at_the_level_where_inversion_ends() -> None:
    model = untrained()
    clean, noise = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(0))
    alpha = float(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[600])

    noised = model.add_noise(clean, noise, levels(50, 31))

    assert torch.allclose(noised, alpha**0.5 * clean + (1 - alpha) ** 0.5 * noise, atol=1e-5)


@pytest.mark.parametrize(("steps", "num"), [(10, 11), (10, 0), (1001, 5)])
def test_steps_out_of_range_are_refused(steps: int, num: int) -> None:
    model = untrained()
    with pytest.raises(InputError, match="1 <= inversion_steps <= num_inference_steps <= 1000"):
        model.invert(torch.zeros(1, 256), torch.zeros(1, dtype=torch.int64), levels(steps, num))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(16, 16), (20, 12)])
def test_images_of_another_size_or_colour_are_fitted(channels: int, size: tuple[int, int]) -> None:
    model = untrained((3, 16, 16))
    pixels = torch.rand(2, channels, *size, generator=torch.Generator().manual_seed(0))

    latents = model.encode(pixels, "mode")
    again = model.decode(latents, (channels, *size))

    assert latents.shape == (2, 256)
    assert again.shape == pixels.shape
    assert 0 <= float(again.min()) <= float(again.max()) <= 1


def test_a_size_that_does_not_divide_is_rounded_up() -> None:
    assert untrained((1, 28, 28)).image_size == 28
    assert untrained((1, 30, 27)).image_size == 32


def test_a_saved_pipeline_is_opened_by_diffusers_and_by_us(tmp_path: Path) -> None:
    from diffusers import DiTPipeline

    model = untrained()
    z, labels = torch.randn(2, 256, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2])
    folder = tmp_path / "dit"
    save_pipeline(model, folder)
    (folder / "left").write_text("old")
    save_pipeline(model, folder)  # replaced as a whole

    ours = open_pipeline(folder)
    theirs = DiTPipeline.from_pretrained(folder)

    assert not (folder / "left").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["dit"]
    assert torch.equal(ours.predict(z, 10, labels, 4.0), model.predict(z, 10, labels, 4.0))
    assert ours.class_names == ("class 0", "class 1", "class 2")
    assert ours.fingerprint == folder_fingerprint(folder)
    assert theirs.labels == {"class 0": 0, "class 1": 1, "class 2": 2}
    assert theirs.transformer.config.num_embeds_ada_norm == 3
    weights = zip(theirs.transformer.parameters(), model.transformer.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


def test_the_fingerprint_changes_with_a_weight(tmp_path: Path) -> None:
    model = untrained()
    save_pipeline(model, tmp_path / "a")
    save_pipeline(model, tmp_path / "b")
    with torch.no_grad():
        model.vae.decoder.conv_out.bias.add_(1)
    save_pipeline(model, tmp_path / "c")

    assert folder_fingerprint(tmp_path / "a") == folder_fingerprint(tmp_path / "b")
    assert folder_fingerprint(tmp_path / "a") != folder_fingerprint(tmp_path / "c")


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must be a DiTPipeline folder, .*nowhere has no model_index.json"):
        open_pipeline(tmp_path / "nowhere")
    save_pipeline(untrained(), tmp_path / "dit")
    path = tmp_path / "dit" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "v_prediction"}))
    with pytest.raises(InputError, match="must predict epsilon, its scheduler says 'v_prediction'"):
        open_pipeline(tmp_path / "dit")
    _edit(path, prediction_type="epsilon")
    weights = next((tmp_path / "dit" / "vae").glob("*.safetensors"))
    weights.write_bytes(b"half")
    with pytest.raises(InputError, match="must be an undamaged DiTPipeline folder"):
        open_pipeline(tmp_path / "dit")


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: (d / "model_index.json").write_text("[]"),
        lambda d: (d / "model_index.json").write_text("{"),
        lambda d: _edit(d / "model_index.json", id2label=["a", "b", "c"]),
        lambda d: _edit(d / "model_index.json", id2label={"a": "b"}),
        lambda d: (d / "scheduler" / "scheduler_config.json").write_text("[1]"),
        lambda d: (d / "scheduler" / "scheduler_config.json").unlink(),
        lambda d: _edit(d / "scheduler" / "scheduler_config.json", beta_schedule="parabolic"),
        lambda d: _edit(d / "scheduler" / "scheduler_config.json", num_train_timesteps="many"),
        lambda d: _edit(d / "transformer" / "config.json", num_embeds_ada_norm=None),
        lambda d: _edit(d / "transformer" / "config.json", num_layers="two"),
        lambda d: (d / "transformer" / "config.json").write_text("[]"),
        lambda d: _edit(d / "vae" / "config.json", block_out_channels=3),
        lambda d: (d / "ddray.json").write_text('{"seen": [1]}'),
    ],
)
def test_a_damaged_folder_is_bad_input(damage: Any, tmp_path: Path) -> None:
    save_pipeline(untrained(), tmp_path / "dit")
    damage(tmp_path / "dit")
    with pytest.raises(InputError, match=r"must be an undamaged DiTPipeline folder: \w+: .*; get it"):
        open_pipeline(tmp_path / "dit")


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_missing_weights_are_refused_and_never_left_at_random(part: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_pipeline(untrained(), tmp_path / "dit")
    path = next((tmp_path / "dit" / part).glob("*.safetensors"))
    weights = load_file(path)
    gone = sorted(weights)[3]
    save_file({name: tensor for name, tensor in weights.items() if name != gone}, path, {"format": "pt"})

    with pytest.raises(InputError, match=f"{part} must hold all weights .* 1 are missing .first: {gone}"):
        open_pipeline(tmp_path / "dit")


def test_classes_are_matched_by_number_by_name_or_as_told() -> None:
    model = untrained(num_classes=4)

    assert ids_of(model, ("a", "b", "c", "d"), None) == (0, 1, 2, 3)
    assert ids_of(model, ("class 3", "class 1"), None) == (3, 1)
    assert ids_of(model, ("a", "b"), (2, 0)) == (2, 0)
    assert ids_of(model, ("class 2", "class 0", "class 1", "class 3"), None) == (2, 0, 1, 3)
    model.class_names = ("crane, bird", "crane, machine", "a", "b")  # as in ImageNet
    assert ids_of(model, ("a", "bird"), None) == (2, 0)
    with pytest.raises(InputError, match=r"give method\.class_ids"):
        ids_of(model, ("a", "crane"), None)
    model.class_names = tuple(f"class {i}" for i in range(4))
    with pytest.raises(InputError, match=r"has 4 classes and the dataset 2 others: give method.class_ids"):
        ids_of(model, ("class 1", "b"), None)
    with pytest.raises(InputError, match=r"class_ids must be 2 labels in 0\.\.3"):
        ids_of(model, ("a", "b"), (2, 4))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("class 2", "class 0", "a", "b"), "2 of 4 are, but class 0 is 'class 2' here and 'class 0' there"),
        (("class 0", "class 1", "class 2", "d"), "3 of 4 are, but class 3 is 'd' here and 'class 3' there"),
        (("class 0", "class 0", "class 2", "class 3"), "4 of 4 are, but class 1 is 'class 0' here"),
    ],
)
def test_names_that_match_in_part_are_not_mixed_by_number(names: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"must all be the diffusion model's, {message}"):
        ids_of(untrained(num_classes=4), names, None)
    assert ids_of(untrained(num_classes=4), names, (0, 1, 2, 3)) == (0, 1, 2, 3)


def test_names_that_say_nothing_against_it_are_matched_by_number() -> None:
    """ImageNet has two cranes; a label may have no name."""
    model = untrained(num_classes=4)
    model.class_names = ("tench, Tinca tinca", "crane", "crane", "")
    assert ids_of(model, ("tench", "crane", "crane", "d"), None) == (0, 1, 2, 3)


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "50KB"}, {"safe_serialization": False}])
def test_weights_of_a_variant_are_read_where_there_are_no_others(tmp_path: Path, options: Any) -> None:
    """Into float32, with the values of half precision."""
    from diffusers import DiTPipeline

    model = untrained()
    save_pipeline(model, tmp_path / "plain")
    halved = DiTPipeline.from_pretrained(tmp_path / "plain").to(torch.float16)
    halved.save_pretrained(tmp_path / "half", variant="fp16", **options)
    assert not list((tmp_path / "half").glob("vae/diffusion_pytorch_model.safetensors"))

    opened = open_pipeline(tmp_path / "half")

    assert weights_variant(tmp_path / "plain" / "vae") is None
    for part in ("transformer", "vae"):
        assert weights_variant(tmp_path / "half" / part) == "fp16"
        theirs = getattr(model, part).state_dict()
        for name, tensor in getattr(opened, part).state_dict().items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, theirs[name].half().float()), name
    halved.save_pretrained(tmp_path / "plain", variant="fp16", **options)
    assert weights_variant(tmp_path / "plain" / "vae") is None, "the exact weights win"


def test_relabelled_classes_keep_what_they_are_known_by(tmp_path: Path) -> None:
    model = untrained(num_classes=3)
    table = model.transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight.clone()

    relabelled = relabel(model, ("class 2", "new", "class 0", "newer"), seed=0)

    fresh = relabelled.transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight
    assert fresh.shape[0] == 5
    assert torch.equal(fresh[[0, 2, 4]], table[[2, 0, 3]])  # the null label stays last
    assert not torch.equal(fresh[1], fresh[3])
    assert relabelled.num_classes == 4
    save_pipeline(relabelled, tmp_path / "dit")
    assert open_pipeline(tmp_path / "dit").num_classes == 4


def test_an_opened_pipeline_is_fine_tuned_and_keeps_its_autoencoder(toy: Any, tmp_path: Path) -> None:
    save_pipeline(untrained((3, 16, 16), num_classes=5), tmp_path / "dit")
    dataset = toy()
    before = open_pipeline(tmp_path / "dit")

    recipe = tiny_recipe(init=str(tmp_path / "dit"))
    model, measured = train_generator(dataset.train(), dataset.class_names, recipe, seed=0, device=CPU)

    assert set(measured) == {"loss"}
    assert model.num_classes == 3
    pairs = zip(model.vae.state_dict().values(), before.vae.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(
        model.transformer.state_dict()["proj_out_2.weight"],
        before.transformer.state_dict()["proj_out_2.weight"],
    )


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion transformer"])
def test_training_that_was_killed_goes_on_to_the_same_bytes(
    stage: str, toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = toy()
    recipe = tiny_recipe(epochs=3, vae_epochs=3, batch=8)
    monkeypatch.setattr(_diffusion_fit, "_SAVE_EVERY_S", 0.0)

    def run(checkpoint: Path | None) -> DiffusionModel:
        split = dataset.train()
        return train_generator(split, dataset.class_names, recipe, seed=3, device=CPU, checkpoint=checkpoint)[
            0
        ]

    whole = run(None)
    save, calls = _diffusion_fit.Checkpoint.save, []

    def killed(self: Any, name: str, state: Any, **kwargs: Any) -> None:
        save(self, name, state, **kwargs)
        calls.append(name)
        if calls.count(stage) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(_diffusion_fit.Checkpoint, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "c.pt")
    monkeypatch.setattr(_diffusion_fit.Checkpoint, "save", save)
    assert (tmp_path / "c.pt").exists()
    resumed = run(tmp_path / "c.pt")

    again = run(tmp_path / "c.pt")  # killed once more, before the model was published

    fresh = build(recipe, (3, 16, 16), dataset.class_names, seed=3)
    for part in ("vae", "transformer"):
        for result in (resumed, again):
            pairs = zip(getattr(whole, part).parameters(), getattr(result, part).parameters(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
            assert not any(parameter.requires_grad for parameter in getattr(result, part).parameters())
        pairs = zip(getattr(whole, part).parameters(), getattr(fresh, part).parameters(), strict=True)
        assert not all(torch.equal(a, b) for a, b in pairs)


def test_a_damaged_checkpoint_is_said_and_training_starts_anew(
    toy: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "c.pt").write_bytes(b"half")
    dataset = toy()

    train_generator(
        dataset.train(), dataset.class_names, tiny_recipe(), seed=0, device=CPU, checkpoint=tmp_path / "c.pt"
    )

    assert "is damaged" in caplog.text


def test_a_rate_that_diverges_is_an_error(toy: Any) -> None:
    dataset = toy()
    with pytest.raises(DivergedError, match="the loss of the autoencoder must stay finite"):
        train_generator(dataset.train(), dataset.class_names, tiny_recipe(vae_lr=1e30), seed=0, device=CPU)


def test_dropped_labels_and_the_average_of_weights_take_part(toy: Any) -> None:
    dataset = toy()

    def bias(**changes: Any) -> torch.Tensor:
        model, _ = train_generator(
            dataset.train(), dataset.class_names, tiny_recipe(epochs=2, **changes), seed=0, device=CPU
        )
        weight: torch.Tensor = model.transformer.proj_out_2.weight
        return weight

    plain = bias()
    assert not torch.equal(plain, bias(label_dropout=1.0))
    assert float(bias(ema=0.0).norm()) > float(plain.norm())  # the average is closer to its start, 0


@pytest.mark.parametrize("shape", [(1, 16, 16), (1, 28, 28), (3, 32, 32), (3, 64, 64), (3, 224, 224)])
def test_default_recipes_are_recipes(shape: tuple[int, int, int]) -> None:
    recipe = DiffusionRecipe.parse(default_recipe(shape))

    assert (shape[1] // 2**recipe.vae_halvings) // recipe.patch <= 16
    assert set(TINY) <= set(DiffusionRecipe.model_fields)
