"""Whether steps wait for the device, and whether the GPU computes what the CPU does."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ddray.data import Dataset, PixelSpace
from ddray.methods import REGISTRY
from ddray.nets import build_net
from ddray.system import numerics
from ddray.training.engine import Order, Rule, Step
from ddray.training.graph import WORTHWHILE_STEPS
from reports.gpu.lab import Figure, Figures, Lab, attempts, figure

_WAITS = "called a synchronizing CUDA operation"
_STEPS = 3
_SLOW_TO_SET_UP = ("d3hr", "boost_ssdd", "krr_st", "kmeans_ssl", "random_ssl", "rded", "sre2l")
_COMPARED = ("dm", "datadam", "m3d", "mmd_pixel", "dc", "dsa", "cafe", "idm", "dsdm", "sre2l")
LOSS_TOLERANCE, IMAGE_TOLERANCE = 1e-3, 1e-2
"""Of the first losses, relative, and of the images after them, in deviations of the CPU's images."""
# Their networks are trained for an epoch on either device, where rounding adds up.
_TRAINED, _TRAINED_FACTOR = ("dsdm", "sre2l"), 50


class _Training:
    """Steps of the training engine, as a method's: as many as make it take a CUDA graph, or fewer."""

    def __init__(self, lab: Lab, dataset: Dataset, num_steps: int) -> None:
        self.num_steps, self._count = num_steps, 0
        split, space = dataset.train(), PixelSpace("normalized", dataset.mean, dataset.std)
        self._images, self._labels = space.encode(split.images).to(lab.device), split.labels.to(lab.device)
        net = build_net("convnet2_w8", dataset.image_shape, dataset.num_classes, seed=0, device=lab.device)
        rule = Rule(F.cross_entropy, partial(torch.optim.SGD, momentum=0.9), clip=5.0)
        self._step = Step([net.train()], rule, lr=0.01, num_steps=num_steps)
        order = Order(len(split), batch=64, last="drop")
        self._rows = order.indices(torch.Generator().manual_seed(0), lab.device)

    def step(self) -> None:
        rows = next(self._rows)
        self._count += 1
        self._step.set_lr(0.01 / self._count)
        self._step(self._images[rows], self._labels[rows])


def devices(lab: Lab) -> Figures:
    """Set up every method and the training engine, and count the waits for the device of steady steps."""
    dataset = lab.digits()
    waiting: list[str] = []
    stepping: list[str] = []

    def case(name: str, start: Callable[[], Any]) -> dict[str, Figure]:
        measured = _waits(lab, start)
        if measured["n"]:
            stepping.append(name)
            waiting.extend([name] * bool(measured["value"]))
        return {"": measured}

    methods = sorted(REGISTRY.builtin_names(), key=lambda name: name in _SLOW_TO_SET_UP)
    starts: dict[str, Callable[[], Any]] = {
        method: partial(lab.started, method, dataset, ipc=2, quick=True) for method in methods
    }
    for name, num_steps in (("training, eager", _STEPS + 2), ("training, by a graph", WORTHWHILE_STEPS)):
        starts[name] = partial(_Training, lab, dataset, num_steps)
    yield from attempts({name: partial(case, name, start) for name, start in starts.items()})
    yield "steps that wait", figure(len(waiting), f"of {len(stepping)}", names=waiting)


def _waits(lab: Lab, start: Callable[[], Any]) -> Figure:
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


def _warm(start: Callable[[], Any]) -> Any:
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
        both = (torch.device("cpu"), lab.device)
        losses, images = zip(*(_first_steps(lab, dataset, method, device) for device in both), strict=True)
        loss = float(((losses[1] - losses[0]).abs() / losses[0].abs().clamp(min=1e-12)).max())
        pixels = float((images[1] - images[0]).abs().max() / images[0].std())
        differences["loss"].append(loss)
        differences["images"].append(pixels)
        factor = _TRAINED_FACTOR if method in _TRAINED else 1
        if loss > factor * LOSS_TOLERANCE or pixels > factor * IMAGE_TOLERANCE:
            allowed = f"{factor * LOSS_TOLERANCE:g} and {factor * IMAGE_TOLERANCE:g} are allowed"
            raise AssertionError(f"loss differs by {loss:.2g}, images by {pixels:.2g}; {allowed}")
        return {
            "loss": figure(loss, "relative difference", n=_STEPS),
            "images": figure(pixels, "difference in deviations", n=_STEPS),
        }

    yield from attempts({method: partial(case, method) for method in _COMPARED})
    for name, unit in (("loss", "relative"), ("images", "deviations")):
        if values := differences[name]:
            yield f"largest difference, {name}", figure(max(values), unit, n=len(values))


def _first_steps(
    lab: Lab, dataset: Dataset, method: str, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return losses [S] and images after S steps, computed in float32 on a device."""
    with numerics.applied("fp32", device=device.type):
        engine = lab.started(method, dataset, ipc=2, quick=True, device=device)
        losses = [engine.step()["loss"].reshape(()) for _ in range(_STEPS)]
    return torch.stack(losses).double().cpu(), engine.snapshot().images
