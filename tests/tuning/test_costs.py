"""What a search's units cost, and the forecast of a search."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from ddray import api
from ddray.commands.display import search_forecast_tables
from ddray.errors import InputError
from ddray.jobs.plan import resolve
from ddray.nets import multiply_adds
from ddray.runs.costs import History, costs_file, record_costs
from ddray.runs.folder import open_run
from ddray.runs.ledger import Row, Unit
from ddray.tuning.costs import record_search_costs
from ddray.tuning.options import TuneOptions

LAYER = {"arch": "convnet1_w8", "compile": "off", "steps": 18}
SMALL = ("arch=convnet1_w8", "compile=off", "steps=18")


def row(kind: Any, wall_s: float, **result: Any) -> Row:
    return Row.done(Unit(kind=kind, spec={"wall_s": wall_s, **result}), result, wall_s)


def forecast(**options: Any) -> Any:
    return api.forecast_tune("dm", ipc=1, num_samples=3, sets=SMALL, gpus_per_trial=0, **options)


def printed(costs: Any) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    for table in search_forecast_tables(costs):
        console.print(table)
    return console.export_text()


@pytest.fixture
def search(digits: Any) -> Any:
    plan = resolve("dm", digits, ipc=1, layers=[LAYER])
    job = SimpleNamespace(budgets=(1, 3, 9), device="cpu")
    return SimpleNamespace(plan=plan, options=TuneOptions(), job=job)


def test_without_past_units_there_is_no_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    costs = forecast(strategy="random", final_sets=2)
    assert (costs["num_units"], costs["num_missing"], costs["num_without_estimate"]) == (7, 7, 7)
    assert costs["estimate_s"] is None
    assert costs["peak_memory_bytes"] is None
    assert not costs["is_upper_bound"]
    assert not Path("runs").exists()


def test_trials_and_final_runs_are_estimated_from_their_own_kind(search: Any) -> None:
    trials = [
        row("trial", 4.0, peak_memory_bytes=7, device_seconds=6.0),
        row("trial", 5.0, resumed_from_step=3),
    ]
    finals = [row("evaluate", 9.0, peak_memory_bytes=8)]
    record_search_costs(search, [*trials, *finals])

    costs = forecast(final_sets=2)
    trial, final = costs["units"]

    assert (trial["kind"], trial["units"], trial["past_units"]) == ("trial", 3, 1), "one was resumed"
    assert (trial["estimate_s"], trial["peak_memory_bytes"]) == (pytest.approx(6.0), 7)
    assert (final["kind"], final["units"], final["estimate_s"]) == ("final", 4, pytest.approx(9.0))
    assert costs["estimate_s"] == pytest.approx(3 * 6 + 4 * 9)
    assert costs["peak_memory_bytes"] == 8
    assert costs["is_upper_bound"], "asha-tpe stops trials early"
    assert [str(table.title) for table in search_forecast_tables(costs)] == [
        "asha-tpe: dm on digits",
        "forecast",
    ]


def test_without_past_searches_a_trial_takes_what_distilling_and_scoring_took(search: Any) -> None:
    plan, scoring = search.plan, search.plan.config.evaluate
    network = scoring.epochs * 10 * multiply_adds(plan.arch, plan.dataset.image_shape)
    distilled = {"kind": "distill", "what": "dm", "which": "digits"}
    record_costs(distilled, [(row("distill", 2.0), plan.work)], "cpu")
    assert forecast()["units"][0]["estimate_s"] is None
    scored = {"kind": "evaluate", "what": "hard", "which": plan.arch}
    record_costs(scored, [(row("evaluate", 1.0), float(network))], "cpu")

    costs = forecast(final_sets=2)

    assert costs["units"][0]["estimate_s"] == pytest.approx(2.0 + min(scoring.seeds, scoring.val_seeds))
    assert costs["units"][1]["estimate_s"] == pytest.approx(2.0 + scoring.seeds)
    assert forecast(objective="nas-spearman")["units"][0]["estimate_s"] is None


def test_the_wall_time_counts_rounds_of_this_machines_workers(
    search: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_search_costs(search, [row("trial", 6.0), row("evaluate", 9.0)])
    monkeypatch.setattr("ddray.system.worker.cpu_count", lambda: 2)

    costs = forecast(final_sets=2)

    assert (costs["num_workers"], costs["estimate_wall_s"]) == (2, pytest.approx(2 * 6 + 2 * 9))
    assert forecast(max_concurrent=1)["estimate_wall_s"] == pytest.approx(3 * 6 + 6 * 9)
    elsewhere = forecast(address="auto")
    assert (elsewhere["num_workers"], elsewhere["estimate_wall_s"]) == (None, None)
    assert "2 units at a time" in printed(costs)
    assert "wall time" not in printed(elsewhere)


def test_features_are_counted_apart_from_the_networks_that_are_asked_for_too() -> None:
    sets = ("arch=convnet1_w8", "augment=none", "pool.num_models=2", "compile=off")
    costs = api.forecast_tune("dsdm", ipc=1, num_samples=1, sets=sets, gpus_per_trial=0)
    lines = [line for line in costs["units"] if line["kind"] == "pool"]
    assert [(line["units"], line["missing"]) for line in lines] == [(2, 2), (2, 2)]


def test_a_sets_cost_is_without_its_pools(tmp_path: Path) -> None:
    settings = {"arch": "convnet1_w8", "feature_epochs": 1, "compile": "off"}
    api.distill("kcenter", "digits", settings=settings, run_dir=tmp_path / "run")
    (line,) = map(json.loads, costs_file().read_text().splitlines())
    (entry,) = (
        json.loads(path.read_text())
        for path in (costs_file().parent / "pool").glob("*/entry.json")
        if json.loads(path.read_text())["spec"]["kind"] == "supervised"
    )
    assert (line["kind"], line["what"]) == ("distill", "kcenter")
    assert 0 <= line["wall_s"] < entry["wall_s"]


def test_networks_of_the_pool_are_counted_until_they_are_there() -> None:
    sets = ("arch=convnet1_w8", "feature_epochs=1", "compile=off")

    def pool_line(*further: str) -> Any:
        costs = api.forecast_tune("kcenter", ipc=1, num_samples=1, sets=(*sets, *further), gpus_per_trial=0)
        assert costs["pool_known"]
        return costs["units"][0]

    assert (pool_line()["kind"], pool_line()["missing"], pool_line()["estimate_s"]) == ("pool", 1, None)
    settings = {"arch": "convnet1_w8", "feature_epochs": 1, "compile": "off"}
    api.distill("kcenter", "digits", val_seed=0, settings=settings)  # trained without val, as in a search
    assert (pool_line()["units"], pool_line()["missing"]) == (1, 0)
    assert pool_line("feature_epochs=2")["missing"] == 1
    assert pool_line("feature_epochs=2")["estimate_s"] > 0, "from the pool's own entry"


def test_a_trial_that_was_stopped_early_counts_for_its_steps(search: Any) -> None:
    stopped = row("trial", 2.0, rungs={"1": 0.1, "3": 0.2}, stopped_early=True)
    record_search_costs(search, [stopped])
    (line,) = map(json.loads, costs_file().read_text().splitlines())
    assert line["amount"] == pytest.approx(search.plan.work * 3 / 9)
    estimate = History("cpu").estimate({"kind": "trial", "what": "dm", "which": "digits"}, search.plan.work)
    assert estimate.wall_s == pytest.approx(6.0)


def test_a_trial_that_ranks_architectures_says_nothing_of_others(search: Any) -> None:
    search.options = TuneOptions(objective="nas-spearman")
    record_search_costs(search, [row("trial", 2.0)])
    assert forecast()["units"][0]["estimate_s"] is None
    assert forecast(objective="nas-spearman")["units"][0]["estimate_s"] == pytest.approx(2.0)


def test_what_is_done_is_not_missing(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", {"device": "cpu"}, command="tune", resume=False)
    for number in range(2):
        unit = Unit(kind="trial", spec={"number": number})
        run.ledger.publish(unit, Row.done(unit, {}, 1.0), epoch=run.epoch)
    costs = forecast(run_dir=tmp_path / "run")
    assert [line["missing"] for line in costs["units"]] == [1, 6]


def test_bad_input_is_refused_as_by_the_search_itself(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        forecast(space=tmp_path / "none.yaml")
