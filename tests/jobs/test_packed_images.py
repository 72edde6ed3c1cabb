"""Methods, protocols and searches give the same results from images on the disk as from those in memory."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from ddray.artifact.distilled_set import DistilledSet, TrainSet
from ddray.data import Dataset, Split, carve_val, packed, search_rows
from ddray.data.packed import PackedImages
from ddray.data.pixels import pixel_space
from ddray.distillation.loop import run_distillation
from ddray.distillation.shards import Shard, join_sets, shard_classes
from ddray.errors import InputError
from ddray.evaluation.hard import fit
from ddray.evaluation.linear import embeddings
from ddray.evaluation.protocol import EvalContext
from ddray.jobs import trainers
from ddray.methods.families.matching import batches
from ddray.ranking.options import NasOptions
from ddray.ranking.proxies import Proxy
from ddray.ranking.spaces import resolve_config
from ddray.ranking.sweep import Sweep
from ddray.ranking.worker import Workbench, real_set
from ddray.system.tensors import sha256_of
from ddray.testing import _started, plan_method, random_dataset
from ddray.training.recipe import Recipe
from ddray.tuning.payload import pack, unpack

COUNTS = (60, 40, 55)  # more than what networks embed at a time
SHAPE = (3, 8, 8)
EXACT = ["random", "herding", "kcenter", "kmeans", "dm", "datadam", "dsdm", "m3d", "mmd_pixel", "idm", "dc"]
EXACT += ["cafe", "rded", "random_ssl"]


@pytest.fixture
def pair(ddray_home: Path) -> tuple[Dataset, Dataset]:
    """A dataset in memory, and the same on the disk."""
    dataset = random_dataset(COUNTS, SHAPE)
    folder = ddray_home / "packed" / "a"
    folder.mkdir(parents=True)
    np.save(folder / "images.npy", dataset.train().images.numpy())
    split = Split(PackedImages(folder / "images.npy"), dataset.train().labels)
    return dataset, replace(dataset, load_train=lambda: split, load_test=lambda: split)


@pytest.fixture
def never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuses to take all images into memory, as what a tensor of a file doesn't know would do."""
    original = PackedImages.whole

    def whole(images: PackedImages) -> torch.Tensor:
        assert len(images) < sum(COUNTS), "all images are read at once"
        return original(images)

    monkeypatch.setattr(PackedImages, "whole", whole)
    monkeypatch.setattr(packed, "_PART_BYTES", 10 * math.prod(SHAPE))
    monkeypatch.setattr(trainers, "_MAX_ENCODED", 0)  # below it, a set is encoded once


def distilled(method: str, dataset: Dataset, ipc: int = 2) -> DistilledSet:
    _, distiller = _started(method, dataset, steps=2, ipc=ipc)
    for _ in range(distiller.num_steps):
        distiller.step()
    return distiller.snapshot()


@pytest.mark.parametrize("method", EXACT)
def test_a_method_gives_the_same_set(
    pair: tuple[Dataset, Dataset],
    method: str,
    never_whole: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    in_memory = distilled(method, pair[0])
    monkeypatch.setenv("DDRAY_HOME", str(tmp_path / "another"))  # with no network in its pool
    on_disk = distilled(method, pair[1])
    assert torch.equal(on_disk.images, in_memory.images)
    assert torch.equal(on_disk.labels, in_memory.labels)
    assert on_disk.meta.fingerprint == in_memory.meta.fingerprint


def test_means_in_parts_are_nearly_the_same(pair: tuple[Dataset, Dataset], never_whole: None) -> None:
    in_memory, on_disk = (distilled("class_mean", dataset) for dataset in pair)
    torch.testing.assert_close(on_disk.images, in_memory.images, rtol=1e-6, atol=1e-6)


def test_whitening_by_the_batch_is_nearly_the_same(pair: tuple[Dataset, Dataset], never_whole: None) -> None:
    sets = []
    for dataset in pair:
        settings = {"pixel_space": "zca", "steps": 2, "method": {"batch_real": 8}}
        _, ctx, distiller = plan_method("dm", dataset, **settings)
        distiller.setup(ctx)
        distiller.step()
        sets.append(distiller.snapshot().images)
    torch.testing.assert_close(sets[0], sets[1], rtol=1e-4, atol=1e-4)


def test_class_shards_whiten_as_the_whole_run(
    pair: tuple[Dataset, Dataset], never_whole: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single image is whitened in another way than several: the second shard has one of a chunk's four."""
    monkeypatch.setattr(batches, "_CHUNK_BYTES", 4 * 8 * 8 * 8 * 4)
    settings = {"pixel_space": "zca", "steps": 2, "method": {"batch_real": 3}}
    _, ctx, whole = plan_method("dm", pair[1], **settings)
    expected, sets = run_distillation(whole, ctx).distilled, []
    for classes in shard_classes(3, 3):
        shard = Shard(classes, ctx.split.labels)
        part = replace(ctx, split=ctx.split.select(shard.rows), shard=shard)
        sets.append(run_distillation(plan_method("dm", pair[1], **settings)[2], part).distilled)
    assert torch.equal(join_sets(sets).images, expected.images)


def test_a_part_of_a_train_set_stays_on_the_disk(pair: tuple[Dataset, Dataset], never_whole: None) -> None:
    parts = []
    for dataset in pair:
        split = dataset.train()
        parts.append(TrainSet(split.images, split.labels).select(split.labels == 1))
    assert isinstance(parts[1].images, PackedImages)
    assert torch.equal(parts[1].images.whole(), parts[0].images)
    assert torch.equal(parts[1].labels, parts[0].labels)


def contexts(pair: tuple[Dataset, Dataset]) -> list[EvalContext]:
    device = torch.device("cpu")
    return [
        EvalContext(each, each.test(), pixel_space("normalized", each, each.train()), device) for each in pair
    ]


def test_protocols_score_the_same(pair: tuple[Dataset, Dataset], never_whole: None) -> None:
    scores, digests, features = [], [], []
    for ctx in contexts(pair):
        split = ctx.dataset.train()
        recipe = Recipe(epochs=2, batch=8, lr=0.01, augment="none")
        net = fit(
            TrainSet(split.images, split.labels),
            ctx,
            recipe,
            arch="convnet2_w8",
            seed=0,
            augment=lambda batch, generator, space=ctx.space: space.encode(batch),
        )
        scores.append(ctx.score(net))
        digests.append(sha256_of(chain(packed.parts_of(split.images), [split.labels])))
        features.append(embeddings(net, split, ctx))
    assert scores[0] == scores[1]
    assert digests[0] == digests[1]
    assert torch.equal(features[0], features[1])


def test_a_search_sends_the_name_of_images_and_no_pixel(
    pair: tuple[Dataset, Dataset], never_whole: None
) -> None:
    _, dataset = pair
    train, val = carve_val(dataset.train(), seed=0)
    space = pixel_space("normalized", dataset, train)
    rows = search_rows(dataset.train(), seed=0)
    sent = pickle.dumps(pack(dataset, train, "train-val0", val, space, rows))
    assert dataset.train().images[0].numpy().tobytes()[:16] not in sent
    unpacked = unpack(pickle.loads(sent))
    whole = unpacked.dataset.train()
    for images in (unpacked.split.images, unpacked.held_out.images, whole.images):
        assert isinstance(images, PackedImages)
    index = torch.tensor([0, 5, 154])
    assert torch.equal(whole.images[index], pair[0].train().images[index])
    assert torch.equal(whole.labels, pair[0].train().labels)
    assert torch.equal(unpacked.held_out.images[[1]], carve_val(pair[0].train(), seed=0)[1].images[[1]])


def test_a_sweep_sends_the_name_of_images_and_no_pixel(
    pair: tuple[Dataset, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = NasOptions(space="convnet720", sample=1, epochs=1, truth="whole")
    config = resolve_config(options, ({"recipe": {"batch": 64, "augment": "none"}},))
    results = []
    for dataset in pair:
        train, val = carve_val(dataset.train(), seed=0)
        sweep = Sweep(options, config, dataset, train, val, (), (0,), "cpu")
        tasks = sweep.tasks(fused=False)
        sent = pickle.dumps(sweep.data(tasks))
        is_sent = val.images[0].numpy().tobytes()[:16] in sent
        assert is_sent == (dataset is pair[0])
        data = pickle.loads(sent)
        results.append((data.sets["whole"].key, Workbench(data, torch.device("cpu")).run(tasks[0])))
    assert results[0] == results[1]
    proxy = Proxy("some", "some", real_set(val, dataset), 15.0)
    table = replace(sweep, options=options.model_copy(update={"truth": "table"}), proxies=(proxy,))
    assert table.data(table.tasks(fused=False)).sets.keys() == {"some"}
    assert "_whole" not in vars(table)


def test_whole_sets_as_floats_are_refused_with_the_figures(
    pair: tuple[Dataset, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pair[1].train().images
    monkeypatch.setattr(packed, "_CHECKED_BYTES", 1)
    monkeypatch.setattr(packed, "available_bytes", lambda device: 2 * images.nbytes)
    space = pixel_space("normalized", pair[1], pair[1].train())
    assert len(images.whole()) == sum(COUNTS)  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="this needs all of 155 images in memory"):
        space.encode(images)
