"""The t-SNE planes of the page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ddray.data import open_dataset
from ddray.drawing.plots import project
from ddray.report.page import write_page
from ddray.report.plane import embedding_net, make_plane
from ddray.report.runs import read_run


def test_clusters_stay_together_and_the_same_seed_gives_the_same_points() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 20 * torch.eye(3).repeat_interleave(30, 0)
    features = torch.cat([centres, torch.zeros(90, 5)], 1) + torch.randn(90, 8, generator=generator)
    points = project(features, seed=0)
    assert points.shape == (90, 2)
    assert torch.equal(points, project(features, seed=0))
    groups = points.view(3, 30, 2)
    spread = (groups - groups.mean(1, keepdim=True)).norm(dim=2).max()
    apart = torch.pdist(groups.mean(1)).min()
    assert apart > spread


def test_points_are_of_the_right_images(bench_folder: Path) -> None:
    run = read_run(bench_folder)
    sets = [view for view in run.sets if view.size == "ipc 2"]
    plane = make_plane(open_dataset("digits"), sets)
    assert plane is not None
    assert plane.real.shape == (len(plane.real_labels), 2)
    assert plane.real_labels.bincount().tolist() == [60] * 10
    assert [label for label, _, _ in plane.distilled] == [view.label for view in sets]
    for _, points, classes in plane.distilled:
        assert points.shape == (20, 2)
        assert classes.tolist() == torch.arange(10).repeat_interleave(2).tolist()
    assert plane.network == "convnet3, untrained"


def test_the_pools_longest_trained_network_is_taken(toy: Callable[..., Any], planned: Any) -> None:
    dataset = toy(name="toy")
    assert embedding_net(dataset)[1].endswith("untrained")
    for epochs in (2, 1):
        _, ctx, method = planned("kcenter", dataset, method={"feature_epochs": epochs})
        method.setup(ctx)
    net, name = embedding_net(dataset)
    assert name == "convnet2_w8, trained on the real images for 2 epochs"
    assert not net.training


def test_a_missing_dataset_is_said(bench_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(bench_folder, copy)
    cells_file = json.loads((copy / "cells.json").read_text())
    for path in (copy / "ledger").glob("*.json"):
        path.write_text(path.read_text().replace('"dataset":"digits"', '"dataset":"cifar10"'))
    cells_file["cells"] = [{**cell, "dataset": "cifar10"} for cell in cells_file["cells"]]
    (copy / "cells.json").write_text(json.dumps(cells_file))
    write_page([copy], copy / "report.html")
    assert "Not drawn: dataset cifar10 needs a data directory" in (copy / "report.html").read_text()
