"""The memory of a step in groups of classes against that of all classes at once, and what groups cost."""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest
import torch

from ddray.jobs.context import make_context, make_distiller
from ddray.jobs.plan import resolve
from ddray.system.memory import peak_bytes, reset_peak
from tests.benchmarks.conftest import best_of, random_dataset

pytestmark = pytest.mark.benchmark
CPU = torch.device("cpu")
BUDGET = 128  # MiB


def step_of(method: str, ipc: int, budget: str) -> dict[str, float]:
    """Return the MiB that a step takes beyond what there is before it, and its seconds (a fresh process)."""
    torch.set_num_threads(1)
    dataset = random_dataset(10, 64)
    settings = {"batch_real": 8, **({"use_pool": False} if method == "dsdm" else {})}
    layer = {"compile": "off", "memory_budget": budget, "steps": 9, "method": settings}
    plan = resolve(method, dataset, ipc=ipc, layers=[layer])
    distiller = make_distiller(plan)
    distiller.setup(make_context(plan, dataset.train(), split_name="train", device=CPU))
    reset_peak(CPU)
    before = peak_bytes(CPU)
    distiller.step()
    peak = (peak_bytes(CPU) - before) / 2**20
    return {"MiB": peak, "seconds": best_of(distiller.step, rounds=2, warm=True)[0]}


@pytest.mark.parametrize(("method", "ipc"), [("datadam", 10), ("datadam", 50), ("dsdm", 10)])
def test_a_step_takes_what_its_budget_says(method: str, ipc: int, figures: dict[str, Any]) -> None:
    """Bars: at most 2.5 times the budget, or what one class takes; no longer than the whole step, to 15 %."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        whole, groups = (pool.apply(step_of, (method, ipc, size)) for size in ("64GiB", f"{BUDGET}MiB"))
    figures.update({"whole": whole, "groups": groups})
    assert groups["MiB"] <= 2.5 * max(BUDGET, whole["MiB"] / 10), figures
    assert groups["seconds"] <= 1.15 * whole["seconds"], figures
