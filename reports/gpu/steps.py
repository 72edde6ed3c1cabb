"""Seconds of distillation steps, in which precision, and how much of them the device computes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from ddray.data import Dataset
from ddray.system import numerics
from ddray.system.options import Precision
from reports.gpu.lab import Figure, Figures, Lab, attempts, figure

# Settings at CIFAR's size beside the preset's, and steps of a measured block.
_METHODS: Mapping[str, tuple[dict[str, Any], int]] = {
    "datadam": ({}, 10),
    "dm": ({}, 10),
    "dsdm": ({"pool": {"num_models": 2, "epochs": 1}}, 10),
    "idm": ({"net_steps": 5}, 5),
    "dc": ({"outer_loop": 2, "inner_loop": 2}, 1),
}
_VARIANTS: Mapping[str, tuple[str, Precision]] = {
    "eager": ("off", "tf32"),
    "eager, fp32": ("off", "fp32"),
    "eager, bf16": ("off", "bf16"),
    "compiled": ("on", "tf32"),
    "compiled, bf16": ("on", "bf16"),
}


def steps(lab: Lab) -> Figures:
    """Time the steps of five methods, and profile them."""
    dataset = lab.pictures()

    def case(method: str) -> dict[str, Figure]:
        settings, inner = _METHODS[method]
        sizes: dict[str, Any] = {} if lab.is_tiny else {"method": settings}
        engine = lab.started(method, dataset, ipc=lab.size(10, 1), **sizes)
        timed = lab.timed(engine.step, inner=inner)
        return {"step": timed, "busy": lab.busy(engine.step, inner, timed["value"])}

    yield from attempts({method: partial(case, method) for method in _METHODS})


def precisions(lab: Lab) -> Figures:
    """Time a step eagerly, compiled and in bfloat16."""
    dataset = lab.pictures()
    methods = {"datadam": tuple(_VARIANTS), "dm": ("eager", "eager, bf16", "compiled")}
    yield from attempts(
        {
            f"{method}, {name}": partial(_variant, lab, dataset, method, *_VARIANTS[name])
            for method, names in methods.items()
            for name in names
            if not (lab.is_tiny and name.startswith("compiled"))  # half a minute on a CPU
        }
    )


def _variant(
    lab: Lab, dataset: Dataset, method: str, compiled: str, precision: Precision
) -> dict[str, Figure]:
    with numerics.applied(precision, device=lab.device.type):
        engine = lab.started(method, dataset, ipc=lab.size(10, 1), compile=compiled)
        return {"": lab.timed(engine.step, inner=10)}


def generative(lab: Lab) -> Figures:
    """Time the self-supervised methods' steps, and D3HR from its generator to its images."""
    dataset = lab.pictures(100)
    learned = {
        "teacher": {
            "arch": "convnet2_w8" if lab.is_tiny else "convnet3",
            "epochs": 1,
            "batch": lab.size(256, 64),
        },
        "pool_size": 2,
        "inner_steps_max": lab.size(20, 2),
        "batch_real": lab.size(512, 8),
    }

    def case(method: str) -> dict[str, Figure]:
        engine = lab.started(method, dataset, ipc=lab.size(10, 1), method=learned)
        return {"step": lab.timed(engine.step, inner=5)}

    def diffusion() -> dict[str, Figure]:
        quick = {"num_candidates": lab.size(100_000, 5), "num_inference_steps": lab.size(20, 2)}
        engine = lab.started("d3hr", dataset, ipc=lab.size(10, 1), quick=True, method=quick)
        seconds = lab.seconds(engine.step, repeats=min(5, engine.num_steps - 1))
        mean = sum(seconds) / len(seconds)
        return {"step": figure(1000 * mean, "ms", n=len(seconds), num_steps=engine.num_steps)}

    yield from attempts(
        {"krr_st": partial(case, "krr_st"), "boost_ssdd": partial(case, "boost_ssdd"), "d3hr": diffusion}
    )
