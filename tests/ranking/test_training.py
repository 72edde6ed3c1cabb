from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.errors import InputError
from ddray.nets import Net, build_net
from ddray.ranking.options import NasRecipe
from ddray.ranking.training import train_seeds
from ddray.seeding import derive, derive_seed
from ddray.training.dsa import dsa_for
from ddray.training.embedding import score

SHAPE = (3, 16, 16)
ARCHS = (
    "convnet2_w8_bn",
    "convnet2_w8",
    "convnet1_w8_ln_max",
    "convnet2_w8_gn_nopool",
    "convnet1_w8_sigmoid_nonorm",
)


def blobs(num: int = 40, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Return images [num, C, H, W] of separable classes, class-sorted, and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(classes).repeat_interleave(num // classes)
    centres = torch.randn(classes, *SHAPE, generator=generator)
    images = centres[labels] + 0.5 * torch.randn(num, *SHAPE, generator=generator)
    return images.contiguous(memory_format=torch.channels_last), labels


def build(arch: str, seeds: Sequence[int]) -> list[Net]:
    return [build_net(arch, SHAPE, 4, seed=derive_seed(seed, "net")) for seed in seeds]


def weights(net: Net) -> Tensor:
    return torch.cat(
        [tensor.detach().flatten() for tensor in net.state_dict().values() if tensor.is_floating_point()]
    )


@pytest.mark.parametrize(("nesterov", "shuffle"), [(False, True), (True, True), (False, False)])
def test_a_loop_is_torchs_own_sgd(nesterov: bool, shuffle: bool) -> None:
    images, labels = blobs()
    recipe = NasRecipe(epochs=3, batch=16, lr=0.05, lr_min=0.01, augment="none", nesterov=nesterov)
    (ours,) = build("convnet2_w8_bn", [0])
    train_seeds([ours], (images, labels), recipe, seeds=[5], dsa=None, shuffle=shuffle)

    (plain,) = build("convnet2_w8_bn", [0])
    plain.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        plain.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=nesterov
    )
    total, step = 9, 0
    generator = derive(5, "nas", "order")
    for _ in range(3):
        order = torch.randperm(40, generator=generator) if shuffle else torch.arange(40)
        for index in order.split(16):
            cosine = (1 + torch.cos(torch.tensor(torch.pi * step / total, dtype=torch.float64)).item()) / 2
            optimizer.param_groups[0]["lr"] = 0.01 + 0.04 * cosine
            optimizer.zero_grad()
            F.cross_entropy(plain(images[index]), labels[index]).backward()
            optimizer.step()
            step += 1
    assert step == total == recipe.num_steps(40)
    torch.testing.assert_close(weights(ours), weights(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ARCHS)
def test_fused_seeds_are_the_loops_networks(arch: str) -> None:
    images, labels = blobs()
    recipe = NasRecipe(epochs=2, batch=16, lr=0.05, clip=1.0)
    seeds = [3, 4, 5]
    trained = {}
    for mode in ("loop", "fused"):
        nets = build(arch, seeds)
        used_mode = train_seeds(nets, (images, labels), recipe, seeds=seeds, dsa=dsa_for(True), mode=mode)
        assert used_mode == mode
        trained[mode] = torch.stack([weights(net) for net in nets])
    torch.testing.assert_close(trained["fused"], trained["loop"], rtol=2e-3, atol=2e-4)
    assert not torch.allclose(trained["loop"][0], trained["loop"][1], atol=1e-2), "seeds must differ"


def test_training_learns_and_repeats_itself() -> None:
    images, labels = blobs(80)
    recipe = NasRecipe(epochs=15, batch=16, lr=0.05)
    trained = []
    for _ in range(2):
        (net,) = build("convnet2_w8", [0])
        train_seeds([net], (images, labels), recipe, seeds=[1], dsa=dsa_for(True))
        trained.append(weights(net))
        assert score(net, images, labels, lambda part: part, images.device).accuracy > 0.87
    assert torch.equal(*trained)


def test_the_batch_order_depends_on_the_seed_alone() -> None:
    images, labels = blobs()
    recipe = NasRecipe(epochs=2, batch=16, augment="none")
    nets = build("convnet1_w8", [0, 0, 0])
    for net, seed in zip(nets, (1, 1, 2), strict=True):
        train_seeds([net], (images, labels), recipe, seeds=[seed], dsa=None)
    assert torch.equal(weights(nets[0]), weights(nets[1]))
    assert not torch.equal(weights(nets[0]), weights(nets[2]))


def test_steps_end_a_training_early() -> None:
    images, labels = blobs()
    recipe = NasRecipe(epochs=50, batch=16, augment="none", lr=0.05)
    (stopped,) = build("convnet1_w8", [0])
    train_seeds([stopped], (images, labels), recipe, seeds=[0], dsa=None, num_steps=6)
    (whole,) = build("convnet1_w8", [0])
    train_seeds([whole], (images, labels), recipe.model_copy(update={"epochs": 2}), seeds=[0], dsa=None)
    assert torch.equal(weights(stopped), weights(whole)), (
        "6 steps are 2 epochs of 3 batches, at the same rates"
    )


def test_parts_of_a_batch_give_the_whole_batchs_gradient() -> None:
    images, labels = blobs(200)
    recipe = NasRecipe(epochs=2, batch=200, augment="none", lr=0.05)
    (ours,) = build("convnet2_w8", [0])
    train_seeds([ours], (images, labels), recipe, seeds=[0], dsa=None)
    (fused,) = build("convnet2_w8", [0])
    train_seeds([fused], (images, labels), recipe, seeds=[0], dsa=None, mode="fused")
    torch.testing.assert_close(weights(ours), weights(fused), rtol=1e-4, atol=1e-6)


def test_clipping_bounds_the_first_move() -> None:
    images, labels = blobs()
    recipe = NasRecipe(epochs=1, batch=40, augment="none", lr=1.0, clip=0.01, weight_decay=0.0)
    (net,) = build("convnet1_w8", [0])
    before = weights(net)
    train_seeds([net], (images, labels), recipe, seeds=[0], dsa=None)
    assert float((weights(net) - before).norm()) == pytest.approx(0.01, rel=1e-3)


def test_bf16_learns_too() -> None:
    images, labels = blobs(80)
    (net,) = build("convnet2_w8", [0])
    recipe = NasRecipe(epochs=15, batch=16, lr=0.05, precision="bf16")
    train_seeds([net], (images, labels), recipe, seeds=[1], dsa=dsa_for(True))
    assert score(net, images, labels, lambda part: part, images.device).accuracy > 0.87


def test_a_bad_setting_is_one_line() -> None:
    with pytest.raises(InputError, match="lr"):
        NasRecipe.parse({"lr": -1.0})
