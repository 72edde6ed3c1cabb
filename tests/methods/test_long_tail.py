"""A class with fewer images than ipc: methods that learn images reach ipc, selections give what there is."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from ddray.artifact.export import export_folder
from ddray.artifact.reading import load
from ddray.data import SplitName, normalized_space
from ddray.drawing.images import grid
from ddray.evaluation.hard import Hard
from ddray.evaluation.protocol import EvalContext, evaluate_archs
from ddray.jobs.plan import budget_method, resolve
from ddray.methods import get_method, method_names
from ddray.methods.families.selection import herding_order, kcenter_order, kmeans_order
from ddray.ranking.options import NamedFile, NasOptions
from ddray.ranking.proxies import baseline_proxies, file_proxies
from ddray.ranking.spaces import resolve_config
from ddray.training.recipe import Recipe
from tests.methods.diffusion_models import BASE

COUNTS, IPC = (12, 11, 2), 4
SELECTIONS = ("class_mean", "herding", "kcenter", "kmeans", "random", "rded")
LEARNERS = tuple(name for name in method_names() if name not in SELECTIONS and budget_method(name) is None)
QUICK = {"rded": {"num_crops": 1}, "d3hr": BASE}


def distilled_of(method: str, dataset: Any, planned: Any, ipc: int = IPC, **settings: Any) -> Any:
    """Distil for two steps, with the method's quick settings."""
    quick = {**getattr(get_method(method).config_type, "quick", {}), **QUICK.get(method, {}), **settings}
    steps = {"steps": 2} if resolve(method, dataset, ipc=1).config.steps else {}
    _, ctx, distiller = planned(method, dataset, ipc=ipc, method=quick, **steps)
    distiller.setup(ctx)
    for _ in range(distiller.num_steps):
        assert torch.isfinite(distiller.step()["loss"]).all()
    return distiller.snapshot()


@pytest.mark.parametrize("method", LEARNERS)
def test_methods_that_learn_images_reach_ipc(
    method: str, toy: Any, planned: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        distilled = distilled_of(method, toy(COUNTS), planned)

    distilled.validate()
    assert distilled.labels.tolist() == [0] * IPC + [1] * IPC + [2] * IPC
    assert not caplog.messages
    tail = distilled.images[2 * IPC :].flatten(1)
    assert float(torch.pdist(tail).min()) > 0, "no image is another's copy"


def test_d4m_has_a_noisy_copy_of_each_centre(toy: Any, planned: Any) -> None:
    distilled = distilled_of("d3hr", toy(COUNTS), planned, sampling="kmeans")
    assert torch.bincount(distilled.labels).tolist() == [IPC] * 3
    assert float(torch.pdist(distilled.images[2 * IPC :].flatten(1)).min()) > 0


@pytest.mark.parametrize("method", SELECTIONS)
def test_selections_give_what_there_is_and_say_so(
    method: str, toy: Any, planned: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        distilled = distilled_of(method, toy(COUNTS), planned)

    distilled.validate()
    assert distilled.labels.tolist() == [0] * IPC + [1] * IPC + [2] * 2
    assert (distilled.meta.ipc, distilled.meta.storage_floats) == (IPC, 10 * 3 * 16 * 16)
    expected = "1 of 3 classes of toy give fewer than 4 images, all that they have: class 2 2"
    assert caplog.messages == [expected]


@pytest.mark.parametrize("method", ["herding", "kcenter", "kmeans", "random"])
def test_the_tail_is_the_whole_class(method: str, toy: Any, planned: Any) -> None:
    dataset = toy(COUNTS)
    distilled = distilled_of(method, dataset, planned)
    real = normalized_space(dataset).encode(dataset.train().images)
    tail = distilled.images[distilled.labels == 2]
    indices = [int((real - image).flatten(1).abs().sum(1).argmin()) for image in tail]
    assert sorted(indices) == (dataset.train().labels == 2).nonzero().flatten().tolist()


def test_at_most_five_classes_are_named(toy: Any, planned: Any, caplog: pytest.LogCaptureFixture) -> None:
    distilled_of("random", toy((5, *[2] * 7)), planned)
    (line,) = caplog.messages
    assert line.startswith("7 of 8 classes of toy give fewer than 4 images, all that they have: class 1 2, ")
    assert line.endswith("class 5 2 and 2 more")


def test_orders_end_with_the_class() -> None:
    features = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    for order in (herding_order(features, 7), kcenter_order(features, 7), kmeans_order(features, 7, seed=0)):
        assert sorted(order.tolist()) == [0, 1, 2]


class TestAShorterSet:
    """Written, read, scored, ranked on, drawn, exported; class 1 may have no image at all."""

    @pytest.fixture(params=[False, True], ids=["shorter", "without a class"])
    def path(self, request: pytest.FixtureRequest, toy: Any, planned: Any, tmp_path: Path) -> Path:
        distilled = distilled_of("random", toy(COUNTS), planned)
        if request.param:
            from dataclasses import replace

            rows = distilled.labels != 1
            images = distilled.images[rows]
            meta = distilled.meta.model_copy(update={"storage_floats": images.numel()})
            distilled = replace(distilled, images=images, labels=distilled.labels[rows], meta=meta)
        distilled.save(tmp_path / "tail.pt")
        return tmp_path / "tail.pt"

    def test_it_is_scored(self, path: Path, toy: Any) -> None:
        dataset, distilled = toy(COUNTS), load(path)
        space = distilled.space()
        ctx = EvalContext(dataset, dataset.test(), space, torch.device("cpu"))
        (summary,) = evaluate_archs(
            Hard(Recipe(epochs=3)), distilled.decode(), ctx, archs=["convnet2_w8"], num_seeds=2
        )
        shares = summary["per_class"]
        assert len(shares) == 3
        weighted = sum(share * count for share, count in zip(shares, COUNTS, strict=True)) / sum(COUNTS)
        assert summary["accuracy_mean"] == pytest.approx(weighted)
        assert summary["balanced_accuracy_mean"] == pytest.approx(sum(shares) / 3)

    def test_it_is_a_proxy_with_baselines_of_its_size(self, path: Path, toy: Any) -> None:
        dataset, distilled = toy(COUNTS), load(path)
        (proxy,) = file_proxies([NamedFile(path=path)], [distilled], "train")
        assert proxy.storage_images == proxy.num_images == len(distilled.labels)
        config = resolve_config(NasOptions())
        (baseline,) = baseline_proxies(
            ["random"], [proxy], dataset, dataset.train(), config, split=SplitName(0)
        )
        ipc = round(len(distilled.labels) / 3)
        assert baseline.num_images == sum(min(ipc, count) for count in COUNTS)

    def test_it_is_drawn_and_exported(self, path: Path, tmp_path: Path) -> None:
        distilled = load(path)
        picture = grid(distilled)
        assert picture is not None
        assert picture.shape[2] > picture.shape[1] * 4 / 3 - 16, "a row has four columns"
        export_folder(distilled, tmp_path / "folder")
        folders = [folder for folder in (tmp_path / "folder").iterdir() if folder.is_dir()]
        files = {folder.name: len(list(folder.iterdir())) for folder in folders}
        counts = torch.bincount(distilled.labels, minlength=3).tolist()
        assert files == {f"{label}_class-{label}": count for label, count in enumerate(counts)}
        assert json.loads((tmp_path / "folder" / "meta.json").read_text())["ipc"] == IPC
