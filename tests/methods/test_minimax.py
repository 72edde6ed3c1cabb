"""Minimax: both terms, memories, what fine-tuning trains, and the pool entry that it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.data import Dataset
from ddray.errors import DivergedError
from ddray.methods.dit import METHOD as DIT
from ddray.methods.families.diffusion import fit, stages
from ddray.methods.families.diffusion.ancestral import betas_of, clean_latents, respaced
from ddray.methods.families.diffusion.minimax import (
    Draws,
    Finetuning,
    Memories,
    MinimaxRecipe,
    finetune,
    minimax_terms,
    trained_parameters,
)
from ddray.methods.families.diffusion.model import DiffusionModel, save_pipeline
from ddray.methods.families.diffusion.train import epoch_batch
from ddray.methods.minimax import plan
from tests.methods.diffusion_models import TINY, untrained, with_variances

CPU = torch.device("cpu")
QUICK = {"generator": TINY, "num_inference_steps": 2, "finetune": {"epochs": 2, "memory": 3}}


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def terms_by_loops(latents: Tensor, labels: list[int], memories: Memories) -> tuple[float, float]:
    """Return both terms pair by pair."""
    representativeness = diversity = 0.0
    for label in set(labels):
        count = min(int(memories.counts[label]), memories.real.shape[1])
        if count == 0:
            continue
        lowest, highest = 2.0, -2.0
        for latent, other in zip(latents, labels, strict=True):
            if other != label:
                continue
            for index in range(count):
                real, predicted = memories.real[label, index], memories.predicted[label, index]
                lowest = min(lowest, float(latent @ real / latent.norm() / real.norm()))
                highest = max(highest, float(latent @ predicted / latent.norm() / predicted.norm()))
        representativeness += 1 - lowest
        diversity += highest
    return representativeness / len(set(labels)), diversity / len(set(labels))


def remembering(counts: list[int], size: int = 4, dim: int = 6) -> Memories:
    """Return memories in float64 that so many latents of each class have joined."""
    memories = Memories(len(counts), size, dim, CPU)
    memories.real, memories.predicted = memories.real.double(), memories.predicted.double()
    for label, count in enumerate(counts):
        labels = torch.full((count,), label)
        memories.join(labels, draws(count, dim, seed=label), draws(count, dim, seed=9 + label))
    return memories


@pytest.mark.parametrize("counts", [[5, 2, 4, 9], [0, 0, 0, 0], [0, 3, 0, 1]])
@pytest.mark.parametrize("labels", [[0], [2, 2, 2], [3, 0, 3, 1, 0], [1, 2]])
def test_the_terms_are_double_loops_over_pairs(counts: list[int], labels: list[int]) -> None:
    memories, latents = remembering(counts), draws(len(labels), 6, seed=20)

    terms = memories.terms(latents, torch.tensor(labels))

    expected = terms_by_loops(latents, labels, memories)
    assert [float(term) for term in terms] == pytest.approx(expected, abs=1e-12)


def test_a_class_without_memories_counts_with_0() -> None:
    memories, latents = remembering([0, 2]), draws(2, 6, seed=20).requires_grad_()

    nothing = memories.terms(latents[:1], torch.tensor([0]))
    both = memories.terms(latents, torch.tensor([0, 1]))
    alone = memories.terms(latents[1:], torch.tensor([1]))

    assert [float(term.detach()) for term in nothing] == [0, 0]
    halves = [float(term.detach()) / 2 for term in alone]
    assert [float(term.detach()) for term in both] == pytest.approx(halves)
    sum(both).backward()  # type: ignore[union-attr]
    assert latents.grad is not None
    assert torch.isfinite(latents.grad).all()
    assert not latents.grad[0].any()


def test_memories_are_the_last_64_first_in_first_out() -> None:
    memories = Memories(2, 64, 1, CPU)
    for start in range(0, 90, 5):  # five of class 1 at a time, one of class 0 among them
        labels = torch.tensor([1, 1, 0, 1, 1, 1])
        values = torch.tensor([start, start + 1, -start, start + 2, start + 3, start + 4]).float()[:, None]
        memories.join(labels, values, values + 0.5)

    assert memories.counts.tolist() == [18, 90]
    assert sorted(memories.real[1].flatten().tolist()) == [*range(26, 90)]
    assert sorted(memories.predicted[1].flatten().tolist()) == [value + 0.5 for value in range(26, 90)]
    assert memories.real[0, :18].flatten().tolist() == [-value for value in range(0, 90, 5)]
    assert not memories.real[0, 18:].any()
    assert MinimaxRecipe().memory == 64


def test_a_batch_of_more_than_fits_leaves_its_last() -> None:
    memories = Memories(1, 3, 1, CPU)
    values = torch.arange(8.0)[:, None]

    memories.join(torch.zeros(8, dtype=torch.int64), values, -values)

    assert sorted(memories.real.flatten().tolist()) == [5, 6, 7]
    assert sorted(memories.predicted.flatten().tolist()) == [-7, -6, -5]


def test_a_memory_holds_no_graph() -> None:
    memories, leaf = Memories(2, 3, 4, CPU), torch.ones(2, 4, requires_grad=True)
    labels = torch.tensor([0, 1])
    memories.join(labels, 2 * leaf, 3 * leaf)
    memories.join(labels, 2 * leaf, 3 * leaf)

    assert not memories.real.requires_grad
    assert not memories.predicted.requires_grad
    representativeness, diversity = memories.terms(draws(2, 4).float(), labels)
    assert representativeness.grad_fn is None
    assert diversity.grad_fn is None


@pytest.mark.parametrize("term", [0, 1])
def test_a_step_on_a_term_raises_the_lowest_or_lowers_the_highest_cosine(term: int) -> None:
    memories, labels = remembering([4, 4]), torch.tensor([0, 1, 1])
    latents = draws(3, 6, seed=20).requires_grad_()
    before = memories.terms(latents, labels)
    (gradient,) = torch.autograd.grad(before[term], latents)

    after = memories.terms((latents - 0.05 * gradient).detach(), labels)

    assert float(gradient.norm()) > 0
    assert float(after[term]) < float(before[term].detach())
    alone = terms_by_loops((latents - 0.05 * gradient).detach(), labels.tolist(), memories)[term]
    assert alone == pytest.approx(float(after[term]))


def test_the_clean_latents_of_the_true_noise_are_exact() -> None:
    levels = respaced(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 1000)
    at = levels.at(torch.tensor([0, 300, 999]))
    clean, noise = draws(2, 3, 5)

    noisy = at.root_alpha * clean + at.root_noise * noise

    assert torch.allclose(clean_latents(noisy, noise, at), clean, atol=1e-9)


def finetuning(dataset: Dataset, model: DiffusionModel | None = None, **recipe: Any) -> Finetuning:
    model = model or untrained((3, 16, 16))
    settings = {"epochs": 2, "memory": 3, "ema": 0.0, **recipe}
    return Finetuning(model, dataset.train(), (0, 1, 2), MinimaxRecipe.parse(settings), 5, dataset.can_flip)


def weights_of(model: DiffusionModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.transformer.state_dict().items()}


def test_without_weights_it_is_plain_fine_tuning(toy: Any) -> None:
    """By hand: AdamW on the squared error of the noise, of biases and class embeddings."""
    dataset, model = toy(), untrained((3, 16, 16))
    split, null = dataset.train(), 3
    net, alphas = model.transformer, torch.cumprod(1 - betas_of(model).double(), 0)
    before = weights_of(model)
    parameters = [
        parameter
        for name, parameter in net.named_parameters()
        if name.endswith("bias") or name.endswith("embedding_table.weight")
    ]
    optimizer = torch.optim.AdamW(
        [parameter.requires_grad_() for parameter in parameters], 1e-3, weight_decay=0
    )
    for step in range(6):
        index = epoch_batch(5, "minimax", step, 3, len(split), 8)
        drawn = Draws.of(5, step, index, dim=256, num_levels=1000, dropout=0.1)
        pixels = split.images[index].float() / 255
        pixels[drawn.flipped] = pixels[drawn.flipped].flip(3)
        with torch.no_grad():
            posterior = model.vae.encode(model.fit(pixels)).latent_dist
        clean = posterior.mean.flatten(1) + posterior.std.flatten(1) * drawn.posterior
        clean = clean * model.vae.config.scaling_factor
        share = alphas[drawn.steps][:, None]
        noisy = (share.sqrt() * clean + (1 - share).sqrt() * drawn.noise).float()
        labels = torch.where(drawn.dropped, null, split.labels[index])
        output = net(noisy.unflatten(1, (4, 8, 8)), timestep=drawn.steps, class_labels=labels).sample
        optimizer.zero_grad()
        F.mse_loss(output.flatten(1), drawn.noise).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    expected = weights_of(model)

    job = finetuning(dataset, lambda_r=0.0, lambda_d=0.0)
    changed, loss = finetune(job)

    assert 0 < loss < 3
    assert not job.memories.counts.any(), "nothing is remembered"
    for name, weight in changed.items():
        if name.endswith("to_k.bias"):
            continue  # attention ignores it: Adam moves it by the rounding of a gradient of 0
        moved = expected[name] - before[name]
        assert torch.allclose(weight - before[name], moved, atol=2e-5 + 0.02 * float(moved.abs().max())), name
    other, _ = finetune(finetuning(dataset, lambda_r=1.0, lambda_d=1.0))
    assert not all(torch.equal(other[name], changed[name]) for name in changed)


def test_images_are_mirrored_only_where_that_keeps_their_class(toy: Any) -> None:
    changed = [finetune(finetuning(toy(can_flip=can_flip), ema=0.0))[0] for can_flip in (False, False, True)]
    assert all(torch.equal(changed[0][name], changed[1][name]) for name in changed[0])
    assert not all(torch.equal(changed[0][name], changed[2][name]) for name in changed[0])
    job = finetuning(toy(can_flip=False))
    index = torch.arange(8)
    drawn = Draws.of(5, 0, index, dim=256, num_levels=1000, dropout=0.1)
    assert drawn.flipped.any()
    unflipped = replace(drawn, flipped=torch.zeros_like(drawn.flipped))
    assert torch.equal(job._encoded(drawn), job._encoded(unflipped))


def test_frozen_tensors_keep_their_bytes(toy: Any) -> None:
    model = untrained((3, 16, 16))
    before, vae = weights_of(model), {k: v.clone() for k, v in model.vae.state_dict().items()}

    changed, _ = finetune(finetuning(toy(), model))

    after = weights_of(model)
    for name, weight in before.items():
        assert torch.equal(after[name], weight) == (name not in changed), name
    assert all(torch.equal(vae[name], tensor) for name, tensor in model.vae.state_dict().items())
    assert "transformer_blocks.0.norm1.linear.weight" not in changed
    assert "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight" in changed
    assert not any(parameter.requires_grad for parameter in model.transformer.parameters())
    assert {name.rpartition(".")[2] for name in changed} == {"bias", "weight"}
    assert [name for name in changed if name.endswith("weight")] == [
        "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
    ]


def test_the_average_begins_with_the_start_and_never_forgets_sooner(toy: Any) -> None:
    """Of .9999 after 12,000 steps 30% are the start; the average of two steps here, by hand."""
    start = weights_of(untrained((3, 16, 16)))
    steps = [finetune(finetuning(toy(), epochs=1, batch=batch))[0] for batch in (24,)]
    averaged, _ = finetune(finetuning(toy(), epochs=1, batch=24, ema=0.75))

    for name, weight in averaged.items():
        assert torch.allclose(weight, 0.75 * start[name] + 0.25 * steps[0][name], atol=1e-6), name
    assert pytest.approx(0.3, abs=0.002) == 0.9999**12_000


def test_terms_reach_the_trained_weights(toy: Any) -> None:
    """A step on both terms alone: what the loss adds has a gradient once there are memories."""
    job = finetuning(toy(), lambda_r=1.0, lambda_d=1.0)
    parameters = trained_parameters(job.model.transformer)
    for parameter in parameters.values():
        parameter.requires_grad_()
    job(0)
    index = epoch_batch(5, "minimax", 1, 3, 24, 8)
    labels = job.split.labels[index]
    noisy = draws(8, 256).float()
    at = job._levels.at(torch.full((8,), 500))

    predicted, _ = job._predicted(noisy, torch.full((8,), 500), labels, torch.zeros(8, dtype=torch.bool))
    terms = job.memories.terms(clean_latents(noisy, predicted, at), labels)

    for term in terms:
        gradients = torch.autograd.grad(term, list(parameters.values()), retain_graph=True, allow_unused=True)
        assert sum(float(gradient.norm()) for gradient in gradients if gradient is not None) > 0
    assert int(job.memories.counts.sum()) == 8


def test_a_network_with_variances_learns_them_by_the_bound(toy: Any, tmp_path: Path) -> None:
    model = with_variances(3)
    head = model.transformer.proj_out_2.bias.clone().view(2, 2, 8)

    changed, loss = finetune(finetuning(toy(), model, lambda_r=0.0, lambda_d=0.0))

    after = changed["proj_out_2.bias"].view(2, 2, 8)
    assert torch.isfinite(torch.tensor(loss))
    assert float((after - head)[..., :4].abs().min()) > 0
    assert float((after - head)[..., 4:].abs().min()) > 0, "the variances' channels"


def test_fine_tuning_that_was_killed_ends_with_the_same_bytes(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "_SAVE_EVERY_S", 0.0)
    settings = {"ema": 0.5, "lambda_r": 0.5, "lambda_d": 0.5}
    whole, loss = finetune(finetuning(toy(), **settings))
    save, calls = fit.Checkpoint.save, []

    def killed(self: Any, name: str, state: Any, **kwargs: Any) -> None:
        save(self, name, state, **kwargs)
        calls.append(name)
        if len(calls) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(fit.Checkpoint, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        finetune(finetuning(toy(), **settings), tmp_path / "c.pt")
    monkeypatch.setattr(fit.Checkpoint, "save", save)
    assert int(torch.load(tmp_path / "c.pt")["minimax diffusion transformer"]["memory"]["counts"].sum()) == 32

    for _ in range(2):  # the second time it was killed before the entry was stored
        resumed, again = finetune(finetuning(toy(), **settings), tmp_path / "c.pt")
        assert again == loss
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_rate_that_diverges_is_an_error(toy: Any) -> None:
    with pytest.raises(DivergedError, match="loss of the minimax diffusion transformer must stay finite"):
        finetune(finetuning(toy(), lr=1e30))


def test_the_entrys_parent_is_the_generator_and_its_key_covers_the_settings(
    planned: Any, toy: Any, dit: str
) -> None:
    def spec(seed: int = 0, ipc: int = 1, dataset: Dataset | None = None, **method: Any) -> Any:
        settings = {**QUICK, **method}
        _, ctx, distiller = planned("minimax", dataset or toy(), ipc=ipc, seed=seed, method=settings)
        return distiller.pool_specs(ctx)

    generator, entry = spec()
    assert (entry.kind, entry.parents) == ("minimax", (generator.key,))
    assert spec(seed=3, ipc=2)[1].key == entry.key
    assert spec(guidance=2.0, num_inference_steps=3)[1].key == entry.key
    assert spec(finetune={**QUICK["finetune"], "lambda_d": 0.1})[1].key != entry.key
    assert spec(class_ids=(1, 0, 2))[1].key != entry.key
    mirrored = toy().with_options(can_flip=False)
    assert spec(dataset=mirrored)[0].key == generator.key, "the generator never sees mirrored images"
    assert spec(dataset=mirrored)[1].key != entry.key
    (of_folder,) = spec(diffusion=dit)
    assert of_folder.recipe["source"] == {"fingerprint": of_folder.parents[0]}


def test_a_run_samples_the_fine_tuned_weights_as_dit_does(
    planned: Any, toy: Any, dit: str, ddray_home: Path
) -> None:
    settings = {**QUICK, "diffusion": dit, "finetune": {**QUICK["finetune"], "ema": 0.0}}
    _, ctx, method = planned("minimax", toy(), ipc=2, method=settings)
    method.setup(ctx)
    entry_spec = plan(ctx, method._config)[1]
    entry = ctx.pool.get([entry_spec])[0]
    model = stages.load_minimax(entry_spec, ctx.pool)
    save_pipeline(model, ddray_home / "tuned")
    method.step()
    distilled = method.snapshot()

    sampling = {name: settings[name] for name in ("generator", "num_inference_steps")}
    _, ctx, baseline = planned(
        "dit", toy(), ipc=2, method={**sampling, "diffusion": str(ddray_home / "tuned")}
    )
    baseline.setup(ctx)
    baseline.step()

    assert torch.equal(distilled.images, baseline.snapshot().images)
    assert distilled.meta.generator == entry_spec.key
    assert set(entry.tensors) == {f"transformer.{name}" for name in trained_parameters(model.transformer)}
    assert entry.meta["dataset_name"] == "toy"
    assert not list(ddray_home.glob("parts/*"))
    assert issubclass(method.config_type, DIT.config_type.__mro__[1])


def test_without_fine_tuning_steps_to_speak_of_it_is_dit(planned: Any, toy: Any, dit: str) -> None:
    """At a rate of nearly 0 the weights, and so the images, are the generator's."""
    images = []
    for name, extra in (("dit", {}), ("minimax", {"finetune": {"epochs": 1, "lr": 1e-20}})):
        settings = {"num_inference_steps": 2, "diffusion": dit, **extra}
        _, ctx, method = planned(name, toy(), method=settings)
        method.setup(ctx)
        method.step()
        images.append(method.snapshot().images)
    assert torch.allclose(*images, atol=1e-5)


def test_the_functions_of_a_batch_do_not_mix_classes() -> None:
    latents, groups = draws(2, 4), torch.tensor([0, 1])
    real, predicted = draws(2, 2, 3, 4, seed=1)
    filled = torch.ones(2, 3, dtype=torch.bool)

    both = minimax_terms(latents, groups, real, predicted, filled)
    apart = [
        minimax_terms(latents[i : i + 1], groups[:1], real[i : i + 1], predicted[i : i + 1], filled[:1])
        for i in (0, 1)
    ]

    for term in (0, 1):
        assert float(both[term]) == pytest.approx(float(apart[0][term] + apart[1][term]) / 2)
