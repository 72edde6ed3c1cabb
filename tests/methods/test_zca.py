from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ddray.artifact.reading import load
from ddray.data import Dataset
from ddray.jobs import distill as api
from ddray.jobs.plan import resolve


def test_a_whitened_set_is_distilled_saved_and_shown(toy: Callable[..., Dataset], tmp_path: Path) -> None:
    """Preset paper whitens CIFAR: the file holds the whitening, its decoded pixels are near the real ones."""
    dataset = toy((12, 12, 12))
    layers = [
        {"pixel_space": "zca", "steps": 2, "arch": "convnet2_w8", "method": {"batch_real": 4, "lr_img": 1e-3}}
    ]
    plan = resolve("datadam", dataset, ipc=2, layers=layers)
    out = tmp_path / "set.pt"
    api.distill(plan, device=torch.device("cpu"), run_dir=tmp_path / "run", out=out)
    distilled = load(out)
    assert distilled.meta.pixel_space == "zca"
    assert distilled.meta.mean == dataset.mean
    assert distilled.meta.storage_floats == distilled.images.numel()
    assert set(distilled.zca) == {"zca_mean", "zca_matrix"}
    real = dataset.train().images.float().div(255).flatten(1)
    pixels = distilled.space().decode(distilled.images).flatten(1)
    assert float(torch.cdist(pixels, real).min(1).values.max()) < 1.0
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
