"""Benchmarks compare what they measure in one run, and end with one table of their figures (`make bench`)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from ddray.data import Dataset, Split
from ddray.jobs.plan import Plan, resolve
from ddray.system.worker import cpu_count

TABLE = pytest.StashKey[list[tuple[str, dict[str, Any]]]]()


@pytest.fixture
def figures(request: pytest.FixtureRequest, record_property: Any) -> Iterator[dict[str, Any]]:
    """Takes what a benchmark measures, for the table and for reports/regenerate.py."""
    measured: dict[str, Any] = {}
    yield measured
    for name, value in measured.items():
        record_property(name, json.dumps(value))
    request.config.stash.setdefault(TABLE, []).append((request.node.name, measured))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash.get(TABLE, [])
    if rows:
        terminalreporter.section("figures")
    for benchmark, measured in rows:
        terminalreporter.write_line(benchmark)
        for name, value in measured.items():
            values = value.items() if isinstance(value, dict) else [("", value)]
            text = ", ".join(f"{key} {number:.4g}".strip() for key, number in values)
            terminalreporter.write_line(f"    {name:<32} {text}")


@pytest.fixture(autouse=True)
def all_threads() -> Iterator[None]:
    """Use the machine's cores: the bars are for that."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, cpu_count()))
    yield
    torch.set_num_threads(before)


def best_of(*functions: Callable[[], object], rounds: int, warm: bool = False) -> list[float]:
    """Return each function's shortest (least disturbed) run in seconds, after a warm-up run.

    The functions take turns, so that other load and clock changes affect them alike.
    """
    for function in () if warm else functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, durations in zip(functions, times, strict=True):
            begin = time.perf_counter()
            function()
            durations.append(time.perf_counter() - begin)
    return [min(durations) for durations in times]


def random_dataset(num_classes: int, per_class: int, *, name: str = "random32") -> Dataset:
    """Return random 32x32 colour images; speed does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    shape = (num_classes * per_class, 3, 32, 32)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    split = Split(images, torch.arange(num_classes).repeat(per_class))
    return Dataset(
        name=name,
        class_names=tuple(map(str, range(num_classes))),
        image_shape=(3, 32, 32),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        can_flip=True,
        load_train=lambda: split,
        load_test=lambda: split,
    )


def datadam_plan(dataset: Dataset, batch_real: int, compile_: str) -> Plan:
    """Return DataDAM's paper preset on a dataset at ipc 1."""
    layer = {"compile": compile_, "steps": 8000, "method": {"batch_real": batch_real}}
    return resolve("datadam", dataset, ipc=1, layers=[layer])
