"""Training of the generators, their pool entries, and the sets that are sampled from them."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddray.errors import DivergedError, InputError
from ddray.jobs.plan import resolve
from ddray.jobs.trainers import PoolTrainer
from ddray.methods import get_method
from ddray.methods.families.diffusion import fit as checkpoints
from ddray.methods.families.diffusion.fit import Checkpoint
from ddray.methods.families.generative.pool import SYSTEMS, open_generator, sample_class, train_generator
from ddray.pool.listing import list_pool
from ddray.pool.local import LocalPool
from ddray.pool.spec import PoolEntry
from tests.methods.generators import CPU, bright_quadrants, quick_recipe, spec_of, training_of

GANS = ("cgan", "biggan", "dc_vae")
LEARNED = {  # enough to tell four quadrants
    "gmmn": {"epochs": 150, "batch": 20, "optimizer": "adam", "lr": 0.01, "hidden": (32,)},
    "cgan": {"epochs": 25, "batch": 20, "width": 16, "lr": 2e-3},
    "biggan": {"epochs": 40, "batch": 16, "width": 4, "lr": 2e-3, "ema": 0.9, "ema_start": 10},
    "dc_vae": {"epochs": 40, "batch": 16, "width": 4, "lr": 2e-3, "ema": 0.9},
}


def values_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def changed(before: dict[str, Tensor], net: nn.Module) -> set[str]:
    """Names of the parameters that have moved."""
    after = dict(net.named_parameters())
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


@pytest.fixture(scope="module")
def quadrants() -> Any:
    return bright_quadrants()


@pytest.mark.parametrize(
    "system", ["gmmn", "cgan", *(pytest.param(name, marks=pytest.mark.slow) for name in ("biggan", "dc_vae"))]
)
def test_samples_of_a_class_are_classified_as_that_class(system: str, quadrants: Any) -> None:
    """By a network trained on the real images."""
    split = quadrants.train()
    judge = nn.Linear(64, 4)
    optimizer = torch.optim.Adam(judge.parameters(), lr=0.05)
    for _ in range(60):
        loss = F.cross_entropy(judge(split.images.float().flatten(1) / 255), split.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    spec = spec_of(system, quadrants, **LEARNED[system])

    tensors, measured = train_generator(quadrants, split, CPU, spec)

    net = open_generator(PoolEntry({"spec": spec.dump()}, tensors), CPU)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 20, quick_recipe(system).noise_dim, generator=generator).clamp(-1, 1)
    samples = torch.stack([sample_class(net, noise[label], label, (1, 8, 8)) for label in range(4)])
    assert ((samples >= 0) & (samples <= 1)).all()
    predicted = judge(samples.flatten(2)).argmax(2)
    assert float((predicted == torch.arange(4)[:, None]).float().mean()) > 0.9
    assert all(name == "dataset_name" or name.endswith("_loss") for name in measured)


@pytest.mark.parametrize("system", SYSTEMS)
def test_training_that_was_killed_ends_with_the_same_weights(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_SAVE_EVERY_S", 0.0)
    whole = training_of(system, epochs=2, batch=12)
    losses = whole.run(Checkpoint(None))
    killed = training_of(system, epochs=2, batch=12)
    update, num = killed.update, 2 * killed.per_epoch

    def interrupted(step: int) -> Tensor:
        if step == num // 2:
            raise KeyboardInterrupt
        return update(step)

    monkeypatch.setattr(killed, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        killed.run(Checkpoint(tmp_path / "checkpoint.pt"))
    again = training_of(system, epochs=2, batch=12)

    resumed = again.run(Checkpoint(tmp_path / "checkpoint.pt"))

    assert 0 < num // 2 < num
    assert resumed == losses
    expected = values_of(whole.nets)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in values_of(again.nets).items())
    after = training_of(system, epochs=2, batch=12)
    assert after.run(Checkpoint(tmp_path / "checkpoint.pt")) == losses, "nothing is left to train"
    assert changed(expected, after.nets) == set()


def test_a_moment_matching_step_draws_from_every_class_its_own_images(toy: Any) -> None:
    dataset = toy((9, 1, 8), shape=(3, 8, 8))
    training = training_of("gmmn", dataset, batch=6)

    index = training.index(0).view(3, 6)

    assert dataset.train().labels[index].tolist() == [[0] * 6, [1] * 6, [2] * 6]
    assert len({*training.index(1)[:6].tolist()} | {*index[0].tolist()}) > 1, "other images in another step"


def test_the_moment_matching_networks_of_classes_learn_apart(toy: Any) -> None:
    """Other images of one class leave the others' weights."""
    first, second = toy(shape=(3, 8, 8)), toy(shape=(3, 8, 8))
    images = second.train().images
    images[second.train().labels == 1] //= 2
    trainings = [training_of("gmmn", dataset, epochs=4) for dataset in (first, second)]
    for training in trainings:
        training.run(Checkpoint(None))

    for mine, theirs in zip(*(training.nets.parameters() for training in trainings), strict=True):
        assert torch.equal(mine[[0, 2]], theirs[[0, 2]])
        assert not torch.equal(mine[1], theirs[1])


def test_rate_and_momentum_change_after_a_quarter_of_the_steps() -> None:
    training = training_of("gmmn", epochs=8, batch=9)
    assert training.per_epoch == 1

    groups = []
    for step in range(8):
        training.update(step)
        group = training.optimizers[0].param_groups[0]
        groups.append((group["lr"], group["momentum"]))

    assert groups == [(2.0, 0.9)] * 2 + [(0.2, 0.99)] * 6


@pytest.mark.parametrize("system", GANS)
def test_generator_and_discriminator_move_in_their_own_steps(system: str) -> None:
    """Each loss's gradient reaches the networks that its step moves, and no others keep one."""
    training = training_of(system)
    before = values_of(training.nets)

    losses = training.update(0)

    moved = changed(before, training.nets)
    assert len(losses) == len(training.loss_names)
    trained = {name for name in training.nets if name in ("generator", "critic", "encoder", "decoder")}
    assert {name.partition(".")[0] for name in moved} >= trained
    assert all(parameter.requires_grad for name in trained for parameter in training.nets[name].parameters())


def test_the_contrast_moves_encoder_decoder_and_trunk_and_not_the_discriminators_head() -> None:
    training: Any = training_of("dc_vae", contrast_weight=1.0)
    images, labels = training._real.batch(0, 8)
    before = values_of(training.nets)

    training._compare(images, labels, training._real.draws(0), 0)

    moved = changed(before, training.nets)
    assert any(name.startswith("encoder.") for name in moved)
    assert any(name.startswith("decoder.") for name in moved)
    assert any(name.startswith("critic.trunk.") for name in moved)
    assert any(name.startswith("comparer.layers.") for name in moved)
    assert not any(name.startswith(("critic.head.", "key_comparer.", "average.")) for name in moved)


def test_the_contrast_tells_a_reconstruction_from_the_other_images() -> None:
    """An autoencoder that only contrasts brings its loss down: the instance is in the reconstruction."""
    training: Any = training_of("dc_vae", width=4, lr=2e-3, temperature=0.2, key_momentum=0.9)
    losses = []
    for step in range(30):
        images, labels = training._real.batch(step, 16)
        losses.append(float(training._compare(images, labels, training._real.draws(step), step)))
        training._keys.update(step)

    chance = math.log(1 + 8)  # the own key among a queue of eight
    assert sum(losses[-5:]) / 5 < 0.9 * chance < sum(losses[1:6]) / 5


@pytest.mark.parametrize("system", SYSTEMS)
def test_runs_of_all_seeds_share_a_generator_and_sample_it_anew(system: str, toy: Any, planned: Any) -> None:
    dataset = toy((9, 7, 2), shape=(3, 8, 8))
    quick = {"generator": quick_recipe(system).dump()}
    sets = []
    for seed in (0, 1):
        _, ctx, method = planned(system, dataset, ipc=3, seed=seed, method=quick)
        method.setup(ctx)
        sets.append(method.snapshot())

    (entry,) = list_pool().models
    assert (entry["kind"], entry["arch"], entry["epochs"], entry["times_trained"]) == (
        "generator",
        system,
        1,
        1,
    )
    assert {distilled.meta.generator for distilled in sets} == {entry["key"]}
    assert not torch.equal(sets[0].images, sets[1].images)
    assert sets[0].labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2], "a class of two images has three samples"
    assert method.measures == {"generator_epochs": 1.0}
    pixels = sets[0].space().decode(sets[0].images)
    assert float(pixels.min()) >= -1e-5
    assert float(pixels.max()) <= 1 + 1e-5


def test_a_generators_own_seed_and_recipe_are_in_its_key(toy: Any, planned: Any) -> None:
    def key(**method: Any) -> str:
        settings = {"generator": {"epochs": 1, **method.pop("generator", {})}, **method}
        _, ctx, distiller = planned("biggan", toy(shape=(3, 8, 8)), method=settings)
        return str(distiller.pool_specs(ctx)[0].key)

    keys = [key(), key(generator_seed=1), key(generator={"width": 2}), key(generator={"augment": False})]

    assert len({*keys}) == 4
    assert keys[0] == key()


def test_real_images_are_mirrored_only_where_they_may_be(toy: Any, planned: Any) -> None:
    """So can_flip is in the key too."""

    def transform(dataset: Any) -> str:
        _, ctx, distiller = planned("biggan", dataset)
        return str(distiller.pool_specs(ctx)[0].transform)

    dataset = toy(shape=(3, 8, 8))

    assert transform(dataset) == "raw"
    assert transform(dataset.with_options(can_flip=False)) == "raw, can_flip=False"


@pytest.mark.parametrize("augment", [True, False])
def test_the_discriminator_sees_real_and_sampled_images_augmented_alike(
    augment: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both, and the samples in the generator's own step; each by a draw of its own."""
    training: Any = training_of("biggan", augment=augment, critic_steps=2)
    seen: list[Tensor] = []
    from ddray.methods.families.generative import systems

    original = systems.augmented

    def watched(images: Tensor, rows: Tensor) -> Tensor:
        assert len(rows) == len(images)
        assert len(rows.unique(dim=0)) == len(rows)
        seen.append(images)
        return original(images, rows)

    monkeypatch.setattr(systems, "augmented", watched)
    training.update(0)

    assert [len(images) for images in seen] == ([16, 16, 8] if augment else [])
    assert not augment or seen[-1].requires_grad, "the generator's gradient goes through it"


def test_spectrograms_are_refused(sounds: Any) -> None:
    trainer = PoolTrainer(sounds, sounds.train(), CPU)

    with pytest.raises(InputError, match="trained on uint8 images, got spectrograms; use another method"):
        trainer(spec_of("gmmn", sounds))


def test_an_unknown_system_is_refused(quadrants: Any) -> None:
    spec = spec_of("biggan", quadrants).model_copy(update={"arch": "bigan"})

    with pytest.raises(InputError, match=r"generator must be one of .* got 'bigan'; did you mean 'biggan'"):
        PoolTrainer(quadrants, quadrants.train(), CPU)(spec)


def test_a_training_that_diverges_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    training = training_of("gmmn", epochs=6)
    monkeypatch.setattr(training, "update", lambda step: torch.tensor([math.nan]))

    with pytest.raises(DivergedError, match=r"losses must stay finite, .*; lower its lr"):
        training.run(Checkpoint(None))


def test_a_class_is_sampled_alike_whatever_else_is(quadrants: Any, planned: Any) -> None:
    _, ctx, method = planned("cgan", quadrants, ipc=3, method={"generator": quick_recipe("cgan").dump()})
    method.setup(ctx)
    whole = method.snapshot().images
    spec = method.pool_specs(ctx)[0]
    entry = LocalPool(PoolTrainer(quadrants, quadrants.train(), CPU)).get([spec])[0]

    net = open_generator(entry, CPU)
    noise = torch.randn(3, 4, generator=ctx.generator("noise", 2))
    alone = ctx.space.encode(sample_class(net, noise, 2, (1, 8, 8)))

    assert torch.equal(whole[6:9], alone)


@pytest.mark.parametrize("method", ["gmmn", "cgan", "biggan", "dc_vae"])
def test_the_settings_of_digits_are_in_the_search_space(method: str, digits: Any) -> None:
    config = resolve(method, digits, ipc=1).config.method
    for name, space in get_method(method).config_type.search_space.items():
        value = functools.reduce(getattr, name.split("."), config)
        low, high = space.get("loguniform", (value, value))
        assert low <= value <= high, name
