"""Shards give the bytes of the unsharded run where a batch's other samples could change them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ddray.data import Dataset, PixelSpace
from ddray.distillation.loop import run_distillation
from ddray.distillation.method import coupling_of
from ddray.distillation.shards import Shard, join_sets, shard_classes
from ddray.errors import InputError
from ddray.jobs.context import make_distiller
from ddray.methods import get_method
from ddray.methods.families.matching import batches, initial
from ddray.testing import plan_method, random_dataset

SHAPE = (3, 16, 16)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., list[bytes]]:
    """Returns the files of the unsharded run, of 2 shards, and of one per class."""

    def files(name: str, dataset: Dataset, ipc: int, **settings: Any) -> list[bytes]:
        plan, ctx, whole = plan_method(name, dataset, ipc=ipc, steps=2, **settings)
        runs = [run_distillation(whole, ctx).distilled]
        for num_shards in (2, dataset.num_classes):
            sets = []
            for classes in shard_classes(dataset.num_classes, num_shards):
                shard = Shard(classes, ctx.split.labels)
                part = replace(ctx, split=ctx.split.select(shard.rows), shard=shard)
                sets.append(run_distillation(make_distiller(plan), part).distilled)
            runs.append(join_sets(sets))
        for index, distilled in enumerate(runs):
            distilled.save(tmp_path / f"{index}.pt")
        return [(tmp_path / f"{index}.pt").read_bytes() for index in range(len(runs))]

    return files


@pytest.mark.parametrize(
    ("method", "ipc", "settings"),
    [
        ("dm", 1, {"method": {"batch_real": 13}}),  # chunks and groups of one sample
        ("dm", 2, {"method": {"batch_real": 4, "init": "noise", "augment": "none"}}),
        ("dm", 2, {"method": {"batch_real": 4, "init": "kcenter"}}),
        ("dm", 1, {"method": {"batch_real": 3}, "arch": "vit_tiny"}),  # bits depend on the batch's size
        ("datadam", 2, {"method": {"batch_real": 5, "loss": "cosine"}, "pixel_space": "zca"}),
        ("datadam", 1, {"method": {"batch_real": 5}, "memory_budget": 2_000_000}),  # groups of classes
        ("mmd_pixel", 1, {"arch": "convnet2_w8_bn"}),
        (
            "esfr",
            3,
            {"method": {"batch_real": 5, "pool": {"num_models": 1, "epochs": 1, "arch": "resnet10_in"}}},
        ),
        ("m3d", 1, {"method": {"batch_real": 5, "batch_syn": 3, "augment": "dsa", "strategy": None}}),
    ],
)
def test_shards_give_the_unsharded_bytes(
    method: str, ipc: int, settings: dict[str, Any], saved: Callable[..., list[bytes]]
) -> None:
    whole, *joined = saved(method, random_dataset((13, 17, 13, 21, 14), SHAPE), ipc, **settings)

    assert joined == [whole, whole]


def test_draws_of_many_images_are_those_of_all_classes(
    saved: Callable[..., list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "MANY_IMAGES", 10)
    whole, *joined = saved("dm", random_dataset((13, 17, 13), SHAPE), 2, method={"batch_real": 7})

    assert joined == [whole, whole]


def test_a_shard_streams_the_noise_of_all_classes(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initial, "_NOISE_CHUNK", 64)
    dataset = random_dataset((5,) * 7, (1, 3, 5))  # 15 values an image: no multiple of torch's 16
    _, ctx, _ = plan_method("mmd_pixel", dataset, ipc=1, arch="convnet1_w8")
    images, _ = initial.initial_images(ctx, "noise")

    for classes in shard_classes(7, 3):
        shard = Shard(classes, ctx.split.labels)
        part = replace(ctx, split=ctx.split.select(shard.rows), shard=shard)
        streamed, labels = initial.initial_images(part, "noise")
        assert torch.equal(streamed, images[classes.start : classes.stop])
        assert labels.tolist() == list(classes)


def test_copies_under_noise_are_refused(toy: Any) -> None:
    dataset = random_dataset((9, 2, 8))
    _, ctx, _ = plan_method("dm", dataset, ipc=4)
    shard = Shard(range(1), ctx.split.labels)
    part = replace(ctx, split=ctx.split.select(shard.rows), shard=shard)

    with pytest.raises(InputError, match="--shards needs 4 or more images of every class"):
        initial.initial_images(part, "random")


def test_rows_of_real_size_are_whitened_as_in_chunks_of_all() -> None:
    images, size = random_dataset((300, 300), (3, 32, 32)).train().images, 3 * 32 * 32
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(size, size, generator=generator) / size
    space = PixelSpace("zca", (0.0,) * 3, (1.0,) * 3, torch.randn(size, generator=generator), matrix)
    whole = torch.cat([space.encode(part) for part in torch.split(images, 512)])

    for rows in (range(7), range(250, 350), range(511, 513), range(599, 600)):
        index = torch.tensor(list(rows))
        assert torch.equal(space.encode(images[index]), whole[index])


@pytest.mark.parametrize(
    ("method", "arch", "settings", "reason"),
    [
        ("dm", "convnet3_bn", {}, "the batch norm of convnet3_bn mixes images of all classes"),
        ("dsdm", "convnet3_bn", {"use_pool": False}, "batch norm"),
        ("dsdm", "convnet3_bn", {}, None),  # the pool's networks match in eval mode
        ("dm", "convnet3", {}, None),
        ("mmd_pixel", "convnet3_bn", {}, None),
        ("dc", "convnet3", {}, "inner network"),
        ("idm", "convnet3", {}, "queue of networks"),
        ("esfr", "convnet3", {"base": "idm"}, "queue of networks"),
        ("esfr", "convnet3_bn", {}, "batch norm"),
        ("esfr", "convnet3", {}, None),
        ("sre2l", "convnet3_bn", {}, "every class"),
        ("dwa", "convnet3_bn", {}, "every class"),
        ("krr_st", "convnet3", {}, "without classes"),
        ("d3hr", "convnet3", {"store": "statistics"}, "no step"),
    ],
)
def test_a_method_says_what_couples_its_classes(
    method: str, arch: str, settings: dict[str, Any], reason: str | None
) -> None:
    method_class = get_method(method)
    actual = coupling_of(method_class, method_class.config_type.parse(settings), arch)

    assert actual is None if reason is None else reason in str(actual)


def test_a_method_that_says_nothing_is_coupled() -> None:
    class Silent:
        pass

    assert "does not say" in str(coupling_of(Silent, get_method("dm").config_type(), "convnet3"))  # type: ignore[arg-type]
