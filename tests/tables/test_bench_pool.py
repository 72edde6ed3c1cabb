"""Networks that methods need are units of a bench."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from ddray.data import open_dataset
from ddray.distillation.method import DistillContext
from ddray.errors import DdrayError
from ddray.jobs.pool_needs import predict_pool_specs
from ddray.runs.executor import Outcome
from ddray.runs.folder import open_run
from ddray.runs.ledger import Ledger
from ddray.system.files import home
from ddray.tables import scheduler
from ddray.tables import worker as bench_worker
from ddray.tables.graph import build_graph
from ddray.tables.spec import BenchSpec
from ddray.tables.worker import StoredPool
from tests.tables.benches import TINY, run, spec, starts


def test_networks_that_a_method_asks_for_are_units_trained_once(tmp_path: Path) -> None:
    rows = ["kcenter", "herding"]
    bench_spec = spec(methods=rows, set={**TINY["set"], "method.feature_epochs": 1}, ipc=[1, 2])
    result = run(tmp_path / "run", bench_spec)
    assert result["num_failed"] == 0
    ledger = Ledger(tmp_path / "run")
    pool = ledger.rows("pool")
    assert sorted(row.spec["seed"] for row in pool) == [0, 1], "one network per seed for four rows"
    keys = {row.spec["pool_key"] for row in pool}
    assert all(set(row.result["pool"]) <= keys and row.result["pool"] for row in ledger.rows("distill"))
    finished = [event["key"] for event in ledger.events() if event["event"] == "finish"]
    order = {key: position for position, key in enumerate(finished)}
    assert max(order[row.key] for row in pool) < min(order[row.key] for row in ledger.rows("evaluate"))
    assert all(count == 1 for count in starts(tmp_path / "run").values())
    # Another run finds them.
    run(tmp_path / "other", bench_spec)
    assert Ledger(tmp_path / "other").rows("pool") == []


def test_entries_of_another_run_are_no_units_of_this_one(tmp_path: Path) -> None:
    bench_spec = spec(methods=["kcenter"], set={**TINY["set"], "method.feature_epochs": 1}, seeds=1)
    run(tmp_path / "one", bench_spec)
    # Half of the pool is there: the other seed's network is missing.
    result = run(tmp_path / "two", BenchSpec.parse({**bench_spec.dump(), "seeds": 2}))
    assert (result["skipped"], result["num_failed"]) == ([], 0)
    assert len(Ledger(tmp_path / "two").rows("pool")) == 1


def test_of_two_entries_asked_for_only_the_missing_one_is_a_unit(tmp_path: Path) -> None:
    changes = {"set": {**TINY["set"], "method.feature_epochs": 1}, "seeds": 1}
    bench_spec = spec(methods=["kcenter"], **changes)
    graph = build_graph(bench_spec, open_dataset)
    bench_run = open_run(tmp_path / "run", {"a": 1}, command="bench", resume=False)
    job = bench_worker.BenchJob(tmp_path / "run", bench_run.epoch, None, "cpu")
    unit_scheduler = scheduler.UnitScheduler(graph, bench_run, job)
    (asker,) = unit_scheduler.first()
    (plan,) = graph.plans.values()
    (missing_spec,) = predict_pool_specs(plan) or ()
    present_spec = missing_spec.model_copy(update={"seed": 7})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "has_entry", lambda pool_spec: pool_spec.seed == 7)
        needs = bench_worker.Needs((missing_spec, present_spec))
        (pool_unit,) = unit_scheduler.after(Outcome(asker.key, needs, None, 1))
    assert pool_unit.pool == missing_spec
    assert [title for title in unit_scheduler.skipped() if title.startswith("pool")] == [pool_unit.title]


def test_an_entry_that_is_removed_is_trained_again_and_one_that_never_stays_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench_spec = spec(methods=["kcenter"], set={**TINY["set"], "method.feature_epochs": 1}, seeds=1)
    real = bench_worker._TASKS["pool"]
    lost: list[str] = []

    def train(job: Any, unit: Any, most: int = 1) -> Any:
        result = real(job, unit)
        if len(lost) < most:
            lost.append(unit.key)
            shutil.rmtree(home() / "pool" / unit.pool.key)
        return result

    monkeypatch.setitem(bench_worker._TASKS, "pool", train)
    outcome = run(tmp_path / "once", bench_spec)
    assert (outcome["num_failed"], outcome["skipped"], len(lost)) == (0, [], 1)
    shutil.rmtree(home() / "pool")
    monkeypatch.setitem(bench_worker._TASKS, "pool", lambda job, unit: train(job, unit, 99))
    with pytest.raises(DdrayError, match="DDRAY_HOME must be one folder"):
        run(tmp_path / "never", bench_spec)
    assert len(lost) == 1 + 3


def test_a_failed_entry_leaves_its_askers_out_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench_spec = spec(methods=["random", "kcenter"], seeds=1)
    with monkeypatch.context() as patch:
        patch.setitem(bench_worker._TASKS, "pool", lambda job, unit: 1 / 0)
        result = run(tmp_path / "run", bench_spec)
    assert [cell["method"] for cell in result["cells"]] == ["random", "random"]
    assert [failure["kind"] for failure in result["failures"]] == ["pool"]
    assert len(result["skipped"]) == 3
    mended = run(tmp_path / "run", bench_spec, resume=True, retry_failed=True)
    assert (mended["num_failed"], mended["skipped"]) == (0, [])


def test_an_asking_pool_gives_what_is_there_and_names_the_rest(toy: Any, planned: Any) -> None:
    _, ctx, method = planned("kcenter", toy())
    ctx: DistillContext
    asking = StoredPool(ctx.pool)
    object.__setattr__(ctx, "pool", asking)
    with pytest.raises(bench_worker._MissingError) as missing:
        method.setup(ctx)
    assert isinstance(missing.value.missing, bench_worker.Needs)
    (missing_spec,) = missing.value.missing.specs
    asking.pool.get([missing_spec])
    method.setup(ctx)
    assert asking.used == [missing_spec.key]


def test_what_a_method_will_ask_for_is_known_without_images(digits: Any) -> None:
    graph = build_graph(spec(methods=["kcenter", "random", "datadam"], seeds=1), lambda name: digits)
    pool_specs = {plan.method: predict_pool_specs(plan) for plan in graph.plans.values()}
    assert pool_specs["random"] == () == pool_specs["datadam"]
    assert [pool_spec.arch for pool_spec in pool_specs["kcenter"] or ()] == ["convnet1_w8"]
