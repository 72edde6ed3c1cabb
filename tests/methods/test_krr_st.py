"""KRR-ST: presets, pool counters, the outer rate, real batches; the self-supervised baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddray.data import carve_val, normalized_space
from ddray.distillation.method import Target
from ddray.errors import InputError
from ddray.jobs.context import check_size, declared_specs, make_context
from ddray.jobs.plan import resolve
from ddray.methods import get_method
from ddray.methods.families.selection import kmeans_order
from ddray.methods.families.ssl import memory as _krr_memory
from ddray.methods.families.ssl.budget import KrrConfig
from ddray.methods.families.ssl.loop import DrawRows, InnerPool, krr_inner_rules
from ddray.methods.krr_st import preset
from ddray.nets import build_net
from ddray.pool.local import LocalPool
from ddray.pool.spec import PoolEntry, PoolSpec
from ddray.system.files import home

TEACHER = {"arch": "convnet2_w8", "epochs": 1, "batch": 8, "projector": 8}
QUICK = {"teacher": TEACHER, "pool_size": 2, "inner_steps_max": 2, "batch_real": 6, "augment_real": "none"}


@pytest.fixture
def started(toy: Any, planned: Any) -> Any:
    def make(method: str = "krr_st", *, steps: int = 4, **method_settings: Any) -> Any:
        defaults = {"teacher": QUICK["teacher"]} if method == "random_ssl" else QUICK
        settings = {"steps": steps, "method": {**defaults, **method_settings}, "arch": "convnet2_w8_bn"}
        _, ctx, distiller = planned(method, toy(), ipc=2, **settings)
        distiller.setup(ctx)
        return ctx, distiller

    return make


def recipe(**changes: Any) -> KrrConfig:
    return KrrConfig(**{"pool_size": 2, "inner_steps_max": 3, **changes})


def filled(ctx: Any, inner_recipe: KrrConfig) -> tuple[InnerPool, DrawRows]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 3, 16, 16, generator=generator)
    targets = torch.randn(6, 4, generator=generator)
    pool = InnerPool(ctx, inner_recipe, 4, krr_inner_rules(ctx.arch, inner_recipe))
    pool.fill(lambda rows: (images, targets))
    return pool, lambda rows: (images, targets)


def weights(pool: InnerPool, slot_index: int) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in pool.net(slot_index).parameters()])


def is_fresh(pool: InnerPool, slot_index: int) -> bool:
    """Whether a network's batch-norm statistics are those of one that was never trained."""
    return bool((pool.net(slot_index).body.norms[0].running_mean == 0).all())


def test_counters_reset_as_in_boost_algorithm_1(started: Any) -> None:
    """z < Z: one step more; z = Z: a fresh network with z = 0, which is not trained in that turn."""
    ctx, _ = started()
    pool, draw = filled(ctx, recipe(pool_size=1, inner_steps_max=3))
    (z,) = (slot.trained for slot in pool._slots)
    assert 1 <= z <= 3
    seen = []
    for step in range(1, 9):
        before = weights(pool, 0)
        pool.advance(0, draw, step)
        seen.append(pool._slots[0].trained)
        assert not torch.equal(weights(pool, 0), before)
        assert is_fresh(pool, 0) == (seen[-1] == 0)
    turns = [*range(z + 1, 4), 0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert seen == turns[:8]


def test_counters_stay_at_their_end_as_in_krr_sts_code(started: Any) -> None:
    ctx, _ = started()
    pool, draw = filled(ctx, recipe(pool_size=1, inner_steps_max=2, pool_reset="krrst_code"))
    for step in range(1, 3):
        pool.advance(0, draw, step)
    for step in range(3, 7):
        before = weights(pool, 0)
        pool.advance(0, draw, step)
        assert [slot.trained for slot in pool._slots] == [2]
        assert is_fresh(pool, 0)
        assert not torch.equal(weights(pool, 0), before)


def test_an_inner_step_is_sgd_on_the_mean_squared_error_in_train_mode(started: Any) -> None:
    ctx, _ = started()
    pool, draw = filled(ctx, recipe(pool_size=1, inner_steps_max=1))
    net = build_net(ctx.arch, (3, 16, 16), 4, seed=0)
    net.load_state_dict(pool.net(0).state_dict())
    longer = recipe(pool_size=1, inner_steps_max=9)
    pool = InnerPool(ctx, longer, 4, krr_inner_rules(ctx.arch, longer))
    pool._slots[0].net.load_state_dict(net.state_dict())
    before = [p.detach().clone() for p in net.parameters()]
    images, targets = draw(torch.Generator())
    loss = (net.train()(images) - targets).square().sum() / (6 * 4)
    gradients = torch.autograd.grad(loss, list(net.parameters()))

    pool.advance(0, draw, 1)

    for old, gradient, new in zip(before, gradients, pool.net(0).parameters(), strict=True):
        torch.testing.assert_close(new.detach(), old - 0.1 * (gradient + 1e-3 * old), rtol=1e-4, atol=1e-5)


def test_a_batch_of_images_is_drawn_anew_each_step(started: Any) -> None:
    ctx, distiller = started(inner_batch=3)
    draw, rows = distiller._engine._draw(), ctx.generator("inner", "fill", 0)
    first, second = draw(rows), draw(rows)
    again = draw(ctx.generator("inner", "fill", 0))
    whole = distiller._engine._synthesise(distiller._engine.parameters, slice(None))
    for images, targets in (first, second):
        assert len(images) == 3
        for image, target in zip(images, targets, strict=True):
            index = int((whole[0] - image).abs().amax((1, 2, 3)).argmin())
            assert torch.equal(whole[0][index], image)
            assert torch.equal(whole[1][index], target)
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[0], again[0])


def test_a_batch_as_large_as_the_set_is_all_of_it_in_order(started: Any) -> None:
    _, distiller = started(inner_batch=5)
    engine = distiller._engine
    images, _ = engine._synthesise(engine.parameters, slice(None))
    assert torch.equal(engine._draw()(torch.Generator())[0], images)


def test_the_outer_rate_falls_linearly(started: Any) -> None:
    _, distiller = started(steps=4, lr_outer=0.01)
    rates = []
    for _ in range(4):
        distiller.step()
        rates.append(distiller._engine._optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    assert distiller._engine._optimizer.param_groups[0]["weight_decay"] == 0


def test_the_loss_falls(started: Any) -> None:
    """Five images of random pixels: the loss can fall by a tenth (measured: .556 to .502)."""
    _, distiller = started(steps=120, lr_outer=0.02, batch_real=24, inner_steps_max=10)
    losses = [float(distiller.step()["loss"]) for _ in range(120)]
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])


def test_pairs_start_as_real_images_with_their_representations(started: Any) -> None:
    ctx, distiller = started()
    distilled = distiller.snapshot()
    assert distilled.targets is not None
    real = ctx.space.encode(ctx.split.images)
    indices = [int((real - image).abs().amax((1, 2, 3)).argmin()) for image in distilled.images]
    assert torch.equal(real[indices], distilled.images)
    assert torch.equal(distiller.representations[indices], distilled.targets)
    assert len(set(indices)) == len(indices) == 5  # 6 * 768 // (768 + 128)
    assert distilled.meta.storage_floats == 5 * (768 + 128)

    _, raw = started(init_raw=True)
    raw_images = raw.snapshot().images
    assert torch.equal(raw_images, (ctx.split.images[indices].float() / 255))


def test_augmented_real_batches_are_seen_by_the_teacher_too(started: Any) -> None:
    """Cached features would belong to other views: the loop compares with the live teacher's output."""
    ctx, distiller = started(augment_real="crop_flip", batch_real=8)
    loop = distiller._engine
    net = loop.inner.net(0)
    seen: list[Tensor] = []
    live = loop._teacher.embed
    loop._teacher.embed = lambda images: seen.append(images) or live(images)

    chunks = list(loop._real(net, ctx.generator("step", 1)))

    targets = torch.cat([w for _, w in chunks])
    real = normalized_space(ctx.dataset).encode(ctx.split.images)
    for image, target in zip(torch.cat(seen), targets, strict=True):
        torch.testing.assert_close(live(image[None])[0], target, rtol=1e-4, atol=1e-5)
    moved = [float((real - image).abs().amax((1, 2, 3)).min()) for image in torch.cat(seen)]
    assert sum(value > 1e-3 for value in moved) >= 6

    _, plain = started()
    (features, cached), *_ = plain._engine._real(net, ctx.generator("step", 1))
    assert plain._engine._teacher is None
    indices = [int((plain.representations - row).abs().sum(1).argmin()) for row in cached]
    assert torch.equal(plain.representations[indices], cached)
    torch.testing.assert_close(net.embed(real[indices]), features)


def test_presets_differ_where_code_and_paper_do() -> None:
    paper, code = (preset(name, Target("cifar100", (3, 32, 32), 100, 1, 100)) for name in ("paper", "repo"))
    assert "pool_reset" not in paper["method"]
    assert code["method"]["pool_reset"] == "krrst_code"
    assert code["method"]["init_raw"]
    assert paper["arch"] == "convnet3_w128_x2_bn"
    large = preset("paper", Target("tiny_imagenet", (3, 64, 64), 200, 1, 200))
    assert (large["arch"], large["method"]["lr_outer"]) == ("convnet4_w64_x2_bn", 1e-5)


@pytest.mark.parametrize("method", ["random_ssl", "kmeans_ssl", "krr_st", "boost_ssdd"])
def test_all_methods_are_pretrained_on_with_the_weight_decay_of_table_5(method: str) -> None:
    """Table 5's last column, and the same one for every row of a comparison."""
    rows = {
        ("cifar100", 32): {25: 1e-3, 50: 1e-3, 100: 1e-3, 1000: 1e-4, 5000: 1e-4},
        ("tiny_imagenet", 64): {50: 5e-3, 100: 5e-3, 200: 5e-3},
        ("imagenet", 64): {250: 5e-3},
        ("imagenette", 128): {10: 5e-3},
        ("digits", 16): {200: 1e-3},
    }
    for (dataset, side), budgets in rows.items():
        for budget, weight_decay in budgets.items():
            target = Target(dataset, (3, side, side), 100, 1, budget)
            settings = get_method(method).preset("paper", target)["evaluate"]
            assert (settings["weight_decay"], settings["lr"], settings["epochs"]) == (weight_decay, 0.1, 1000)


@pytest.mark.parametrize("method", ["krr_st", "random_ssl"])
def test_an_enormous_budget_is_refused_at_once(
    method: str, toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ddray.methods.families.ssl import budget as _ssl

    dataset, calls = toy(), []
    real = _ssl.budget_floats
    monkeypatch.setattr(_ssl, "budget_floats", lambda *args: calls.append(args) or real(*args))
    plan = resolve(method, dataset, budget=10**20, layers=[{"method": {"teacher": TEACHER}}])
    with pytest.raises(InputError, match=f"budget must be <= 29 for toy .*, got {10**20}"):
        check_size(plan, dataset.train())
    assert 0 < len(calls) < 300


@pytest.mark.parametrize("method", ["random_ssl", "kmeans_ssl", "krr_st", "boost_ssdd"])
def test_the_teacher_is_declared_before_it_is_asked_for(method: str, toy: Any, planned: Any) -> None:
    """A search trains what is declared before its first trial; the trial must then request exactly that."""
    steps = 0 if method.endswith("_ssl") else 1
    plan, ctx, distiller = planned(method, toy(), ipc=2, steps=steps, method={"teacher": TEACHER})
    requested: list[PoolSpec] = []

    class Noting:
        def get(self, specs: Sequence[PoolSpec]) -> list[PoolEntry]:
            requested.extend(specs)
            return ctx.pool.get(specs)

    declared = declared_specs(plan, ctx)
    assert not (home() / "pool").exists()
    distiller.setup(replace(ctx, pool=Noting()))
    assert [spec.kind for spec in declared] == ["ssl"]
    assert {spec.key for spec in requested} == {spec.key for spec in declared}


def test_a_clusters_worker_trains_the_declared_teacher(toy: Any, tmp_path: Path) -> None:
    """`tune` hands a declared spec to `train_member`, whose trainer knows kind `ssl`."""
    from ddray.tuning.payload import pack
    from ddray.tuning.worker import SearchJob, train_member

    dataset = toy((20, 20, 20))
    train, val = carve_val(dataset.train(), seed=0)
    plan = resolve("krr_st", dataset, ipc=2, layers=[{"method": {"teacher": TEACHER}}])
    ctx = make_context(plan, train, split_name="train-val0", device=torch.device("cpu"))
    (spec,) = declared_specs(plan, ctx)
    payload = pack(dataset, train, "train-val0", val, ctx.space, torch.arange(len(train)))
    job = SearchJob(
        run_dir=str(tmp_path),
        epoch=1,
        method="krr_st",
        ipc=plan.ipc,
        seed=0,
        config=plan.config.dump(),
        budgets=(1,),
        cpus=1,
        gpus=0,
        budget=plan.budget,
    )
    train_member(job, payload, spec)

    class Refusing:
        def __call__(self, spec: PoolSpec) -> Any:
            raise AssertionError("the entry is there already")

    (entry,) = LocalPool(Refusing()).get([spec])
    assert entry.tensors["features"].shape == (len(train), 128)


@pytest.mark.parametrize("method", ["krr_st", "boost_ssdd"])
def test_a_set_too_large_is_refused_before_its_teacher_is_trained(
    method: str, toy: Any, planned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, ctx, distiller = planned(method, toy(), ipc=2, steps=1, method={"teacher": TEACHER})
    monkeypatch.setattr(_krr_memory, "available_bytes", lambda device: 2**20)
    assert declared_specs(plan, ctx) == []
    with pytest.raises(
        InputError, match=rf"{method} needs about 0\.\d GiB for \d+ images .*cpu has 0\.0 free"
    ):
        distiller.setup(ctx)
    assert not (home() / "pool").exists()


def test_a_search_whose_driver_lacks_the_device_declares_the_teacher(toy: Any, planned: Any) -> None:
    """A head node without a GPU can't say what its workers' GPUs hold."""
    plan, ctx, _ = planned("krr_st", toy(), ipc=2, steps=1, method={"teacher": TEACHER})
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    (spec,) = declared_specs(plan, replace(ctx, device=torch.device("cuda")))
    assert spec.device == "cuda"


def test_a_budget_larger_than_the_split_is_refused(toy: Any) -> None:
    dataset = toy()
    quick = [{"method": {"teacher": TEACHER}}]
    with pytest.raises(InputError, match=r"budget must be <= (\d+) for toy \(24 images\), got 40") as caught:
        check_size(resolve("krr_st", dataset, budget=40, layers=quick), dataset.train())
    most = int(str(caught.value).split("<= ")[1].split()[0])
    assert most == 29  # 29 * 768 // 896 = 24
    check_size(resolve("krr_st", dataset, budget=most, layers=quick), dataset.train())


@pytest.mark.parametrize(
    ("method", "size", "message"),
    [
        ("krr_st", {}, r"krr_st takes --budget N \(images of storage\), got neither ipc nor budget"),
        ("krr_st", {"ipc": 1, "budget": 10}, "krr_st takes --budget N .*, got ipc and budget"),
        ("random", {"budget": 10}, r"random takes --ipc K \(images per class\), got budget"),
        ("random", {}, "random takes --ipc K .*, got neither"),
        ("krr_st", {"budget": 0}, "budget must be >= 1, got 0"),
        ("random", {"ipc": 0}, "ipc must be >= 1, got 0"),
    ],
)
def test_a_method_takes_either_ipc_or_budget(
    method: str, size: dict[str, int], message: str, toy: Any
) -> None:
    with pytest.raises(InputError, match=message):
        resolve(method, toy(), **size)


def test_images_per_class_of_a_budget_method_are_that_many_images_of_each_class(toy: Any) -> None:
    assert resolve("krr_st", toy(), ipc=4).budget == 12
    plan = resolve("krr_st", toy(), budget=7)
    assert (plan.ipc, plan.budget, plan.describe()["budget"]) == (2, 7, 7)
    assert resolve("random", toy(), ipc=4).budget is None
    assert "budget" not in resolve("random", toy(), ipc=4).describe()


def test_random_pairs_are_real_images_with_their_representations(started: Any) -> None:
    ctx, distiller = started("random_ssl", steps=0)
    distilled = distiller.snapshot()
    assert distilled.targets is not None
    real = ctx.space.encode(ctx.split.images)
    indices = [int((real - image).abs().amax((1, 2, 3)).argmin()) for image in distilled.images]
    assert len(set(indices)) == 5
    assert torch.equal(distilled.targets, distiller.representations[indices])


@pytest.mark.parametrize("method", ["random_ssl", "kmeans_ssl"])
def test_a_selection_counts_images_if_told_to(method: str, toy: Any, planned: Any) -> None:
    """Boost-SSDD: "we get the same numbers of coreset images as the given budget"."""
    for count, expected in (("storage", 5), ("images", 6)):
        settings = {"teacher": TEACHER, "count": count}
        plan, ctx, distiller = planned(method, toy(), ipc=2, steps=0, method=settings)
        distiller.setup(ctx)
        distilled = distiller.snapshot()
        distilled.validate()
        assert plan.budget == distilled.meta.budget == 6
        assert len(distilled.images) == len(distilled.targets) == expected  # 6 * 768 // (768 + 128) = 5
        assert distilled.meta.storage_floats == expected * (768 + 128), "what is stored is counted either way"
        assert ("count" in plan.config.method.dump()) == (count == "images"), "old keys stay"


def test_as_many_images_as_there_are_can_be_selected(toy: Any) -> None:
    layers = [{"method": {"teacher": TEACHER, "count": "images"}}]
    dataset = toy()
    check_size(resolve("random_ssl", dataset, budget=24, layers=layers), dataset.train())
    with pytest.raises(InputError, match=r"budget must be <= 24 for toy \(24 images\), got 25"):
        check_size(resolve("random_ssl", dataset, budget=25, layers=layers), dataset.train())


@pytest.mark.parametrize("method", ["random_ssl", "kmeans_ssl", "krr_st", "boost_ssdd"])
def test_repo_trains_the_teacher_by_solo_learns_recipe(method: str) -> None:
    target = Target("cifar100", (3, 32, 32), 100, 1, 100)
    paper, code = (get_method(method).preset(name, target) for name in ("paper", "repo"))
    assert "teacher" not in paper["method"]
    assert code["method"]["teacher"] == {"stem_padding": 2, "crop_area": 0.08, "warmup_epochs": 10}
    assert paper["evaluate"]["finetune"] == code["evaluate"]["finetune"] == {"batch": 256}


def test_kmeans_takes_the_nearest_to_each_centroid() -> None:
    generator = torch.Generator().manual_seed(0)
    middles = torch.tensor([[0.0, 0], [10, 0], [0, 10], [10, 10]])
    features = torch.cat([middles + 0.3 * torch.randn(4, 2, generator=generator) for _ in range(20)])
    features[:4] = middles  # the first of each cluster lies in its middle, near its centroid

    indices = kmeans_order(features, 4, seed=0)

    assert sorted(int(index) % 4 for index in indices) == [0, 1, 2, 3]
    for index in indices.tolist():
        cluster = features[index % 4 :: 4]
        distance = (cluster - cluster.mean(0)).norm(dim=1)
        assert float((features[index] - cluster.mean(0)).norm()) == pytest.approx(float(distance.min()))


def test_kmeans_never_takes_an_image_twice() -> None:
    features = torch.zeros(6, 3)
    features[3:] = 1.0
    with pytest.warns(match="distinct clusters"):
        indices = kmeans_order(features, 5, seed=0)
    assert len(set(indices.tolist())) == 5
