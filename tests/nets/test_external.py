"""Networks of other packages and of scripts: found by name, held to the contract of ours."""

from __future__ import annotations

import copy
import importlib.metadata
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ddray
from ddray.errors import InputError
from ddray.nets import Features, build_net, check_arch, multiply_adds, reinitialize
from ddray.nets import names as module
from ddray.nets.names import arch_names, is_registered, parse_arch, register_net
from ddray.system import registry

SHAPE = (3, 16, 16)


class Tutorial(nn.Module):
    """As in PyTorch's tutorial: batch norm, and maps that are flattened by `view`."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(image_shape[0], 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.fc1 = nn.Linear(6 * image_shape[1] * image_shape[2] // 4, 20)
        self.fc2 = nn.Linear(20, num_classes)

    def body(self, x: Tensor) -> Tensor:
        maps = torch.max_pool2d(torch.relu(self.norm(self.conv(x))), 2)
        return torch.relu(self.fc1(maps.view(len(x), -1)))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc2(self.body(x))
        return logits


class Open(Tutorial):
    """One that shows its maps."""

    def forward(self, x: Tensor) -> Any:
        maps = torch.relu(self.conv(x))
        embedding = torch.relu(self.fc1(torch.max_pool2d(maps, 2).view(len(x), -1)))
        return Features(self.fc2(embedding), embedding, (maps, torch.max_pool2d(maps, 2)))


def headless(image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(image_shape[0], num_classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgets after each test what it has registered."""
    monkeypatch.setattr(module, "_REGISTERED", {})
    for factory in (Tutorial, Open, headless):
        register_net(factory)


def images(num: int = 5) -> Tensor:
    return torch.randn(num, *SHAPE, generator=torch.Generator().manual_seed(0))


def test_its_name_is_taken_as_it_is() -> None:
    assert check_arch("Tutorial") == "Tutorial"
    arch = parse_arch("Tutorial")
    assert (arch.is_external, arch.is_convnet, arch.norm) == (True, False, "custom")
    assert {"Tutorial", "headless", "convnet3"} <= {*arch_names()}
    assert is_registered("Tutorial")
    assert not is_registered("convnet3")
    with pytest.raises(InputError, match=r"arch must be one of .*Tutorial.*got 'Tutoral'; did you mean"):
        check_arch("Tutoral")
    with pytest.raises(InputError, match="arch must be one of"):
        check_arch("Tutorial_bn")


@pytest.mark.parametrize("device_format", [torch.contiguous_format, torch.channels_last])
def test_features_are_the_modules_own(device_format: Any) -> None:
    net = build_net("Tutorial", SHAPE, 7, seed=1).eval()
    net.to(memory_format=device_format)
    x = images().contiguous(memory_format=device_format)

    features = net.features(x)

    theirs: Any = net.body
    assert torch.equal(features.logits, theirs(images()))
    assert torch.equal(features.embedding, theirs.body(images()))
    assert torch.equal(net.embed(x), features.embedding)
    assert torch.equal(net(x), features.logits)
    assert features.maps == ()
    assert not theirs.fc2._forward_pre_hooks, "a hook lives for one pass"
    copied = copy.deepcopy(net)
    assert torch.equal(copied.embed(x), features.embedding)


def test_a_seed_decides_its_weights_and_global_generators_stay() -> None:
    before = torch.get_rng_state()
    first, again, other = (build_net("Tutorial", SHAPE, 7, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(next(first.parameters()), next(other.parameters()))
    assert first.training
    assert float(dict(first.named_buffers())["body.norm.num_batches_tracked"]) == 0
    reinitialize(first, 2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_its_layers_and_its_head_are_measured() -> None:
    net = build_net("Tutorial", SHAPE, 7, seed=0)
    assert max(net.map_bytes()) == 4 * 6 * 16 * 16
    assert net.head_names() == ("body.fc2.",)
    assert max(build_net("convnet1_w8", SHAPE, 7, seed=0).eval().map_bytes()) == 4 * 8 * 16 * 16


def test_multiply_adds_are_one_images_of_the_function_that_bears_the_name_now() -> None:
    def registered_as_probe(width: int) -> str:
        def probe(image_shape: Any, num_classes: int) -> nn.Module:
            inputs = math.prod(image_shape)
            return nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.Linear(width, num_classes))

        return register_net(probe)

    values = math.prod(SHAPE)
    assert [multiply_adds(registered_as_probe(width), SHAPE) for width in (2, 5)] == [
        (values + 1) * 2,
        (values + 1) * 5,
    ]


def test_one_without_a_last_linear_layer_has_no_embedding() -> None:
    net = build_net("headless", SHAPE, 7, seed=0)
    assert net(images()).shape == (5, 7)
    with pytest.raises(InputError, match=r"net headless must end in an nn\.Linear, or return ddray\.nets"):
        net.features(images())


one = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(SHAPE), 7))


def test_what_is_no_network_is_refused() -> None:
    def other_classes(image_shape: Any, num_classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(image_shape), 4))

    def other_images(image_shape: Any, num_classes: int) -> nn.Module:
        return nn.Conv2d(1, num_classes, 3)

    def no_module(image_shape: Any, num_classes: int) -> Any:
        return "net"

    def no_shape(num_classes: int) -> Any:
        return nn.Linear(1, num_classes)

    for factory, message in (
        (other_classes, r"must return logits \[N, 7\], or ddray\.nets\.Features, got \[2, 4\] of 2 images"),
        (other_images, r"must take images \(3, 16, 16\), got RuntimeError: Given groups=1"),
        (no_module, "must be made as a new nn.Module at each call, got str"),
        (no_shape, r"must be made of \(image_shape, num_classes\), got TypeError"),
        (Tutorial(SHAPE, 7), r"be a function \(image_shape, num_classes\) -> nn.Module, got Tutorial"),
    ):
        with pytest.raises(InputError, match=message):
            build_net(register_net(factory), SHAPE, 7, seed=0)
    repeated_name = register_net(lambda shape, classes: one)
    build_net(repeated_name, SHAPE, 7, seed=0)
    with pytest.raises(InputError, match="at each call, got the same one again"):
        build_net(repeated_name, SHAPE, 7, seed=0)


def test_the_name_of_one_of_ours_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headless, "__qualname__", "convnet3_bn")
    with pytest.raises(InputError, match="must not have the name of one of ours, got convnet3_bn"):
        register_net(headless)


class TestInUse:
    def test_a_function_is_scored_under_its_name(self) -> None:
        distilled = ddray.distill("random", ipc=2)
        result = ddray.evaluate(distilled, archs=[Tutorial, "convnet1_w8"], seeds=2, epochs=2)
        assert [each.arch for each in result.results] == ["Tutorial", "convnet1_w8"]
        assert result.results[0].per_seed == (
            ddray.evaluate(distilled, arch=Tutorial, seeds=2, epochs=2).results[0].per_seed
        )
        with pytest.raises(InputError, match="archs must be functions of different names, got same, same"):
            ddray.evaluate(distilled, archs=[self.named(1), self.named(2)], seeds=1, epochs=1)

    def named(self, width: int) -> Any:
        def same(image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
            return nn.Sequential(
                nn.Flatten(), nn.Linear(math.prod(image_shape), width), nn.Linear(width, num_classes)
            )

        same.__qualname__ = "same"
        return same

    @pytest.mark.parametrize("method", ["dm", "dc", "idm"])
    def test_methods_match_in_it(self, method: str, planned: Any, toy: Any) -> None:
        quick = {"batch_real": 4, **({"net_steps": 1} if method == "idm" else {})}
        _, ctx, distiller = planned(method, toy(), arch="Tutorial", steps=2, method=quick)
        distiller.setup(ctx)
        before = distiller.snapshot().images
        for _ in range(2):
            assert torch.isfinite(distiller.step()["loss"])
        distilled = distiller.snapshot()
        assert (distilled.meta.arch, distilled.meta.norm) == ("Tutorial", "custom")
        assert not torch.equal(distilled.images, before)

    @pytest.mark.parametrize("method", ["datadam", "cafe"])
    def test_methods_of_inner_layers_need_them(self, method: str, planned: Any, toy: Any) -> None:
        with pytest.raises(InputError, match=f"{method} needs the inner layers of its network, net Tutorial"):
            planned(method, toy(), arch="Tutorial", steps=1)
        _, ctx, distiller = planned(method, toy(), arch="Open", steps=1, method={"batch_real": 4})
        distiller.setup(ctx)
        assert torch.isfinite(distiller.step()["loss"])

    def test_methods_of_an_embedding_need_one(self, planned: Any, toy: Any) -> None:
        _, ctx, distiller = planned("dm", toy(), arch="headless", steps=1, method={"batch_real": 4})
        with pytest.raises(InputError, match="net headless must end in an nn"):
            distiller.setup(ctx)

    def test_the_linear_protocol_refuses_one_without_embedding_before_it_trains(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from ddray.evaluation import linear

        monkeypatch.setattr(linear, "train", lambda *args, **kwargs: pytest.fail("it trained"))
        with pytest.raises(InputError, match="net headless must end in an nn"):
            ddray.evaluate(ddray.distill("random"), archs=headless, protocol="linear", seeds=1, epochs=1)

    def test_fine_tuning_gives_it_a_new_head(self) -> None:
        sets = ("finetune.steps=2", "seeds=1")
        options = {"protocol": "linear", "finetune": True, "sets": sets, "epochs": 2}
        result = ddray.evaluate(ddray.distill("random"), archs=Tutorial, **options)
        assert 0 <= result.results[0].accuracy_mean <= 1

    def test_a_whole_set_of_a_functions_network_is_not_stored(self, ddray_home: Path) -> None:
        """Its next version has the same name."""
        options: dict[str, Any] = {"protocol": "robust", "epochs": 1, "seeds": 1}
        distilled = ddray.distill("random")
        ddray.evaluate(distilled, archs=Tutorial, **options)
        assert not list((ddray_home / "truth" / "ledger").iterdir())
        ddray.evaluate(distilled, archs="convnet1_w8", **options)
        assert list((ddray_home / "truth" / "ledger").iterdir())


def test_a_package_offers_one_by_an_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "from tests.nets.test_external import Tutorial\nNET = Tutorial\n"
    (tmp_path / "net_of_theirs.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    offered = importlib.metadata.EntryPoint("theirs_v2", "net_of_theirs", "ddray.nets")
    monkeypatch.setattr(registry, "entry_points", lambda group: [offered] if group == offered.group else [])

    assert check_arch("theirs_v2") == "theirs_v2"
    net = build_net("theirs_v2", SHAPE, 7, seed=1)
    ours = build_net("Tutorial", SHAPE, 7, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), ours.parameters(), strict=True))
    with pytest.raises(InputError, match="did you mean 'theirs_v2'"):
        check_arch("theirs_v3")
