"""Decoding an image folder into a packed map, against torchvision's loader with as many workers."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddray.data import packing
from ddray.data.folders import image_source
from ddray.data.pictures import Geometry
from ddray.system.worker import cpu_count
from tests.benchmarks.conftest import best_of

pytestmark = pytest.mark.benchmark
NUM, SIDE = 600, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs' size and about their entropy: 500 x 375 px, 50 to 70 KB each."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(NUM):
        small = Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8))
        image = np.asarray(small.resize((500, 375), Image.Resampling.BICUBIC)).astype(np.int16)
        image = (image + rng.integers(-12, 13, image.shape)).clip(0, 255).astype(np.uint8)
        path = root / f"class{number % 10}" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path, quality=85)
    return root


@pytest.mark.parametrize("workers", [1, 2])
def test_decode_rate(
    folder: Path, ddray_home: Path, workers: int, figures: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bar: as many images a second as torchvision's ImageFolder in a DataLoader, with as many workers."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    if workers > cpu_count():
        pytest.skip("needs two cores")
    monkeypatch.setattr(packing, "_threads", lambda: workers)
    labelled = [(path, int(path.parent.name[-1])) for path in sorted(folder.rglob("*.jpg"))]
    choose = partial(Geometry, (3, SIDE, SIDE), resize=True)

    def ours() -> None:
        shutil.rmtree(ddray_home, ignore_errors=True)
        split, _ = packing.packed(image_source(labelled), "benchmark", choose)
        assert split.images.shape == (NUM, 3, SIDE, SIDE)

    def torchvision() -> None:
        steps = [v2.Resize(SIDE, antialias=True), v2.CenterCrop(SIDE), v2.PILToTensor()]
        loader = DataLoader(ImageFolder(folder, v2.Compose(steps)), 64, num_workers=workers)
        assert sum(len(labels) for _, labels in loader) == NUM

    seconds = best_of(ours, torchvision, rounds=4)
    rates = {"ours": NUM / seconds[0] / workers, "torchvision": NUM / seconds[1] / workers}
    figures.update({"images/s per core": rates, "ratio": rates["ours"] / rates["torchvision"]})
    assert rates["ours"] >= rates["torchvision"], rates
