"""Dry runs: the graph, what is missing and what it will cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ddray.data import open_dataset
from ddray.errors import InputError
from ddray.nets import multiply_adds
from ddray.runs.costs import History, costs_file, wall_seconds
from ddray.runs.ledger import Ledger
from ddray.tables.cost import estimate_of, summarise
from ddray.tables.dry_run import dry_run
from ddray.tables.graph import build_graph
from ddray.tables.options import BenchOptions
from tests.tables.benches import LOCAL, TINY, run, spec


def test_the_graph_is_listed_with_what_it_needs_and_nothing_is_made(tmp_path: Path) -> None:
    result = dry_run(spec(methods=["random", "kcenter"]), LOCAL, run_dir=tmp_path / "none")
    kinds = [unit["kind"] for unit in result["units"]]
    assert (kinds.count("pool"), kinds.count("distill"), kinds.count("evaluate")) == (2, 4, 8)
    assert result["num_missing"] == result["num_units"] == 14
    assert result["estimate_s"] is None
    pool = {"kind": "pool", "what": "features", "which": "convnet1_w8 on digits", "device": "cpu"}
    costs_file().parent.mkdir(parents=True, exist_ok=True)
    costs_file().write_text(json.dumps({**pool, "amount": 0.0, "wall_s": 4.0}) + "\n")
    priced = dry_run(spec(methods=["random", "kcenter"]), LOCAL, run_dir=tmp_path / "none")
    assert priced["estimate_s"] == 8.0, "two networks with their features, four seconds each"
    titles = {unit["unit"] for unit in result["units"]}
    assert all(set(unit["needs"]) <= titles for unit in result["units"])
    assert not list(tmp_path.iterdir()) or not (tmp_path / "none").exists()
    groups = summarise(result["units"])
    assert sum(group["units"] for group in groups) == 14


def test_a_datasets_facts_are_enough() -> None:
    result = dry_run(spec(dataset=["imagenet"], methods=["random"]), LOCAL, run_dir=None)
    assert result["num_units"] == 2 + 4
    with pytest.raises(InputError, match="nowhere"):
        dry_run(spec(dataset=["nowhere"]), LOCAL, run_dir=None)


def test_units_of_about_the_same_size_are_asked_first() -> None:
    graph = build_graph(spec(seeds=1), open_dataset)
    unit = next(iter(graph.evaluate.values()))
    past_unit = {"kind": "evaluate", "what": "hard", "which": unit.identity.spec["arch"], "device": "cpu"}
    small = [{**past_unit, "amount": unit.amount / 1000, "wall_s": 2.0} for _ in range(40)]
    costs_file().parent.mkdir(parents=True, exist_ok=True)
    costs_file().write_text("".join(json.dumps(line) + "\n" for line in small))
    guess = estimate_of(History("cpu"), unit)
    assert guess.wall_s == pytest.approx(2000.0)
    assert guess.is_from_smaller, "an upper bound: the start of each was counted as work"
    assert dry_run(spec(seeds=1), LOCAL, run_dir=None)["num_from_smaller"] > 0
    alike = [{**past_unit, "amount": unit.amount * 1.1, "wall_s": 5.5} for _ in range(15)]
    with costs_file().open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in alike))
    guess = estimate_of(History("cpu"), unit)
    assert guess.wall_s == pytest.approx(5.0)
    assert not guess.is_from_smaller


def test_estimates_come_from_past_units(tmp_path: Path) -> None:
    run(tmp_path / "run", spec(seeds=1))
    rows = Ledger(tmp_path / "run").rows()
    assert len(costs_file().read_text().splitlines()) == len(rows) == 6
    result = dry_run(spec(seeds=3), LOCAL, run_dir=None)
    assert result["num_without_estimate"] == 0
    assert result["estimate_s"] == pytest.approx(3 * sum(row.wall_s for row in rows), rel=1e-6)
    assert dry_run(spec(), BenchOptions(gpus_per_unit=1), run_dir=None)["estimate_s"] is None
    again = dry_run(spec(seeds=1), LOCAL, run_dir=tmp_path / "run")
    assert (again["num_missing"], again["estimate_s"]) == (0, 0.0)
    assert {unit["status"] for unit in again["units"]} == {"done"}


def test_the_work_counts_images_and_multiply_adds() -> None:
    graph = build_graph(spec(methods=["dm"], seeds=1), open_dataset)
    (distil_unit,), scored = graph.distil.values(), list(graph.evaluate.values())
    shape = open_dataset("digits").image_shape
    # Grey images are padded by 3: a convolution on 20 x 20, and a classifier on what pooling leaves.
    assert multiply_adds("convnet1_w8", shape) == 9 * 8 * 20 * 20 + 8 * 10 * 10
    plan = graph.plans[distil_unit.key]
    images = 10 * (plan.config.method.dump()["batch_real"] + 1)
    assert distil_unit.amount == (1 + plan.config.steps) * images * multiply_adds("convnet1_w8", shape)
    for unit in scored:
        arch = unit.identity.spec["arch"]
        assert unit.amount == 2 * 1 * 10 * multiply_adds(arch, shape), "networks, epochs, images"


def test_the_work_of_the_default_network_is_counted() -> None:
    (unit,) = build_graph(spec(methods=["dm"], set={}, seeds=1), open_dataset).distil.values()
    assert unit.amount % multiply_adds("convnet3", open_dataset("digits").image_shape) == 0


def test_the_work_of_a_budget_counts_no_classes() -> None:
    bench_spec = spec(
        methods=[{"name": "krr_st", "steps": 3}], ipc=(), budget=40, evaluate={"protocol": "linear"}
    )
    for unit in build_graph(bench_spec, open_dataset).distil.values():
        one = multiply_adds("convnet1_w8", open_dataset("digits").image_shape)
        assert unit.amount == (1 + 3) * (40 + unit.config["method"]["batch_real"]) * one


def test_an_estimate_scales_with_the_work() -> None:
    costs_file().parent.mkdir(parents=True)
    graph = build_graph(spec(seeds=1), open_dataset)
    unit = next(unit for unit in graph.distil.values() if unit.method == "dm")
    line = {"kind": "distill", "what": "dm", "which": "digits", "device": "cpu"}
    costs_file().write_text(
        "\n".join(json.dumps({**line, "amount": unit.amount * k, "wall_s": 3.0 * k}) for k in (1, 2, 9))
        + '\n{"torn'
    )
    assert estimate_of(History("cpu"), unit).wall_s == pytest.approx(3.0)
    assert estimate_of(History("cpu"), unit).units == 3
    assert estimate_of(History("cuda"), unit).wall_s is None
    other = next(unit for unit in graph.distil.values() if unit.method != "dm")
    assert estimate_of(History("cpu"), other).wall_s is None, "one method's rate is not another's"


def test_networks_in_the_pool_are_done_and_say_what_others_take(tmp_path: Path) -> None:
    bench_spec = spec(methods=["kcenter"], seeds=1)
    run(tmp_path / "run", bench_spec)
    costs_file().unlink()
    entries = map(
        json.loads, (path.read_text() for path in (costs_file().parent / "pool").glob("*/entry.json"))
    )
    took = {entry["spec"]["kind"]: entry["wall_s"] for entry in entries}

    again = dry_run(bench_spec, LOCAL, run_dir=None)
    other_seeds = dry_run(spec(methods=["kcenter"], seeds=3), LOCAL, run_dir=None)

    assert [unit["status"] for unit in again["units"]] == ["done", "missing", "missing", "missing"]
    networks = [unit for unit in other_seeds["units"] if unit["kind"] == "pool"]
    assert [unit["status"] for unit in networks] == ["done", "missing", "missing"]
    assert networks[1]["estimate_s"] == pytest.approx(took["supervised"] + took["features"])
    longer = spec(methods=["kcenter"], seeds=1, set={**TINY["set"], "method.feature_epochs": 9})
    line = dry_run(longer, LOCAL, run_dir=None)["units"][0]
    assert line["status"] == "missing", "of another recipe"
    expected = took["supervised"] * 9 / 20 + took["features"]  # by the epoch; 20 are the default
    assert line["estimate_s"] == pytest.approx(expected)


def test_the_wall_time_is_that_of_this_machines_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddray.system.worker.cpu_count", lambda: 4)
    options = {"gpus_per_unit": 0}

    def num_workers(**changes: object) -> int | None:
        parsed = BenchOptions.parse({**options, **changes})
        return dry_run(spec(seeds=1), parsed, run_dir=None)["num_workers"]

    assert num_workers() == 4
    assert num_workers(cpus_per_unit=3) == 1
    assert num_workers(cpus_per_unit=0.5, max_concurrent=6) == 6
    assert num_workers(address="auto") is None
    assert num_workers(executor="local") == 1
    assert dry_run(spec(seeds=1), LOCAL, run_dir=None)["estimate_wall_s"] is None, "nothing was run here"


def test_units_wait_for_what_they_need_and_sweeps_take_all_workers() -> None:
    def line(unit: str, seconds: float | None, *needs: str, kind: str = "distill") -> dict[str, object]:
        return {"unit": unit, "kind": kind, "estimate_s": seconds, "needs": list(needs)}

    sets = [line("a", 3.0), line("b", 1.0), line("c", 1.0, "a")]
    assert wall_seconds(sets, 1) == 5.0
    assert wall_seconds(sets, 2) == 4.0, "c waits for a"
    assert wall_seconds([*sets, line("d", 6.0, "b", kind="nas"), line("e", 1.0)], 2) == 8.0
    assert wall_seconds([line("a", None)], 2) is None
    assert wall_seconds([], 2) == 0.0
