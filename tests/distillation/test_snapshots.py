"""The sets along a distillation's steps, and what it took."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from ddray.artifact.reading import load
from ddray.distillation import meter as meter_module
from ddray.distillation.loop import run_distillation
from ddray.distillation.meter import Meter, MeteredPool
from ddray.distillation.method import DistillContext
from ddray.distillation.snapshots import Snapshots, snapshot_steps
from ddray.evaluation.options import EvaluateConfig
from ddray.pool.files import PoolFiles
from ddray.pool.local import LocalPool
from ddray.pool.spec import PoolEntry, PoolSpec
from ddray.system.files import home
from ddray.system.memory import halved_budget
from tests.distillation.test_loop import Counter

EVERY = 3


@pytest.fixture
def ctx(toy: Any, planned: Any) -> DistillContext:
    return planned("random", toy())[1]


def snapshots_of(folder: Path, num_steps: int) -> Snapshots:
    return Snapshots(folder, snapshot_steps(EVERY, num_steps))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    ("every", "num_steps", "steps"),
    [(10, 30, (10, 20)), (10, 31, (10, 20, 30)), (10, 9, ()), (10, 0, ()), (None, 30, ())],
)
def test_the_last_step_is_the_result(every: int | None, num_steps: int, steps: tuple[int, ...]) -> None:
    assert snapshot_steps(every, num_steps) == steps


def test_each_kept_set_is_that_of_a_run_of_as_many_steps(ctx: DistillContext, tmp_path: Path) -> None:
    whole = run_distillation(Counter(10), ctx)
    result = run_distillation(Counter(10), ctx, snapshots=snapshots_of(tmp_path, 10))

    assert torch.equal(result.distilled.images, whole.distilled.images)
    assert sorted(contents(tmp_path)) == ["0000003.pt", "0000006.pt", "0000009.pt"]
    for step in (3, 6, 9):
        short = run_distillation(Counter(step), ctx)
        assert torch.equal(load(snapshots_of(tmp_path, 10).path(step)).images, short.distilled.images)


@pytest.mark.parametrize("fail_at", [2, 3, 4, 6, 7, 10])
def test_a_run_cut_off_anywhere_keeps_the_same_sets(
    fail_at: int, ctx: DistillContext, tmp_path: Path
) -> None:
    run_distillation(Counter(10), ctx, snapshots=snapshots_of(tmp_path / "whole", 10))
    settings: dict[str, Any] = {
        "checkpoint": tmp_path / "c.pt",
        "checkpoint_every": 2,
        "snapshots": snapshots_of(tmp_path / "cut", 10),
    }
    with pytest.raises(KeyboardInterrupt):
        run_distillation(Counter(10, fail_at=fail_at), ctx, **settings)
    again = run_distillation(Counter(10), ctx, **settings)

    # A checkpoint is written wherever a set is kept.
    assert again.resumed_from_step == max(s for s in (0, 2, 3, 4, 6, 8, 9) if s < fail_at)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_run_that_lost_one_begins_anew(
    ctx: DistillContext, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {
        "checkpoint": tmp_path / "c.pt",
        "snapshots": snapshots_of(tmp_path / "steps", 10),
    }
    run_distillation(Counter(10), ctx, **settings)
    before = contents(tmp_path / "steps")
    snapshots_of(tmp_path / "steps", 10).path(6).unlink()

    method = Counter(10)
    with caplog.at_level(logging.WARNING):
        again = run_distillation(method, ctx, **settings)

    assert "the snapshots of steps 6 are missing" in caplog.text
    assert (again.resumed_from_step, method.steps_done) == (0, list(range(1, 11)))
    assert contents(tmp_path / "steps") == before


def test_a_continued_run_keeps_the_set_of_the_step_it_goes_on_from(
    ctx: DistillContext, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "c.pt"
    run_distillation(Counter(6), ctx, checkpoint=checkpoint, snapshots=snapshots_of(tmp_path / "steps", 6))
    assert sorted(contents(tmp_path / "steps")) == ["0000003.pt"]
    longer = run_distillation(
        Counter(10), ctx, checkpoint=checkpoint, snapshots=snapshots_of(tmp_path / "steps", 10)
    )

    run_distillation(Counter(10), ctx, snapshots=snapshots_of(tmp_path / "whole", 10))
    assert longer.resumed_from_step == 6
    assert contents(tmp_path / "steps") == contents(tmp_path / "whole")


def test_an_unset_interval_changes_no_configuration() -> None:
    assert "every" not in EvaluateConfig().dump()
    assert EvaluateConfig.parse({"every": 5}).dump()["every"] == 5


def pool_spec(kind: str, *parents: PoolSpec) -> PoolSpec:
    return PoolSpec(
        kind=kind,
        dataset="d",
        split="train",
        transform="raw",
        arch="a",
        recipe={},
        seed=0,
        image_shape=(1, 1, 1),
        num_classes=2,
        parents=tuple(parent.key for parent in parents),
    )


class Clock:
    """Stands for the meter's clock: a call of `pass_` is the only thing that takes time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(meter_module.time, "perf_counter", lambda: self.now)

    def pass_(self, seconds: float) -> None:
        self.now += seconds


def test_seconds_go_on_where_an_interrupted_run_left_off(
    ctx: DistillContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)

    class Slow(Counter):
        def step(self) -> Any:
            clock.pass_(1.0)
            return super().step()

    settings: dict[str, Any] = {"checkpoint": tmp_path / "c.pt", "checkpoint_every": 4}
    with pytest.raises(KeyboardInterrupt):
        run_distillation(Slow(10, fail_at=7), ctx, **settings)
    again = run_distillation(Slow(10), ctx, **settings)

    assert again.seconds == 10.0, "the steps that led to the set, not those done twice"
    assert again.costs()["seconds_with_pool"] == 10.0
    checkpoint = torch.load(tmp_path / "c.pt", weights_only=True)
    del checkpoint["spent"]  # as written before it was counted
    torch.save(checkpoint, tmp_path / "c.pt")
    unknown = run_distillation(Slow(10), ctx, **settings)
    assert unknown.seconds is None
    assert not {"seconds", "seconds_with_pool"} & unknown.costs().keys()


def test_the_pools_work_is_left_out_and_counted_apart(
    ctx: DistillContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)

    root = pool_spec("root")
    child, other = pool_spec("child", root), pool_spec("other", root)

    def train(each: PoolSpec) -> Any:
        """A child takes 3 s after its parent; the parent takes 5."""
        if each.parents:
            LocalPool(train).get([root])
        clock.pass_(3.0 if each.parents else 5.0)
        return {"weights.x": torch.zeros(1)}, {}

    monkeypatch.setattr("ddray.pool.local.time.perf_counter", lambda: clock.now)
    meter = Meter(torch.device("cpu"))
    pool = MeteredPool(LocalPool(train), meter)
    clock.pass_(1.0)
    pool.get([child])
    pool.get([child, other])
    clock.pass_(1.0)

    assert meter.spent()["seconds"] == 2.0
    assert pool.trained_s == {root.key: 5.0, child.key: 3.0, other.key: 3.0}
    stored = {key: PoolFiles(home() / "pool").describe(key)["wall_s"] for key in pool.trained_s}
    assert stored == pool.trained_s, "an entry's seconds are without those of what it was trained from"


def test_a_set_counts_networks_that_the_pool_had_already(ctx: DistillContext) -> None:
    class Pool:
        def get(self, specs: Any) -> list[PoolEntry]:
            return [PoolEntry({"wall_s": 40.0}, {}) for _ in specs]

    class Pooled(Counter):
        def setup(self, ctx: DistillContext) -> None:
            super().setup(ctx)
            ctx.pool.get([spec, spec])

    spec = pool_spec("k")
    costs = run_distillation(Pooled(2), replace(ctx, pool=Pool())).costs()

    assert costs["seconds_with_pool"] == pytest.approx(costs["seconds"] + 40.0, abs=1e-9)


def test_the_peak_is_of_the_distillation_and_of_all_its_processes(
    ctx: DistillContext, tmp_path: Path
) -> None:
    size = 2**26  # floats: 256 MiB

    class Large(Counter):
        def step(self) -> Any:
            if self._step == 1:
                torch.ones(size).sum()
            return super().step()

    first = run_distillation(Large(3), ctx, checkpoint=tmp_path / "c.pt")
    stored = torch.load(tmp_path / "c.pt", weights_only=True)["spent"]["peak_memory_bytes"]
    small = run_distillation(Counter(3), ctx)
    again = run_distillation(Large(3), ctx, checkpoint=tmp_path / "c.pt")

    assert first.peak_memory_bytes is not None
    assert small.peak_memory_bytes is not None
    assert first.peak_memory_bytes - small.peak_memory_bytes > 3 * size
    assert stored - small.peak_memory_bytes > 3 * size
    assert again.peak_memory_bytes == stored, "the first process's was the largest, as its checkpoint says"


def test_what_a_method_measures_is_among_the_costs(ctx: DistillContext) -> None:
    class Measured(Counter):
        measures: ClassVar = {"sampling_seconds_per_class": 0.5}

    costs = run_distillation(Measured(1), ctx).costs()

    assert costs["sampling_seconds_per_class"] == 0.5
    assert costs["storage_floats"] == ctx.dataset.num_classes * math.prod(ctx.dataset.image_shape)


def test_bf16_of_a_method_that_computes_nothing_in_it_is_said(
    ctx: DistillContext, caplog: pytest.LogCaptureFixture
) -> None:
    in_bf16 = replace(ctx, config={**ctx.config, "precision": "bf16"})

    assert run_distillation(Counter(1), in_bf16).costs()["precision"] == "fp32"
    assert caplog.messages == ["precision bf16: this method computes nothing in bfloat16; its set is of fp32"]


def test_a_second_try_with_half_the_memory_budget_says_so(ctx: DistillContext) -> None:
    assert "half_memory_budget" not in run_distillation(Counter(1), ctx).costs()
    with halved_budget():
        assert run_distillation(Counter(1), ctx).costs()["half_memory_budget"] is True


def test_the_meter_counts_real_seconds() -> None:
    meter = Meter(torch.device("cpu"))
    time.sleep(0.02)
    with meter.excluded():
        time.sleep(0.1)
    assert 0.02 <= meter.spent()["seconds"] < 0.1
