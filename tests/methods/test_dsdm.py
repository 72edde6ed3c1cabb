"""DSDM against Algorithm 1 replayed class by class in float64, and Eq 8's memory by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.data import Dataset, Split
from ddray.methods.dsdm import history_loss, prototype_loss, update_memory
from ddray.methods.families.matching.batches import ClassBatches
from ddray.pool.spec import PoolEntry, PoolSpec
from ddray.training.dsa import Dsa

BATCH, IPC, LR = 4, 2, 0.02


POOL = {"num_models": 2, "epochs": 1}
LETTER = {"augment": "none", "momentum": 0.0}  # Algorithm 1, without DM's configuration


VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {"augment": "dsa", "momentum": 0.5},
    "algorithm_1": {},
    "factor_1": {"factor": 1},
    "time": {"axes": "time", "factor": 3},
    "repo": {
        "augment": "dsa_idc",
        "strategy": "color_crop_cutout",
        "momentum": 0.5,
        "init": "first",
        "resize": "nearest",
        "unbiased": True,
        "history_mean": True,
        "history_first": "prototype",
        "history_augmented": True,
    },
    "table_4_row_1": {"use_pool": False, "use_sd": False, "use_history": False},
    "table_4_row_2": {"use_sd": False, "use_history": False},
    "table_4_row_3": {"use_history": False},
    "covariance_alone": {"use_proto": False},
    "history_later": {"history_from": 3, "lambda2": 5.0, "ema": 0.5},
}


def features(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_prototypes_match_class_by_class() -> None:
    real, synthetic = features((3, 5, 4), 1), features((3, 2, 4), 2)

    expected = 0.0
    for one, other in zip(real.tolist(), synthetic.tolist(), strict=True):
        for dim in range(4):
            expected += (sum(r[dim] for r in one) / 5 - sum(s[dim] for s in other) / 2) ** 2
    assert float(prototype_loss(real, synthetic)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("mean", [False, True])
def test_history_loss_is_eq_6(mean: bool) -> None:
    synthetic, memory = features((3, 2, 4), 3), features((3, 4), 4)

    expected = 0.0
    for rows, class_memory in zip(synthetic.tolist(), memory.tolist(), strict=True):
        expected += sum((sum(row[dim] for row in rows) / 2 - class_memory[dim]) ** 2 for dim in range(4))
    actual = float(history_loss(synthetic, memory, mean=mean))
    assert actual == pytest.approx(expected / 4 if mean else expected, rel=1e-12)


def test_memory_is_eq_8_by_hand() -> None:
    steps = [torch.tensor([[8.0, -4.0]]), torch.tensor([[4.0, 2.0]]), torch.tensor([[1.0, 1.0]])]

    def memories(first: Any) -> list[list[float]]:
        memory, history = None, []
        for prototypes in steps:
            memory = update_memory(memory, prototypes, ema=0.75, first=first)
            history.append(memory[0].tolist())
        return history

    # h1 = 0; h2 = .75 * 0 + .25 * 4 = 1; h3 = .75 * 1 + .25 * 1 = 1
    assert memories("zero") == [[0, 0], [1.0, 0.5], [1.0, 0.625]]
    # h1 = 8; h2 = .75 * 8 + .25 * 4 = 7; h3 = .75 * 7 + .25 = 5.5
    assert memories("prototype") == [[8, -4], [7.0, -2.5], [5.5, -1.625]]


def parts_of(image: Tensor, settings: dict[str, Any]) -> list[Tensor]:
    """Mini-images [C, H, W] of one stored image, cut and up-sampled one by one."""
    factor = settings.get("factor", 2)
    _, height, width = image.shape
    rows = 1 if settings.get("axes") == "time" else factor
    mini_images = []
    for i in range(rows):
        for j in range(factor):
            part = image[
                None,
                :,
                i * height // rows : (i + 1) * height // rows,
                j * width // factor : (j + 1) * width // factor,
            ]
            mini_images.append(F.interpolate(part, (height, width), mode="bilinear", align_corners=False)[0])
    return mini_images


def covariance(rows: Tensor, unbiased: bool) -> Tensor:
    centred = rows - rows.mean(0)
    return centred.T @ centred / (len(rows) - int(unbiased))


class Replay:
    """Algorithm 1 on float64 tensors, class by class, image by image."""

    def __init__(self, ctx: Any, distiller: Any, settings: dict[str, Any], stored: Tensor) -> None:
        self.ctx, self.settings = ctx, settings
        self.space, self.num_classes = ctx.space, ctx.dataset.num_classes
        self.pixels = ctx.space.decode(stored).double()
        self.velocity = torch.zeros_like(self.pixels)
        networks = [spec for spec in distiller.pool_specs(ctx) if spec.kind == "supervised"]
        self.nets = [entry.module().double() for entry in ctx.pool.get(networks)]
        self.batches = ClassBatches(ctx, BATCH)
        every = "color_crop_cutout_scale_rotate"  # the images can't be flipped
        augment, strategy = settings.get("augment", "none"), settings.get("strategy", every)
        self.dsa = Dsa(strategy, variant=augment) if augment != "none" else None
        self.memory: list[Tensor] | None = None

    def normalized(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(v).double().view(-1, 1, 1) for v in (self.space.mean, self.space.std))
        return (images - mean) / std

    def embed(self, net: Any, images: Sequence[Tensor], label: int, plan: Any) -> Tensor:
        batch = torch.stack(list(images))
        if plan is not None:
            batch = self.dsa.apply(batch, plan, torch.full((len(batch),), label))
        return torch.cat([net.features(image[None]).embedding for image in batch])

    def synthetic(self, pixels: Tensor, label: int) -> list[Tensor]:
        stored = self.normalized(pixels[label * IPC : (label + 1) * IPC])
        return [part for image in stored for part in parts_of(image, self.settings)]

    def step(self, step: int) -> float:
        settings, pixels = self.settings, self.pixels.clamp(0, 1).requires_grad_(True)
        generator = self.ctx.generator("step", step)
        if settings.get("use_pool", True):
            net = self.nets[int(torch.randint(len(self.nets), (), generator=generator))]
        else:
            from ddray.nets import build_net
            from ddray.seeding import derive_seed

            seed = derive_seed(self.ctx.seed, "distill", "net", step)
            net = build_net(self.ctx.arch, self.ctx.dataset.image_shape, self.num_classes, seed=seed).double()
        index = self.batches.draw(generator).view(self.num_classes, -1)
        plan = self.dsa.draw(self.num_classes, generator, shared_op=False) if self.dsa else None
        loss = torch.zeros((), dtype=torch.float64)
        for label in range(self.num_classes):
            images = self.ctx.split.images[index[label]].double() / 255
            real = self.embed(net, list(self.normalized(images)), label, plan).detach()
            syn = self.embed(net, self.synthetic(pixels, label), label, plan)
            if settings.get("use_proto", True):
                loss = loss + ((real.mean(0) - syn.mean(0)) ** 2).sum()
            if settings.get("use_sd", True):
                unbiased = settings.get("unbiased", False)
                gap = covariance(real, unbiased) - covariance(syn, unbiased)
                loss = loss + 50 * (gap**2).sum() / real.shape[1]
            if self.memory is not None and step >= settings.get("history_from", 2):
                gap = (syn.mean(0) - self.memory[label]) ** 2
                weight = settings.get("lambda2", 0.2) / (len(gap) if settings.get("history_mean") else 1)
                loss = loss + weight * gap.sum()
        (gradient,) = torch.autograd.grad(loss, pixels)
        self.velocity = settings.get("momentum", 0.0) * self.velocity + gradient
        self.pixels = (pixels - LR * self.velocity).detach()
        if settings.get("use_history", True):
            self.update_memory(net, plan if settings.get("history_augmented") else None)
        return float(loss.detach())

    @torch.no_grad()
    def update_memory(self, net: Any, plan: Any) -> None:
        settings = self.settings
        prototypes = [
            self.embed(net, self.synthetic(self.pixels, label), label, plan).mean(0)
            for label in range(self.num_classes)
        ]
        if self.memory is None:
            self.memory = (
                prototypes
                if settings.get("history_first") == "prototype"
                else [0 * row for row in prototypes]
            )
        else:
            ema = settings.get("ema", 0.99)
            self.memory = [
                ema * old + (1 - ema) * new for old, new in zip(self.memory, prototypes, strict=True)
            ]


@pytest.mark.parametrize("name", VARIANTS)
def test_steps_are_algorithm_1(name: str, toy: Any, planned: Any) -> None:
    variant = VARIANTS[name]
    settings = {"batch_real": BATCH, "lr_img": LR, "pool": POOL, **LETTER, **variant}
    dataset = toy(counts=(9, 7, 8), shape=(3, 16, 16), can_flip=False)
    _, ctx, distiller = planned("dsdm", dataset, ipc=IPC, seed=3, steps=4, method=settings)
    distiller.setup(ctx)
    start = distiller.snapshot().images
    replay = Replay(ctx, distiller, variant, start)

    for step in range(1, 5):
        loss = float(distiller.step()["loss"])
        assert loss == pytest.approx(replay.step(step), rel=1e-3), step

    moved = ctx.space.decode(distiller.snapshot().images).double() - ctx.space.decode(start).double()
    expected = replay.pixels - ctx.space.decode(start).double()
    assert float((moved - expected).norm() / expected.norm()) < 5e-3
    if replay.memory is not None:
        torch.testing.assert_close(
            distiller.state_dict()["memory"].double(), torch.stack(replay.memory), rtol=1e-3, atol=1e-4
        )


class Recording:
    """A pool that notes what it is asked for."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        self.requested: list[PoolSpec] = []

    def get(self, specs: Sequence[PoolSpec]) -> list[PoolEntry]:
        self.requested += specs
        entries: list[PoolEntry] = self.pool.get(specs)
        return entries


def test_the_pools_features_spare_the_real_images_forward_pass(
    toy: Any, planned: Any, read_sizes: list[int]
) -> None:
    settings = {"batch_real": BATCH, "pool": POOL, **LETTER}
    _, ctx, fast = planned("dsdm", toy(), ipc=IPC, steps=2, method=settings)
    _, _, slow = planned("dsdm", toy(), ipc=IPC, steps=2, method=settings)
    fast.setup(ctx), slow.setup(ctx)
    slow._engine._features = None

    losses = [float(fast.step()["loss"]) for _ in range(2)]
    assert read_sizes == []
    assert [float(slow.step()["loss"]) for _ in range(2)] == pytest.approx(losses, rel=1e-4)
    assert sum(read_sizes) == 2 * 3 * BATCH


def test_the_pool_is_asked_for_what_the_preset_says(toy: Any, planned: Any) -> None:
    _, ctx, distiller = planned("dsdm", toy(), preset="repo", seed=5, steps=1)

    specs = distiller.pool_specs(ctx)

    assert [spec.seed for spec in specs] == list(range(10)), "runs of every seed share the networks"
    assert {spec.split for spec in specs} == {"train-val0"}, "and none of them has seen val"
    assert {spec.kind for spec in specs} == {"supervised"}, "nobody reads features of augmented images"
    _, ctx, letter = planned("dsdm", toy(), steps=1, method=LETTER)
    assert [spec.kind for spec in letter.pool_specs(ctx)] == ["supervised"] * 10 + ["features"] * 10
    searched = dataclasses.replace(ctx, search_seed=3)
    assert {spec.split for spec in distiller.pool_specs(searched)} == {"train-val3"}
    searched = dataclasses.replace(ctx, split_name="train-val7", search_seed=3)
    assert {spec.split for spec in distiller.pool_specs(searched)} == {"train-val7"}
    assert len({spec.key for spec in specs}) == 10
    assert specs[0].recipe == {
        "epochs": 20,
        "lr": 0.01,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "batch": 256,
        "augment": "dsa_idc",
        "strategy": "color_crop",
        "cutmix": 0.5,
    }
    first = specs[0]
    assert (first.kind, first.transform) == ("supervised", "normalized")
    assert (first.arch, first.dataset) == (ctx.arch, ctx.dataset.fingerprint)


def test_without_a_pool_none_is_asked_for(toy: Any, planned: Any) -> None:
    _, ctx, distiller = planned("dsdm", toy(), steps=1, method={"use_pool": False, "batch_real": BATCH})
    pool = Recording(ctx.pool)

    distiller.setup(dataclasses.replace(ctx, pool=pool))

    assert distiller.pool_specs(ctx) == pool.requested == []
    assert torch.isfinite(distiller.step()["loss"])


@pytest.mark.parametrize("unbiased", [False, True])
def test_one_mini_image_per_class_drops_the_covariance(unbiased: bool, toy: Any, planned: Any) -> None:
    settings = {"factor": 1, "batch_real": BATCH, "pool": POOL, "unbiased": unbiased, "use_history": False}
    losses = []
    for overrides in ({}, {"use_sd": False}):
        _, ctx, distiller = planned("dsdm", toy(), ipc=1, steps=2, method={**settings, **overrides})
        distiller.setup(ctx)
        losses.append([float(distiller.step()["loss"]) for _ in range(2)])

    assert losses[0] == losses[1]
    assert losses[0][0] > 0
    assert distiller.snapshot().meta.decoder is None


def test_random_networks_match_in_any_pixel_space(toy: Any, planned: Any) -> None:
    for space in ("raw", "zca"):
        settings = {"use_pool": False, "batch_real": BATCH}
        _, ctx, distiller = planned("dsdm", toy(), steps=1, pixel_space=space, method=settings)
        distiller.setup(ctx)
        assert torch.isfinite(distiller.step()["loss"])
        assert distiller.snapshot().decode().images.shape == (12, 3, 16, 16)


def test_a_large_set_is_matched_in_batches(toy: Any, planned: Any) -> None:
    settings = {"batch_real": BATCH, "batch_syn": 5, "pool": POOL, "lr_img": 1e-3, **LETTER}
    _, ctx, distiller = planned("dsdm", toy(), ipc=2, steps=2, method=settings)
    distiller.setup(ctx)
    before = distiller.snapshot().images
    distiller.step()
    first = distiller.snapshot().images
    distiller.step()

    def touched(a: Tensor, b: Tensor) -> list[bool]:
        """Which of the 4 parts of 6 images moved."""
        moved = (a - b).abs().amax(1)
        return [
            bool(part.any()) for image in moved for half in image.split(8) for part in half.split(8, dim=1)
        ]

    moved_parts = [touched(before, first), touched(first, distiller.snapshot().images)]
    assert [sum(row[i * 8 : (i + 1) * 8]) for row in moved_parts for i in range(3)] == [5] * 6
    assert moved_parts[0] != moved_parts[1]


def test_pixels_are_clamped_at_the_start_of_a_step(toy: Any, planned: Any) -> None:
    settings = {"batch_real": BATCH, "pool": POOL, "lr_img": 100.0, "use_history": False, **LETTER}
    _, ctx, distiller = planned("dsdm", toy(), ipc=1, steps=2, method=settings)
    distiller.setup(ctx)
    distiller.step()
    wild = ctx.space.decode(distiller.snapshot().images)
    assert float(wild.max()) > 2
    _, _, heir = planned("dsdm", toy(), ipc=1, steps=2, method={**settings, "lr_img": 1e-12})
    heir.setup(ctx)
    heir.load_state_dict(distiller.state_dict())

    heir.step()

    pixels = ctx.space.decode(heir.snapshot().images)
    torch.testing.assert_close(pixels, wild.clamp(0, 1), rtol=0, atol=1e-5)


def speech(num: int = 12) -> Dataset:
    """Log-magnitude spectrograms, float32, of 2 classes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num, 1, 64, 64, generator=generator).clamp_min(-1.5)
    split = Split(images, torch.arange(num) % 2)
    return Dataset(
        name="/sounds",
        class_names=("yes", "no"),
        image_shape=(1, 64, 64),
        mean=(0.1,),
        std=(0.9,),
        can_flip=False,
        load_train=lambda: split,
        load_test=lambda: split,
    )


def test_speech_is_cut_along_time_and_clamped_from_below(planned: Any) -> None:
    dataset = speech()
    settings = {"batch_real": BATCH, "pool": POOL, "lr_img": 1000.0, "use_history": False}
    _, ctx, distiller = planned("dsdm", dataset, ipc=2, steps=2, arch="convnet4_w8", method=settings)
    distiller.setup(ctx)
    distilled = distiller.snapshot()
    assert distilled.images.shape == (4, 1, 64, 64)
    assert (distilled.meta.ipc, distilled.meta.ipc_decoded, distilled.meta.partition.axes) == (2, 4, "time")
    distilled.validate()
    assert distilled.decode().labels.tolist() == [0] * 4 + [1] * 4

    distiller.step()
    wild = ctx.space.decode(distiller.snapshot().images)
    distiller._engine._learned.clamp()
    tamed = ctx.space.decode(distiller.snapshot().images)

    assert float(wild.min()) < -2
    assert float(wild.max()) > 4
    torch.testing.assert_close(tamed, wild.clamp_min(-1.5), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", ["random", "first", "kcenter", "noise"])
def test_initial_mini_images_are_of_their_class(init: str, toy: Any, planned: Any) -> None:
    dataset = toy(counts=(9, 7, 8))
    settings = {"init": init, "resize": "nearest", "pool": POOL, "batch_real": BATCH}
    _, ctx, distiller = planned("dsdm", dataset, ipc=2, steps=1, method=settings)
    distiller.setup(ctx)

    stored = ctx.space.decode(distiller.snapshot().images)

    real = ctx.split.images.float() / 255
    small = real[:, :, ::2, ::2]
    sources = []
    for image in stored:
        for top in (0, 8):
            for left in (0, 8):
                gaps = (small - image[:, top : top + 8, left : left + 8]).abs().amax((1, 2, 3))
                sources.append(int(gaps.argmin()) if float(gaps.min()) < 1e-4 else -1)
    if init == "noise":
        assert set(sources) == {-1}
        return
    labels = torch.tensor([0] * 8 + [1] * 8 + [2] * 8)
    assert torch.equal(ctx.split.labels[sources], labels)
    assert [len(set(sources[i : i + 8])) for i in (0, 8, 16)] == [8, 7, 8]  # class 1 has only 7 images
    if init == "first":
        members = torch.nonzero(ctx.split.labels == 0).flatten()
        assert sources[:8] == members[:8].tolist()
