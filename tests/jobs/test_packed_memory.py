"""A dataset that is larger than the memory of a process distils in it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

SIDE, NUM = 224, 14_400
MAP_BYTES = 3 * SIDE * SIDE * NUM
BOUND = 2**30


def write_folder(root: Path) -> None:
    """Writes more than 2 GB of decoded images, of which 60 differ, in 10 classes."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(60):
        image = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((SIDE, SIDE))
        image.save(buffer := io.BytesIO(), "JPEG", quality=60)
        encoded.append(buffer.getvalue())
    for part, num in (("train", NUM), ("test", 200)):
        for number in range(num):
            path = root / part / f"class{number % 10}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded[number % 60])


def run(*arguments: object) -> tuple[dict[str, Any], int]:
    """Runs a command; returns its JSON and its peak of anonymous memory, in bytes."""
    command = [sys.executable, "-m", "ddray", *map(str, arguments), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    peak = 0
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        while process.poll() is None:
            lines = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii").splitlines()
            sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")]
            peak = max([peak, *sizes])
            time.sleep(0.02)
        output, errors = process.communicate()
    assert process.returncode == 0, errors
    result: dict[str, Any] = json.loads(output)
    return result, peak


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_map_of_2_gb_distils_in_1_gb_of_anonymous_memory(
    tmp_path: Path, ddray_home: Path, record_property: Callable[[str, object], None]
) -> None:
    write_folder(tmp_path / "data")
    shared = ("--dataset", tmp_path / "data", "--ipc", 1, "--set", "arch=convnet2_w8", "--set", "compile=off")
    small = ("--steps", 2, "--set", "method.batch_real=8")
    peaks = {}
    for method, steps in (("dm", small), ("datadam", small), ("random", ()), ("class_mean", ())):
        out = tmp_path / f"{method}.pt"
        _, peaks[method] = run("distill", "--method", method, *shared, *steps, "--out", out)
    _, peaks["evaluate"] = run("evaluate", tmp_path / "dm.pt", "--epochs", 2, "--seeds", 1)
    sizes = [path.stat().st_size for path in (ddray_home / "packed").glob("*/images.npy")]
    assert max(sizes) > MAP_BYTES > 2 * 10**9
    for name, peak in peaks.items():
        record_property(f"{name} MiB", peak // 2**20)
    assert max(peaks.values()) < BOUND, peaks
