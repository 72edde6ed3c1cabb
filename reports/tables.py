"""The papers' tables scaled down to two CPU cores: specs for `ddray bench`.

`python reports/regenerate.py ablation` (or another part of TITLES) runs one. The spec shows what is scaled
down; it is stored in reports/<part>.json with the cells.
"""

from __future__ import annotations

import json
import os
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

Spec = dict[str, Any]
Run = Callable[..., dict[str, Any]]

ABLATION: Spec = {
    "name": "ablation",
    "dataset": "digits",
    "ipc": 1,
    "seeds": 3,
    "methods": [
        {
            "name": "dsdm",
            "label": "L_proto",
            "set": {"method.use_pool": False, "method.use_sd": False, "method.use_history": False},
        },
        {
            "name": "dsdm",
            "label": "L_proto + PM",
            "set": {"method.use_sd": False, "method.use_history": False},
        },
        {"name": "dsdm", "label": "L_proto + PM + L_SD", "set": {"method.use_history": False}},
        {"name": "dsdm", "label": "L_proto + PM + L_SD + L_h"},
    ],
    "evaluate": {"protocol": "hard", "seeds": 3},
}
SPEECH: Spec = {
    "name": "speech",
    "ipc": [10, 20],
    "seeds": 1,
    "set": {"arch": "convnet4_w32"},
    "methods": [
        "random",
        {"name": "herding", "set": {"method.feature_epochs": 5}},
        {
            "name": "dsdm",
            "steps": 100,
            "set": {"method.batch_real": 64, "method.pool.num_models": 3, "method.pool.epochs": 5},
        },
    ],
    "evaluate": {"protocol": "hard", "seeds": 3, "epochs": 100},
}
_SSDD_ROWS: list[Any] = [
    "random_ssl",
    "kmeans_ssl",
    {"name": "krr_st", "label": "KRR-ST"},
    {"name": "boost_ssdd", "label": "+ parameterization", "set": {"method.augmentation": "none"}},
    {"name": "boost_ssdd", "label": "full method (init pc)"},
    {"name": "boost_ssdd", "label": "full method, init real", "set": {"method.init": "real"}},
    {"name": "boost_ssdd", "label": "full method, init random", "set": {"method.init": "random"}},
]
# Inner networks start at up to Z steps: 10 of them at Z = 1,000 take an hour before the first outer step.
_SSDD_LOOP = {"method.pool_size": 3, "method.inner_steps_max": 60, "method.batch_real": 256}
_LOOP_METHODS = ("krr_st", "boost_ssdd")


def _ssdd(steps: int, every: dict[str, Any]) -> list[Any]:
    """Return the rows of Tables 3 and 4, with settings for every row and for the bilevel loop."""
    rows: list[Any] = []
    for row in _SSDD_ROWS:
        entry = dict(row) if isinstance(row, dict) else {"name": row}
        looped = entry["name"] in _LOOP_METHODS
        entry["set"] = {**every, **(_SSDD_LOOP if looped else {}), **entry.get("set", {})}
        rows.append({**entry, "steps": steps} if looped else entry)
    return rows


def _linear(epochs: int, target: str, train_limit: int) -> list[Spec]:
    """Return a table's evaluations: a linear probe on the distilled dataset and one on a transfer target."""
    probe = {"protocol": "linear", "seeds": 2, "epochs": epochs}
    return [probe, {**probe, "target": [target], "options": {"train_limit": train_limit}}]


SSDD: Spec = {
    "name": "ssdd",
    "dataset": "digits",
    "budget": 200,
    "seeds": 1,
    "methods": _ssdd(150, {"arch": "convnet3_w32_x2_bn", "method.teacher.epochs": 10}),
    "evaluate": _linear(100, "mnist", 2000),
}
SSDD_CIFAR100: Spec = {
    "name": "ssdd_cifar100",
    "dataset": "cifar100",
    "budget": 100,
    "seeds": 1,
    "methods": _ssdd(
        100,
        {
            "arch": "convnet3_w32_x2_bn",
            "method.teacher.arch": "convnet4",
            "method.teacher.projector": 512,
            "method.teacher.epochs": 4,
        },
    ),
    "evaluate": _linear(50, "cifar10", 5000),
}
_LATENT_ROWS: dict[str, dict[str, Any]] = {
    "D4M-style k-means": {"method.sampling": "kmeans"},
    "Base-DDPM": {"method.mapping": "ddpm", "method.sampling": "random"},
    "Base-RS": {"method.sampling": "random"},
    "D3HR": {},
}


def _diffusion(
    rows: list[Any], arch: str, *, every: dict[str, Any] | None = None, searched: dict[str, Any] | None = None
) -> Spec:
    """Return Table 3's and Fig 4's shape: `rows`, D3HR and its baselines, with hard and soft labels.

    Args:
        rows: rows of other methods.
        arch: of teacher and students.
        every: settings of all latent rows.
        searched: settings of the row that selects among groups.
    """
    every, searched = every or {}, searched or {}
    latent = [
        {
            "name": "d3hr",
            "label": label,
            "set": {**every, **row_settings, **(searched if label == "D3HR" else {})},
        }
        for label, row_settings in _LATENT_ROWS.items()
    ]
    return {
        "ipc": [1, 10],
        "seeds": 3,
        "methods": [*rows, *latent],
        "evaluate": [
            {"protocol": "hard", "archs": [arch], "seeds": 3, "epochs": 100},
            {
                "protocol": "soft",
                "archs": [arch],
                "seeds": 3,
                "epochs": 100,
                "teacher": [arch],
                "options": {"sets": ["teacher.epochs=10"]},
            },
        ],
    }


DIFFUSION: Spec = {
    "name": "diffusion",
    "dataset": "digits",
    **_diffusion(
        [
            "random",
            {"name": "rded", "set": {"method.teacher_epochs": 10}},
            {"name": "sre2l", "ipc": 1, "steps": 200, "set": {"method.teacher_epochs": 10}},
            {
                "name": "d3hr",
                "label": "D3HR, the code's score",
                "set": {"method.form": "repo", "method.lambda_skew": 0.1},
            },
        ],
        "convnet3",
    ),
}
# Inverting all 60,000 images, and 400 epochs of the default generator on them, take days on two cores; the
# paper's 5,000,000 candidates take minutes per set.
MNIST_PER_CLASS = 600
DIFFUSION_MNIST: Spec = {
    "name": "diffusion_mnist",
    "dataset": "mnist",
    **_diffusion(
        ["random"],
        "convnet3_w32",
        every={
            "method.generator.vae_width": 16,
            "method.generator.vae_epochs": 15,
            "method.generator.depth": 4,
            "method.generator.head_dim": 32,
            "method.generator.epochs": 30,
            "method.generator.ema": 0.99,
        },
        searched={"method.num_candidates": 100_000},
    ),
}
IMAGENETTE_PER_CLASS = {"train": 20, "val": 10}
_GENERATOR_224 = {
    "vae_width": 16,
    "vae_epochs": 2,
    "depth": 4,
    "heads": 4,
    "epochs": 5,
    "ema": 0.99,
    "batch": 16,
}
IMAGENETTE: Spec = {
    "name": "imagenette",
    "dataset": ["imagenette", "imagenette-224"],
    "ipc": 1,
    "seeds": 1,
    "methods": [
        "random",
        {
            "name": "datadam",
            "dataset": "imagenette",
            "steps": 10,
            "set": {"arch": "convnet5_w32", "method.batch_real": 20},
        },
        {
            "name": "rded",
            "dataset": "imagenette-224",
            "set": {"method.teacher_arch": "convnet6_w32", "method.teacher_epochs": 5},
        },
        {
            "name": "d3hr",
            "dataset": "imagenette-224",
            "set": {f"method.generator.{name}": value for name, value in _GENERATOR_224.items()},
        },
    ],
    "evaluate": [
        {"protocol": "hard", "archs": ["convnet5_w32"], "seeds": 2, "epochs": 20, "dataset": "imagenette"},
        {
            "protocol": "soft",
            "archs": ["convnet6_w32"],
            "seeds": 2,
            "epochs": 20,
            "teacher": ["convnet6_w32"],
            "options": {"sets": ["teacher.epochs=5"]},
            "dataset": "imagenette-224",
        },
    ],
}
TITLES = {
    "ablation": "DSDM's parts (the shape of its Table 4), digits",
    "speech": "Spoken digits (the shape of DSDM's Table 2), ConvNet-4 of width 32",
    "ssdd": "Self-supervised sets (the shape of Boost-SSDD's Tables 3 and 4, and a transfer), digits",
    "ssdd_cifar100": "Self-supervised sets, the CIFAR-100 part (100 + 20 images per class), and a transfer",
    "diffusion_table": "D3HR and its baselines (the shape of its Table 3 and Fig 4), digits",
    "diffusion_mnist": "D3HR and its baselines, MNIST (600 training images of each class, all test images)",
    "imagenette": "ImageNette at 128 px and 224 px (20 + 10 images of each class): the whole path, few steps",
}


def measure(ddray: Run, spec: Spec) -> dict[str, Any]:
    """Run a spec on all cores, one unit per core; return its cells."""
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "spec.yaml"
        file.write_text(yaml.safe_dump(spec))
        result = ddray("bench", str(file), "--run-dir", str(Path(temporary) / "run"))
    return {
        **{name: result[name] for name in ("cells", "num_failed", "wall_s")},
        "spec": spec,
        "command": "ddray bench FILE, FILE being the spec in this part's JSON",
    }


def speech(ddray: Run) -> dict[str, Any]:
    """Unpack the spoken digits of $DDRAY_DATA/fsdd.tar and run their spec."""
    with tempfile.TemporaryDirectory() as temporary:
        with tarfile.open(Path(os.environ["DDRAY_DATA"]) / "fsdd.tar") as tar:
            tar.extractall(temporary, filter="data")
        measured = measure(ddray, {**SPEECH, "dataset": str(Path(temporary) / "fsdd")})
    measured["spec"]["dataset"] = "fsdd"
    measured["cells"] = [{**cell, "dataset": "fsdd"} for cell in measured["cells"]]
    return measured


def cifar100_part(ddray: Run) -> dict[str, Any]:
    """Run a spec on $DDRAY_DATA/cifar100-12k, a part of CIFAR-100 used in place of the whole."""
    data = Path(os.environ["DDRAY_DATA"]).resolve()
    with tempfile.TemporaryDirectory() as temporary:
        for name, folder in (("cifar100", "cifar100-12k"), ("cifar10", "cifar10")):
            (Path(temporary) / name).symlink_to(data / folder)
        with mock.patch.dict(os.environ, DDRAY_DATA=temporary):
            return measure(ddray, SSDD_CIFAR100)


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
            return measure(ddray, DIFFUSION_MNIST)


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
        spec = json.loads(json.dumps(IMAGENETTE).replace('"imagenette-224"', json.dumps(str(large))))
        with mock.patch.dict(os.environ, DDRAY_DATA=temporary):
            measured = measure(ddray, spec)
    cells = [{**cell, "dataset": cell["dataset"].rpartition("/")[2]} for cell in measured["cells"]]
    return {**measured, "spec": IMAGENETTE, "cells": cells}
