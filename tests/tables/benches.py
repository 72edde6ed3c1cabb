"""A small bench that tests of tables run in their own process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ddray.errors import InterruptedRunError
from ddray.runs.executor import LocalExecutor
from ddray.runs.ledger import Ledger
from ddray.tables import worker
from ddray.tables.columns import MEASURED
from ddray.tables.options import BenchOptions
from ddray.tables.run import (
    prepare,
    run_bench,
)
from ddray.tables.spec import BenchSpec, PublishedSource
from ddray.tables.units import Cell

LOCAL = BenchOptions(executor="local")


TINY: dict[str, Any] = {
    "name": "tiny",
    "dataset": "digits",
    "methods": ["random", {"name": "dm", "steps": 2, "set": {"method.batch_real": 4}}],
    "ipc": 1,
    "set": {"arch": "convnet1_w8", "compile": "off"},
    "evaluate": {"archs": ["convnet1_w8", "convnet1_w8_bn"], "epochs": 1, "seeds": 2},
    "seeds": 2,
}


def spec(**changes: Any) -> BenchSpec:
    return BenchSpec.parse({**TINY, **changes})


@contextmanager
def cut_after(stop: int) -> Iterator[None]:
    """Interrupt the bench of the block when it has published `stop` units."""
    real, count = worker.publish, 0

    def publish(*args: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        if count > stop:
            raise KeyboardInterrupt
        real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "publish", publish)
        with pytest.raises(InterruptedRunError, match="the bench was interrupted; run again with"):
            yield


def run(
    folder: Path, bench_spec: BenchSpec | None = None, *, resume: bool = False, **options: Any
) -> dict[str, Any]:
    """Run a bench in this process."""
    bench_options = BenchOptions(executor="local", **options)
    return run_bench(
        prepare(bench_spec or spec(), bench_options), LocalExecutor(), run_dir=folder, resume=resume
    ).dump()


def repeatable(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a bench's cells without what differs from run to run."""
    return [{k: v for k, v in cell.items() if k not in MEASURED} for cell in result["cells"]]


def starts(folder: Path) -> dict[str, int]:
    """Return how often each unit was started."""
    keys = [event["key"] for event in Ledger(folder).events() if event["event"] == "start"]
    return {key: keys.count(key) for key in keys}


def nas_of(**options: Any) -> dict[str, Any]:
    """Return the settings of a NAS evaluation."""
    return {"protocol": "nas", "options": options}


def table_cell(**changes: Any) -> Cell:
    values: dict[str, Any] = {
        "method": "datadam",
        "name": "datadam",
        "dataset": "cifar10",
        "num_classes": 10,
        "size": ("ipc", 1),
        "protocol": "hard",
        "arch": "convnet3",
        "target": "cifar10",
        "teacher": None,
        "augment": None,
        "settings": None,
        "keys": (),
        "source": PublishedSource(),
    }
    return Cell(**{**values, **changes})
