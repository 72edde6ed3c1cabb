"""The protocol and the dataset of CONTRIBUTING work as the page shows them."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ddray
from ddray.artifact.reading import load
from ddray.cli import _run
from ddray.data import open_dataset
from ddray.data.catalog import KNOWN, KnownDataset
from ddray.errors import InputError
from ddray.evaluation import get_protocol, protocol_names
from ddray.evaluation.options import EvaluateOptions
from ddray.jobs import score
from ddray.jobs.distill import distill
from ddray.jobs.plan import resolve
from ddray.nets import names
from ddray.system import registry
from ddray.tables.columns import columns_of
from tests.tables.benches import spec
from tests.test_docs import blocks

CPU = torch.device("cpu")


@pytest.fixture
def nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CONTRIBUTING's protocol, offered by another package."""
    (source,) = blocks("CONTRIBUTING.md", "protocol", "python")
    (tmp_path / "nearest_of_theirs.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    offered = importlib.metadata.EntryPoint("nearest", "nearest_of_theirs", "ddray.protocols")
    monkeypatch.setattr(registry, "entry_points", lambda group: [offered] if group == offered.group else [])


@pytest.fixture
def random_set(tmp_path: Path) -> Path:
    path = tmp_path / "random.pt"
    digits = open_dataset("digits")
    distill(resolve("random", digits, ipc=3), run_dir=tmp_path / "run", out=path, device=CPU)
    return path


def test_ours_are_found_by_name_and_import_nothing() -> None:
    expected = ["continual", "distribution", "hard", "kernel", "linear", "robust", "soft", "steps"]
    assert protocol_names() == expected


@pytest.mark.usefixtures("nearest")
def test_contributing_protocol_scores_a_set(random_set: Path) -> None:
    result = score.evaluate(random_set, EvaluateOptions(protocol="nearest"), device=CPU)

    distilled, test = load(random_set), open_dataset("digits").test()
    images = distilled.space().encode(test.images)
    right = sum(
        int(distilled.labels[(distilled.images - image).square().sum((1, 2, 3)).argmin()]) == int(label)
        for image, label in zip(images, test.labels, strict=True)
    )
    (row,) = result.dump()["results"]
    assert row["accuracy_mean"] == pytest.approx(right / len(test))
    assert row["agreement"] == 1.0


@pytest.mark.usefixtures("nearest")
def test_contributing_protocol_is_an_option_of_the_command(
    random_set: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _run(["evaluate", str(random_set), "--protocol", "nearest", "--set", "k=3"], debug=True) == 0
    assert "agreement %" in capfd.readouterr().out
    with pytest.raises(InputError, match="k: input should be greater than or equal to 1"):
        EvaluateOptions(protocol="nearest", sets=("k=0",))
    with pytest.raises(InputError, match="--num-tasks must be left out, or used with --protocol continual"):
        EvaluateOptions(protocol="nearest", num_tasks=2)


@pytest.mark.usefixtures("nearest")
def test_contributing_protocol_has_a_column_in_benches() -> None:
    (evaluation,) = spec(evaluate={"protocol": "nearest", "options": {"sets": ["k=3"]}}).evaluate
    cell = {"method": "dm", "protocol": evaluation.protocol, "agreement": 0.5}
    assert "agreement %" in [column.header for column in columns_of([cell])]


def test_a_module_without_its_ending_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty_of_theirs.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    offered = importlib.metadata.EntryPoint("empty", "empty_of_theirs", "ddray.protocols")
    monkeypatch.setattr(registry, "entry_points", lambda group: [offered])
    with pytest.raises(InputError, match="protocol empty: its module empty_of_theirs must end in PROTOCOL"):
        get_protocol("empty")


def test_contributing_dataset_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (entry,) = blocks("CONTRIBUTING.md", "dataset", "python")
    ((name, facts),) = eval(f"{{{entry}}}", {"KnownDataset": KnownDataset}).items()
    monkeypatch.setitem(KNOWN, name, facts)
    generator = np.random.default_rng(0)
    for part, class_name, number in np.ndindex(2, 2, 4):
        folder = tmp_path / facts.folders[0] / ("train", "test")[part] / facts.class_names[class_name]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (16, 16), np.uint8)).save(folder / f"{number}.png")

    dataset = open_dataset(name, data_dir=tmp_path)

    assert (dataset.class_names, dataset.image_shape) == (("circle", "square"), (1, 16, 16))
    assert (len(dataset.train()), len(dataset.test())) == (8, 8)


@pytest.fixture
def perceptron(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """CONTRIBUTING's network, offered by another package; its module."""
    (source,) = blocks("CONTRIBUTING.md", "net", "python")
    (entry,) = blocks("CONTRIBUTING.md", "nets", "toml")
    ((group, entries),) = tomllib.loads(entry)["project"]["entry-points"].items()
    ((name, module),) = entries.items()
    monkeypatch.setattr(names, "_REGISTERED", {})
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").touch()
    (tmp_path / "my_package" / f"{module.partition('.')[2]}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    for imported in ("my_package", module):  # other pages' tests have a package of that name
        monkeypatch.delitem(sys.modules, imported, raising=False)
    offered = importlib.metadata.EntryPoint(name, module, group)
    monkeypatch.setattr(registry, "entry_points", lambda group: [offered] if group == offered.group else [])
    return importlib.import_module(module)


def test_contributing_network_is_trained_and_matched_in(
    random_set: Path, perceptron: Any, run_command: Any, tmp_path: Path
) -> None:
    command = ("--seeds", "1", "--epochs", "60", "--augment", "none")
    result = run_command("evaluate", str(random_set), "--arch", "perceptron", *command)
    (row,) = result["results"]
    assert row["arch"] == "perceptron"
    assert row["accuracy_mean"] > 0.5
    same = ddray.evaluate(random_set, archs=[perceptron.NET], seeds=1, epochs=60, augment="none")
    assert same.results[0].per_seed == row["per_seed"]
    options = ("--dataset", "digits", "--ipc", "1", "--set", "arch=perceptron", "--steps", "2")
    run = run_command("distill", "--method", "dm", *options, "--run-dir", str(tmp_path / "dm"))
    assert load(Path(run["artifact"])).meta.arch == "perceptron"


def test_contributing_entry_points_are_read_as_groups() -> None:
    (text,) = blocks("CONTRIBUTING.md", "groups", "toml")
    groups = tomllib.loads(text)["project"]["entry-points"]
    assert groups == {
        "ddray.protocols": {"nearest": "my_package.nearest"},
        "ddray.spaces": {"my_space": "my_package.my_space"},
    }
