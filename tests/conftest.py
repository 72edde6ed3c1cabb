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
from ddray.jobs.plan import Plan
from ddray.testing import plan_method, random_dataset

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
def _same_random_numbers() -> None:
    """Tests that draw from the global generator get the same numbers whichever tests ran before."""
    torch.manual_seed(0)


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
    return random_dataset


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
    return plan_method
