"""Whether steps wait for the device, and whether the GPU computes what the CPU does."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ddray.data import Dataset
from ddray.distillation.method import Distiller
from ddray.methods import REGISTRY
from reports.gpu.lab import Figure, Figures, Lab, attempts, figure

_WAITS = "called a synchronizing CUDA operation"
_STEPS = 3
_SLOW_TO_SET_UP = ("d3hr", "boost_ssdd", "krr_st", "kmeans_ssl", "random_ssl", "rded", "sre2l")
_COMPARED = ("dm", "datadam", "m3d", "mmd_pixel", "dc", "dsa", "cafe", "idm", "dsdm", "sre2l")
LOSS_TOLERANCE, IMAGE_TOLERANCE = 1e-3, 1e-2
"""Of the first losses, relative, and of the images after them, in deviations of the CPU's images."""


def devices(lab: Lab) -> Figures:
    """Set up every method and count the waits for the device of its steady steps."""
    dataset = lab.digits()
    waiting: list[str] = []
    stepping: list[str] = []

    def case(method: str) -> dict[str, Figure]:
        start = partial(lab.started, method, dataset, ipc=2, quick=True)
        measured = _waits(lab, start)
        if measured["n"]:
            stepping.append(method)
            waiting.extend([method] * bool(measured["value"]))
        return {"": measured}

    methods = sorted(REGISTRY.builtin_names(), key=lambda name: name in _SLOW_TO_SET_UP)
    yield from attempts({method: partial(case, method) for method in methods})
    yield "steps that wait", figure(len(waiting), "methods", n=len(stepping), methods=waiting)


def _waits(lab: Lab, start: Callable[[], Distiller]) -> Figure:
    """Return how often a steady step waits, and where; 0 if it raises nothing with waits as errors."""
    engine = _warm(start)
    steps = min(_STEPS, engine.num_steps)
    if not steps:
        engine.snapshot()
        return figure(None, "waits per step", n=0, note="selects in its set-up")
    try:
        with lab.syncs("error"):
            for _ in range(steps):
                engine.step()
        return figure(0, "waits per step", n=steps)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
    engine = _warm(start)  # the one before was left within a step
    with warnings.catch_warnings(record=True) as caught, lab.syncs("warn"):
        warnings.simplefilter("always")
        for _ in range(steps):
            engine.step()
    places = Counter(_place(entry) for entry in caught if _WAITS in str(entry.message))
    return figure(places.total() / steps, "waits per step", n=steps, where=dict(places.most_common(8)))


def _warm(start: Callable[[], Distiller]) -> Distiller:
    engine = start()
    for _ in range(min(2, max(0, engine.num_steps - _STEPS))):
        engine.step()
    return engine


def _place(entry: warnings.WarningMessage) -> str:
    path = Path(entry.filename)
    parts = path.parts
    short = "/".join(parts[parts.index("ddray") :]) if "ddray" in parts else path.name
    return f"{short}:{entry.lineno}"


def parity(lab: Lab) -> Figures:
    """Take the first steps of methods on the CPU and on the GPU, and compare losses and images."""
    dataset = lab.digits()
    differences: dict[str, list[float]] = {"loss": [], "images": []}

    def case(method: str) -> dict[str, Figure]:
        places = (torch.device("cpu"), lab.device)
        losses, images = zip(*(_first_steps(lab, dataset, method, place) for place in places), strict=True)
        loss = float(((losses[1] - losses[0]).abs() / losses[0].abs().clamp(min=1e-12)).max())
        pixels = float((images[1] - images[0]).abs().max() / images[0].std())
        differences["loss"].append(loss)
        differences["images"].append(pixels)
        if loss > LOSS_TOLERANCE or pixels > IMAGE_TOLERANCE:
            allowed = f"{LOSS_TOLERANCE:g} and {IMAGE_TOLERANCE:g} are allowed"
            raise AssertionError(f"loss differs by {loss:.2g}, images by {pixels:.2g}; {allowed}")
        return {
            "loss": figure(loss, "relative difference", n=_STEPS),
            "images": figure(pixels, "difference in deviations", n=_STEPS),
        }

    yield from attempts({method: partial(case, method) for method in _COMPARED})
    for name, values in differences.items():
        if values:
            yield f"largest difference, {name}", figure(max(values), "relative", n=len(values))


def _first_steps(
    lab: Lab, dataset: Dataset, method: str, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return losses [S] and images after S steps, computed in float32 on a device."""
    engine = lab.started(method, dataset, ipc=2, quick=True, device=device, precision="fp32")
    losses = [engine.step()["loss"].reshape(()) for _ in range(_STEPS)]
    return torch.stack(losses).double().cpu(), engine.snapshot().images
