"""DWA: the move of the weights against torch.func, what it changes and what it leaves; resume, presets."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad

from ddray.distillation.method import Target
from ddray.errors import InputError
from ddray.methods.dwa import DWAConfig, move_weights, preset
from ddray.methods.families.recovery import recover_loss
from ddray.nets import build_net
from tests.gpu.fake_cuda import FakeCuda
from tests.gpu.runs import started as started_on

QUICK = {"teacher_arch": "convnet2_w8_bn", "teacher_epochs": 1}
RHO = 0.3


def net_and_batch() -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network with batch norm in float64, in eval mode, images and labels."""
    net = build_net("convnet2_w8_bn", (3, 16, 16), 3, seed=0).double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for norm in (module for module in net.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.copy_(torch.randn(8, generator=generator))
        norm.running_var.copy_(torch.rand(8, generator=generator) + 0.5)
    images = torch.randn(6, 3, 16, 16, generator=generator, dtype=torch.float64)
    return net, images, torch.arange(6) % 3


def flat(net: nn.Module) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in net.parameters()]).clone()


def by_torch_func(net: nn.Module, images: Tensor, labels: Tensor, num_moves: int) -> Tensor:
    """Return the moved weights as one vector: grad of functional_call over one flat vector, K times."""
    shapes = {name: weight.shape for name, weight in net.named_parameters()}
    buffers = dict(net.named_buffers())

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes.values()])
        weights = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return F.cross_entropy(functional_call(net, {**weights, **buffers}, (images,)), labels)

    vector = flat(net)
    for _ in range(num_moves):
        gradient = grad(loss)(vector)
        vector = vector + RHO / num_moves * gradient / gradient.norm()
    return vector


@pytest.mark.parametrize("num_moves", [1, 2, 12])
def test_the_move_is_that_of_torch_func_on_one_vector(num_moves: int) -> None:
    net, images, labels = net_and_batch()
    expected = by_torch_func(net, images, labels, num_moves)
    before = flat(net)

    move_weights(net, images, labels, rho=RHO, num_moves=num_moves)

    torch.testing.assert_close(flat(net), expected, rtol=1e-9, atol=1e-12)
    length = float((flat(net) - before).norm())
    assert 0.5 * RHO < length <= RHO * (1 + 1e-9)
    assert not any(weight.requires_grad for weight in net.parameters())


def test_two_moves_of_half_the_length_are_not_one_of_it() -> None:
    ends = []
    for num_moves in (1, 2):
        net, images, labels = net_and_batch()
        move_weights(net, images, labels, rho=RHO, num_moves=num_moves)
        ends.append(flat(net))

    assert float((ends[0] - ends[1]).norm()) > 1e-4 * RHO


def test_the_cross_entropy_rises_and_the_running_statistics_stay() -> None:
    net, images, labels = net_and_batch()
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    before = F.cross_entropy(net(images), labels)

    move_weights(net, images, labels, rho=RHO, num_moves=12)

    assert float(F.cross_entropy(net(images), labels)) > float(before) + 1e-3
    assert buffers
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in net.named_buffers())


def test_batch_norms_weights_move_too() -> None:
    net, images, labels = net_and_batch()
    before = {name: weight.clone() for name, weight in net.named_parameters()}

    move_weights(net, images, labels, rho=RHO, num_moves=2)

    moved = {name for name, weight in net.named_parameters() if not torch.equal(weight, before[name])}
    norms = [name for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert {f"{name}.weight" for name in norms} | {f"{name}.bias" for name in norms} <= moved


def test_a_gradient_of_0_moves_nothing() -> None:
    net = nn.Linear(2, 1).requires_grad_(False)  # one class: the cross entropy is 0 whatever the weights
    before = flat(net)

    move_weights(net, torch.randn(3, 2), torch.zeros(3, dtype=torch.int64), rho=RHO, num_moves=2)

    assert torch.equal(flat(net), before)


def started(
    planned: Any, toy: Any, method: str = "dwa", ipc: int = 2, steps: int = 6, **settings: Any
) -> Any:
    _, ctx, distiller = planned(method, toy(), ipc=ipc, steps=steps, method={**QUICK, **settings})
    distiller.setup(ctx)
    return distiller


def test_without_the_move_and_its_start_a_step_is_sre2ls(planned: Any, toy: Any) -> None:
    """rho 0, r_var 1, noise: the same losses, gradients and images, bit for bit."""
    plain = {"squeeze": "dsa", "init": "noise", "r_var": 1.0, "lr": 0.1, "bn_weight": 0.05}
    ours = started(planned, toy, ipc=1, rho=0.0, **plain)
    theirs = started(planned, toy, "sre2l", ipc=1)

    for _ in range(6):
        assert torch.equal(ours.step()["loss"], theirs.step()["loss"])
        assert torch.equal(ours._engine._batch.grad, theirs._engine._images.grad)
    assert torch.equal(ours.snapshot().images, theirs.snapshot().images)


def test_every_index_has_a_move_of_its_own_and_begins_from_the_squeezed_network(
    planned: Any, toy: Any
) -> None:
    distiller = started(planned, toy, rho=RHO)
    engine = distiller._engine
    squeezed = flat(engine._recovery.net)
    thetas = []
    for _ in range(6):
        distiller.step()
        thetas.append(flat(engine._recovery.net))

    assert all(torch.equal(theta, thetas[0]) for theta in thetas[:3])
    assert all(torch.equal(theta, thetas[3]) for theta in thetas[3:])
    assert not torch.equal(thetas[0], thetas[3])
    for theta in (thetas[0], thetas[3]):
        assert 0.5 * RHO < float((theta - squeezed).norm()) <= RHO * (1 + 1e-3)


def test_the_move_and_the_first_iteration_see_one_view_and_an_index_learns_its_own_images(
    planned: Any, toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    distiller = started(planned, toy)
    engine, start = distiller._engine, distiller.snapshot().images
    views: list[Tensor] = []
    view = engine._recovery.view

    def note(*args: Any) -> Tensor:
        result: Tensor = view(*args)
        views.append(result.detach())
        return result

    monkeypatch.setattr(engine._recovery, "view", note)
    distiller.step()
    images = distiller.snapshot().images

    assert len(views) == 2
    assert torch.equal(views[0], views[1])
    assert not any(torch.equal(images[row], start[row]) for row in (0, 2, 4))
    assert all(torch.equal(images[row], start[row]) for row in (1, 3, 5))


def test_the_moved_weights_make_the_loss(planned: Any, toy: Any) -> None:
    """The loss of a step is sre2l's under the moved network, by hand."""
    distiller = started(planned, toy, rho=RHO, jitter=0)
    engine = distiller._engine
    start = engine._images[:, 0].clone()

    loss = distiller.step()["loss"]

    statistics = engine._recovery.statistics
    with statistics.watch(), torch.no_grad():
        logits = engine._recovery.net(start)
    expected = recover_loss(logits, torch.arange(3), statistics.distances, weight=0.01, first=10.0)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_the_pools_network_stays_as_it_is(planned: Any, toy: Any) -> None:
    distiller = started(planned, toy, rho=RHO)
    engine = distiller._engine
    entry = engine._ctx.pool.get(distiller.pool_specs(engine._ctx))[0]

    def digest() -> str:
        tensors = engine._ctx.pool.get(distiller.pool_specs(engine._ctx))[0].tensors
        return hashlib.sha256(
            b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))
        ).hexdigest()

    before = digest()
    for _ in range(6):
        distiller.step()

    assert digest() == before
    assert not torch.equal(flat(engine._recovery.net), flat(entry.module()))


@pytest.mark.parametrize("cut", [2, 3, 4])
def test_a_run_cut_within_an_index_recomputes_its_weights(planned: Any, toy: Any, cut: int) -> None:
    whole, first, second = (started(planned, toy, rho=RHO) for _ in range(3))
    for _ in range(6):
        whole.step()
    for _ in range(cut):
        first.step()
    second.load_state_dict(first.state_dict())

    assert torch.equal(flat(second._engine._recovery.net), flat(first._engine._recovery.net))
    for _ in range(cut, 6):
        second.step()
    assert torch.equal(second.snapshot().images, whole.snapshot().images)
    assert sorted(whole.state_dict()) == ["images", "moments", "start", "step"]


def test_steps_are_shared_out_and_an_image_without_one_stays_real(planned: Any, toy: Any) -> None:
    few = started(planned, toy, ipc=3, steps=2)
    start = few.snapshot().images
    assert few._engine._ends == [0, 1, 2]
    for _ in range(2):
        few.step()
    images = few.snapshot().images

    changed = [not torch.equal(images[row], start[row]) for row in range(9)]
    assert changed == [False, True, True] * 3
    assert started(planned, toy, ipc=3, steps=11)._engine._ends == [3, 7, 11]


def test_one_graph_serves_every_index_though_its_weights_move() -> None:
    with FakeCuda() as gpu:
        ctx, distiller = started_on("dwa", "cuda", steps=60, ipc=2, rho=RHO)
        distiller.setup(ctx)
        thetas = []
        for step in range(60):
            gpu.syncs.clear()
            distiller.step()
            assert not (gpu.syncs and step), "only the capture waits"
            if step in (29, 30):
                thetas.append([w.clone() for w in distiller._engine._recovery.net.parameters()])

        assert distiller._engine._graphs.captured
        assert len(distiller._engine._graphs._graphs) == 1
        assert any(not torch.equal(a, b) for a, b in zip(*thetas, strict=True))


def test_images_stay_pixels(planned: Any, toy: Any) -> None:
    distiller = started(planned, toy, lr=5.0)
    for _ in range(6):
        distiller.step()

    pixels = distiller._engine._ctx.space.decode(distiller.snapshot().images)
    assert -1e-5 < float(pixels.min()) < float(pixels.max()) < 1 + 1e-5


@pytest.mark.parametrize(
    ("side", "iterations", "method"),
    [  # the shipped commands for CIFAR, Tiny-ImageNet and ImageNet
        (32, 1000, {"teacher_epochs": 200}),
        (64, 2000, {"teacher_epochs": 100, "lr": 0.1, "crop": "fixed"}),
        (224, 2000, {"squeeze": "dsa", "r_var": 2.0, "jitter": 32, "num_moves": 15, "crop": "fixed"}),
    ],
)
@pytest.mark.parametrize("name", ["paper", "repo"])
def test_presets_are_the_shipped_commands(
    name: str, side: int, iterations: int, method: dict[str, Any]
) -> None:
    settings = preset(name, Target("pictures", (3, side, side), 10, 10))
    config = DWAConfig.parse(settings["method"])

    assert settings["steps"] == 10 * iterations
    assert config == DWAConfig.parse(method)
    assert (config.bn_weight, config.rho, config.init, config.first_bn_factor) == (
        0.01,
        0.015,
        "random",
        10.0,
    )
    assert (config.lr, config.r_var) == (0.1 if side == 64 else 0.25, 2.0 if side == 224 else 11.0)


def test_a_network_without_batch_norm_and_whitened_pixels_are_refused(planned: Any, toy: Any) -> None:
    _, ctx, method = planned("dwa", toy(), steps=1, method={**QUICK, "teacher_arch": "convnet2_w8"})
    with pytest.raises(
        InputError, match="teacher_arch must have batch norm for dwa, convnet2_w8 has none; add _bn"
    ):
        method.setup(ctx)
    _, ctx, method = planned("dwa", toy(), steps=1, pixel_space="zca", method=QUICK)
    with pytest.raises(InputError, match="dwa needs pixel_space=normalized, got zca"):
        method.setup(ctx)
