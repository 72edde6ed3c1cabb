"""CUDA graphs on a fake GPU: one per shape, state restored after the warm-up, eager where none can be."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.nets import build_net
from ddray.seeding import derive
from ddray.system.memory import halved_budget
from ddray.training.engine import Rule, Step
from ddray.training.graph import WORTHWHILE_STEPS, Graphs
from ddray.training.gsam import Gsam
from tests.gpu.fake_cuda import FakeCuda

CUDA = torch.device("cuda")


def test_a_function_is_captured_once_per_shape_and_replayed(gpu: FakeCuda) -> None:
    graphs, total, calls = Graphs(on=True), torch.zeros((), device=CUDA), []

    def add(values: Tensor) -> Tensor:
        calls.append(len(values))
        return total.add_(values.sum()).clone()

    sums = [float(graphs(add, [torch.ones(n, device=CUDA)], lambda: [total])) for n in (2, 2, 3, 2, 3)]

    assert sums == [2.0, 4.0, 7.0, 9.0, 12.0], "the warm-up's changes are undone"
    assert calls == [2] * 4 + [3] * 4, "three warm-ups and a capture per shape"
    assert gpu.replays == 5
    assert graphs.captured


def test_what_the_warm_up_makes_begins_at_zero(gpu: FakeCuda) -> None:
    graphs, param = Graphs(on=True), torch.ones(2, device=CUDA, requires_grad=True)
    optimizer = torch.optim.SGD([param], lr=torch.tensor(0.5, device=CUDA), momentum=0.9, fused=True)

    def step(values: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        (param * values).sum().backward()
        optimizer.step()

    def state() -> list[Tensor]:
        return [param.detach(), *(buffers["momentum_buffer"] for buffers in optimizer.state.values())]

    for _ in range(2):
        graphs(step, [torch.ones(2, device=CUDA)], state)

    assert param.tolist() == pytest.approx([1 - 0.5 - 0.5 * 1.9] * 2)


@pytest.mark.parametrize("reason", ["a wait", "a kernel"])
def test_what_cannot_be_captured_is_called_with_one_warning(
    reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with FakeCuda(capture_fails=reason == "a kernel"), caplog.at_level(logging.WARNING):
        before, graphs, total = torch.cuda.current_stream(), Graphs(on=True), torch.zeros((), device=CUDA)

        def add(values: Tensor) -> float:
            total.add_(values.sum())
            return float(total) if reason == "a wait" else 0.0

        for _ in range(3):
            graphs(add, [torch.ones(2, device=CUDA)], lambda: [total])

        assert total.item() == 6.0
        assert torch.cuda.current_stream() is before, "the capture's stream is given back"
    assert not graphs.captured
    (record,) = caplog.records
    assert "no CUDA graph" in record.message


def test_graphs_that_are_off_are_none(gpu: FakeCuda) -> None:
    graphs = Graphs(on=False)

    assert graphs(lambda values: values.sum(), [torch.ones(2, device=CUDA)]).item() == 2.0
    assert gpu.replays == 0


@pytest.mark.parametrize("kernel", [1, 4], ids=["in the warm-up", "in the capture"])
def test_lack_of_memory_passes_and_the_second_time_steps_run_eagerly(
    gpu: FakeCuda, caplog: pytest.LogCaptureFixture, kernel: int
) -> None:
    def double() -> list[float]:
        gpu.fail_in(kernel)
        doubled: list[float] = Graphs(on=True)(
            lambda values: values * 2, [torch.ones(2, device=CUDA)]
        ).tolist()
        return doubled

    with pytest.raises(torch.OutOfMemoryError):  # the caller makes parts smaller
        double()
    assert not caplog.text
    with halved_budget():
        assert double() == [2.0, 2.0]
    assert "no CUDA graph" in caplog.text


def test_a_failed_capture_leaves_generators_that_draw(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    class Captured:
        """A global generator of CUDA that a failed capture left in its state of capture."""

        state = "capturing"

        def clone_state(self) -> str:
            return "drawing"

        def graphsafe_set_state(self, state: str) -> None:
            self.state = state

    generator = Captured()
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    Graphs(on=True)(lambda values: values * 2, [torch.ones(2, device=CUDA)])
    assert generator.state == "capturing", "a capture that ends is ended by torch"

    Graphs(on=True)(lambda values: values.tolist(), [torch.ones(2, device=CUDA)])
    assert generator.state == "drawing"


@pytest.mark.parametrize("optimizer", [partial(torch.optim.SGD, momentum=0.9), torch.optim.AdamW])
@pytest.mark.parametrize("capture_fails", [False, True])
@pytest.mark.parametrize("gsam", [None, Gsam(0.05, 0.3)])
def test_training_steps_by_graphs_are_those_of_an_eager_training(
    optimizer: Callable[..., Any], capture_fails: bool, gsam: Gsam | None
) -> None:
    """Warm-ups and captures leave no trace: not on weights, statistics, moments or the loss."""

    def trained(num_steps: int) -> tuple[Step, dict[str, Tensor]]:
        net = build_net("convnet2_w8_bn", (3, 16, 16), 4, seed=0, device=CUDA).train()
        step = Step([net], Rule(F.cross_entropy, optimizer, gsam=gsam), lr=0.01, num_steps=num_steps)
        for index, num in enumerate((6, 6, 4, 6, 4)):
            generator = derive(index)
            images = torch.randn(num, 3, 16, 16, generator=generator)
            labels = torch.randint(0, 4, (num,), generator=generator)
            step.set_lr(0.01 / (index + 1))
            step(images.to(CUDA), labels.to(CUDA))
        return step, {**net.state_dict(), "loss": step.mean_loss()}

    with FakeCuda(capture_fails=capture_fails) as gpu:
        _, expected = trained(num_steps=1)
        step, result = trained(WORTHWHILE_STEPS)

        assert step.captured == (not capture_fails)
        assert gpu.replays == (0 if capture_fails else 5)
        for name, value in expected.items():
            assert torch.allclose(result[name].float(), value.float(), atol=1e-6), name
