"""The contract of every method (`ddray.testing`), and the files that ship with the built-in ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ddray.config import difference, merge, read_yaml
from ddray.distillation.method import MethodConfig
from ddray.errors import InputError
from ddray.jobs.plan import resolve
from ddray.methods import REGISTRY, get_method, method_names
from ddray.methods.families.ssl import bases_fit
from ddray.system.shipped import shipped
from ddray.testing import MethodContract

CONFIGS = [path for path in sorted(shipped("configs").glob("*/*.yaml")) if path.parent.name in method_names()]
SHAPES = {"digits": (1, 16, 16), "tiny_imagenet": (3, 64, 64)}


class TestEveryMethod(MethodContract):
    deterministic = ("class_mean",)  # at ipc 1: the mean of all
    other_networks = ("dd",)  # LeNet, AlexCifarNet

    @pytest.fixture(autouse=True)
    def _short_fits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bases_fit, "_FIT_STEPS", 20)  # 2,000 take most of Boost-SSDD's time

    @pytest.fixture(params=method_names())
    def method(self, request: pytest.FixtureRequest) -> str:
        name: str = request.param
        return name


def test_a_schedule_that_is_not_declared_breaks_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_method("sre2l"), "schedule", "")

    with pytest.raises(AssertionError, match="say in `schedule` what depends on the number of steps"):
        MethodContract().test_a_longer_run_continues_a_shorter_one_or_is_refused("sre2l")


def test_there_are_methods() -> None:
    papers = {"cafe", "datadam", "dc", "dm", "dsa", "dsdm", "idm", "m3d", "mmd_pixel"}
    assert {"class_mean", "herding", "kcenter", "kmeans", "random"} | papers <= set(method_names())


def test_an_unknown_method_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        InputError, match=r"method must be one of .*datadam.*got 'datadm'; did you mean 'datadam'"
    ):
        get_method("datadm")


@pytest.mark.parametrize("name", ["families", "toolkit"])
def test_shared_code_is_no_method(name: str) -> None:
    assert name not in method_names()
    with pytest.raises(InputError, match="method must be one of"):
        get_method(name)


def test_a_shipped_space_or_config_is_that_of_a_method() -> None:
    spaces = sorted(shipped("search_spaces", "hpo").glob("*.yaml"))
    assert spaces
    assert CONFIGS
    assert {path.stem for path in spaces} <= set(REGISTRY.builtin_names())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_shipped_config_resolves_and_decides(path: Path, toy: Any) -> None:
    name, _, ipc = path.stem.partition("_ipc")
    dataset = toy(counts=(60,) * 10, shape=SHAPES.get(name, (3, 32, 32)), name=name)
    plan = resolve(path.parent.name, dataset, ipc=int(ipc or 1))

    expected = read_yaml(path)
    resolved = plan.config.dump()
    assert expected
    assert difference(merge(resolved, expected), resolved) == []


def test_a_methods_own_settings_for_a_dataset_lie_between_preset_and_files(
    toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_type = get_method("dm").config_type
    assert issubclass(config_type, MethodConfig)
    ours = {"toy": {"steps": 30, "method": {"momentum": 0.25}}, "toy_ipc2": {"steps": 20}}
    monkeypatch.setattr(config_type, "dataset_settings", ours)

    plans = [resolve("dm", toy(), ipc=ipc) for ipc in (1, 2)]
    later = resolve("dm", toy(), ipc=2, layers=[{"steps": 7}])

    assert [plan.config.steps for plan in (*plans, later)] == [30, 20, 7]
    assert [plan.config.method.momentum for plan in plans] == [0.25, 0.25]
    assert resolve("dm", toy(name="other"), ipc=2).config.steps == 20_000
