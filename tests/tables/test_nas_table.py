"""Sets of a bench that rank architectures."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ddray.artifact.reading import load
from ddray.commands.display import bench_tables
from ddray.data import open_dataset
from ddray.errors import DdrayError, InputError
from ddray.methods import get_method
from ddray.ranking import sweep as nas_sweep
from ddray.ranking.spaces import get_space
from ddray.runs.costs import costs_file
from ddray.runs.ledger import Ledger
from ddray.tables import nas_table
from ddray.tables.cost import summarise
from ddray.tables.dry_run import _facts, dry_run
from ddray.tables.graph import build_graph
from ddray.tables.nas_table import cell_of, resolve_sweeps
from ddray.tables.options import BenchOptions
from ddray.tables.result import BenchResult
from ddray.tables.spec import PublishedSource, read_spec
from tests.tables.benches import LOCAL, repeatable, run, spec, table_cell

ROOT = Path(__file__).resolve().parents[2]

NAS: dict[str, Any] = {
    "evaluate": {
        "protocol": "nas",
        "options": {"sample": 2, "max_mflops": 3, "epochs": 1, "baselines": ["early-stopping"]},
    },
    "seeds": 1,
}


def test_sets_rank_architectures_in_a_run_of_their_own(tmp_path: Path) -> None:
    bench_spec = spec(**NAS)
    result = run(tmp_path / "run", bench_spec)
    assert [(cell["method"], cell["arch"], cell["protocol"]) for cell in result["cells"]] == [
        ("random", "convnet720", "nas"),
        ("dm", "convnet720", "nas"),
        ("early-stopping (1 steps)", "convnet720", "nas"),
    ]
    assert {cell["num_archs"] for cell in result["cells"]} == {2}
    (sweep,) = [path for path in (tmp_path / "run" / "nas").iterdir() if (path / "ledger").is_dir()]
    proxies = {row.spec.get("proxy") for row in Ledger(sweep).rows("nas")}
    assert len(Ledger(sweep).rows("nas")) == 3 * 2, f"two sets and early stopping: {proxies}"
    for row in Ledger(tmp_path / "run").rows("distill"):
        distilled = load(tmp_path / "run" / row.result["artifact"])
        assert distilled.meta.split == row.spec["split"] == "train-val0", (
            "val is what the ranking is scored on"
        )
    for cell in result["cells"]:
        assert {"spearman", "spearman_top20", "kendall"} <= cell.keys()
        assert 0 <= cell["accuracy_mean"] <= 1
    before = {path: path.stat().st_mtime_ns for path in sweep.glob("ledger/*.json")}
    assert run(tmp_path / "run", bench_spec, resume=True)["cells"] == result["cells"]
    assert {path: path.stat().st_mtime_ns for path in sweep.glob("ledger/*.json")} == before


def test_a_set_that_is_gone_is_distilled_again_and_its_sweep_goes_on(tmp_path: Path) -> None:
    bench_spec = spec(**NAS)
    result = run(tmp_path / "run", bench_spec)
    for row in Ledger(tmp_path / "run").rows("distill"):
        (tmp_path / "run" / row.result["artifact"]).unlink()
    again = run(tmp_path / "run", bench_spec, resume=True)
    assert repeatable(again) == repeatable(result)
    rows = Ledger(tmp_path / "run").rows("distill")
    assert rows
    assert all((tmp_path / "run" / row.result["artifact"]).is_file() for row in rows)


def test_a_set_that_failed_joins_the_sweep_when_the_bench_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench_spec = spec(**NAS)
    with monkeypatch.context() as patch:
        patch.setattr(get_method("dm"), "step", lambda self: 1 / 0)
        result = run(tmp_path / "run", bench_spec)
    assert [cell["method"] for cell in result["cells"]] == ["random", "early-stopping (1 steps)"]
    again = run(tmp_path / "run", bench_spec, resume=True, retry_failed=True)
    assert [cell["method"] for cell in again["cells"]] == ["random", "dm", "early-stopping (1 steps)"]
    assert again["failures"] == []
    assert [again["cells"][0], again["cells"][2]] == result["cells"]


def test_architectures_that_crash_are_listed_and_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench_spec = spec(**NAS)
    real = nas_sweep.run_task

    def broken(job: Any, data: Any, task: Any, *args: Any) -> Any:
        if task.units[0].spec.get("proxy") == "dm-0.pt":
            raise RuntimeError("a worker died")
        return real(job, data, task, *args)

    with monkeypatch.context() as patch:
        patch.setattr(nas_sweep, "run_task", broken)
        result = run(tmp_path / "run", bench_spec)
    assert [failure["kind"] for failure in result["failures"]] == ["nas", "nas"]
    assert all("on dm-0.pt" in failure["unit"] for failure in result["failures"])
    assert {cell["method"]: cell["num_archs"] for cell in result["cells"]}["dm"] == 0
    again = run(tmp_path / "run", bench_spec, resume=True, retry_failed=True)
    assert again["num_failed"] == 0
    assert {cell["num_archs"] for cell in again["cells"]} == {2}


def test_rows_whose_labels_make_one_file_name_are_told_apart(tmp_path: Path) -> None:
    rows = [{"name": "random", "label": "a+b"}, {"name": "class_mean", "label": "a b"}]
    result = run(tmp_path / "run", spec(**{**NAS, "methods": rows, "set": {}}))
    assert [cell["method"] for cell in result["cells"]][:2] == ["a+b", "a b"]
    assert result["failures"] == []


def test_early_stopping_finds_its_published_number() -> None:
    sweep = sweep_of("datadam_table4")
    figures = {"top1_truth_accuracy": 0.95, "top1_test_accuracy": 0.9, "spearman": 0.6, "spearman_top20": 0.6}
    figures |= {"wall_s": 90.0, "storage_images": 50_000, "num_archs": 720}
    cell = cell_of(sweep.baseline("early-stopping (150 steps)"), [figures])
    assert cell["published"]["accuracy_mean"] == pytest.approx(0.889)
    assert cell["published_spearman_top20"] == pytest.approx(0.64)
    assert (cell["search_time"], cell["published_search_time"]) == (1.5, 37.1), "minutes"
    assert (cell["storage_images"], cell["published_storage_images"]) == (50_000, 50_000)
    cell = cell_of(sweep.baseline("whole"), [figures])
    assert (cell["published"]["accuracy_mean"], cell["published_search_time"]) == (0.892, 5168.9)


def test_a_baseline_has_nothing_of_how_the_first_set_was_distilled() -> None:
    of_set = {"cut": "steps 3 of 20,000", "overridden": ("method.lr",), "num_images": 7, "generator": "dit"}
    of_set |= {"distilled_in": "convnet3", "distilled_with": "resnet18", "changes": ("steps",)}
    sweep = sweep_of("datadam_table4")
    first, *others = sweep.spec.cells
    cells = (first.model_copy(update={**of_set, "settings": "sample=9"}), *others)
    sweep = replace(sweep, spec=replace(sweep.spec, cells=cells))

    baseline = sweep.baseline("random")
    assert {name for name in of_set if getattr(baseline, name) == of_set[name]} == set()
    assert (baseline.settings, baseline.size, baseline.target) == ("sample=9", first.size, "cifar10")
    scored = cell_of(baseline, [{"top1_truth_accuracy": 0.5, "num_archs": 9}])
    assert {"cut", "overridden", "generator"} & scored.keys() == set()


@pytest.mark.parametrize("name", ["epochs", "seeds", "archs", "teacher"])
def test_what_only_other_protocols_take_is_refused(name: str) -> None:
    bench_spec = spec(evaluate={"protocol": "nas", name: ["vgg11"] if name in ("archs", "teacher") else 3})
    with pytest.raises(InputError, match=f"evaluate.{name} must be left out with protocol nas"):
        build_graph(bench_spec, open_dataset)


def test_a_sweep_that_fails_is_listed_and_the_rest_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise DdrayError("no architecture finished on dm-0.pt: out of memory")

    monkeypatch.setattr(nas_table, "run_nas", broken)
    bench_spec = spec(
        seeds=1, evaluate=[{"epochs": 1, "seeds": 1, "archs": ["convnet1_w8"]}, NAS["evaluate"]]
    )
    result = run(tmp_path / "run", bench_spec)
    assert [cell["method"] for cell in result["cells"]] == ["random", "dm"]
    (failure,) = result["failures"]
    assert (failure["kind"], failure["unit"]) == ("nas", "nas sweep of convnet720: digits ipc 1")
    assert "no architecture finished" in failure["reason"]
    for name in ("results.csv", "table.csv", "cells.json"):
        assert (tmp_path / "run" / name).is_file()


def test_a_dry_run_prices_sweeps_from_past_ones(tmp_path: Path) -> None:
    bench_spec = spec(**NAS)
    unknown = dry_run(bench_spec, LOCAL, run_dir=None)
    (sweep,) = [unit for unit in unknown["units"] if unit["kind"] == "nas"]
    assert sweep["estimate_s"] is None
    assert len(sweep["needs"]) == 2
    run(tmp_path / "run", bench_spec)
    (sweep,) = [unit for unit in dry_run(bench_spec, LOCAL, run_dir=None)["units"] if unit["kind"] == "nas"]
    lines = [json.loads(line) for line in costs_file().read_text().splitlines()]
    times = [line["wall_s"] for line in lines if line["kind"] == "nas"]
    assert sweep["past_units"] == len(times) > 0
    # two architectures on two sets and on the baseline, and their truth
    assert sweep["estimate_s"] == pytest.approx(statistics.median(times) * 2 * (2 + 1 + 1))
    assert "nas sweep of convnet720" in str(summarise([sweep]))
    assert (sweep["status"], sweep["num_trainings"], sweep["num_trainings_left"]) == ("missing", 8, 8)
    (sweep,) = [
        u for u in dry_run(bench_spec, LOCAL, run_dir=tmp_path / "run")["units"] if u["kind"] == "nas"
    ]
    assert (sweep["status"], sweep["num_trainings_left"]) == ("done", 0)
    ledger = next((tmp_path / "run" / "nas").glob("digits-*/ledger"))
    min(ledger.glob("*.json")).unlink()
    (sweep,) = [
        u for u in dry_run(bench_spec, LOCAL, run_dir=tmp_path / "run")["units"] if u["kind"] == "nas"
    ]
    assert (sweep["status"], sweep["num_trainings_left"]) == ("missing", 1)
    assert sweep["estimate_s"] == pytest.approx(statistics.median(times))


def test_people_see_correlations_and_rows_without_an_architecture() -> None:
    shared = {"dataset": "cifar10", "ipc": 50, "protocol": "nas", "arch": "convnet720", "num_sets": 1}
    shared |= {"n": 1, "accuracy_std": None}
    cells = [
        {**shared, "method": "dm", "accuracy_mean": 0.9, "spearman": 0.512, "storage_images": 50_000.0},
        {**shared, "method": "dc", "accuracy_mean": None, "spearman": None, "published_spearman": -0.19},
    ]
    facts = {"failures": [], "skipped": [], "num_failed": 0, "wall_s": 1.0, "run_dir": "r"}
    table = bench_tables(BenchResult.parse({"name": "mini", "cells": cells, **facts}))[0]
    columns = {str(column.header): list(column.cells) for column in table.columns}
    assert columns["accuracy %"] == ["90.00", "-"]
    assert (columns["Spearman"], columns["published Spearman"]) == (["0.512", "-"], ["-", "-0.19"])
    assert columns["images"] == ["50,000", "-"]


def test_a_sweep_is_priced_without_architectures_above_its_limit() -> None:
    bench_spec = spec(evaluate={"protocol": "nas", "options": {"max_mflops": 2}}, seeds=1)
    (sweep,) = dry_run(bench_spec, LOCAL, run_dir=None)["units"][-1:]
    assert sweep["kind"] == "nas"
    (ranked,) = resolve_sweeps(build_graph(bench_spec, open_dataset), bench_spec, LOCAL, open_dataset)
    digits, space = open_dataset("digits"), get_space("convnet720")
    within = sum(space.cost(i, digits.image_shape, digits.num_classes) <= 2 for i in range(len(space)))
    assert 0 < within < len(space)
    assert ranked.num_trainings(digits) == within * (2 + 1), "on two sets, and the truth"


def test_a_bad_option_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    bad = {"evaluate": {"protocol": "nas", "options": {"sampel": 2}}}
    with pytest.raises(InputError, match="did you mean 'sample'"):
        run(tmp_path / "run", spec(**bad))
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="did you mean 'sample'"):
        dry_run(spec(**bad), LOCAL, run_dir=None)


def test_published_correlations_stand_beside_ours() -> None:
    cell = table_cell(
        size=("ipc", 50),
        protocol="nas",
        arch="convnet720",
        source=PublishedSource(paper="datadam", table="Table 4"),
    )
    figures = [
        {
            "top1_truth_accuracy": 0.5,
            "top1_test_accuracy": value,
            "spearman": rho,
            "spearman_top20": None,
            "kendall": rho,
            "num_archs": 720,
        }
        for value, rho in ((0.90, 0.5), (0.88, 0.7))
    ]
    result = cell_of(cell, figures)
    assert result["accuracy_mean"] == pytest.approx(0.89)
    assert result["spearman"] == pytest.approx(0.6)
    assert (result["spearman_top20"], result["published_spearman_top20"]) == (None, 0.69)
    assert result["published"]["accuracy_mean"] == pytest.approx(0.89)
    assert result["published"]["difference_se"] is None, "printed without a deviation"
    assert (result["top1_truth_accuracy"], result["top1_test_accuracy"]) == (0.5, pytest.approx(0.89))

    for one in figures:
        del one["top1_test_accuracy"]
    untested = cell_of(cell, figures)
    assert untested["accuracy_mean"] == 0.5
    assert untested["differs"] == ["the truth has no test accuracies"]
    assert untested["published"]["difference"] is None, "the papers' is on test"


def sweep_of(table: str, scale: str = "paper", **changes: Any) -> nas_table.NasSweep:
    """The sweep of a shipped file, with other options of `ddray nas`."""
    bench_spec = read_spec(ROOT / "configs" / "bench" / f"{table}.yaml", scale)
    facts = _facts("cifar10" if scale == "paper" else "digits", None)
    facts.__dict__["fingerprint"] = "unread"
    (sweep,) = resolve_sweeps(
        build_graph(bench_spec, lambda name: facts), bench_spec, BenchOptions(), lambda name: facts
    )
    return nas_table.NasSweep(sweep.spec, sweep.options.model_copy(update=changes))


TABLE_5 = {"random": (-0.06, 0.919), "dc": (-0.19, 0.8644), "dsa": (-0.37, 0.7354), "dm": (-0.37, 0.9216)}


def test_table_5_stands_beside_the_papers_correlations_and_top_1() -> None:
    sweep = sweep_of("datadam_table5")
    assert sweep.differs == ()
    figures = {"top1_truth_accuracy": 0.9, "top1_test_accuracy": 0.9, "spearman": 0.1, "num_archs": 100}
    cells = [cell_of(cell, [figures]) for cell in [*sweep.cells, sweep.baseline("whole")]]
    printed = {
        cell["method"]: (cell["published_spearman"], pytest.approx(cell["published"]["accuracy_mean"]))
        for cell in cells
        if cell["method"] != "kip"
    }
    later = {"mtt": (-0.09, 0.7354), "datadam": (0.07, 0.9396)}
    assert printed == {**TABLE_5, **later, "whole": (0.7487, 0.935)}


def test_a_cheaper_kernel_of_kip_is_not_set_beside_the_papers() -> None:
    (cell,) = (cell for cell in sweep_of("datadam_table5").cells if cell.method == "kip")
    figures = {"top1_truth_accuracy": 0.9, "top1_test_accuracy": 0.9, "spearman": 0.1, "num_archs": 100}
    assert not [name for name in cell_of(cell, [figures]) if name.startswith("published_")]


@pytest.mark.parametrize(
    ("table", "changes", "differs"),
    [
        ("datadam_table5", {"sampling": "cost"}, ["sampling cost, theirs uniform"]),
        ("datadam_table5", {"val_images": None}, ["val_images unset, theirs 10000"]),
        ("datadam_table5", {"seeds": 1, "sample": 12}, ["sample 12, theirs 100", "seeds 1, theirs 5"]),
        (
            "datadam_table5",
            {"truth": "whole", "epochs": 3},
            ["epochs 3, theirs unset", "truth whole, theirs table"],
        ),
        ("datadam_table4", {"sample": 36}, ["sample 36, theirs unset"]),
        ("datadam_table4", {"max_mflops": 5.0}, ["max_mflops 5.0, theirs unset"]),
    ],
)
def test_another_sweep_than_the_papers_says_in_what_it_differs(
    table: str, changes: dict[str, Any], differs: list[str]
) -> None:
    sweep = sweep_of(table, **changes)
    assert list(sweep.differs) == differs
    figures = {"top1_truth_accuracy": 0.9, "top1_test_accuracy": 0.9, "spearman": 0.1, "num_archs": 100}
    cell = cell_of(sweep.cells[0], [figures])
    assert cell["differs"] == differs
    assert not [name for name in cell if name.startswith("published_")]
    assert cell["published"]["difference"] is None


def test_sets_leave_out_what_the_sweep_ranks_by() -> None:
    table5 = read_spec(ROOT / "configs" / "bench" / "datadam_table5.yaml")
    assert str(table5.split) == "train-val0-10000"
    assert str(spec(**NAS).split) == "train-val0"
    assert str(spec().split) == "train"
    other = {**NAS["evaluate"], "options": {**NAS["evaluate"]["options"], "val_images": 200}}
    bench_spec = spec(evaluate=other)
    units = build_graph(bench_spec, open_dataset).distil.values()
    assert {(unit.identity.spec["split"], str(unit.split)) for unit in units} == {("train-val0-200",) * 2}
    with pytest.raises(InputError, match=r"must have the same val_images, .* got None, 200"):
        build_graph(spec(evaluate=[NAS["evaluate"], other]), open_dataset)
