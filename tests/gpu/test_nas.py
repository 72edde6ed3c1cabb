"""Training NAS architectures on a fake GPU: loop and fused, by graphs and without, as on the CPU."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from ddray.data import normalized_space
from ddray.nets import Net, build_net
from ddray.nets.nasbench201 import CellNet, Skeleton, parse_arch_str
from ddray.ranking.options import NasRecipe
from ddray.ranking.training import train_seeds
from ddray.seeding import forked_global
from ddray.testing import random_dataset
from ddray.training import engine
from ddray.training.dsa import dsa_for
from tests.gpu.fake_cuda import FakeCuda
from tests.gpu.runs import compute_as_cuda

CUDA = torch.device("cuda")
STEPS = 4
SHAPE = (3, 16, 16)
ARCHS = {
    "instance": "convnet2_w8",
    "layer": "convnet2_w8_ln",
    "group": "convnet2_w8_gn",
    "batch": "convnet2_w8_bn",
    "none": "convnet1_w8_nonorm_max",
    "cell": "|nor_conv_3x3~0|+|nor_conv_1x1~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_3x3~1|none~2|",
}


def built(arch: str, seed: int, device: torch.device | str) -> Net:
    if not arch.startswith("|"):
        return build_net(arch, SHAPE, 3, seed=seed, device=device)
    with forked_global(seed, device), torch.device(device):
        return Net(arch, SHAPE, 3, CellNet(parse_arch_str(arch), 3, 3, Skeleton(8, 1, True, None)))


@pytest.fixture(autouse=True)
def graphs_are_worthwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "WORTHWHILE_STEPS", 1)
    compute_as_cuda(monkeypatch)


def trained(
    device: torch.device | str, mode: str, arch: str = "instance", **recipe: Any
) -> tuple[str, list[Tensor]]:
    """Train two networks; return how, and their weights."""
    dataset = random_dataset((5, 5, 5), SHAPE)
    images = normalized_space(dataset).encode(dataset.train().images).to(device)
    images = images.contiguous(memory_format=torch.channels_last)
    nets = [built(ARCHS[arch], seed, device) for seed in (0, 1)]
    how = train_seeds(
        nets,
        (images, dataset.train().labels.to(device)),
        NasRecipe(epochs=2, batch=8, **recipe),
        seeds=[0, 1],
        dsa=dsa_for(True),
        num_steps=STEPS,
        mode=mode,
    )
    return how, [value.detach().cpu() for net in nets for value in weights(net)]


def weights(net: Net) -> list[Tensor]:
    return [*net.parameters(), *net.buffers()]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("mode", ["loop", "fused"])
def test_graphs_train_the_weights_of_the_cpu(mode: str, arch: str) -> None:
    how, expected = trained("cpu", mode, arch)

    with FakeCuda() as gpu:
        result = trained(CUDA, mode, arch)

    assert (how, result[0]) == (mode, f"{mode}+graph")
    assert gpu.replays >= STEPS
    for mine, theirs in zip(result[1], expected, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("mode", ["loop", "fused"])
def test_without_graphs_it_is_the_same(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    with FakeCuda():
        _, expected = trained(CUDA, mode)

    with FakeCuda(capture_fails=True) as gpu, caplog.at_level(logging.WARNING):
        how, result = trained(CUDA, mode)

    assert (how, gpu.replays) == (mode, 0)
    assert all(map(torch.equal, result, expected))
    assert all("no CUDA graph" in record.message for record in caplog.records)


def test_a_probe_decides(gpu: FakeCuda) -> None:
    how, _ = trained(CUDA, "auto")

    assert how in ("loop+graph", "fused+graph")


def test_what_cannot_be_fused_is_trained_in_a_loop(monkeypatch: pytest.MonkeyPatch, gpu: FakeCuda) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("Batching rule not implemented")

    monkeypatch.setattr(torch.func, "vmap", refuse)

    assert trained(CUDA, "auto")[0] == "loop+graph"


def test_bfloat16_trains(gpu: FakeCuda) -> None:
    how, result = trained(CUDA, "loop", precision="bf16")

    assert how == "loop+graph"
    assert all(torch.isfinite(value.float()).all() for value in result)


@pytest.mark.parametrize("mode", ["loop", "fused"])
def test_a_steady_step_waits_for_nothing_and_is_one_launch(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What grows with the number of steps: no sync; a replay, and what makes the batch."""

    def counted(steps: int) -> tuple[int, int, int]:
        monkeypatch.setattr("tests.gpu.test_nas.STEPS", steps)
        with FakeCuda() as gpu:
            trained(CUDA, mode)
            return sum(gpu.syncs.values()), gpu.replays, gpu.launches

    few, many = counted(4), counted(10)

    networks = 2 if mode == "loop" else 1
    assert many[0] - few[0] <= 4, "the epochs' orders"
    assert many[1] - few[1] == 6 * networks
    assert (many[2] - few[2]) / (6 * networks) < 60
