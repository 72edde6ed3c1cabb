"""The contract of every method, built-in or a user's."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from ddray.artifact import distilled_set as artifact
from ddray.artifact.reading import load
from ddray.config import Config, difference, merge, read_yaml
from ddray.distillation.method import DistillContext, Distiller
from ddray.errors import InputError
from ddray.jobs.context import make_distiller
from ddray.jobs.plan import PRESETS, budget_method, resolve
from ddray.methods import get_method, method_names
from ddray.system.shipped import shipped
from ddray.tuning.space import grid, read_space, sample

METHODS = method_names()
DETERMINISTIC = {"class_mean"}  # at ipc 1: the mean of all
OURS = sorted(path.stem for path in shipped("search_spaces", "hpo").glob("*.yaml"))
CONFIGS = [path for path in sorted(shipped("configs").glob("*/*.yaml")) if path.parent.name in METHODS]
SHAPES = {"digits": (1, 16, 16), "cifar10": (3, 32, 32), "tiny_imagenet": (3, 64, 64)}


def fields(method: str) -> dict[str, Any]:
    return get_method(method).config_type.model_fields


def small(method: str) -> dict[str, Any]:
    """Settings that make a method quick, limited to those that it has."""
    generator = {"epochs": 1, "vae_epochs": 1, "vae_width": 8, "depth": 1, "heads": 1, "head_dim": 8}
    quick = {
        "batch_real": 8,
        "feature_epochs": 1,
        "teacher_arch": "convnet2_w8_bn",
        "teacher_epochs": 1,
        "generator": generator,
        "num_candidates": 5,
        "num_inference_steps": 2,
        "pool": {"num_models": 2, "epochs": 1},
        "net_steps": 2,
        "batch_train": 16,
        "batch_query": 4,
        "max_inner": 3,
        "window": 2,
        "teacher": {"arch": "convnet2_w8", "epochs": 1, "batch": 64, "projector": 8},
        "pool_size": 2,
        "inner_steps_max": 2,
    }
    layers: dict[str, Any] = {"method": {k: v for k, v in quick.items() if k in fields(method)}}
    return layers


def has_steps(method: str, dataset: Any) -> bool:
    return resolve(method, dataset, ipc=1).config.steps > 0


def started(
    planned: Any,
    method: str,
    dataset: Any,
    *,
    steps: int,
    seed: int = 0,
    ipc: int = 1,
    **method_settings: Any,
) -> tuple[DistillContext, Distiller]:
    layers = {**small(method), **({"steps": steps} if has_steps(method, dataset) else {})}
    layers["method"] = {**layers["method"], **method_settings}
    _, ctx, distiller = planned(method, dataset, ipc=ipc, seed=seed, **layers)
    distiller.setup(ctx)
    return ctx, distiller


def saved(distilled: artifact.DistilledSet, path: Path) -> bytes:
    distilled.save(path)
    return path.read_bytes()


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def names_in(state: Any) -> set[str]:
    if isinstance(state, dict):
        return {*map(str, state), *itertools.chain(*(names_in(value) for value in state.values()))}
    if isinstance(state, list | tuple):
        return set(itertools.chain(*(names_in(value) for value in state)))
    return set()


def test_there_are_methods() -> None:
    papers = {"cafe", "datadam", "dc", "dm", "dsa", "dsdm", "idm", "m3d", "mmd_pixel"}
    assert {"class_mean", "herding", "kcenter", "kmeans", "random"} | papers <= set(METHODS)


def test_an_unknown_method_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        InputError, match=r"method must be one of .*datadam.*got 'datadm'; did you mean 'datadam'"
    ):
        get_method("datadm")


def test_a_package_of_shared_code_is_no_method() -> None:
    assert not [name for name in METHODS if name.startswith("_")]
    with pytest.raises(InputError, match="method must be one of"):
        get_method("families")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ipc", [1, 3])
def test_it_distils_digits_into_a_valid_artifact(
    method: str, ipc: int, digits: Any, planned: Any, tmp_path: Path
) -> None:
    ctx, distiller = started(planned, method, digits, steps=2, ipc=ipc)
    for _ in range(distiller.num_steps):
        values = distiller.step()
        assert values["loss"].shape in ((), (1,))
        assert torch.isfinite(values["loss"]).all()

    distilled = distiller.snapshot()
    distilled.save(tmp_path / "distilled.pt")
    loaded = load(tmp_path / "distilled.pt")

    if budget_method(method) is None:
        assert loaded.images.shape == (10 * ipc, 1, 16, 16)
        assert loaded.labels.tolist() == [label for label in range(10) for _ in range(ipc)]
        assert loaded.meta.storage_floats == 10 * ipc * 256
    else:
        assert loaded.targets is not None
        assert len(loaded.images) == len(loaded.targets) >= 1
        assert loaded.meta.budget == 10 * ipc
        assert loaded.meta.storage_floats <= 10 * ipc * 256
    assert (loaded.meta.method, loaded.meta.dataset, loaded.meta.ipc) == (method, "digits", ipc)
    assert loaded.meta.fingerprint == digits.fingerprint
    assert loaded.meta.arch == ctx.arch
    assert torch.equal(loaded.images, distilled.images)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    method: str, toy: Any, planned: Any, tmp_path: Path
) -> None:
    def run(seed: int, name: str) -> artifact.DistilledSet:
        _, distiller = started(planned, method, toy(), steps=2, seed=seed)
        torch.rand(seed + 3)  # the global generator decides nothing
        for _ in range(distiller.num_steps):
            distiller.step()
        distilled = distiller.snapshot()
        saved(distilled, tmp_path / name)
        return distilled

    run(0, "a.pt"), run(0, "b.pt")
    others = [run(seed, "c.pt") for seed in (1, 2, 3)]

    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    first = load(tmp_path / "a.pt").images
    differ = [not torch.equal(first, other.images) for other in others]
    if method in DETERMINISTIC:
        assert max(float((first - other.images).abs().max()) for other in others) < 1e-6
    else:
        assert any(differ)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_does_not_touch_the_global_generators(method: str, toy: Any, planned: Any) -> None:
    import numpy as np

    torch.manual_seed(5)
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    _, distiller = started(planned, method, toy(), steps=1)
    for _ in range(distiller.num_steps):
        distiller.step()

    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == before_numpy).all()  # noqa: NPY002


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cut", [0, 1, 3])
def test_save_load_continue_equals_uninterrupted(method: str, cut: int, toy: Any, planned: Any) -> None:
    _, whole = started(planned, method, toy(), steps=4, ipc=2)
    losses = [whole.step()["loss"] for _ in range(whole.num_steps)]

    _, first = started(planned, method, toy(), steps=4, ipc=2)
    cut = min(cut, first.num_steps)
    for _ in range(cut):
        first.step()
    state = through_a_file(first.state_dict())
    _, second = started(planned, method, toy(), steps=4, ipc=2)
    second.load_state_dict(state)
    rest = [second.step()["loss"] for _ in range(second.num_steps - cut)]

    assert same(second.snapshot().images, whole.snapshot().images)
    assert same(second.state_dict(), whole.state_dict())
    assert same(rest, losses[cut:])
    assert same(state, through_a_file(first.state_dict()))  # what was loaded is not shared


@pytest.mark.parametrize("method", METHODS)
def test_a_state_is_a_copy(method: str, toy: Any, planned: Any) -> None:
    """Later steps change neither a state nor a set returned earlier."""
    _, distiller = started(planned, method, toy(), steps=3)
    if distiller.num_steps:
        distiller.step()
    state, distilled = distiller.state_dict(), distiller.snapshot()
    before, images = through_a_file(state), distilled.images.clone()
    for _ in range(distiller.num_steps - 1):
        distiller.step()

    assert same(state, before)
    assert torch.equal(distilled.images, images)
    assert not distilled.images.requires_grad


@pytest.mark.parametrize("method", METHODS)
def test_the_state_holds_no_hyperparameters(method: str, toy: Any, planned: Any) -> None:
    _, a = started(planned, method, toy(), steps=2)
    if a.num_steps:
        a.step()

    assert not names_in(a.state_dict()) & {
        *fields(method),
        "lr",
        "steps",
        "num_steps",
        "param_groups",
        "seed",
    }


@pytest.mark.parametrize("method", [m for m in METHODS if "lr_img" in fields(m)])
def test_a_cloned_state_goes_on_with_the_new_objects_settings(method: str, toy: Any, planned: Any) -> None:
    """What PB2 does: the state of one member, the settings of another."""
    _, donor = started(planned, method, toy(), steps=3, lr_img=0.01)
    donor.step()
    state = through_a_file(donor.state_dict())
    _, heir = started(planned, method, toy(), steps=3, lr_img=5.0)
    heir.load_state_dict(state)
    assert same(heir.state_dict(), donor.state_dict())
    start = heir.snapshot().images

    donor.step(), heir.step()

    small, large = ((d.snapshot().images - start).norm() for d in (donor, heir))
    assert float(large / small) == pytest.approx(500, rel=0.05)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("target", SHAPES)
def test_presets_resolve_for_every_target(method: str, preset: str, target: str, toy: Any) -> None:
    dataset = toy(counts=(3,) * 10, shape=SHAPES[target], name=target)

    plan = resolve(method, dataset, ipc=1, preset=preset)

    assert make_distiller(plan).num_steps == plan.config.steps
    assert isinstance(plan.config.method, get_method(method).config_type)
    assert plan.arch.startswith("convnet")


@pytest.mark.parametrize("method", METHODS)
def test_its_settings_are_a_config_with_documented_fields(method: str) -> None:
    assert issubclass(get_method(method).config_type, Config)
    assert not [name for name, field in fields(method).items() if not field.description]


def test_shipped_spaces_are_found() -> None:
    assert OURS
    assert set(OURS) == {m for m in METHODS if get_method(m).__module__.startswith("ddray.")}


@pytest.mark.parametrize("method", OURS)
def test_its_search_space_names_its_fields_and_only_legal_values(method: str, digits: Any) -> None:
    space = read_space(shipped("search_spaces", "hpo", f"{method}.yaml"))

    assert set(space) <= set(fields(method))
    for name, dimension in space.items():
        for value in dimension.ends():
            plan = resolve(method, digits, ipc=1, layers=[{"method": {name: value}}])
            assert getattr(plan.config.method, name) == value
    for trial_id in range(5):
        resolve(method, digits, ipc=1, layers=[{"method": sample(space, 0, trial_id)}])
    if all(dimension.kind == "choice" for dimension in space.values()):
        assert grid(space, {name: dimension.choices[-1] for name, dimension in space.items()})


def test_shipped_configs_are_found() -> None:
    assert {path.parent.name for path in CONFIGS} >= set(OURS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_shipped_config_resolves_and_decides(path: Path, toy: Any) -> None:
    name, _, ipc = path.stem.partition("_ipc")
    dataset = toy(counts=(60,) * 10, shape=SHAPES.get(name, (3, 32, 32)), name=name)
    plan = resolve(path.parent.name, dataset, ipc=int(ipc or 1))

    expected = read_yaml(path)
    resolved = plan.config.dump()
    assert expected
    assert difference(merge(resolved, expected), resolved) == []
