"""Runs of methods on a device, short, and what makes a CPU compute as CUDA does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ddray.data import Dataset
from ddray.distillation.loop import Distillation, run_distillation
from ddray.distillation.method import DistillContext, Distiller
from ddray.jobs.context import make_context, make_distiller
from ddray.jobs.plan import resolve
from ddray.methods import get_method
from ddray.methods.families.diffusion import groups
from ddray.methods.families.matching import batches
from ddray.methods.families.ssl import bases_fit
from ddray.nets import build
from ddray.nets.features import CpuLayer
from ddray.testing import random_dataset
from ddray.training import embedding, engine

STEPS = 4


def started(
    method: str,
    device: torch.device | str,
    dataset: Dataset | None = None,
    *,
    steps: int = STEPS,
    ipc: int = 2,
    settings: dict[str, Any] | None = None,
    **method_settings: Any,
) -> tuple[DistillContext, Distiller]:
    """Return context and method object, not set up, on three classes of twelve images; quick settings."""
    dataset = dataset or random_dataset((12, 12, 12))
    quick = getattr(get_method(method).config_type, "quick", {})
    layer: dict[str, Any] = {"arch": "convnet2_w8", "compile": "off", **(settings or {})}
    layer["method"] = {**quick, **method_settings}
    if resolve(method, dataset, ipc=ipc).config.steps > 0:
        layer["steps"] = steps
    plan = resolve(method, dataset, ipc=ipc, layers=[layer])
    ctx = make_context(plan, dataset.train(), split_name="train", device=torch.device(device))
    return ctx, make_distiller(plan)


def distilled(
    method: str,
    device: torch.device | str,
    *,
    checkpoint: Path | None = None,
    until: int | None = None,
    **options: Any,
) -> Distillation:
    """Run a method's steps, or those up to `until`, from its checkpoint if there is one."""
    ctx, distiller = started(method, device, **options)
    return run_distillation(distiller, ctx, checkpoint=checkpoint, checkpoint_every=1, until=until)


def fit_briefly(patch: pytest.MonkeyPatch) -> None:
    """Let the views' shifts be fitted in a few steps (Boost-SSDD)."""
    patch.setattr(bases_fit, "_FIT_STEPS", 20)


def compute_as_cuda(patch: pytest.MonkeyPatch) -> None:
    """Let CPU and GPU take the same memory formats, layers and sizes of parts: they change last digits."""
    whole = 2**40
    patch.setattr(CpuLayer, "is_on_cpu", lambda layer, maps: False)
    patch.setattr(engine, "_CHUNK_PIXELS", whole)
    patch.setattr(batches, "_CHUNK_BYTES", whole)
    patch.setitem(embedding._CHUNK, "cpu", embedding._CHUNK["cuda"])
    patch.setitem(embedding._SCORED, "cpu", embedding._SCORED["cuda"])
    patch.setitem(groups._BLOCK, "cpu", groups._BLOCK["cuda"])
    original = build.training_format
    for module in [module for name, module in sys.modules.items() if name.startswith("ddray.")]:
        if vars(module).get("training_format") is original:
            patch.setattr(module, "training_format", lambda net, device, **_: torch.channels_last)
