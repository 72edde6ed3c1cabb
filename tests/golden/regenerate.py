"""Losses of five steps, or drawn images' mean squares, by method: .venv/bin/python -m tests.golden.regenerate

Run it only after a change that is meant to change the numbers, and say so in CHANGELOG.md.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from ddray.data import open_dataset
from ddray.distillation.loop import Distillation, run_distillation
from ddray.jobs.context import make_context, make_distiller
from ddray.jobs.plan import resolve
from ddray.methods import get_method
from ddray.methods.dwa import DWAConfig
from ddray.methods.families import recovery
from ddray.methods.sre2l import SRe2LConfig
from ddray.pool.spec import SUPERVISED_RECIPE
from ddray.training.recipe import TeacherRecipe

FOLDER = Path(__file__).resolve().parent
METHODS = (
    *("cafe", "d3s", "datadam", "datm", "dc", "dd", "dm", "dsa", "dsdm", "dwa", "esfr", "frepo", "g_vbsm"),
    *("idm", "kip", "m3d", "mmd_pixel", "mtt", "sre2l"),
)
_GENERATORS = ("biggan", "cgan", "dc_vae", "gmmn")
_DIFFUSION = ("d3hr", "dit", "minimax")
DRAWN = (*_GENERATORS, *_DIFFUSION)
"""Methods whose sets a generator draws."""
# CAFE trains its network until an accuracy has moved, which on another CPU may be an epoch earlier or later.
# IDM's losses move by 1e-3 where its networks' ten batches are multiplied by 1 + 6e-8; after three by 1e-7.
_EXPERTS = {"num_models": 1, "epochs": 2, "batch": 64}
_BRIEF = {"inner_steps": 3, "expert_epochs": 1, "max_start": 1, "experts": _EXPERTS}
EXTRA: Mapping[str, Mapping[str, Any]] = {
    "datm": {**_BRIEF, "min_start": 0, "threshold": 10.0},
    "mtt": _BRIEF,
    "dsdm": {"pool": {"num_models": 2, "epochs": 1}},
    "cafe": {"max_inner": 3},
    "esfr": {"base": "idm", "net_steps": 3, "pool": {"num_models": 2, "epochs": 1, "arch": "convnet3_w64"}},
    "idm": {"net_steps": 3},
    "frepo": {"pool_size": 2},
    "minimax": {"finetune": {"epochs": 1, "memory": 2, "lr": 0.01, "ema": 0.5}},
    "dwa": DWAConfig.quick,
    "sre2l": SRe2LConfig.quick,
    "d3s": {"teacher_arch": "convnet2_w8_bn", "num_teachers": 2, "teacher_epochs": 1, "teacher_lr": 1e-5},
    "g_vbsm": {"teacher_archs": ["convnet2_w8_bn", "convnet2_w8"], "teacher_epochs": 1, "teacher_lr": 1e-5},
}
STEPS = 5


def losses(method: str) -> list[float]:
    """Return the losses of the first steps on digits: ipc 1, batch_real 8, seed 0, one thread."""
    has_real = "batch_real" in get_method(method).config_type.model_fields
    distilled = _distilled(method, {"batch_real": 8} if has_real else {}, steps=STEPS)
    return [float(loss) for loss in distilled.losses]


def mean_squares(method: str) -> list[float]:
    """Return the mean square of each class's image on digits: ipc 1, seed 0, one thread."""
    quick: Mapping[str, Any] = getattr(get_method(method).config_type, "quick", {})
    slow = {"lr": 1e-5} if method in _GENERATORS else {"lr": 1e-5, "vae_lr": 1e-5}
    images = _distilled(method, {**quick, "generator": {**quick["generator"], **slow}}).distilled.images
    return [float(mean) for mean in images.square().mean((1, 2, 3))]


def _distilled(method: str, settings: Mapping[str, Any], **run: int) -> Distillation:
    torch.set_num_threads(1)
    dataset = open_dataset("digits")
    layers = [{"compile": "off", **run, "method": {**settings, **EXTRA.get(method, {})}}]
    plan = resolve(method, dataset, ipc=1, seed=0, layers=layers)
    ctx = make_context(plan, dataset.train(), split_name="train", device=torch.device("cpu"))
    # Networks of the pool hardly move: trained at .01, their last digits, which differ between kinds of CPUs
    # (AVX2, AVX-512), grow to 5e-4 of DSDM's first loss; at 1e-5 to 1e-7.
    with (
        patch.dict(SUPERVISED_RECIPE, lr=1e-5),
        patch.object(recovery, "TeacherRecipe", partial(TeacherRecipe, lr=1e-5)),
    ):
        return run_distillation(make_distiller(plan), ctx)


if __name__ == "__main__":
    os.environ["DDRAY_HOME"] = tempfile.mkdtemp()  # networks of another build would give other numbers
    for name in sys.argv[1:] or (*METHODS, *DRAWN):
        numbers = {"mean_squares": mean_squares(name)} if name in DRAWN else {"losses": losses(name)}
        text = json.dumps({"command": "python -m tests.golden.regenerate", **numbers}, indent=2)
        (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")
