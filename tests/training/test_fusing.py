"""Networks trained as one: on which formats CUDA's operations can be vmapped, and what falls back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ddray.data import PixelSpace
from ddray.nets.build import Net, _body, build_net, training_format
from ddray.nets.features import CpuLayer
from ddray.nets.names import parse_arch
from ddray.nets.nasbench201 import CellNet, Skeleton, parse_arch_str
from ddray.seeding import derive
from ddray.system.numerics import applied
from ddray.training import fusing, loop
from ddray.training.loop import augmenter
from ddray.training.recipe import Recipe

CUDA = torch.device("cuda")
SHAPE = (3, 32, 32)
CELL = "|nor_conv_3x3~0|+|nor_conv_1x1~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_3x3~1|none~2|"
NORMS = ("convnet3_w8", "convnet3_w8_bn", "convnet3_w8_ln", "convnet3_w8_gn", "convnet3_w8_nonorm")


def net_of(arch: str) -> Net:
    body = _body(parse_arch(arch), SHAPE, 10) if arch != "cell" else None
    return Net(arch, SHAPE, 10, body or CellNet(parse_arch_str(CELL), 3, 10, Skeleton(8, 1, True)))


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let tensors have shapes and devices without values: what torch dispatches to is CUDA's."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    with FakeTensorMode(allow_non_fake_inputs=True), CUDA:
        yield


@torch.no_grad()
def logits_of(arch: str, form: torch.memory_format | None, *, bf16: bool) -> Tensor:
    """Return the logits of three networks as the engine fuses them; `form` None: the one to train in."""
    nets = [net_of(arch).train() for _ in range(3)]
    form = form or training_format(nets[0], CUDA, fused=True, bf16=bf16)
    for param in (param for net in nets for param in net.parameters() if param.ndim == 4):
        param.data = param.data.contiguous(memory_format=form)
    stacked, buffers = torch.func.stack_module_state(list[torch.nn.Module](nets))
    for module in nets[0].modules():
        if isinstance(module, CpuLayer):
            module.plain = True

    def forward(params: Any, buffers: Any, images: Tensor) -> Tensor:
        outputs: Tensor = torch.func.functional_call(nets[0], (params, buffers), (images,))
        return outputs

    images = torch.zeros(24, *SHAPE).contiguous(memory_format=form).view(3, -1, *SHAPE)
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        logits: Tensor = torch.func.vmap(forward)(stacked, buffers, images)
    return logits


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("arch", [*NORMS, "convnet2_w8_bn_nopool", "convnet2_w8_sigmoid_max", "cell"])
def test_every_norm_is_fused_on_cuda(arch: str, bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(monkeypatch):
        logits = logits_of(arch, None, bf16=bf16)
    assert logits.shape == (3, 8, 10)
    assert logits.device.type == "cuda"


def test_batch_norm_is_not_in_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why fused networks are contiguous; once torch can do it, so may they be."""
    with fake_cuda(monkeypatch), pytest.raises(RuntimeError):
        logits_of("convnet3_w8_bn", torch.channels_last, bf16=False)


class TestProbe:
    @pytest.fixture(autouse=True)
    def _no_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    @pytest.mark.parametrize(("fused_s", "faster"), [(2.0, True), (4.0, False)])
    def test_copies_are_timed_both_ways(
        self, fused_s: float, faster: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = [0.0]
        monkeypatch.setattr(fusing.time, "perf_counter", lambda: clock[0])
        nets = [net_of("convnet1_w8") for _ in range(3)]

        def fit(copies: Sequence[Any], fused: bool) -> None:
            assert len(copies) == (3 if fused else 1)
            assert not {*map(id, copies)} & {*map(id, nets)}
            clock[0] += fused_s if fused else 1.0

        assert fusing.fusing_pays(nets, fit) is faster
        with applied(deterministic=True):  # timings differ, and with them the last digits would
            assert not fusing.fusing_pays(nets, fit)

    def test_what_cannot_be_fused_is_said(self, caplog: pytest.LogCaptureFixture) -> None:
        def fit(copies: Sequence[Any], fused: bool) -> None:
            raise RuntimeError("no batching rule\nmore lines")

        assert not fusing.fusing_pays([net_of("convnet1_w8")] * 2, fit)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "convnet1_w8: networks are not fused (no batching rule)" in caplog.text


@pytest.mark.parametrize("arch", ["convnet2_w8", "convnet2_w8_bn"])
def test_networks_of_an_evaluation_trained_as_one_are_the_loops(arch: str) -> None:
    images, labels = torch.randn(20, 3, 16, 16, generator=derive(1)), torch.arange(20) % 4
    augment = augmenter("dsa", can_flip=True, space=PixelSpace("raw", (0.0,), (1.0,)))
    training = loop.Training(images, labels, Recipe(epochs=2, batch=8), augment)
    trained = []
    for fused in (True, False):
        nets = [build_net(arch, (3, 16, 16), 4, seed=seed) for seed in range(3)]
        generators = [derive(seed, "order") for seed in range(3)]
        if fused:
            loss = training.run(nets, generators, fused=True)
        else:
            pairs = zip(nets, generators, strict=True)
            loss = torch.stack([training.run([net], [generator]) for net, generator in pairs]).mean()
        trained.append((loss, [dict(net.state_dict()) for net in nets]))
    torch.testing.assert_close(*trained, rtol=2e-3, atol=2e-4)
