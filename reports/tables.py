"""The papers' tables scaled down to two CPU cores: reports/specs/<part>.yaml, run by `ddray bench`.

`python reports/regenerate.py ablation` (or another part of TITLES) runs one. The spec shows what is scaled
down; it is stored in reports/<part>.json with the cells.
"""

from __future__ import annotations

import os
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

Run = Callable[..., dict[str, Any]]

SPECS = Path(__file__).resolve().parent / "specs"
MNIST_PER_CLASS = 600
IMAGENETTE_PER_CLASS = {"train": 20, "val": 10}
TITLES = {
    "ablation": "DSDM's parts on digits",
    "speech": "Spoken digits",
    "ssdd": "Self-supervised sets: digits, and a transfer",
    "ssdd_cifar100": "Self-supervised sets: CIFAR-100, and a transfer",
    "diffusion_table": "D3HR and its baselines: digits",
    "diffusion_mnist": "D3HR and its baselines: MNIST",
    "imagenette": "ImageNette at 128 and 224 px",
}
PREPARED = ("speech", "ssdd_cifar100", "diffusion_mnist", "imagenette")
"""Parts whose data is prepared first, of part of a dataset or from an archive: their spec alone is another
table."""


def described(part: str) -> str:
    """Return what a spec says of itself: the comment that it begins with, but for its last line."""
    lines = (SPECS / f"{part}.yaml").read_text(encoding="utf-8").splitlines()
    comment = list(takewhile(lambda line: line.startswith("# "), lines))
    return " ".join(line.removeprefix("# ") for line in comment[:-1])


def command_of(part: str) -> str:
    """Return the command that measures a part."""
    if part in PREPARED:
        return f"python reports/regenerate.py {part}"
    return f"ddray bench reports/specs/{part}.yaml"


def measure(ddray: Run, part: str, replaced: str = "", folder: str = "") -> dict[str, Any]:
    """Run a part's spec on all cores, one unit per core; return its cells.

    Args:
        ddray: runs a command and returns its JSON.
        part: the spec's name.
        replaced: a dataset of the spec that stands for a folder.
        folder: the folder, named as the dataset.
    """
    text = (SPECS / f"{part}.yaml").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "spec.yaml"
        file.write_text(text.replace(f" {replaced}", f" {folder}") if replaced else text)
        result = ddray("bench", str(file), "--run-dir", str(Path(temporary) / "run"))
    cells = [{**cell, "dataset": cell["dataset"].rpartition("/")[2]} for cell in result["cells"]]
    return {
        "cells": cells,
        **{name: result[name] for name in ("num_failed", "wall_s")},
        "spec": yaml.safe_load(text),
        "command": command_of(part),
    }


def speech(ddray: Run) -> dict[str, Any]:
    """Unpack the spoken digits of $DDRAY_DATA/fsdd.tar and run their spec."""
    with tempfile.TemporaryDirectory() as temporary:
        with tarfile.open(Path(os.environ["DDRAY_DATA"]) / "fsdd.tar") as tar:
            tar.extractall(temporary, filter="data")
        return measure(ddray, "speech", "fsdd", str(Path(temporary) / "fsdd"))


def cifar100_part(ddray: Run) -> dict[str, Any]:
    """Run a spec on $DDRAY_DATA/cifar100-12k, a part of CIFAR-100 used in place of the whole."""
    data = Path(os.environ["DDRAY_DATA"]).resolve()
    with tempfile.TemporaryDirectory() as temporary:
        for name, folder in (("cifar100", "cifar100-12k"), ("cifar10", "cifar10")):
            (Path(temporary) / name).symlink_to(data / folder)
        with mock.patch.dict(os.environ, DDRAY_DATA=temporary):
            return measure(ddray, "ssdd_cifar100")


def mnist_part(ddray: Run) -> dict[str, Any]:
    """Run a spec on the first MNIST_PER_CLASS training images of each digit and all test images."""
    data = Path(os.environ["DDRAY_DATA"]).resolve() / "mnist"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "mnist"
        folder.mkdir()
        for file in data.glob("*.parquet"):
            if file.name.startswith("train"):
                table = pq.read_table(file)
                position = table["label"].to_pandas().groupby(table["label"].to_pandas()).cumcount()
                pq.write_table(table.filter(pa.array(position < MNIST_PER_CLASS)), folder / file.name)
            else:
                (folder / file.name).symlink_to(file)
        with mock.patch.dict(os.environ, DDRAY_DATA=temporary):
            return measure(ddray, "diffusion_mnist")


def imagenette(ddray: Run) -> dict[str, Any]:
    """Unpack part of $DDRAY_DATA/imagenette224-small.tar and run a spec on it, by name and as a folder."""
    seen: Counter[Path] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "imagenette"
        with tarfile.open(Path(os.environ["DDRAY_DATA"]) / "imagenette224-small.tar") as tar:
            for member in tar:
                within = Path(member.name).parent
                seen[within] += member.isfile()
                if member.isfile() and seen[within] <= IMAGENETTE_PER_CLASS[within.parts[0]]:
                    tar.extract(member, folder, filter="data")
        large = Path(temporary) / "imagenette-224"
        large.symlink_to(folder)
        with mock.patch.dict(os.environ, DDRAY_DATA=temporary):
            return measure(ddray, "imagenette", "imagenette-224", str(large))
