"""One vectorised, chunked step against a loop over classes with the same draws, in float64."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from ddray.data import Split
from ddray.errors import InputError
from ddray.jobs import context
from ddray.jobs.context import wants_compile
from ddray.methods.families.matching import batches
from ddray.methods.families.matching.batches import (
    _CHUNK_BYTES,
    ClassBatches,
    chunks,
    initial_images,
)
from ddray.nets import build_net
from ddray.seeding import derive, derive_seed
from ddray.training.dsa import Dsa, dsa_for, siamese

BATCH, IPC, LR = 5, 2, 0.25
METHODS = {
    "dm": {},
    "mmd_pixel": {},
    "datadam": {"lambda_mmd": 0.1, "p": 4, "loss_scale": 10.0},
    "datadam_p1": {"lambda_mmd": 0.02, "p": 1, "loss_scale": 100.0},
    "datadam_p3_l1_mae": {"p": 3, "sam_norm": "l1", "loss": "mae"},
    "datadam_raw_cosine": {"p": 2, "sam_norm": "none", "loss": "cosine"},
    "datadam_all_layers": {"p": 2, "layers": [2, 1]},
}


def per_sample(method: str, features: Any, images: Tensor, settings: dict[str, Any]) -> list[list[Tensor]]:
    """Statistics of one class's images, sample by sample: a list per statistic."""
    if method == "mmd_pixel":
        return [[image.flatten() for image in images]]
    if method == "dm":
        return [list(features.embedding)]
    norm = settings.get("sam_norm", "l2")
    statistics: list[list[Tensor]] = []
    layers = settings.get("layers") or range(1, len(features.maps))  # all but the last
    for layer in layers:
        rows = []
        for sample in features.maps[layer - 1]:
            row = sum(channel.abs() ** settings["p"] for channel in sample).flatten()
            size = {"l2": (row**2).sum().sqrt(), "l1": row.sum(), "none": 1.0}[norm]
            rows.append(row / size)
        statistics.append(rows)
    return [*statistics, list(features.embedding)]


def distance(method: str, index: int, num: int, a: Tensor, b: Tensor, settings: dict[str, Any]) -> Tensor:
    """One class's term of one statistic; the last of DataDAM's is L_MMD's."""
    squared = ((a - b) ** 2).sum()
    if method in ("dm", "mmd_pixel"):
        return squared
    scale = settings.get("loss_scale", 100.0)
    if index == num - 1:
        return scale * settings.get("lambda_mmd", 0.01) * squared
    kind = settings.get("loss", "mse")
    if kind == "mae":
        return scale * (a - b).abs().sum()
    return scale * (squared if kind == "mse" else 1 - (a @ b) / (a.norm() * b.norm()))


def naive_step(
    method: str, settings: dict[str, Any], ctx: Any, images: Tensor, augment: bool
) -> tuple[float, Tensor]:
    """Loss and gradient of step 1, class by class; networks with batch norm see all classes at once."""
    generator = ctx.generator("step", 1)
    shape, num_classes = ctx.dataset.image_shape, ctx.dataset.num_classes
    net = build_net(ctx.arch, shape, num_classes, seed=derive_seed(ctx.seed, "distill", "net", 1))
    net.double().train()
    index = ClassBatches(ctx, BATCH).draw(generator)
    dsa = dsa_for(ctx.dataset.can_flip)
    plan = dsa.draw(num_classes, generator, shared_op=False) if augment else None
    live = images.double().requires_grad_(True)

    def prepared(batch: Tensor, label: int) -> Tensor:
        return batch if plan is None else dsa.apply(batch, plan, torch.full((len(batch),), label))

    def all_statistics(parts: list[Tensor]) -> list[list[list[Tensor]]]:
        if "bn" not in ctx.arch:
            return [per_sample(method, net.features(part), part, settings) for part in parts]
        features = net.features(torch.cat(parts))
        statistics, start = [], 0
        for part in parts:
            rows = slice(start, start + len(part))
            part_features = type(features)(
                features.logits[rows], features.embedding[rows], tuple(m[rows] for m in features.maps)
            )
            statistics.append(per_sample(method, part_features, part, settings))
            start += len(part)
        return statistics

    real_parts, syn_parts = [], []
    for label in range(num_classes):
        class_index = index[label * BATCH : (label + 1) * BATCH]
        assert bool((ctx.split.labels[class_index] == label).all())
        real_parts.append(prepared(ctx.space.encode(ctx.split.images[class_index]).double(), label))
        syn_parts.append(prepared(live[label * IPC : (label + 1) * IPC], label))
    loss = torch.zeros((), dtype=torch.float64)
    for real, syn in zip(all_statistics(real_parts), all_statistics(syn_parts), strict=True):
        for statistic, (a, b) in enumerate(zip(real, syn, strict=True)):
            loss = loss + distance(method, statistic, len(real), sum(a) / len(a), sum(b) / len(b), settings)
    loss.backward()
    assert live.grad is not None
    return float(loss.detach()), live.grad


@pytest.mark.parametrize(
    ("name", "arch", "augment"),
    list(itertools.product(METHODS, ["convnet2_w8", "convnet2_w8_bn"], ["dsa", "none"])),
)
def test_a_step_is_the_loop_over_classes(
    name: str,
    arch: str,
    augment: str,
    toy: Any,
    planned: Any,
    monkeypatch: pytest.MonkeyPatch,
    read_sizes: list[int],
) -> None:
    method, settings = ("datadam" if name.startswith("datadam") else name), METHODS[name]
    dataset = toy()
    _, ctx, distiller = planned(
        method,
        dataset,
        ipc=IPC,
        seed=3,
        steps=1,
        arch=arch,
        method={"batch_real": BATCH, "lr_img": LR, "momentum": 0.0, "augment": augment, **settings},
    )
    # Three images of 8 x 16 x 16 floats at a time: chunks begin and end inside classes.
    monkeypatch.setattr(batches, "_CHUNK_BYTES", 3 * 8 * 16 * 16 * 4)
    distiller.setup(ctx)
    before = distiller.snapshot().images

    loss = distiller.step()["loss"]

    assert read_sizes == ([15] if arch.endswith("bn") else [3] * 5)
    expected_loss, expected_grad = naive_step(method, settings, ctx, before, augment == "dsa")
    assert float(loss) == pytest.approx(expected_loss, rel=2e-4)
    grad = (before - distiller.snapshot().images).double() / LR
    assert float(expected_grad.abs().max()) > 0
    error = (grad - expected_grad).norm() / expected_grad.norm()
    assert float(error) < 2e-3


def test_real_and_synthetic_images_of_a_class_share_one_plan(
    toy: Any, planned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ctx, distiller = planned("dm", toy(), ipc=IPC, steps=2, method={"batch_real": BATCH})
    distiller.setup(ctx)
    seen: list[tuple[Any, list[int], bool]] = []
    apply = Dsa.apply

    def spy(self: Dsa, images: Tensor, plan: Any, index: Tensor, among: slice) -> Tensor:
        seen.append((plan, index.tolist(), images.requires_grad))
        return apply(self, images, plan, index, among)

    monkeypatch.setattr(Dsa, "apply", spy)
    distiller.step()

    real = [call for call in seen if not call[2]]
    (syn,) = [call for call in seen if call[2]]
    assert real
    assert all(call[0] is syn[0] for call in seen)
    assert len(syn[0]) == 3  # a parameter set per class
    assert [i for call in real for i in call[1]] == [0] * BATCH + [1] * BATCH + [2] * BATCH
    assert syn[1] == [0, 0, 1, 1, 2, 2]

    first = syn[0]
    distiller.step()
    assert not torch.equal(seen[-1][0].params, first.params)


@pytest.mark.parametrize("method", ["dm", "mmd_pixel", "datadam"])
@pytest.mark.parametrize("augment", ["dsa", "none"])
def test_a_set_of_all_real_images_has_no_loss(method: str, augment: str, toy: Any, planned: Any) -> None:
    dataset = toy(counts=(6, 6, 6))
    settings = {"batch_real": 6, "augment": augment, "lr_img": 0.1}
    _, ctx, distiller = planned(method, dataset, ipc=6, steps=1, method=settings)
    distiller.setup(ctx)
    _, _, other = planned(method, dataset, ipc=6, steps=1, method={**settings, "init": "noise"})
    other.setup(ctx)

    assert float(distiller.step()["loss"]) < 1e-6 * float(other.step()["loss"])


@pytest.mark.parametrize("init", ["random", "kcenter", "noise"])
def test_initial_images_are_class_sorted_and_of_their_class(init: str, toy: Any, planned: Any) -> None:
    dataset = toy()
    _, ctx, _ = planned("dm", dataset, ipc=3, steps=1, method={"batch_real": BATCH})

    images, labels = initial_images(ctx, init)

    assert images.shape == (9, 3, 16, 16)
    assert images.dtype == torch.float32
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    real = ctx.space.encode(ctx.split.images)
    matches = [[i for i in range(len(real)) if torch.equal(real[i], image)] for image in images]
    if init == "noise":
        assert matches == [[]] * 9
        assert abs(float(images.mean())) < 0.1
        assert float(images.std()) == pytest.approx(1, abs=0.1)
        return
    indices = [position for (position,) in matches]
    assert len(set(indices)) == 9
    assert torch.equal(ctx.split.labels[indices], labels)


@pytest.mark.parametrize("init", ["random", "first", "kcenter"])
def test_a_class_with_too_few_images_starts_with_noisy_copies(init: Any, toy: Any, planned: Any) -> None:
    """Of 2 images, 5 initial ones: both, and three copies within a tenth of the images' deviation."""
    _, ctx, _ = planned("dm", toy(counts=(9, 2)), ipc=5, steps=1, method={"batch_real": BATCH})

    images, labels = initial_images(ctx, init)
    selected, fewer = initial_images(ctx, init, repeat=False)

    assert (labels.tolist(), fewer.tolist()) == ([0] * 5 + [1] * 5, [0] * 5 + [1] * 2)
    assert torch.equal(images[:7], selected)
    real = ctx.space.encode(ctx.split.images)[ctx.split.labels == 1]
    assert sorted(int((real - image).flatten(1).abs().sum(1).argmin()) for image in images[5:7]) == [0, 1]
    assert torch.equal(images[5:7].sum(), real.sum()) or float((images[5:7].sum() - real.sum()).abs()) < 1e-2
    differences = images[7:] - images[[5, 6, 5]]
    expected = 0.1 * float(ctx.space.encode(ctx.split.images).std())
    assert float(differences.std()) == pytest.approx(expected, rel=0.1)
    assert torch.equal(initial_images(ctx, init)[0], images)


@pytest.mark.parametrize("init", ["random", "first", "kcenter"])
@pytest.mark.parametrize("counts", [(4, 4, 4), (9, 4, 3)])
def test_more_images_than_a_class_of_ipc_has_are_plain_copies(
    init: Any, counts: tuple[int, ...], toy: Any, planned: Any
) -> None:
    """Mini-images (ipc x parts) may be more than a class has: they start as its images, one after another."""
    _, ctx, _ = planned("dm", toy(counts=counts), ipc=3, steps=1, method={"batch_real": BATCH})

    images, labels = initial_images(ctx, init, 12)

    originals, of_class = initial_images(ctx, init, 12, repeat=False)
    repeated = [originals[of_class == label][torch.arange(12) % n] for label, n in enumerate(counts)]
    assert images.numpy().tobytes() == torch.cat(repeated).numpy().tobytes()
    assert torch.bincount(of_class).tolist() == list(counts)
    assert torch.equal(labels, torch.arange(3).repeat_interleave(12))
    real = ctx.space.encode(ctx.split.images)
    assert all((real == image).flatten(1).all(1).any() for image in originals)


@hypothesis.settings(max_examples=30, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    batch=st.integers(1, 12),
    seed=st.integers(0, 2**32),
)
def test_batches_have_every_class_equally_often_and_no_image_twice(
    counts: list[int], batch: int, seed: int, toy: Any, planned: Any
) -> None:
    dataset = toy(counts=tuple(counts), shape=(1, 4, 4))
    _, ctx, _ = planned("random", dataset, arch="convnet1_w8")
    batches = ClassBatches(ctx, batch)
    per = min(batch, *counts)

    index = batches.draw(derive(seed, "test"))

    assert batches.per_class == per
    assert len(set(index.tolist())) == len(index) == per * len(counts)
    assert ctx.split.labels[index].tolist() == [c for c in range(len(counts)) for _ in range(per)]
    assert torch.equal(batches.labels_cpu, ctx.split.labels[index])
    assert torch.equal(batches.take(index), ctx.space.encode(ctx.split.images[index]))
    assert torch.equal(index, batches.draw(derive(seed, "test")))


def test_a_tail_gives_its_images_several_times_and_takes_none_from_other_classes(
    toy: Any, planned: Any
) -> None:
    """Classes of 9, 3 and 7 at ipc 5: seven of each class, two or three times each image of the second."""
    _, ctx, _ = planned("random", toy(counts=(9, 3, 7), shape=(1, 4, 4)), ipc=5, arch="convnet1_w8")
    batches, seen = ClassBatches(ctx, 64), torch.zeros(19)

    for step in range(300):
        index = batches.draw(derive(step, "test"))
        assert batches.per_class * 3 == 21 == len(index)
        assert torch.equal(ctx.split.labels[index], batches.labels_cpu)
        counts = torch.bincount(index, minlength=19)
        assert set(counts[ctx.split.labels == 1].tolist()) <= {1, 2, 3}
        assert counts[ctx.split.labels != 1].max() == 1
        seen += counts
    tail = seen[ctx.split.labels == 1]
    assert float(tail.min()) > 650, "700 expected of each"


def test_a_batch_larger_than_every_class_takes_what_the_largest_has(toy: Any, planned: Any) -> None:
    _, ctx, _ = planned("random", toy(counts=(4, 2), shape=(1, 4, 4)), ipc=4, arch="convnet1_w8")
    batches = ClassBatches(ctx, 64)
    assert sorted(batches.draw(derive(0)).tolist()) == sorted(
        (ctx.split.labels == 0).nonzero().flatten().tolist()
        + 2 * (ctx.split.labels == 1).nonzero().flatten().tolist()
    )


def test_every_image_of_a_class_can_be_drawn_and_about_equally_often(toy: Any, planned: Any) -> None:
    _, ctx, _ = planned("random", toy(counts=(4, 12), shape=(1, 4, 4)), arch="convnet1_w8")
    batches = ClassBatches(ctx, 4)
    seen = torch.zeros(16, dtype=torch.int64)
    generator = derive(0, "test")
    for _ in range(600):
        seen[batches.draw(generator)] += 1

    small, large = seen[ctx.split.labels == 0], seen[ctx.split.labels == 1]
    assert small.tolist() == [600] * 4
    assert 150 < int(large.min()) <= int(large.max()) < 250  # 200 expected, std 11.5


@hypothesis.given(total=st.integers(0, 500), size=st.integers(1, 2**24))
def test_chunks_cover_everything_once_within_the_budget(total: int, size: int) -> None:
    slices = list(chunks(total, size, torch.device("cpu")))

    assert [i for part in slices for i in range(part.start, part.stop)] == list(range(total))
    assert all((p.stop - p.start) * size <= _CHUNK_BYTES or p.stop - p.start == 1 for p in slices)


def test_whitened_images_are_encoded_once_and_the_same(toy: Any, planned: Any) -> None:
    _, ctx, _ = planned("dm", toy(), steps=1, pixel_space="zca", method={"batch_real": BATCH})
    batches = ClassBatches(ctx, BATCH)
    index = torch.tensor([3, 1, 20])

    assert ctx.space.kind == "zca"
    torch.testing.assert_close(
        batches.take(index), ctx.space.encode(Split(ctx.split.images[index], index).images)
    )


class TestCompile:
    def decide(self, choice: str, steps: int = 10**6) -> bool:
        return wants_compile(choice, num_steps=steps, images_per_step=320, image_shape=(3, 32, 32))

    def test_without_a_compiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(context.shutil, "which", lambda name: None)

        assert not self.decide("auto")
        assert not self.decide("off")
        with pytest.raises(InputError, match=r"compile=on needs a C\+\+ compiler"):
            self.decide("on")

    def test_with_a_compiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(context.shutil, "which", lambda name: "/bin/g++" if name == "g++" else None)

        assert self.decide("on", steps=1)
        assert not self.decide("off")
        assert self.decide("auto")
        assert not self.decide("auto", steps=1)
        worth = 500_000 // 320
        assert [self.decide("auto", steps=worth + i) for i in (0, 1)] == [False, True]

    def test_small_images_must_be_more(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(context.shutil, "which", lambda name: "/bin/g++")
        steps = [
            wants_compile("auto", num_steps=2000, images_per_step=320, image_shape=(1, size, size))
            for size in (16, 32, 64)
        ]
        assert steps == [False, True, True]


@pytest.mark.parametrize("variant", ["dsa", "dsa_idc"])
def test_a_strategy_of_flips_is_none_where_images_are_not_mirrored(variant: Any) -> None:
    assert siamese(False, variant, "flip") is None
    assert siamese(True, variant, "flip").strategy == "flip"
    assert siamese(False, variant, "color_flip").strategy == "color"
    with pytest.raises(InputError, match="flop"):
        siamese(False, variant, "flop")


@pytest.mark.parametrize("method", ["dm", "datadam"])
def test_bf16_is_the_same_step_with_fewer_digits(method: str, toy: Any, planned: Any) -> None:
    losses, moves = [], []
    for precision in ("fp32", "bf16"):
        settings = {"batch_real": BATCH, "lr_img": LR, "precision": precision}
        _, ctx, distiller = planned(method, toy(), ipc=IPC, steps=1, arch="convnet2_w8", method=settings)
        distiller.setup(ctx)
        before = distiller.snapshot().images
        losses.append(float(distiller.step()["loss"]))
        moves.append(distiller.snapshot().images - before)

    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert moves[1].dtype == torch.float32
    assert float((moves[1] - moves[0]).norm() / moves[0].norm()) < 0.1
