from __future__ import annotations

import json
import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as ddray.cli sets it, before torch is loaded

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from ddray.cli import _run
from ddray.cluster.runtime import ray_runtime
from ddray.data import Dataset, Split, open_dataset
from ddray.distillation.method import DistillContext, Distiller
from ddray.jobs.context import make_context, make_distiller
from ddray.jobs.plan import Plan, resolve

CPU = torch.device("cpu")

# A busy machine must not fail a test.
settings.register_profile("ddray", deadline=None)
settings.load_profile("ddray")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that wait for processes: they take longest."""
    items.sort(key=lambda item: not item.get_closest_marker("ray"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Fixes the order of sums, and keeps tests that run in parallel from competing for cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def ddray_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Gives every test its own home, and no data directory unless it sets one."""
    home = tmp_path / "home"
    monkeypatch.setenv("DDRAY_HOME", str(home))
    monkeypatch.delenv("DDRAY_DATA", raising=False)
    return home


@pytest.fixture(scope="session")
def ray_until_the_end() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def ray_here(ray_until_the_end: ExitStack, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One Ray for all tests of this process that use one; its workers have a $DDRAY_HOME of their own."""
    import ray

    if not ray.is_initialized():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DDRAY_HOME", str(tmp_path_factory.mktemp("home-of-workers")))
            ray_until_the_end.enter_context(ray_runtime(None))


@pytest.fixture
def no_ray(ray_until_the_end: ExitStack) -> None:
    """For a test that starts a Ray, or joins one, that others must not share."""
    ray_until_the_end.close()


@pytest.fixture
def run_command(capfd: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Runs a `ddray` command in this process, not in one of its own; returns its JSON."""

    def run(*arguments: str) -> dict[str, Any]:
        capfd.readouterr()
        code = _run([*arguments, "--json"], debug=True)
        printed = capfd.readouterr()
        assert code == 0, printed.err
        result: dict[str, Any] = json.loads(printed.out)
        return result

    return run


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return open_dataset("digits")


@pytest.fixture(scope="session")
def toy() -> Callable[..., Dataset]:
    """Makes a dataset of random uint8 images, classes unsorted; `counts` says how many each class has."""

    def make(
        counts: tuple[int, ...] = (9, 7, 8),
        shape: tuple[int, int, int] = (3, 16, 16),
        *,
        name: str = "toy",
        can_flip: bool = True,
        seed: int = 0,
    ) -> Dataset:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        labels = labels[torch.randperm(len(labels), generator=generator)]
        images = torch.randint(0, 256, (len(labels), *shape), generator=generator, dtype=torch.uint8)
        split = Split(images, labels)
        channels = shape[0]
        return Dataset(
            name=name,
            class_names=tuple(f"class {i}" for i in range(len(counts))),
            image_shape=shape,
            mean=tuple(0.4 + 0.05 * i for i in range(channels)),
            std=tuple(0.2 + 0.05 * i for i in range(channels)),
            can_flip=can_flip,
            load_train=lambda: split,
            load_test=lambda: split,
        )

    return make


@pytest.fixture(scope="session")
def sounds() -> Dataset:
    """A dataset of 24 random spectrograms of two words."""
    images = torch.randn(24, 1, 64, 64, generator=torch.Generator().manual_seed(0)).clamp_min(-1.5)
    split = Split(images, torch.arange(24) % 2)
    return Dataset(
        name="/sounds",
        class_names=("yes", "no"),
        image_shape=(1, 64, 64),
        mean=(0.1,),
        std=(0.9,),
        can_flip=False,
        load_train=lambda: split,
        load_test=lambda: split,
    )


@pytest.fixture(scope="session")
def planned() -> Callable[..., tuple[Plan, DistillContext, Distiller]]:
    """Makes plan, context and a fresh method object from nested settings."""

    def make(
        method: str, dataset: Dataset, /, *, ipc: int = 1, seed: int = 0, preset: str = "paper", **layers: Any
    ) -> tuple[Plan, DistillContext, Distiller]:
        settings = {"arch": "convnet2_w8", "compile": "off", **layers}
        plan = resolve(method, dataset, ipc=ipc, seed=seed, preset=preset, layers=[settings])
        ctx = make_context(plan, dataset.train(), split_name="train", device=CPU)
        return plan, ctx, make_distiller(plan)

    return make
