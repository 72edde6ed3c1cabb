"""Matching steps on a fake GPU: as CUDA graphs, without waits, in the memory that groups of classes take."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ddray.methods.families.matching import batches, queue
from ddray.testing import random_dataset
from ddray.training.graph import WORTHWHILE_STEPS
from tests.gpu.fake_cuda import FakeCuda
from tests.gpu.runs import started

CUDA = torch.device("cuda")
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "dm": ("dm", {}),
    "dm, batch norm": ("dm", {"settings": {"arch": "convnet2_w8_bn"}}),
    "mmd_pixel": ("mmd_pixel", {}),
    "datadam": ("datadam", {}),
    "datadam, bf16": ("datadam", {"precision": "bf16"}),
    "datadam, ZCA": ("datadam", {"settings": {"pixel_space": "zca"}}),
    "dsdm": ("dsdm", {"augment": "none"}),
    "dsdm, augmented": ("dsdm", {"augment": "dsa", "history_augmented": True}),
    "dsdm, random networks": ("dsdm", {"use_pool": False, "augment": "dsa_idc", "batch_syn": 5}),
    "m3d": ("m3d", {}),
    "m3d, polynomial": ("m3d", {"kernel": "polynomial", "batch_syn": 3}),
    "idm": ("idm", {}),
    "esfr": ("esfr", {}),
    "esfr, IDM": ("esfr", {"base": "idm", "net_steps": 2, "batch_train": 8}),
}


def stepped(name: str, gpu: FakeCuda, *, steps: int = 4, budget: int | str = "auto", **settings: Any) -> Any:
    """Run a few steps of many; return the images and the counts of the last step."""
    method, options = METHODS[name]
    options = {**options, "settings": {"memory_budget": budget, **options.get("settings", {}), **settings}}
    _, distiller = started_many(method, **options)
    for _ in range(steps - 1):
        distiller.step()
    gpu.forget()
    loss = distiller.step()["loss"]
    counts = (gpu.replays, gpu.launches, dict(gpu.syncs))
    assert torch.isfinite(loss)
    return distiller.snapshot().images, *counts


def started_many(method: str, **options: Any) -> Any:
    dataset = random_dataset((12,) * 4)
    ctx, distiller = started(method, CUDA, dataset, steps=WORTHWHILE_STEPS, **options)
    distiller.setup(ctx)
    return ctx, distiller


@pytest.mark.parametrize("name", METHODS)
def test_a_graph_does_the_eager_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeCuda() as gpu:
        images, replays, launches, syncs = stepped(name, gpu)
    with monkeypatch.context() as patch, FakeCuda() as gpu:
        for module in (batches, queue):
            patch.setattr(module, "WORTHWHILE_STEPS", 10**6)
        expected, none, eager_launches, _ = stepped(name, gpu)

    assert torch.equal(images, expected)
    assert (replays >= 2, none) == (True, 0)
    assert launches < eager_launches
    assert syncs == {}


@pytest.mark.parametrize("name", ["datadam", "dsdm", "esfr", "idm", "m3d"])
def test_groups_of_classes_share_their_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four classes, two at a time: the images of the whole, with one graph of synthetic images for both."""
    with FakeCuda() as gpu:
        whole, replays, _, _ = stepped(name, gpu)
    monkeypatch.setattr(batches, "class_groups", lambda *_, **__: [slice(0, 2), slice(2, 4)])
    with FakeCuda() as gpu:
        images, more_replays, _, syncs = stepped(name, gpu)

    torch.testing.assert_close(images, whole, rtol=1e-4, atol=1e-4)
    assert more_replays > replays
    assert syncs == {}


def test_without_graphs_a_step_runs_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    with FakeCuda() as gpu:
        expected, *_ = stepped("datadam", gpu)
    with FakeCuda(capture_fails=True) as gpu:
        images, replays, _, _ = stepped("datadam", gpu)

    assert torch.equal(images, expected)
    assert replays == 0
    assert "steps run eagerly" in caplog.text


@pytest.mark.parametrize("name", ["datadam", "dsdm, augmented"])
@pytest.mark.parametrize("ipc", [4, 12])
def test_a_step_takes_the_memory_of_its_groups(name: str, ipc: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager steps: the fake has no memory for a graph to itself."""
    monkeypatch.setattr(batches, "WORTHWHILE_STEPS", 10**6)
    method, options = METHODS[name]
    peaks = []
    for size in (4, 1):
        groups = [slice(start, start + size) for start in range(0, 4, size)]
        monkeypatch.setattr(batches, "class_groups", lambda *_, **__: groups)  # noqa: B023 - used at once
        with FakeCuda():
            _, distiller = started_many(method, ipc=ipc, **options)
            distiller.step()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            distiller.step()
            peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 0.45 * peaks[0], peaks
