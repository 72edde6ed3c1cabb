"""A step in groups of classes: the same images as the step of all classes, in less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ddray.methods.families.matching.groups import class_groups, image_bytes
from ddray.system import memory

POOL = {"pool": {"num_models": 2, "epochs": 1}}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "dm": ("dm", {}),
    "mmd_pixel": ("mmd_pixel", {"augment": "none"}),
    "datadam": ("datadam", {"lr_img": 1e-3}),
    "datadam_cosine": ("datadam", {"loss": "cosine", "sam_norm": "l1"}),
    "dsdm": ("dsdm", {**POOL, "augment": "dsa", "lr_img": 1e-3}),
    "dsdm_stored_features": ("dsdm", {**POOL, "augment": "none", "lr_img": 1e-3}),
    "dsdm_history_augmented": ("dsdm", {**POOL, "augment": "dsa_idc", "history_augmented": True}),
    "dsdm_fewer_drawn": ("dsdm", {"use_pool": False, "batch_syn": 5, "lr_img": 1e-3}),
    "m3d": ("m3d", {}),
    "m3d_polynomial": ("m3d", {"kernel": "polynomial", "batch_syn": 3}),
    "idm": ("idm", {"net_steps": 2, "batch_train": 8, "momentum": 0.5}),
    "esfr": ("esfr", {"pool": {"num_models": 2, "epochs": 1, "arch": "convnet2_w8"}}),
    "idm_factor_1": ("idm", {"net_steps": 1, "batch_train": 8, "factor": 1, "augment": "none"}),
}


def run(planned: Any, dataset: Any, method: str, budget: int | None, **settings: Any) -> tuple[Any, Any, Any]:
    """Two steps; returns the engine, the losses and the images."""
    arch = settings.pop("arch", "convnet2_w8")
    _, ctx, distiller = planned(
        method,
        dataset,
        ipc=2,
        seed=4,
        steps=2,
        arch=arch,
        memory_budget=budget,
        method={"batch_real": 6, **settings},
    )
    distiller.setup(ctx)
    losses = [float(distiller.step()["loss"]) for _ in range(2)]
    return distiller._engine, losses, distiller.snapshot().images


@pytest.mark.parametrize("name", METHODS)
def test_groups_give_the_step_of_the_whole(
    name: str, toy: Any, planned: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDRAY_HOME", str(tmp_path))
    method, settings = METHODS[name]
    dataset = toy(counts=(9, 7, 8, 9, 6))

    whole, losses, images = run(planned, dataset, method, None, **settings)
    one_by_one, actual_losses, actual = run(planned, dataset, method, 1, **settings)
    size = 2 * 2**30 if method == "mmd_pixel" else _bytes_of_two(planned, dataset, method, settings)
    pairs, _, in_pairs = run(planned, dataset, method, size, **settings)

    assert whole._groups == [slice(0, 5)]
    assert one_by_one._groups == [slice(label, label + 1) for label in range(5)]
    assert method == "mmd_pixel" or pairs._groups == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert actual_losses == pytest.approx(losses, rel=1e-4)
    torch.testing.assert_close(actual, images, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(in_pairs, images, rtol=1e-4, atol=1e-4)


def _bytes_of_two(planned: Any, dataset: Any, method: str, settings: dict[str, Any]) -> int:
    """Return a budget that two classes fit, and not three."""
    seen: list[int] = []
    module = "ddray.methods.families.matching.batches.class_groups"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, lambda num, size, *_, **__: seen.append(size) or [slice(0, num)])
        run(planned, dataset, method, None, **settings)
    return 2 * seen[0] + 1


@pytest.mark.parametrize("method", ["dm", "datadam", "m3d"])
def test_batch_norm_in_train_mode_keeps_all_classes_together(
    method: str, toy: Any, planned: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Groups would change its statistics; the warning says what the step takes."""
    settings = {"arch": "convnet2_w8_bn"}
    _, _, images = run(planned, toy(), method, None, **settings)
    assert not caplog.records
    engine, _, actual = run(planned, toy(), method, 1000, **settings)

    assert engine._groups == [slice(0, 3)]
    assert torch.equal(actual, images)
    (record,) = caplog.records
    assert "all classes, whose samples batch norm mixes" in record.getMessage()


def test_batch_norm_in_eval_mode_mixes_nothing(toy: Any, planned: Any) -> None:
    settings = {"arch": "convnet2_w8_bn", "net_steps": 1, "batch_train": 8}
    _, _, images = run(planned, toy(), "idm", None, **settings)
    engine, _, actual = run(planned, toy(), "idm", 1, **settings)

    assert len(engine._groups) == 3
    torch.testing.assert_close(actual, images, rtol=1e-4, atol=1e-4)


def test_a_class_that_does_not_fit_is_said_once(
    toy: Any, planned: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run(planned, toy(), "dm", 2**10)
    (record,) = caplog.records
    assert "for the images of one class, more than memory_budget (0.0 MiB)" in record.getMessage()


@given(num=st.integers(1, 300), size=st.integers(1, 1000), budget=st.integers(1, 50_000))
def test_groups_cover_every_class_once_within_the_budget(num: int, size: int, budget: int) -> None:
    groups = class_groups(num, size, budget)

    assert [label for part in groups for label in range(part.start, part.stop)] == list(range(num))
    sizes = [part.stop - part.start for part in groups]
    assert all(count * size <= budget or count == 1 for count in sizes)
    assert len(set(sizes[:-1])) <= 1
    if max(sizes) < num:
        assert 2 * max(sizes) * size > budget - 2 * size, "no smaller than half of what fits"


@pytest.mark.parametrize(("num", "fit", "expected"), [(200, 30, 25), (10, 4, 4), (100, 99, 50), (7, 3, 3)])
def test_groups_are_equal_where_they_can_be(num: int, fit: int, expected: int) -> None:
    assert class_groups(num, 10, 10 * fit)[0] == slice(0, expected)
    assert class_groups(num, 10, 10 * fit, mixes=True) == [slice(0, num)]


def test_the_bytes_of_an_image_are_those_of_its_maps() -> None:
    net = nn.Sequential(nn.Conv2d(3, 10, 3, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(10 * 64, 4))
    net.requires_grad_(False)
    state = torch.get_rng_state()

    size = image_bytes(net, torch.zeros(2, 3, 8, 8), 10 * 64 * 4, net.parameters())

    # The convolution keeps its input, Sigmoid its output; weights do not count.
    assert size == 3 * 64 * 4 + 10 * 64 * 4 + 4 * 10 * 64 * 4
    assert torch.equal(torch.get_rng_state(), state)


def test_it_follows_the_budget_of_the_process(
    toy: Any, planned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_halvings", [None] * 60)
    engine, _, _ = run(planned, toy(), "dm", 2**40)
    assert len(engine._groups) == 3
