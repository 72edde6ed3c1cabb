"""What methods, augmentation and protocols wait for on a GPU: in a step nothing but what decides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddray.artifact.distilled_set import TrainSet
from ddray.data import normalized_space
from ddray.data.pixels import PixelSpace, fit_zca
from ddray.evaluation.linear import Linear, adapted
from ddray.evaluation.protocol import EvalContext
from ddray.methods.cafe import Accuracies
from ddray.methods.families.diffusion.minimax import Finetuning, MinimaxRecipe, trained_parameters
from ddray.methods.families.ssl.teacher import random_view
from ddray.nets import build_net, reinitialize
from ddray.seeding import derive
from ddray.system.numerics import has_bf16
from ddray.system.transfer import to_device
from ddray.testing import random_dataset
from ddray.training.dsa import Dsa, dsa_for
from ddray.training.embedding import score
from ddray.training.engine import Rule, Step
from ddray.training.loop import augmenter
from ddray.training.operations import crop_and_flip
from ddray.training.recipe import FinetuneConfig, ProbeConfig, Recipe
from tests.gpu.fake_cuda import FakeCuda
from tests.gpu.runs import compute_as_cuda, distilled, started
from tests.methods.diffusion_models import untrained

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
SORTED, MIXED = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), torch.tensor([0, 3, 1, 2, 0, 1, 2, 3])


def pixels(num: int = 8, channels: int = 3) -> Tensor:
    return torch.rand(num, channels, 16, 16, generator=derive(0))


def test_a_copy_to_the_device_is_not_waited_for(gpu: FakeCuda) -> None:
    small, large = torch.arange(5), torch.rand(300, 300)

    there = [to_device(tensor, CUDA) for tensor in (small, large)]

    assert not gpu.syncs
    assert [tensor.device for tensor in there] == [CUDA, CUDA]
    assert torch.equal(to_device(there[0], CPU), small)
    assert torch.equal(to_device(there[1], CPU), large)
    assert sum(gpu.syncs.values()) == 2  # back on the CPU, values are there
    assert to_device(there[0], CUDA) is there[0]
    assert to_device(small, CPU) is small


@pytest.mark.parametrize("variant", ["dsa", "dsa_idc"])
@pytest.mark.parametrize("index", [SORTED, MIXED, None], ids=["sorted", "mixed", "own"])
def test_siamese_augmentation_waits_for_nothing(gpu: FakeCuda, variant: Any, index: Tensor | None) -> None:
    dsa: Dsa = dsa_for(True, variant)
    for seed in range(6):
        plan = dsa.draw(8, derive(seed), shared_op=seed % 2 == 0)
        expected = dsa.apply(pixels(), plan, index)
        images = to_device(pixels(), CUDA)
        gpu.forget()
        augmented = dsa.apply(images, plan, index)
        assert not gpu.syncs
        assert torch.equal(augmented.cpu(), expected)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "crop": lambda images: crop_and_flip(images, derive(1), can_flip=True),
    "view": lambda images: random_view(images, derive(1), crop_area=0.2, flip=True, solarize=0.2),
    "grey": lambda images: adapted(images, (1, 16, 16)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_wait_for_nothing_after_the_first(gpu: FakeCuda, name: str) -> None:
    expected, images = VIEWS[name](pixels()), to_device(pixels(), CUDA)
    VIEWS[name](images)
    gpu.forget()

    views = VIEWS[name](images)

    assert not gpu.syncs
    assert torch.equal(views.cpu(), expected)


@pytest.mark.parametrize("arch", ["convnet2_w8", "convnet3_w8_bn", "vgg11", "resnet10", "densenet_cifar"])
def test_fresh_weights_wait_for_nothing(gpu: FakeCuda, arch: str) -> None:
    net = build_net(arch, (3, 32, 32), 4, seed=0, device=CUDA).to(memory_format=torch.channels_last)
    reinitialize(net, 1)
    gpu.forget()

    reinitialize(net, 2)

    assert not gpu.syncs
    fresh = build_net(arch, (3, 32, 32), 4, seed=2, device=CUDA)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), fresh.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), fresh.buffers(), strict=True))


def test_fresh_weights_of_a_convnet_are_drawn_where_they_were(gpu: FakeCuda) -> None:
    """Nothing is built: a draw and a copy each for weights and biases."""
    net = build_net("convnet2_w8", (3, 32, 32), 4, seed=0, device=CUDA)
    reinitialize(net, 1)
    gpu.forget()
    reinitialize(net, 2)
    assert gpu.names["uniform_"] == 6
    assert gpu.kernels <= 2 * len(list(net.parameters()))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_new_step_waits_for_nothing(gpu: FakeCuda, optimizer: Any) -> None:
    net = torch.nn.Linear(3, 2, device=CUDA)
    gpu.forget()

    step = Step([net], Rule(torch.nn.functional.mse_loss, optimizer), lr=0.5)
    step.set_lr(0.25)

    assert not gpu.syncs
    assert float(step.optimizer.param_groups[0]["lr"]) == 0.25


# What each step of a whole run waits for: KRR-ST's first one trains the inner networks.
STEPS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "krr_st": ({"augment_real": "crop_flip"}, [0, 0, 0, 0]),
    "boost_ssdd": ({"approximation": "bias"}, [0, 0, 0, 0]),
    "dwa": ({}, [0, 0, 0, 0]),
    # A class: facts about its statistics, and which candidate is drawn again. A batch: its images.
    "d3hr": ({"batch": 4}, [2, 2, 2, 1, 1]),
    # A batch: its images.
    "dit": ({"batch": 4}, [1, 1]),
    "minimax": ({"batch": 4}, [1, 1]),
}


@pytest.mark.parametrize("method", STEPS)
def test_a_step_waits_only_for_what_decides(gpu: FakeCuda, method: str) -> None:
    settings, expected = STEPS[method]
    ctx, distiller = started(method, CUDA, **settings)
    distiller.setup(ctx)
    waits = []
    for _ in range(distiller.num_steps):
        gpu.forget()
        assert distiller.step()["loss"].device == CUDA
        waits.append(sum(gpu.syncs.values()))
    assert waits == expected, gpu.syncs


def test_a_step_of_minimax_fine_tuning_waits_for_nothing(gpu: FakeCuda) -> None:
    model, split = untrained((3, 16, 16)).to(CUDA), random_dataset().train()
    recipe = MinimaxRecipe(batch=4, memory=2)
    loss = Finetuning(model, split, (0, 1, 2), recipe, seed=0, can_flip=True)
    for parameter in trained_parameters(model.transformer).values():
        parameter.requires_grad_()
    loss(0), loss(1)
    gpu.forget()

    loss(2).backward()  # type: ignore[no-untyped-call]

    assert not gpu.syncs
    assert loss.memories.real.device == CUDA


@pytest.mark.parametrize("method", ["cafe", "d3hr", "krr_st"])
def test_a_run_cut_off_resumes_to_the_same_losses(gpu: FakeCuda, method: str, tmp_path: Path) -> None:
    """A checkpoint is on the CPU, the losses since are where the method leaves them."""
    whole = distilled(method, CUDA)
    distilled(method, CUDA, checkpoint=tmp_path / "c.pt", until=3)

    again = distilled(method, CUDA, checkpoint=tmp_path / "c.pt")

    assert again.resumed_from_step == 3
    assert torch.equal(again.losses, whole.losses)
    assert torch.equal(again.distilled.images, whole.distilled.images)


def test_the_generators_precision_prints_nothing(gpu: FakeCuda, capfd: pytest.CaptureFixture[str]) -> None:
    ctx, distiller = started("d3hr", CUDA, precision="float16")
    distiller.setup(ctx)
    assert capfd.readouterr() == ("", "")
    assert distiller._engine._sampler.model.transformer.dtype == torch.float16


def test_accuracies_are_waited_for_once_where_they_decide(gpu: FakeCuda) -> None:
    accuracies = Accuracies(window=3, num=10)
    for num_right in (5, 7):
        accuracies.add(torch.full((), float(num_right), device=CUDA))
        assert accuracies.spread(-1.0) == -1.0
    assert not gpu.syncs
    accuracies.add(torch.full((), 6.0, device=CUDA))
    assert accuracies.spread(-1.0) == 0.7 - 0.5
    assert sum(gpu.syncs.values()) == 1


def test_a_score_waits_once(gpu: FakeCuda) -> None:
    split = random_dataset((9, 7, 8)).train()
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 3)).to(CUDA)
    gpu.forget()
    score(net, split.images, split.labels, lambda images: images.float() / 255, CUDA, chunk=5)
    assert sum(gpu.syncs.values()) == 1


@pytest.mark.parametrize("finetune", [False, True])
def test_more_steps_of_a_linear_evaluation_wait_for_nothing_more(gpu: FakeCuda, finetune: bool) -> None:
    dataset = random_dataset((20, 20))
    split, space = dataset.train(), normalized_space(dataset)
    ctx = EvalContext(dataset, split, space, CUDA)
    targets = torch.randn(12, 5, generator=derive(0))
    train_set = TrainSet(space.encode(split.images[:12]), torch.zeros(0, dtype=torch.int64), targets)
    waits = []
    for steps in (2, 2, 5):
        recipe = Recipe(epochs=steps, batch=8, augment="dsa", schedule="constant")
        tuning = FinetuneConfig(steps=steps, batch=16) if finetune else None
        probe = ProbeConfig(steps=steps, batch=16)
        gpu.forget()
        Linear(recipe, probe, real=split, can_flip=True, finetune=tuning).evaluate(
            train_set, ctx, arch="convnet2_w8", seed=0
        )
        waits.append(sum(gpu.syncs.values()))
    assert waits[1] == waits[2], gpu.syncs


def test_a_whitening_is_moved_once_for_a_policy(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    space = fit_zca(random_dataset().train())
    moves: list[Any] = []
    move = PixelSpace.to
    monkeypatch.setattr(PixelSpace, "to", lambda self, device: moves.append(device) or move(self, device))
    apply = augmenter("randaugment", can_flip=True, space=space)
    assert apply is not None
    batch = torch.rand(2, 3, 16, 16, device=CUDA)
    for seed in range(3):
        apply(batch, derive(seed))
    assert len(moves) == 1


def test_a_set_of_statistics_is_sampled_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    compute_as_cuda(monkeypatch)
    expected = distilled("d3hr", CPU, store="statistics").distilled.generated(3)

    with FakeCuda(autocasts=False):
        result = distilled("d3hr", CUDA, store="statistics").distilled.generated(3, CUDA)

    assert result.images.shape == (9, 3, 16, 16)
    assert torch.equal(result.images, expected.images)


@pytest.mark.parametrize("native", [True, False])
def test_a_teacher_is_trained_in_bfloat16_only_where_the_device_has_it(
    gpu: FakeCuda, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert has_bf16(CUDA) == native
    assert not has_bf16(CPU)
