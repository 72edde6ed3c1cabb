"""reports/scale: the record and what becomes of it; `python -m reports.scale --tiny` runs the parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ddray.data import open_dataset
from reports.scale import parts
from reports.scale.__main__ import summary
from reports.scale.lab import Lab, digest, made_arrays, made_folder


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path, tmp_path / "scale.jsonl", repeats=2, is_tiny=True)


def test_a_figure_is_a_line_that_is_there_when_the_next_start_looks(lab: Lab) -> None:
    lab.record("evaluation", "1", "ddray evaluate", [{"wall_s": 8.0, "per_seed": [0.5]}, {"wall_s": 10.0}])
    lab.record("evaluation", "2", "ddray evaluate", [{"wall_s": 5.0}])
    with lab.lines.open("a") as file:
        file.write('{"part": "evalu')  # a kill
    measured = lab.measured()
    assert measured["evaluation", "1"]["mean"] == {"wall_s": 9.0}
    assert measured["evaluation", "1"]["std"] == {"wall_s": pytest.approx(2**0.5)}
    assert measured["evaluation", "1"]["n"] == 2
    assert {"processor", "date", "git_commit"} <= measured["evaluation", "2"]["environment"].keys()
    full = Lab(lab.folder, lab.lines, repeats=2, is_tiny=False)
    assert full.measured() == {}, "a tiny figure is none"
    lines = summary(measured)
    assert lines[-1] == "evaluate, 4 networks, two at a time: x1.80 (wall_s)"
    assert len(lines) == 3


def test_memory_is_compared_without_the_process_itself(lab: Lab) -> None:
    for figure, memory, seconds in (("base", 100, 1.0), ("1", 900, 80.0), ("2", 500, 41.0)):
        run = {"peak_memory_bytes": memory, "largest_shard_s": seconds}
        lab.record("many_classes", figure, "ddray distill", [run])
    assert summary(lab.measured())[-1] == "2 shards: memory 1.000 / 2, seconds 1.025 / 2"


def test_what_is_recorded_is_not_measured_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    monkeypatch.setattr(parts, "_distilled", lambda lab, name, arguments: measured.append(name))
    for figure in ("base", "1", "2", "4", "8"):
        lab.record("many_classes", figure, "", [{"wall_s": 1.0}])
    parts.many_classes(lab)
    lab.record("killed_node", "64", "", [{"wall_s": 1.0}])
    parts.killed_node(lab)

    assert measured == []


def test_datasets_are_there_to_be_opened(lab: Lab) -> None:
    arrays = open_dataset(str(made_arrays(lab, 3, 4, 16)))
    assert (arrays.num_classes, len(arrays.train()), arrays.image_shape) == (3, 12, (3, 16, 16))
    pictures = open_dataset(str(made_folder(lab, 2, 3, 32)))
    assert (pictures.num_classes, len(pictures.train())) == (2, 6)
    assert made_folder(lab, 2, 3, 32) == lab.folder / "pictures-2x3-32px"


def test_the_digest_is_of_images_and_labels(tmp_path: Path) -> None:
    for name, value in (("a", 0.0), ("b", 0.0), ("c", 1.0)):
        torch.save({"images": torch.full((1, 2), value), "labels": torch.zeros(1)}, tmp_path / name)
    first, second, third = (digest(tmp_path / name) for name in "abc")
    assert first == second != third


def test_decoding_is_timed(lab: Lab, ddray_home: Path) -> None:
    run = parts._packed(lab, made_folder(lab, 2, 3, 64) / "train")
    assert run["images"] == 6
    assert run["images_per_s"] > 0


def test_typed_options_are_a_plan(lab: Lab) -> None:
    dataset = made_arrays(lab, 3, 4, 16)
    plan = parts._plan(("--method", "datadam", "--dataset", dataset, "--ipc", 1, "--steps", 2))
    assert (plan.dataset.num_classes, plan.ipc, plan.config.steps) == (3, 1, 2)
