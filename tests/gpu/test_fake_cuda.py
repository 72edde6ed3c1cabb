"""The fake device itself: what it refuses, what it counts, what it leaves alone."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.gpu.fake_cuda import FakeCuda

CUDA = torch.device("cuda")
MIXED = "same device|different device"


class _CpuInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * torch.ones(4, 3)


def _grad_elsewhere(x: Tensor) -> None:
    x.requires_grad_(True).grad = torch.ones(4, 3)


def _index_put(x: Tensor) -> None:
    x[torch.tensor([0, 1], device=CUDA)] = torch.ones(2, 3)


def _state_elsewhere(x: Tensor, **settings: Any) -> None:
    param = nn.Parameter(x)
    optimizer = torch.optim.Adam([param], **settings)
    param.sum().backward()
    optimizer.step()
    optimizer.state[param]["exp_avg"] = torch.zeros(4, 3)
    optimizer.step()


def _fused_steps_elsewhere(x: Tensor) -> None:
    param = nn.Parameter(x)
    optimizer = torch.optim.Adam([param], fused=True)
    param.sum().backward()
    optimizer.step()
    optimizer.state[param]["step"] = torch.zeros(())
    optimizer.step()


def _batch_norm_elsewhere(x: Tensor) -> Tensor:
    norm = nn.BatchNorm1d(3, device=CUDA)
    norm.running_mean = torch.zeros(3)
    return norm(x)


PLANTED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "CPU generator": (lambda x: torch.rand(3, generator=torch.Generator(), device=CUDA), "generator"),
    "CUDA generator": (lambda x: torch.rand(3, generator=torch.Generator(CUDA)), "generator"),
    "in-place draw": (lambda x: x.normal_(generator=torch.Generator()), "generator"),
    "order": (lambda x: torch.randperm(4, generator=torch.Generator(), device=CUDA), "generator"),
    "multinomial": (lambda x: x.multinomial(2, generator=torch.Generator()), "generator"),
    "initialisation": (lambda x: nn.init.xavier_normal_(x, generator=torch.Generator()), "generator"),
    "state of a CPU generator": (
        lambda x: torch.Generator(CUDA).set_state(torch.Generator().get_state()),
        "wrong size",
    ),
    "numpy": (lambda x: x.numpy(), "numpy"),
    "numpy.asarray": (lambda x: np.asarray(x), "numpy"),
    "numpy.stack": (lambda x: np.stack(list(x)), "numpy"),
    "add": (lambda x: x + torch.ones(4, 3), MIXED),
    "in-place add": (lambda x: torch.ones(4, 3).add_(x), MIXED),
    "where": (lambda x: torch.where(x > 0, x, torch.zeros(4, 3)), MIXED),
    "labels on the CPU": (lambda x: F.cross_entropy(x, torch.zeros(4, dtype=torch.int64)), MIXED),
    "embedding with a CPU index": (lambda x: F.embedding(torch.tensor([0, 1]), x), MIXED),
    "embedding with a CPU scalar": (lambda x: F.embedding(torch.tensor(0), x), MIXED),
    "CUDA index of a CPU tensor": (lambda x: torch.ones(4)[x.argmax(1)], MIXED),
    "CUDA mask of a CPU tensor": (lambda x: torch.ones(4, 3)[x > 0], MIXED),
    "CPU mask for masked_fill": (lambda x: x.masked_fill(torch.ones(4, 3) > 0, 0), MIXED),
    "CPU values into a CUDA tensor": (_index_put, MIXED),
    "index_select": (lambda x: x.index_select(0, torch.tensor([0])), MIXED),
    "gather": (lambda x: x.gather(1, torch.zeros(4, 1, dtype=torch.int64)), MIXED),
    "index_add_": (lambda x: x.new_zeros(2, 3).index_add_(0, torch.tensor([0, 1, 0, 1]), x), MIXED),
    "cat": (lambda x: torch.cat([x, torch.ones(1, 3)]), MIXED),
    "stack": (lambda x: torch.stack([x, torch.ones(4, 3)]), MIXED),
    "matmul": (lambda x: x @ torch.ones(3, 2), MIXED),
    "module left on the CPU": (lambda x: nn.Linear(3, 2)(x), MIXED),
    "buffer left on the CPU": (_batch_norm_elsewhere, MIXED),
    "under vmap": (lambda x: torch.func.vmap(lambda row: row + torch.ones(3))(x), MIXED),
    "backward pass in Python": (
        lambda x: _CpuInBackward.apply(x.requires_grad_(True)).sum().backward(),
        MIXED,
    ),
    "gradient on the CPU": (_grad_elsewhere, "different device"),
    "optimiser's state on the CPU": (_state_elsewhere, MIXED),
    "state on the CPU, foreach": (lambda x: _state_elsewhere(x, foreach=True), MIXED),
    "state on the CPU, fused": (lambda x: _state_elsewhere(x, fused=True), MIXED),
    "counters on the CPU, fused": (_fused_steps_elsewhere, MIXED),
    "a device there is not": (lambda x: torch.zeros(1, device="cuda:7"), "invalid device ordinal"),
    "out of meta": (lambda x: torch.ones(2, device="meta").to(CUDA), "meta"),
    "pinning a CUDA tensor": (lambda x: x.pin_memory(), "pin"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_refused(gpu: FakeCuda, name: str) -> None:
    bug, message = PLANTED[name]

    with pytest.raises((RuntimeError, TypeError, NotImplementedError), match=message):
        bug(torch.ones(4, 3, device=CUDA))


def test_two_devices_are_two() -> None:
    with FakeCuda(devices=2) as gpu:
        first, second = torch.ones(2, device="cuda:0"), torch.ones(2, device="cuda:1")

        assert (first.device, second.device) == (torch.device("cuda", 0), torch.device("cuda", 1))
        with pytest.raises(RuntimeError, match=MIXED):
            first + second
        assert (first + second.to(first.device)).tolist() == [2.0, 2.0]
        with torch.cuda.device(1):
            assert torch.zeros(1, device="cuda").device.index == 1
        assert torch.cuda.memory_allocated(1) >= 8
        assert [*gpu.syncs] == ["tolist outside ddray"]


SYNCS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x[0, 0]),
    "bool": lambda x: bool((x > 0).all()),
    "cpu": lambda x: x.cpu(),
    "to the CPU": lambda x: x.to("cpu"),
    "from the CPU": lambda x: torch.ones(3).to(CUDA),
    "copy_": lambda x: x.copy_(torch.zeros(4, 3)),
    "mask": lambda x: x[x > 1],
    "CPU mask": lambda x: x[torch.ones(4, 3) > 0],
    "CPU index": lambda x: x[torch.tensor([0, 2])],
    "list index": lambda x: x[:, [0, 1]],
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "tolist": lambda x: x.tolist(),
    "new tensor": lambda x: torch.tensor([1.0], device=CUDA),
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "as_tensor": lambda x: torch.as_tensor(np.ones(2), device=CUDA),
    "one_hot without classes": lambda x: F.one_hot(x.argmax(1)),
    "repeat_interleave": lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.int64, device=CUDA), 0),
    "synchronize": lambda x: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("name", SYNCS)
def test_a_sync_is_counted(gpu: FakeCuda, name: str) -> None:
    x = torch.ones(4, 3, device=CUDA)
    assert not gpu.syncs

    SYNCS[name](x)

    assert sum(gpu.syncs.values()) == 1


def test_what_does_not_wait_is_no_sync(gpu: FakeCuda) -> None:
    x = torch.ones(4, 3).to(CUDA, non_blocking=True)
    x.copy_(torch.zeros(4, 3), non_blocking=True)
    F.one_hot(x.argmax(1), 3)
    x[0] = 1.0
    x[0, 0] = 2.0
    x[x > 0] = 0.0
    x[torch.zeros(1, dtype=torch.int64, device=CUDA)]
    (x * torch.tensor(2.0)).repeat_interleave(2, 0)
    x.new_zeros(3), torch.arange(3, device=CUDA), torch.zeros_like(x, device="cpu")
    nn.utils.clip_grad_norm_([x.requires_grad_(True)], 1.0)

    assert not gpu.syncs
    assert gpu.kernels > 0


def test_a_sync_names_the_line_of_ddray(gpu: FakeCuda) -> None:
    from ddray.distillation.loop import _finite

    _finite(torch.ones((), device=CUDA), 1, {})

    assert [*gpu.syncs] == [next(iter(gpu.syncs))]
    assert next(iter(gpu.syncs)).startswith("_local_scalar_dense distillation/loop.py:")


def test_tensors_say_where_they_are(gpu: FakeCuda) -> None:
    x = torch.ones(4, 3, device="cuda")
    net = nn.Linear(3, 2).to(CUDA)
    like = torch.zeros_like(x, device="cpu")

    assert (x.device, x.is_cuda, x.is_cpu, x.get_device()) == (torch.device("cuda", 0), True, False, 0)
    assert {
        tensor.device.type for tensor in (x[0], x.T, x.data, net.weight, net(x), copy.deepcopy(net).bias)
    } == {"cuda"}
    assert {tensor.device.type for tensor in (like, x.cpu(), torch.ones(1), x.to("cpu", torch.float64))} == {
        "cpu"
    }
    assert x.to(torch.float64).device.type == "cuda"
    assert copy.deepcopy(net).to("meta").weight.device.type == "meta"
    with torch.device("cuda"):
        assert nn.Linear(2, 2).weight.is_cuda
    assert gpu.opened == "outside ddray"


def test_gradients_cross_devices(gpu: FakeCuda) -> None:
    x = torch.ones(3, requires_grad=True)

    (x.to(CUDA) * 2).sum().backward()

    assert x.grad is not None
    assert x.grad.device.type == "cpu"
    assert x.grad.tolist() == [2.0, 2.0, 2.0]


def test_a_file_says_which_device_its_tensors_are_on() -> None:
    buffer = io.BytesIO()
    with FakeCuda():
        torch.save({"weight": torch.ones(2, device=CUDA), "step": torch.zeros(1)}, buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
        buffer.seek(0)
        assert (state["weight"].device.type, state["step"].device.type) == ("cuda", "cpu")
        assert torch.load(buffer, map_location="cpu", weights_only=True)["weight"].device.type == "cpu"
    buffer.seek(0)
    with pytest.raises(RuntimeError, match="CUDA"):  # as on a machine without a GPU
        torch.load(buffer, weights_only=True)


def test_a_graph_replays_on_the_same_memory_and_keeps_the_values_of_the_host(gpu: FakeCuda) -> None:
    scale, total, factor = torch.zeros(2, device=CUDA), torch.zeros(2, device=CUDA), torch.tensor(2.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total.add_(scale * factor)
    scale.fill_(3)
    factor.fill_(100)

    total.zero_()
    graph.replay()
    graph.replay()

    assert total.tolist() == [12.0, 12.0]
    assert gpu.replays == 2


CAPTURED: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "mask": lambda x: x[x > 0],
    "from the CPU": lambda x: torch.ones(3).to(CUDA, non_blocking=True),
    "to the CPU": lambda x: x.cpu(),
    "generator": lambda x: torch.rand(3, generator=torch.Generator(CUDA), device=CUDA),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "optimiser": lambda x: torch.optim.Adam([x]).step(),
}


@pytest.mark.parametrize("name", CAPTURED)
def test_a_capture_refuses_to_wait_and_leaves_its_stream(gpu: FakeCuda, name: str) -> None:
    x, before = torch.ones(4, 3, device=CUDA, requires_grad=True), torch.cuda.current_stream()
    x.grad = torch.ones_like(x)

    with pytest.raises(RuntimeError, match="previous error"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        CAPTURED[name](x)

    assert torch.cuda.current_stream() is not before


def test_memory_is_counted_and_ends() -> None:
    with FakeCuda(memory=1000) as gpu:
        x = torch.zeros(100, device=CUDA)
        y = x + 1
        assert torch.cuda.memory_allocated() == 800
        del y
        assert (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()) == (400, 800)
        assert torch.cuda.mem_get_info() == (600, 1000)
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            torch.zeros(200, device=CUDA)
        torch.zeros(200), x.view(10, 10), x.add_(1)
        gpu.fail_in(1)
        x.add_(1)
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            x.add_(1)
        x.add_(1)


def test_global_random_state_is_forked(gpu: FakeCuda) -> None:
    before = torch.cuda.get_rng_state(0)
    with torch.random.fork_rng(devices=[0]):
        torch.manual_seed(3)
        first = torch.rand(3, device=CUDA)
    with torch.random.fork_rng(devices=[0]):
        torch.manual_seed(3)
        assert torch.equal(first.cpu(), torch.rand(3))
    assert torch.equal(torch.cuda.get_rng_state(0), before)


def test_nothing_is_left_behind() -> None:
    before = torch.cuda.is_available, torch.Generator, torch.autocast
    with FakeCuda():
        assert torch.cuda.is_available()
        with torch.autocast("cuda", torch.bfloat16):
            assert (torch.ones(2, 2, device=CUDA) @ torch.ones(2, 2, device=CUDA)).dtype == torch.bfloat16
    assert (torch.cuda.is_available, torch.Generator, torch.autocast) == before
    assert torch.ones(1).device.type == "cpu"
