"""Memory: what a step takes, what happens where it does not fit, and two processes on one device."""

from __future__ import annotations

import gc
import multiprocessing
from contextlib import ExitStack
from functools import partial
from multiprocessing.synchronize import Event
from typing import Any

import torch

from ddray.data import Dataset
from ddray.system.memory import halved_budget, peak_bytes, reset_peak
from reports.gpu.lab import Figure, Figures, Lab, attempts, figure

_ROOM = 2**28  # bytes beside a limit: the context's workspaces


def memory(lab: Lab) -> Figures:
    """Measure the peak of a step by its budget, then let a step run out of memory until it fits."""
    dataset = lab.pictures()
    budgets = ("64GiB", "4GiB", "512MiB", "64MiB")
    cases: dict[str, Any] = {f"budget {budget}": partial(_peak, lab, dataset, budget) for budget in budgets}
    yield from attempts({**cases, "drill": partial(_drill, lab, dataset)})


def _peak(lab: Lab, dataset: Dataset, budget: str) -> dict[str, Figure]:
    engine = lab.started("datadam", dataset, ipc=lab.size(50, 2), memory_budget=budget)
    _empty(lab)
    reset_peak(lab.device)
    engine.step()
    lab.synchronize()
    peak = peak_bytes(lab.device) / 2**20
    return {"peak": figure(peak, "MiB"), "step": lab.timed(engine.step, repeats=3)}


def _drill(lab: Lab, dataset: Dataset) -> dict[str, Figure]:
    """Give a step half of the memory it takes: halve the budget after each failure until it fits."""
    whole = 2**20 * (_peak(lab, dataset, "64GiB")["peak"]["value"] or 0)
    limit = int(whole / 2) + lab.size(_ROOM, 0)
    if lab.on_gpu:
        _empty(lab)
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(limit / total)
    with ExitStack() as halved:
        for halvings in range(12):
            if (peak := _peak_if_it_fits(lab, dataset)) is not None:
                return {"": figure(halvings, "halvings", limit_mib=limit / 2**20, peak_mib=peak)}
            _empty(lab)
            halved.enter_context(halved_budget())
    raise RuntimeError(f"a step did not fit {limit / 2**20:.0f} MiB after 12 halvings of the budget")


def _peak_if_it_fits(lab: Lab, dataset: Dataset) -> float | None:
    """Return the peak of a step in MiB; None if memory runs out."""
    reset_peak(lab.device)
    try:
        lab.started("datadam", dataset, ipc=lab.size(50, 2)).step()
        lab.synchronize()
    except torch.OutOfMemoryError:
        return None
    return peak_bytes(lab.device) / 2**20


def _empty(lab: Lab) -> None:
    gc.collect()
    if lab.on_gpu:
        torch.cuda.empty_cache()


def pair(lab: Lab) -> Figures:
    """Time DM's steps alone, then while another process does the same on the device."""
    dataset = lab.pictures()
    yield from attempts({"dm": partial(_beside, lab, dataset)})


def _beside(lab: Lab, dataset: Dataset) -> dict[str, Figure]:
    engine = lab.started("dm", dataset, ipc=lab.size(10, 1))
    alone = lab.timed(engine.step, inner=10)
    spawn = multiprocessing.get_context("spawn")
    ready, enough = spawn.Event(), spawn.Event()
    other = spawn.Process(target=_keep_busy, args=(lab, ready, enough), daemon=True)
    other.start()
    try:
        if not ready.wait(25):
            raise RuntimeError("the second process did not step within 25 s")
        shared = lab.timed(engine.step, inner=10)
    finally:
        enough.set()
        other.join(10)
    together = 2 * alone["value"] / shared["value"]
    return {
        "alone": alone,
        "beside another": shared,
        "both": figure(together, "times the steps of one", n=shared["n"]),
    }


def _keep_busy(lab: Lab, ready: Event, enough: Event) -> None:
    """Do DM's steps until told that it is enough."""
    engine = lab.started("dm", lab.pictures(), ipc=lab.size(10, 1))
    while not enough.is_set():
        engine.step()
        lab.synchronize()
        ready.set()
