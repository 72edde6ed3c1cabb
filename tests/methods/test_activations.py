"""Activation statistics: patches against a loop, running averages, the pool's real statistics by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddray.data import carve_val, normalized_space
from ddray.errors import InputError
from ddray.jobs.trainers import PoolTrainer
from ddray.methods.families import activations
from ddray.methods.families.activations import (
    ActivationRecipe,
    WatchedNet,
    activation_spec,
    channel_statistics,
    covariance_of,
    entering,
    layer_statistics,
    patch_statistics,
    update_average,
    watched_layers,
    watching,
)
from ddray.nets import build_net
from ddray.pool.listing import list_pool
from ddray.pool.local import LocalPool
from ddray.pool.spec import PoolEntry, PoolSpec, teacher_spec
from ddray.testing import random_dataset
from ddray.training.recipe import TeacherRecipe

CPU = torch.device("cpu")
CONVOLUTIONS = ActivationRecipe(layers="convolutions", statistics=("channel", "patch"), batch=7)
NORMS = ActivationRecipe(layers="norms", statistics=("covariance",), batch=7)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(dataset: Any, arch: str = "convnet2_w8_bn", split: str = "train") -> PoolSpec:
    return teacher_spec(dataset, split, arch, TeacherRecipe(epochs=1), device=CPU)


def measured(dataset: Any, recipe: ActivationRecipe, split: str = "train", **changes: Any) -> PoolEntry:
    pool = LocalPool(PoolTrainer(dataset, changes.pop("images", dataset.train()), CPU))
    return pool.get([activation_spec(network(dataset, split=split, **changes), recipe)])[0]


@pytest.mark.parametrize(("height", "width", "side"), [(8, 12, 4), (6, 6, 4), (5, 9, 4), (3, 3, 1)])
def test_patch_statistics_are_those_of_a_loop_over_places(height: int, width: int, side: int) -> None:
    """A map of 6 x 6 is resized to 8 x 8 first."""
    maps = drawn(3, 2, height, width)
    size = [side * -(-height // side), side * -(-width // side)]
    resized = F.interpolate(maps, size, mode="bilinear", align_corners=False)

    means, variances = patch_statistics(maps, side)

    expected = [
        resized[:, :, top : top + side, left : left + side].flatten()
        for top in range(0, size[0], side)
        for left in range(0, size[1], side)
    ]
    assert len(means) == len(expected) == size[0] * size[1] // side**2
    assert torch.allclose(means, torch.stack([place.mean() for place in expected]), rtol=1e-12)
    variance = torch.stack([((place - place.mean()) ** 2).mean() for place in expected])
    assert torch.allclose(variances, variance, rtol=1e-10)


def test_what_enters_has_the_value_of_the_average_and_the_gradient_of_the_batch() -> None:
    """The distance's gradient is that of ||E' - R|| at the value E'."""
    average, real, weight = drawn(5, seed=1), drawn(5, seed=2), drawn(5, 4, seed=3)
    images = drawn(4, seed=4).requires_grad_()
    moved = 0.8 * average + 0.2 * (weight @ images.detach())

    update_average(average, weight @ images, 0.8)
    distance = (real - entering(average, weight @ images)).norm()
    (gradient,) = torch.autograd.grad(distance, images)

    assert torch.allclose(average, moved, rtol=1e-12)
    assert float(distance.detach()) == pytest.approx(float((real - moved).norm()), rel=1e-12)
    expected = weight.T @ ((moved - real) / (moved - real).norm())
    assert torch.allclose(gradient, expected, rtol=1e-10)


def watched(arch: str, decay: float, seed: int = 0) -> tuple[nn.Module, WatchedNet, dict[str, Tensor]]:
    """Return a network in float64, watched, with real statistics that are drawn."""
    net = build_net(arch, (3, 16, 16), 3, seed=seed).double().eval().requires_grad_(False)
    for index, layer in enumerate(watched_layers(net, "norms")):
        layer.running_mean.copy_(drawn(8, seed=10 + index))
        layer.running_var.copy_(drawn(8, seed=20 + index).abs() + 0.5)
    shapes: dict[int, list[Tensor]] = {}

    def note(index: int, maps: Tensor) -> None:
        shapes[index] = [*channel_statistics(maps), *patch_statistics(maps, 4)]

    with watching(watched_layers(net, "convolutions"), note):
        net(drawn(2, 3, 16, 16))
    tensors = {
        f"{index}.{number}": drawn(len(value), seed=100 + 10 * index + number)
        for index, values in shapes.items()
        for number, value in enumerate(values)
    }
    return net, WatchedNet(net, PoolEntry({}, tensors), CONVOLUTIONS, decay), tensors


def test_without_a_running_average_the_distances_are_the_plain_ones() -> None:
    """Layer by layer, convolutions and batch norms in the order of `modules()`."""
    net, watch, real = watched("convnet2_w8_bn", 0.0)
    images = drawn(6, 3, 16, 16, seed=5)
    inputs: list[Tensor] = []
    layers = [module for module in net.modules() if isinstance(module, (nn.Conv2d, nn.BatchNorm2d))]
    with watching(layers, lambda index, maps: inputs.append(maps.clone())):
        net(images)
    by_layer = {id(module): maps for module, maps in zip(executed(net), inputs, strict=True)}

    logits, distances = watch(images, torch.Generator(), 0.0)

    assert torch.equal(logits, net(images))
    assert len(distances) == len(layers) == 4
    convolutions = 0
    for layer, distance in zip(layers, distances, strict=True):
        maps = by_layer[id(layer)]
        batch = channel_statistics(maps)
        targets = [getattr(layer, "running_mean", None), getattr(layer, "running_var", None)]
        if isinstance(layer, nn.Conv2d):
            batch = (*batch, *patch_statistics(maps, 4))
            targets = [real[f"{convolutions}.{number}"] for number in range(4)]
            convolutions += 1
        expected = sum((value - target).norm() for value, target in zip(batch, targets, strict=True))
        assert float(distance) == pytest.approx(float(expected), rel=1e-10)


def executed(net: nn.Module) -> list[nn.Module]:
    """Return a ConvNet's convolutions and norms in the order of the forward pass."""
    chain: Any = net.body  # type: ignore[union-attr]
    return [layer for pair in zip(chain.convs, chain.norms, strict=True) for layer in pair]


def test_a_convolution_that_is_left_out_keeps_its_average_and_adds_nothing() -> None:
    net, watch, _ = watched("convnet2_w8_bn", 0.8)
    images = drawn(6, 3, 16, 16, seed=5)
    layers = [module for module in net.modules() if isinstance(module, (nn.Conv2d, nn.BatchNorm2d))]
    skipped = 0
    for seed in range(6):
        before = [[average.clone() for average in averages] for averages in watch.averages]
        _, distances = watch(images, torch.Generator().manual_seed(seed), 0.5)
        drawn_out = (torch.rand(4, generator=torch.Generator().manual_seed(seed)) < 0.5).tolist()
        for index, layer in enumerate(layers):
            out = drawn_out[index] and isinstance(layer, nn.Conv2d)
            skipped += out
            equal = [torch.equal(a, b) for a, b in zip(before[index], watch.averages[index], strict=True)]
            assert all(equal) if out else not any(equal)
            assert (float(distances[index]) == 0) is out
    assert 0 < skipped < 12


def test_a_network_with_instance_norm_has_convolutions_alone() -> None:
    _, watch, _ = watched("convnet2_w8", 0.8)

    _, distances = watch(drawn(4, 3, 16, 16), torch.Generator(), 0.0)

    assert [len(averages) for averages in watch.averages] == [4, 4]
    assert all(float(distance) > 0 for distance in distances)


def test_real_statistics_are_the_weighted_means_of_batches(toy: Any) -> None:
    """By hand: 24 images in batches of 7, 7, 7 and 3."""
    dataset = toy()
    entry = measured(dataset, CONVOLUTIONS)
    net = LocalPool(PoolTrainer(dataset, dataset.train(), CPU)).get([network(dataset)])[0].module()
    from ddray.seeding import derive

    images = normalized_space(dataset).encode(dataset.train().images)
    order = torch.randperm(24, generator=derive(0, "pool", "activations"))
    first = net.body.convs[0]
    expected = [torch.zeros(8).double(), torch.zeros(8).double()]
    of_images = [torch.zeros(3).double(), torch.zeros(3).double(), torch.zeros(16).double()]
    for index in order.split(7):
        for total, value in zip(of_images, [*channel_statistics(images[index])], strict=False):
            total += len(index) / 24 * value.double()
        of_images[2] += len(index) / 24 * patch_statistics(images[index], 4)[0].double()
        maps = F.avg_pool2d(F.relu(net.body.norms[0](first(images[index]))), 2).detach()
        for total, value in zip(expected, channel_statistics(maps), strict=True):
            total += len(index) / 24 * value.double()

    layers = layer_statistics(entry, CPU, torch.float64)

    assert [len(layer) for layer in layers] == [4, 4]
    assert torch.allclose(torch.cat(layers[0][:2]), torch.cat(of_images[:2]), rtol=1e-5, atol=1e-7)
    assert torch.allclose(layers[0][2], of_images[2], rtol=1e-5, atol=1e-7)
    assert torch.allclose(torch.cat(layers[1][:2]), torch.cat(expected), rtol=1e-4, atol=1e-6)
    assert entry.meta["num_images"] == 24


def test_second_moments_give_the_covariance_of_all_real_images(toy: Any) -> None:
    dataset = toy()
    entry = measured(dataset, NORMS)
    net = LocalPool(PoolTrainer(dataset, dataset.train(), CPU)).get([network(dataset)])[0].module()
    images = normalized_space(dataset).encode(dataset.train().images)
    with torch.no_grad():
        rows = net.body.norms[0](net.body.convs[0](images)).mean((2, 3)).double()

    mean, second = layer_statistics(entry, CPU, torch.float64)[0]

    assert torch.allclose(mean, rows.mean(0), rtol=1e-5, atol=1e-7)
    assert torch.allclose(covariance_of(mean, second), rows.T.cov(correction=0), rtol=1e-3, atol=1e-7)


def test_views_of_real_images_are_drawn_and_the_entry_is_shared(toy: Any, ddray_home: Path) -> None:
    """Its key has the network's; it does not depend on who measures it; the list names its kind."""
    dataset = toy()
    plain, padded, resized = (
        measured(dataset, CONVOLUTIONS.model_copy(update=update))
        for update in ({}, {"crop": "pad", "padding": 2}, {"crop": "resized"})
    )

    again = measured(dataset, CONVOLUTIONS.model_copy(update={"crop": "pad", "padding": 2}))
    kinds = [model["kind"] for model in list_pool().dump()["models"]]

    assert sorted(kinds) == ["activations"] * 3 + ["supervised"]
    assert again.meta == padded.meta
    assert again.meta["times_trained"] == 1
    assert again.meta["spec"]["parents"] == [network(dataset).key]
    assert len({float(entry.tensors["0.0"][0]) for entry in (plain, padded, resized)}) == 3


def test_the_images_are_those_of_the_networks_split(toy: Any) -> None:
    dataset = toy(counts=(20, 20, 20))
    part, _ = carve_val(dataset.train(), seed=0)

    whole = measured(dataset, NORMS, images=part)
    without_val = measured(dataset, NORMS, split="train-val0")

    assert whole.meta["num_images"] == 60
    assert without_val.meta["num_images"] == len(part) < 60


def test_a_network_without_the_layers_is_refused(toy: Any) -> None:
    with pytest.raises(InputError, match="arch must have norms for their activations, convnet2_w8 has none"):
        measured(toy(), NORMS, arch="convnet2_w8")


def test_a_network_that_leaves_a_layer_out_is_refused(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        activations, "watched_layers", lambda net, layers: [*watched_layers(net, layers), nn.BatchNorm2d(8)]
    )
    with pytest.raises(InputError, match="arch must use each of its norms once for their statistics"):
        measured(toy(), NORMS)


def test_what_is_not_a_recipe_is_refused() -> None:
    with pytest.raises(InputError, match="statistics"):
        ActivationRecipe.parse({"layers": "norms", "statistics": ["mean"]})


def test_hooks_are_gone_after_a_pass() -> None:
    net = build_net("convnet2_w8_bn", random_dataset().image_shape, 3, seed=0).eval()
    seen: list[int] = []
    with watching(watched_layers(net, "norms"), lambda index, maps: seen.append(index), outputs=True):
        net(torch.zeros(2, 3, 16, 16))

    net(torch.zeros(2, 3, 16, 16))

    assert seen == [0, 1]
