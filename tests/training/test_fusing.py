"""Networks trained as one: whether it pays, what falls back, and that the weights are a loop's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from ddray.data import PixelSpace
from ddray.nets import Net, build_net
from ddray.seeding import derive
from ddray.system.numerics import applied
from ddray.training import fusing, loop
from ddray.training.loop import augmenter
from ddray.training.recipe import Recipe


def net_of(arch: str) -> Net:
    return build_net(arch, (3, 16, 16), 4, seed=0)


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
