"""Every protocol of evaluation on a fake GPU: the scores are those of the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ddray.data import Dataset
from ddray.evaluation import protocol_names
from ddray.evaluation.options import EvaluateOptions
from ddray.jobs.score import evaluate
from ddray.testing import random_dataset
from tests.gpu.fake_cuda import FakeCuda
from tests.gpu.runs import compute_as_cuda, distilled

TEACHER = {"protocol": "soft", "teachers": ("convnet2_w8",)}
LONG = "teacher.epochs=40"  # until it knows the images by heart: they are random
PROTOCOLS: dict[str, dict[str, Any]] = {
    "hard": {},
    "hard, graphs": {"epochs": 120},
    "hard, ZCA": {},
    "hard, IDC": {"recipe": "idc"},
    "hard, table 5": {"recipe": "table5"},
    "hard, AutoAugment": {"augment": "autoaugment"},
    "hard, batch norm": {"archs": ("convnet2_w8_bn",)},
    "hard, ResNet": {"archs": ("resnet18",), "epochs": 1},
    "soft": {**TEACHER, "sets": (LONG,)},
    "soft, repo": {**TEACHER, "recipe": "repo", "sets": (LONG,)},
    "soft, RDED": {**TEACHER, "recipe": "rded", "sets": (LONG,)},
    "soft, SRe2L": {**TEACHER, "recipe": "sre2l", "sets": (LONG,)},
    "linear": {"protocol": "linear", "sets": ("probe.steps=60",)},
    "linear, fine-tuned": {"protocol": "linear", "finetune": True, "sets": ("finetune.steps=3",)},
    "robust": {"protocol": "robust"},
    "continual": {"protocol": "continual", "num_tasks": 3},
    "distribution": {"protocol": "distribution"},
    "steps": {"protocol": "steps", "epochs": None, "sets": ("rate=0.02",)},
    "kernel": {"protocol": "kernel", "epochs": None, "seeds": None},
    "kernel, convolutions": {"protocol": "kernel", "epochs": None, "seeds": None, "sets": ("kernel=conv3",)},
}


@pytest.fixture
def dataset() -> Dataset:
    return random_dataset((12, 12, 12))


def scored(name: str, path: Path, dataset: Dataset, device: str) -> dict[str, Any]:
    """Return the summary of a protocol's network: numbers, lists of them, names; without the clock's."""
    options = EvaluateOptions(**{"seeds": 1, "epochs": 3, **PROTOCOLS[name]})
    summary = dict(evaluate(path, options, device=torch.device(device), dataset=dataset).results[0])
    return {key: value for key, value in summary.items() if key not in ("wall_s", "measures_per_seed")}


@pytest.fixture
def path(request: pytest.FixtureRequest, tmp_path: Path, dataset: Dataset) -> Path:
    """The file of a distilled set of the dataset, of random images."""
    space = "zca" if "ZCA" in request.node.name else "normalized"
    result = distilled("random", "cpu", dataset=dataset, settings={"pixel_space": space})
    result.distilled.save(tmp_path / "set.pt")
    return tmp_path / "set.pt"


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_gives_the_scores_of_the_cpu(
    name: str, path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_as_cuda(monkeypatch)
    expected = scored(name, path, dataset, "cpu")

    with FakeCuda(devices=2, autocasts=False) as gpu:
        result = scored(name, path, dataset, "cuda:1")

        assert gpu.memories[0].peak == 0
        assert gpu.kernels > 0
        assert (gpu.replays > 0) == (
            (PROTOCOLS[name].get("epochs") or 0) > 50 or "probe" in str(PROTOCOLS[name])
        )
    assert (result.pop("precision"), expected.pop("precision")) == ("tf32", "fp32")
    assert result.keys() == expected.keys()
    for key, value in result.items():
        near = isinstance(value, str) or value is None or None in (value if isinstance(value, list) else [])
        assert value == (expected[key] if near else pytest.approx(expected[key], rel=1e-3, abs=1e-4)), key


def test_every_protocol_is_here() -> None:
    assert {name.split(",")[0] for name in PROTOCOLS} >= {*protocol_names()}
