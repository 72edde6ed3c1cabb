"""The engine's loop and step: what every training relies on, against plain implementations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddray.nets import build_net
from ddray.seeding import derive
from ddray.training import engine
from ddray.training.cutmix import Mixed, mixed_cross_entropy
from ddray.training.engine import Batch, Order, Rule, Step, cosine, decay_matrices, run

CPU = torch.device("cpu")
SHAPE = (3, 16, 16)
SGD = partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4)
RULE = Rule(mixed_cross_entropy, SGD)


def net_of(seed: int = 0, arch: str = "convnet2_w8") -> Any:
    return build_net(arch, SHAPE, 4, seed=seed).train()


def batch_of(num: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = derive(seed)
    return torch.randn(num, *SHAPE, generator=generator), torch.randint(0, 4, (num,), generator=generator)


def weights(net: nn.Module) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in net.parameters()])


class TestOrder:
    @pytest.mark.parametrize(
        ("num", "batch", "last", "sizes"),
        [
            (10, 4, "keep", [4, 4, 2]),
            (8, 4, "keep", [4, 4]),
            (3, 4, "keep", [3]),
            (10, 4, "drop", [4, 4]),
            (9, 4, "join", [4, 5]),
            (10, 4, "join", [4, 4, 2]),
            (1, 4, "join", [1]),
        ],
    )
    def test_epochs(self, num: int, batch: int, last: Any, sizes: list[int]) -> None:
        order = Order(num, batch, last)
        rows = list(islice(order.indices(derive(0), CPU), 2 * len(sizes)))

        assert order.sizes == sizes
        assert [len(index) for index in rows] == sizes * 2
        first, second = (torch.cat(rows[i:][: len(sizes)]) for i in (0, len(sizes)))
        for epoch in (first, second):
            assert len(epoch.unique()) == len(epoch) == sum(sizes)
        assert num < 4 or not torch.equal(first, second)

    def test_an_epoch_is_one_draw_of_the_generator(self) -> None:
        """A transform may draw from the generator of the order: nothing is drawn ahead."""
        generator, replay = derive(3), derive(3)
        for epoch, index in enumerate(islice(Order(5, 5).indices(generator, CPU), 3)):
            assert torch.equal(index, torch.randperm(5, generator=replay)), epoch
            assert torch.equal(torch.rand(2, generator=generator), torch.rand(2, generator=replay))

    def test_without_shuffling_rows_keep_their_order(self) -> None:
        rows = islice(Order(5, 3, shuffle=False).indices(derive(0), CPU), 4)
        assert [index.tolist() for index in rows] == [[0, 1, 2], [3, 4]] * 2


def test_a_run_does_its_steps_at_their_rates_and_ends_epochs() -> None:
    net, drawn = net_of(), []
    rates: list[float] = []
    losses: list[float] = []

    class Spy(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    def batches() -> Iterator[Batch]:
        for index in Order(10, 4).indices(derive(0), CPU):
            drawn.append(len(index))
            images, labels = batch_of(10)
            yield images[index], labels[index]

    step = Step([net], Rule(F.cross_entropy, Spy), num_steps=7)
    run(
        step,
        batches(),
        lr=lambda index: 0.1 * cosine(index, 7),
        epoch=3,
        on_epoch=lambda loss: losses.append(float(loss)),
    )

    assert drawn == [4, 4, 2, 4, 4, 2, 4]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7)
    for rate in rates:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert len(rates) == 7
    assert len(losses) == 2


def test_the_mean_loss_counts_rows() -> None:
    step = Step([net_of()], Rule(F.cross_entropy, torch.optim.SGD))
    twin = net_of()
    (images, labels), (more_images, more_labels) = batch_of(6, 1), batch_of(2, 2)
    with torch.no_grad():
        first, second = (
            float(F.cross_entropy(twin(x), y)) for x, y in ((images, labels), (more_images, more_labels))
        )
    step(images, labels)  # at rate 0
    step(more_images, more_labels)
    assert float(step.mean_loss()) == pytest.approx((6 * first + 2 * second) / 8)
    step.forget_loss()
    step(images, labels)
    assert float(step.mean_loss()) == pytest.approx(first)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_chunks_are_the_whole_batch(mixed: bool, clip: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = batch_of(50)
    targets: tuple[Tensor, ...] = (labels,)
    if mixed:
        targets = Mixed(images, torch.randperm(50, generator=derive(5)), 0.3).targets(labels)
    trained, sizes = [], []
    for pixels in (2**30, 16 * 16 * 16):
        monkeypatch.setattr(engine, "_CHUNK_PIXELS", pixels)
        net, seen = net_of(), []
        net.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(len(inputs[0])))
        step = Step([net], Rule(mixed_cross_entropy, SGD, clip), lr=0.1)
        for _ in range(3):
            step(images, *targets)
        trained.append((weights(net), step.mean_loss()))
        sizes.append(seen)
    assert sizes == [[50] * 3, [16, 16, 16, 2] * 3]
    torch.testing.assert_close(trained[0], trained[1], rtol=1e-5, atol=2e-5)
    assert not torch.allclose(trained[0][0], weights(net_of()), atol=1e-3)


@pytest.mark.parametrize(
    ("arch", "inputs"), [("convnet2_w8_bn", torch.zeros(100, *SHAPE)), (None, torch.zeros(100, 3))]
)
def test_batch_norm_and_vectors_are_never_cut(
    arch: str | None, inputs: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_CHUNK_PIXELS", 1)
    net = nn.Linear(3, 4) if arch is None else net_of(arch=arch)
    seen: list[int] = []
    net.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    Step([net], RULE)(inputs, torch.zeros(100, dtype=torch.int64))
    assert seen == [100]


@pytest.mark.parametrize("arch", ["convnet2_w8", "convnet2_w8_bn"])
@pytest.mark.parametrize("optimizer", [SGD, partial(torch.optim.AdamW, eps=0.1)])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_fused_networks_are_the_loops(arch: str, optimizer: Callable[..., Any], clip: float | None) -> None:
    rule = Rule(F.cross_entropy, optimizer, clip)
    loop, fused = [net_of(seed, arch) for seed in range(3)], [net_of(seed, arch) for seed in range(3)]
    batches = [batch_of(8, seed) for seed in range(3)]
    steps = [Step([net], rule, lr=0.01) for net in loop]
    both = Step(fused, rule, lr=0.01, fused=True)
    for _ in range(3):
        for step, batch in zip(steps, batches, strict=True):
            step(*batch)
        both(*(torch.cat(tensors) for tensors in zip(*batches, strict=True)))
    before = [weights(net) for net in fused]
    both.finish()

    assert all(torch.equal(old, weights(net_of(seed, arch))) for seed, old in enumerate(before))
    for a, b in zip(loop, fused, strict=True):
        torch.testing.assert_close(dict(a.state_dict()), dict(b.state_dict()), rtol=2e-3, atol=2e-4)
    mean = sum(float(step.mean_loss()) for step in steps) / 3
    assert float(both.mean_loss()) == pytest.approx(mean, rel=1e-4)


def test_a_clipped_gradient_bounds_the_move() -> None:
    net = net_of()
    before = weights(net)
    Step([net], Rule(F.cross_entropy, torch.optim.SGD, 0.01), lr=1.0)(*batch_of(9))
    assert float((weights(net) - before).norm()) == pytest.approx(0.01, rel=1e-3)


def test_bf16_computes_the_loss_in_float32() -> None:
    seen: list[torch.dtype] = []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        seen.append(logits.dtype)
        return F.cross_entropy(logits, labels)

    net, exact = net_of(), net_of()
    Step([net], Rule(loss, SGD, bf16=True), lr=0.1)(*batch_of(9))
    Step([exact], Rule(F.cross_entropy, SGD), lr=0.1)(*batch_of(9))
    assert seen == [torch.float32]
    assert 0 < float((weights(net) - weights(exact)).norm()) < 0.05


def test_a_step_leaves_no_gradient_of_others_in_the_update() -> None:
    """IDM's images are matched through networks of the queue, which leaves gradients there."""
    net = net_of()
    twin = copy.deepcopy(net)
    net(batch_of(3, 9)[0]).sum().backward()
    for trained in (net, twin):
        Step([trained], RULE, lr=0.1)(*batch_of(8))
    assert torch.equal(weights(net), weights(twin))


class TestGroups:
    def test_what_is_decayed(self) -> None:
        net: Any = nn.ModuleDict(
            {"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4), "head": nn.Linear(4, 2)}
        )
        net.register_parameter("token", nn.Parameter(torch.zeros(1, 1, 4)))

        decayed, others = decay_matrices(net)

        assert [id(param) for param in decayed["params"]] == [id(net["conv"].weight), id(net["head"].weight)]
        assert "weight_decay" not in decayed
        assert others["weight_decay"] == 0
        assert len(others["params"]) == 5  # two biases, the norm's pair, the token

    def test_every_group_has_the_rate_of_the_step(self) -> None:
        net, plain = net_of(arch="convnet2_w8_bn"), net_of(arch="convnet2_w8_bn")
        rule = Rule(mixed_cross_entropy, partial(torch.optim.AdamW, weight_decay=0.1), groups=decay_matrices)
        step = Step([net], rule)
        optimizer = torch.optim.AdamW(decay_matrices(plain), weight_decay=0.1)

        for rate in (0.01, 0.003):
            step.set_lr(rate)
            step(*batch_of(6))
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            images, labels = batch_of(6)
            F.cross_entropy(plain(images), labels).backward()
            optimizer.step()

        torch.testing.assert_close(weights(net), weights(plain))
