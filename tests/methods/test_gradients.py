"""DC and DSA: the distance of gradients by hand, and steps replayed in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.methods import get_method
from ddray.methods.families.matching import batches
from ddray.methods.families.matching import gradients as gradients_module
from ddray.methods.families.matching.batches import ClassBatches
from ddray.methods.families.matching.gradients import ClassGradients, gradient_distance, loops
from ddray.nets import build_net
from ddray.seeding import derive_seed
from ddray.training.dsa import dsa_for
from tests.gpu.fake_cuda import FakeCuda
from tests.gpu.runs import started

BATCH, IPC, LR = 5, 2, 0.1


def gradients(seed: int) -> list[Tensor]:
    """A convolution's weight and bias, a normalisation layer's two vectors, a linear weight and bias."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 2, 3, 3), (4,), (4,), (4,), (3, 8), (3,)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / (math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b)) + 1e-6)


def distance(real: Sequence[Tensor], synthetic: Sequence[Tensor], metric: Any) -> Tensor:
    """The distance of one class's gradients."""
    a, b = ([gradient[None] for gradient in tensors] for tensors in (real, synthetic))
    return gradient_distance(a, b, metric=metric).sum()


def test_layerwise_distance_goes_by_output_and_leaves_vectors_out() -> None:
    real, synthetic = gradients(1), gradients(2)

    expected = 0.0
    for layer in (0, 4):
        for one, other in zip(
            real[layer].flatten(1).tolist(), synthetic[layer].flatten(1).tolist(), strict=True
        ):
            expected += 1 - cosine(one, other)
    assert float(distance(real, synthetic, "layerwise")) == pytest.approx(expected, rel=1e-12)
    changed = [g if g.ndim > 1 else g + 1 for g in synthetic]
    assert float(distance(real, changed, "layerwise")) == pytest.approx(expected, rel=1e-12)


def test_the_other_distances_take_all_in_one() -> None:
    real, synthetic = gradients(1), gradients(2)
    a, b = ([float(x) for g in tensors for x in g.flatten()] for tensors in (real, synthetic))

    squared = sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
    assert float(distance(real, synthetic, "mse")) == pytest.approx(squared, rel=1e-12)
    assert float(distance(real, synthetic, "cosine")) == pytest.approx(1 - cosine(a, b), rel=1e-6)


@pytest.mark.parametrize("metric", ["layerwise", "mse", "cosine"])
def test_equal_gradients_are_no_distance_apart(metric: Any) -> None:
    real = gradients(3)

    assert float(distance(real, real, metric)) == pytest.approx(0, abs=1e-5)
    assert float(distance(real, gradients(4), metric)) > 0.1


def test_distances_of_several_classes_are_those_of_each() -> None:
    real, synthetic = ([gradients(seed) for seed in seeds] for seeds in ((1, 2, 3), (4, 5, 6)))
    stacked = ([torch.stack(parts) for parts in zip(*each, strict=True)] for each in (real, synthetic))
    a, b = stacked

    for metric in ("layerwise", "mse", "cosine"):
        expected = [distance(one, other, metric) for one, other in zip(real, synthetic, strict=True)]
        torch.testing.assert_close(gradient_distance(a, b, metric=metric), torch.stack(expected))


CONVNETS = [f"convnet2_w8{suffix}" for suffix in ("", "_bn", "_ln", "_gn", "_nonorm", "_max", "_sigmoid")]


@pytest.mark.parametrize("arch", [*CONVNETS, "vit_tiny"])
def test_gradients_of_several_classes_are_those_of_each(arch: str) -> None:
    """Values and second derivatives, under every norm and under attention; in float64."""
    net = build_net(arch, (3, 16, 16), 3, seed=0).double()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
            module.running_mean += 0.3
    gradients_of = ClassGradients(net)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 3, 16, 16, generator=generator, dtype=torch.float64)
    weights = [torch.randn(3, *param.shape, generator=generator).double() for param in net.parameters()]

    def results(groups: Sequence[slice]) -> tuple[list[Tensor], Tensor]:
        leaf = images.clone().requires_grad_(True)
        parts = [
            gradients_of(leaf[2 * group.start : 2 * group.stop], torch.arange(3)[group], create_graph=True)
            for group in groups
        ]
        gradients = [torch.cat(part) for part in zip(*parts, strict=True)]
        # Cubes, so that a second derivative that were missing would show.
        total = sum((g**3 * weight).sum() for g, weight in zip(gradients, weights, strict=True))
        return [gradient.detach() for gradient in gradients], torch.autograd.grad(total, leaf)[0]

    expected, expected_outer = results([slice(0, 1), slice(1, 2), slice(2, 3)])
    actual, actual_outer = results([slice(0, 3)])

    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(actual_outer, expected_outer, rtol=1e-6, atol=1e-12)
    assert not any(gradient.requires_grad for gradient in gradients_of(images, torch.arange(3)))


@pytest.mark.parametrize("method", ["dc", "dsa"])
@pytest.mark.parametrize(("budget", "sizes"), [("1GiB", [3]), ("1GiB", [2, 1]), ("1KiB", [1, 1, 1])])
def test_a_gpu_matches_groups_of_classes_within_the_budget(
    method: str, budget: str, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a fake one: the images of the CPU, which goes class by class, and no wait in a step."""
    settings = {"outer_loop": 2, "inner_loop": 30, "batch_real": 9}
    ctx, on_cpu = started(method, "cpu", steps=60, **settings)
    on_cpu.setup(ctx)
    expected = [float(on_cpu.step()["loss"]) for _ in range(2)]
    if sizes == [2, 1]:
        monkeypatch.setattr(gradients_module, "class_groups", lambda *_: [slice(0, 2), slice(2, 3)])

    with FakeCuda() as gpu:
        ctx, distiller = started(method, "cuda", steps=60, settings={"memory_budget": budget}, **settings)
        distiller.setup(ctx)
        losses = [distiller.step()["loss"]]
        gpu.syncs.clear()
        losses.append(distiller.step()["loss"])
        assert not gpu.syncs
        assert [float(loss) for loss in losses] == pytest.approx(expected, rel=1e-4)
        images = distiller.snapshot().images

    engine = distiller._engine
    assert [group.stop - group.start for group in engine._groups] == sizes
    assert engine._graphs.captured
    assert engine._real_graphs.captured
    assert engine._branch._trainer.captured
    torch.testing.assert_close(images, on_cpu.snapshot().images, rtol=0, atol=1e-4)


def test_a_network_that_vmap_refuses_is_matched_class_by_class(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Batching rule not implemented for aten::new")

    monkeypatch.setattr(torch.func, "vmap", refuse)
    with FakeCuda():
        ctx, distiller = started("dc", "cuda", steps=1, batch_real=4)
        distiller.setup(ctx)
        assert torch.isfinite(distiller.step()["loss"])

    assert [group.stop for group in distiller._engine._groups] == [1, 2, 3]
    assert caplog.messages == ["classes are matched one by one (Batching rule not implemented for aten::new)"]


def replay(ctx: Any, settings: dict[str, Any], images: Tensor) -> tuple[float, Tensor]:
    """The first step in float64: outer updates of the images, epochs of the network between them."""
    num_classes, shape = ctx.dataset.num_classes, ctx.dataset.image_shape
    net = build_net(ctx.arch, shape, num_classes, seed=derive_seed(ctx.seed, "distill", "net", 1)).double()
    dsa = dsa_for(ctx.dataset.can_flip) if settings["augment"] == "dsa" else None
    batches = ClassBatches(ctx, BATCH)
    velocity, total = torch.zeros_like(images), 0.0

    def gradient(batch: Tensor, label: int, plan: Any, graph: bool) -> Any:
        labels = torch.full((len(batch),), label)
        seen = batch if plan is None else dsa.apply(batch, plan, labels)
        loss = F.cross_entropy(net(seen), labels)
        return torch.autograd.grad(loss, list(net.parameters()), create_graph=graph)

    for outer in range(1, settings["outer_loop"] + 1):
        generator = ctx.generator("step", 1, outer)
        net.train()
        if "bn" in ctx.arch:
            index = batches.draw(generator).view(num_classes, -1)[:, :16].flatten()
            with torch.no_grad():
                net(ctx.space.encode(ctx.split.images[index]).double())
            for module in net.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.eval()
        index = batches.draw(generator).view(num_classes, -1)
        plan = dsa.draw(num_classes, generator, shared_op=False) if dsa else None
        live = images.clone().requires_grad_(True)
        loss = torch.zeros((), dtype=torch.float64)
        for label in range(num_classes):
            real = ctx.space.encode(ctx.split.images[index[label]]).double()
            real_gradient = [g.detach() for g in gradient(real, label, plan, graph=False)]
            syn_gradient = gradient(live[IPC * label : IPC * (label + 1)], label, plan, graph=True)
            loss = loss + distance(real_gradient, syn_gradient, "layerwise")
        velocity = 0.5 * velocity + torch.autograd.grad(loss, live)[0]
        images = images - LR * velocity
        total += float(loss.detach())
        if outer < settings["outer_loop"]:
            net.train()
            labels = torch.arange(num_classes).repeat_interleave(IPC)
            for _ in range(settings["inner_loop"]):
                order = torch.randperm(len(labels), generator=generator)
                batch = images[order]
                if dsa is not None:
                    batch = dsa.apply(batch, dsa.draw(len(batch), generator, shared_op=True))
                step = torch.autograd.grad(F.cross_entropy(net(batch), labels[order]), list(net.parameters()))
                with torch.no_grad():
                    for parameter, change in zip(net.parameters(), step, strict=True):
                        parameter -= 0.05 * change
    return total / (num_classes * settings["outer_loop"]), images


@pytest.mark.parametrize("method", ["dc", "dsa"])
@pytest.mark.parametrize("arch", ["convnet2_w8", "convnet2_w8_bn"])
@pytest.mark.parametrize(("outer", "inner"), [(1, 1), (3, 2)])
def test_a_step_is_the_algorithm(
    method: str,
    arch: str,
    outer: int,
    inner: int,
    toy: Any,
    planned: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop_settings = {
        "augment": "dsa" if method == "dsa" else "none",
        "outer_loop": outer,
        "inner_loop": inner,
    }
    settings = {"batch_real": BATCH, "lr_img": LR, "lr_net": 0.05, **loop_settings}
    _, ctx, distiller = planned(method, toy(), ipc=IPC, seed=4, steps=1, arch=arch, method=settings)
    monkeypatch.setattr(batches, "_CHUNK_BYTES", 2 * 8 * 16 * 16 * 4)  # two images at a time
    distiller.setup(ctx)
    start = distiller.snapshot().images

    loss = float(distiller.step()["loss"])

    expected_loss, expected = replay(ctx, loop_settings, start.double())
    assert loss == pytest.approx(expected_loss, rel=1e-3)
    moved = distiller.snapshot().images.double() - start.double()
    assert float((moved - (expected - start)).norm() / (expected - start).norm()) < 1e-2


@pytest.mark.parametrize(
    ("ipc", "expected"),
    [(1, (1, 1)), (9, (1, 1)), (10, (10, 50)), (20, (20, 25)), (50, (50, 10)), (100, (50, 10))],
)
def test_loops_are_the_published_ones(ipc: int, expected: tuple[int, int]) -> None:
    assert loops(ipc) == expected


def test_presets_differ_as_the_papers_do(digits: Any) -> None:
    dc, dsa = (get_method(name).config_type() for name in ("dc", "dsa"))

    assert (dc.init, dc.augment, dc.lr_img, dc.momentum, dc.lr_net) == ("noise", "none", 0.1, 0.5, 0.01)
    assert (dsa.init, dsa.augment, dsa.lr_img, dsa.momentum, dsa.lr_net) == ("random", "dsa", 0.1, 0.5, 0.01)


def test_starts_are_noise_for_dc_and_real_images_for_dsa(toy: Any, planned: Any) -> None:
    real: list[bool] = []
    for method in ("dc", "dsa"):
        _, ctx, distiller = planned(method, toy(), ipc=IPC, steps=1, method={"batch_real": BATCH})
        distiller.setup(ctx)
        real_images = ctx.space.encode(ctx.split.images)
        real.append(
            all(
                (real_images - image).abs().amax((1, 2, 3)).min() < 1e-6
                for image in distiller.snapshot().images
            )
        )
    assert real == [False, True]
