from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddray.distillation.method import Target
from ddray.errors import InputError
from ddray.methods.families.recovery import BatchStatistics, batch_view, recover_loss
from ddray.methods.sre2l import SRe2LConfig, preset
from ddray.nets import build_net
from ddray.training.crops import draw_boxes
from tests.gpu.fake_cuda import FakeCuda
from tests.gpu.runs import started

QUICK = {"teacher_arch": "convnet2_w8_bn", "teacher_epochs": 1}


def test_the_distances_are_those_of_each_layers_input() -> None:
    """Against a walk through the network layer by layer, in float64."""
    net = build_net("convnet2_w8_bn", (3, 16, 16), 3, seed=0).double().eval()
    generator = torch.Generator().manual_seed(0)
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.running_mean.copy_(torch.randn(8, generator=generator))
        norm.running_var.copy_(torch.rand(8, generator=generator) + 0.5)
    images = torch.randn(6, 3, 16, 16, generator=generator, dtype=torch.float64)

    statistics = BatchStatistics(net)
    with statistics.watch():
        net(images)

    x, expected = images, []
    for conv, norm in zip([m for m in net.modules() if isinstance(m, nn.Conv2d)], norms, strict=True):
        maps = conv(x)
        flat = maps.permute(1, 0, 2, 3).reshape(8, -1)
        expected.append(
            (flat.mean(1) - norm.running_mean).norm()
            + (flat.var(1, unbiased=False) - norm.running_var).norm()
        )
        x = F.avg_pool2d(F.relu(norm(maps)), 2)
    assert len(statistics) == 2
    assert torch.allclose(torch.stack(statistics.distances), torch.stack(expected), rtol=1e-9)
    net(images)
    assert len(statistics.distances) == 2  # the hooks are gone


def test_batches_that_go_through_at_once_have_the_gradient_of_their_sum(planned: Any, toy: Any) -> None:
    _, ctx, method = planned("sre2l", toy(), ipc=4, steps=1, method=QUICK)
    method.setup(ctx)
    recovery = method._engine._recovery
    recovery.net.double()
    views = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(3).repeat(4)

    loss, gradient = recovery.gradient(views, labels)

    parts = [recovery.gradient(part, labels[:3]) for part in views.split(3)]
    torch.testing.assert_close(loss, sum(part[0] for part in parts), rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient, torch.cat([part[1] for part in parts]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("budget", "num_batches"), [("1GiB", 3), ("1KiB", 1)])
def test_a_gpu_recovers_as_many_batches_at_once_as_fit(budget: str, num_batches: int) -> None:
    with FakeCuda() as gpu:
        settings = {"memory_budget": budget}
        ctx, distiller = started("sre2l", "cuda", steps=60, ipc=3, settings=settings, crop="fixed")
        distiller.setup(ctx)
        distiller.step()
        gpu.syncs.clear()
        distiller.step()
        assert not gpu.syncs

    assert distiller._engine._num_batches == num_batches
    assert distiller._engine._graphs.captured


def test_the_first_layers_distance_counts_tenfold() -> None:
    logits, labels = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
    distances = [torch.tensor(2.0), torch.tensor(3.0), torch.tensor(5.0)]

    loss = recover_loss(logits, labels, distances, weight=0.1, first=10.0)

    assert float(loss) == pytest.approx(float(F.cross_entropy(logits, labels)) + 0.1 * 28, rel=1e-6)


def test_images_stay_pixels_and_the_loss_falls(planned: Any, toy: Any) -> None:
    dataset = toy()
    _, ctx, method = planned("sre2l", dataset, ipc=2, steps=30, method=QUICK)
    method.setup(ctx)

    losses = [float(method.step()["loss"]) for _ in range(30)]

    pixels = ctx.space.decode(method.snapshot().images)
    assert -1e-5 < float(pixels.min()) < float(pixels.max()) < 1 + 1e-5
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_a_batch_is_one_image_of_each_class(planned: Any, toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ctx, method = planned("sre2l", toy(), ipc=2, steps=1, method=QUICK)
    method.setup(ctx)
    seen: list[list[int]] = []
    real = recover_loss

    def note(logits: Any, labels: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(labels.tolist())
        return real(logits, labels, *args, **kwargs)

    monkeypatch.setattr("ddray.methods.families.recovery.recover_loss", note)
    method.step()

    assert seen == [[0, 1, 2], [0, 1, 2]]


def test_a_network_without_batch_norm_is_refused(planned: Any, toy: Any) -> None:
    _, ctx, method = planned("sre2l", toy(), steps=1, method={**QUICK, "teacher_arch": "convnet2_w8"})
    with pytest.raises(
        InputError, match="teacher_arch must have batch norm for sre2l, convnet2_w8 has none; add _bn"
    ):
        method.setup(ctx)


def test_whitened_pixels_are_refused(planned: Any, toy: Any) -> None:
    _, ctx, method = planned("sre2l", toy(), steps=1, pixel_space="zca", method=QUICK)
    with pytest.raises(InputError, match="sre2l needs pixel_space=normalized, got zca"):
        method.setup(ctx)


@pytest.mark.parametrize(
    ("side", "steps", "method"),
    [  # recover_cifar.sh, recover_tiny.sh and recover.sh, with what they leave at its default
        (32, 1000, {"lr": 0.25, "bn_weight": 0.01, "teacher_epochs": 200, "squeeze": "crop_flip"}),
        (64, 4000, {"lr": 0.1, "bn_weight": 1.0, "jitter": 4, "jitter_both_ways": True, "crop": "fixed"}),
        (224, 4000, {"lr": 0.25, "bn_weight": 0.01, "jitter": 32, "crop": "fixed"}),
    ],
)
def test_repo_is_what_the_shipped_commands_run(side: int, steps: int, method: dict[str, Any]) -> None:
    target = Target("pictures", (3, side, side), 10, 10)
    settings, paper = preset("repo", target), preset("paper", target)

    assert settings["steps"] == steps
    assert SRe2LConfig.parse(settings["method"]) == SRe2LConfig.parse(method)
    ours = SRe2LConfig.parse(paper.get("method", {}))
    assert (ours.crop, ours.jitter_both_ways, ours.first_bn_factor) == ("none", False, 10.0)
    assert (ours.lr, ours.bn_weight) == ((0.25, 0.01) if side > 64 else (0.1, 0.05))


def test_a_batch_is_cropped_mirrored_and_rolled_as_one() -> None:
    """Against torchvision's crop of the same box, image by image; every draw is the generator's."""
    from torchvision.transforms.functional import resized_crop

    images = torch.rand(3, 2, 12, 12, generator=torch.Generator().manual_seed(0))
    mirrored = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        top, left, height, width = draw_boxes(1, (12, 12), generator)[0].tolist()
        flip = bool(torch.rand(1, generator=generator) < 0.5)
        down, right = torch.randint(-2, 3, (2,), generator=generator).tolist()
        mirrored += flip

        view = batch_view(images, torch.Generator().manual_seed(seed), min_area=0.08, rolls=(-2, 2))

        for image, viewed in zip(images, view, strict=True):
            expected = resized_crop(image[None], top, left, height, width, [12, 12], antialias=False)[0]
            expected = expected.flip(2) if flip else expected
            expected = torch.roll(expected, (down, right), (1, 2))
            inner = (expected - viewed).abs().median()  # a box's rim is padded by its own or the next pixel
            assert float(inner) < 1e-5
    assert 0 < mirrored < 20


def test_rolls_go_one_way_by_default_and_both_ways_in_the_tiny_command() -> None:
    image = torch.zeros(1, 1, 9, 9)
    image[..., 4, 4] = 1

    def offsets(rolls: tuple[int, int]) -> set[int]:
        views = [
            batch_view(image, torch.Generator().manual_seed(seed), min_area=None, rolls=rolls)
            for seed in range(80)
        ]
        return {int(index) - 4 for view in views for index in torch.nonzero(view[0, 0])[0]}

    assert offsets((0, 3)) == {0, 1, 2, 3}
    assert offsets((-3, 3)) == {-3, -2, -1, 0, 1, 2, 3}


def test_the_shipped_tiny_command_runs(planned: Any, toy: Any) -> None:
    settings = {**QUICK, "crop": "fixed", "jitter_both_ways": True}
    _, ctx, method = planned("sre2l", toy(), ipc=2, steps=12, method=settings)
    method.setup(ctx)

    losses = [float(method.step()["loss"]) for _ in range(12)]

    assert all(map(math.isfinite, losses))
    assert sum(losses[-4:]) < sum(losses[:4])
