"""What a step of each method costs the host: waits for the device, kernels, milliseconds of Python.

    python -m tests.gpu.budgets            # prints the table, measured now
    python -m tests.gpu.budgets --write    # and makes it the budgets that the tests check

Measured on the fake GPU with a tiny network, where the host is what takes the time; the milliseconds are
those of this machine, with the fake's own work. Methods without steps are measured as a whole, from set-up to
set.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

from ddray.methods import method_names
from tests.gpu.fake_cuda import FakeCuda
from tests.gpu.runs import fit_briefly, started

FILE = Path(__file__).with_name("budgets.yaml")
_WARM_UP, _MEASURED = 3, 4


class Cost(NamedTuple):
    """Of a steady step: mean syncs and kernels; of a method without steps, of the whole run."""

    syncs: float
    kernels: float
    ms: float
    is_step: bool
    places: dict[str, int]


def measured(method: str) -> Cost:
    """Run a method on a fake GPU and return what a step takes after the first few."""
    with FakeCuda() as gpu:
        ctx, distiller = started(method, "cuda", steps=_WARM_UP + _MEASURED)
        begin = time.perf_counter()
        distiller.setup(ctx)
        if distiller.num_steps == 0:
            distiller.snapshot()
            num = 1
        else:
            # D3HR's first steps choose latents, of one class each; the rest decode.
            warm_up = min(_WARM_UP, distiller.num_steps - 2)
            for _ in range(warm_up):
                distiller.step()
            gpu.forget()
            begin, num = time.perf_counter(), min(_MEASURED, distiller.num_steps - warm_up)
            for _ in range(num):
                distiller.step()
        ms = 1000 * (time.perf_counter() - begin) / num
        syncs = sum(gpu.syncs.values()) / num
        return Cost(syncs, gpu.launches / num, ms, distiller.num_steps > 0, dict(gpu.syncs))


def budgets() -> dict[str, dict[str, float]]:
    """Return the budgets by method: syncs and kernels."""
    stored: dict[str, dict[str, float]] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return stored


def table(costs: dict[str, Cost]) -> str:
    """Return the costs as a Markdown table."""
    lines = ["| method | of | syncs | kernels | host ms |", "|---|---|---:|---:|---:|"]
    for name, cost in costs.items():
        unit = "step" if cost.is_step else "run"
        lines.append(f"| {name} | {unit} | {cost.syncs:g} | {cost.kernels:.0f} | {cost.ms:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table; with --write, keep it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="make what was measured the budgets")
    parser.add_argument("--places", action="store_true", help="say where the waits are")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        os.environ["DDRAY_HOME"] = folder
        fit_briefly(patch)
        costs = {}
        for method in method_names():
            measured(method)  # networks of the pool are trained here
            costs[method] = measured(method)
    print(table(costs))  # noqa: T201
    if options.places:
        for method, cost in costs.items():
            print(method, cost.places)  # noqa: T201
    if options.write:
        stored = {name: {"syncs": cost.syncs, "kernels": round(cost.kernels)} for name, cost in costs.items()}
        FILE.write_text(yaml.safe_dump(stored, sort_keys=True), encoding="utf-8")


if __name__ == "__main__":
    main()
