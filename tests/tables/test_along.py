"""Accuracies along the steps as units of a bench, what distilling took, and rows trained on everything."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ddray.artifact.reading import load
from ddray.data import Dataset, open_dataset
from ddray.evaluation.options import EvaluateOptions
from ddray.jobs.score import evaluate
from ddray.pool.files import PoolFiles
from ddray.runs.ledger import Ledger, Row
from ddray.system.files import home
from ddray.tables import worker as bench_worker
from ddray.tables.dry_run import dry_run
from ddray.tables.graph import build_graph
from ddray.tables.table import cells_of
from ddray.tables.units import Cell
from tests.tables.benches import LOCAL, cut_after, nas_of, run, spec, starts

KEY = "e4c197189bf73a45cbb179a9e094832da4b72a84db0dd095ec8ccf078700983e"
DM: dict[str, Any] = {"name": "dm", "steps": 5, "set": {"method.batch_real": 4, "evaluate.every": 2}}
ALONG: dict[str, Any] = {"methods": [DM], "evaluate": {"archs": ["convnet1_w8"], "epochs": 1, "seeds": 1}}


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def snapshot_bytes(folder: Path) -> dict[str, bytes]:
    """Return the content of the sets along the steps, by set and step."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob("artifacts/*-steps/*.pt"))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A bench of two sets, each scored at steps 2, 4 and 5."""
    folder = tmp_path_factory.mktemp("along") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDRAY_HOME", str(folder.parent / "home"))
        return folder, run(folder, spec(**ALONG))


def test_a_cell_has_a_point_per_kept_step_and_the_last(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, result = finished
    (cell,) = result["cells"]
    assert [point["step"] for point in cell["along"]] == [2, 4, 5]
    assert cell["along"][-1] == {
        "step": 5,
        **{name: cell[name] for name in ("accuracy_mean", "accuracy_std", "n")},
    }
    ledger = Ledger(folder)
    for point in cell["along"][:-1]:
        values = []
        for row in ledger.rows("distill"):
            path = folder / bench_worker.artifact_name(row.key, point["step"])
            scored = [r for r in ledger.rows("evaluate") if r.spec.get("step") == point["step"]]
            (seed,) = {r.spec["options"]["seed"] for r in scored if r.spec["seed"] == row.spec["seed"]}
            options = EvaluateOptions(archs=("convnet1_w8",), epochs=1, seeds=1, seed=seed)
            values += evaluate(path, options, device=torch.device("cpu")).results[0].per_seed
        assert point["accuracy_mean"] == pytest.approx(sum(values) / 2, abs=1e-12)
        assert point["n"] == 2
    assert [line["step"] for line in lines(folder / "along.csv")] == ["2", "4", "5"]
    assert (folder / "along.png").stat().st_size > 1000
    assert not list((folder / "checkpoints").iterdir())


def test_the_kept_sets_are_those_of_the_steps(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    for row in Ledger(folder).rows("distill"):
        assert sorted(row.result["snapshots"]) == ["2", "4"]
        images = [load(folder / bench_worker.artifact_name(row.key, step)).images for step in (2, 4, None)]
        assert not torch.equal(images[0], images[1])
        assert not torch.equal(images[1], images[2])


def test_the_row_the_cell_and_its_files_say_what_a_set_took(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, result = finished
    (cell,) = result["cells"]
    rows = Ledger(folder).rows("distill")
    for name in ("seconds", "seconds_with_pool", "peak_memory_bytes", "storage_floats"):
        assert cell[name] == pytest.approx(sum(row.result[name] for row in rows) / 2), name
    assert cell["peak_memory_bytes"] > 1e6
    assert cell["seconds_with_pool"] >= cell["seconds"] > 0
    assert cell["storage_floats"] == 10 * 256
    (costs,) = lines(folder / "costs.csv")
    assert float(costs["seconds"]) == cell["seconds"]
    (line,) = lines(folder / "table.csv")
    assert not {"seconds", "peak_memory_bytes", "along"} & line.keys(), "the same bytes in every run"


def test_a_bench_cut_off_anywhere_keeps_the_same_sets(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    whole, result = finished
    for stop in (0, 1, 3):
        folder = tmp_path / f"cut{stop}"
        with cut_after(stop):
            run(folder, spec(**ALONG))
        again = run(folder, spec(**ALONG), resume=True)
        assert snapshot_bytes(folder) == snapshot_bytes(whole)
        assert again["cells"][0]["along"] == result["cells"][0]["along"]
        assert (folder / "table.csv").read_bytes() == (whole / "table.csv").read_bytes()
    assert set(starts(whole).values()) == {1}


def test_a_damaged_kept_set_that_is_still_needed_is_made_again(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, bench_spec = tmp_path / "run", spec(**{**ALONG, "seeds": 1})
    run(folder, bench_spec)
    before = snapshot_bytes(folder)
    ledger = Ledger(folder)
    (row,) = [row for row in ledger.rows("evaluate") if row.spec.get("step") == 4]
    (folder / "ledger" / f"{row.key}.json").unlink()
    (source,) = ledger.rows("distill")
    (folder / bench_worker.artifact_name(source.key, 4)).write_bytes(b"torn")

    result = run(folder, bench_spec, resume=True)

    assert "it is distilled again" in caplog.text
    assert snapshot_bytes(folder) == before
    assert [point["step"] for point in result["cells"][0]["along"]] == [2, 4, 5]
    assert starts(folder)[source.key] == 2


def test_a_scale_keeps_the_number_of_points() -> None:
    long = {**DM, "steps": 1000, "set": {**DM["set"], "evaluate.every": 250}}
    graph = build_graph(spec(methods=[long], limits={"steps": 40}), open_dataset)
    assert [step for step, _ in graph.cells[0].along] == [10, 20, 30, 40]


def test_without_an_interval_units_have_the_keys_they_had() -> None:
    plain = spec(methods=[{**DM, "set": {"method.batch_real": 4}}], seeds=1)
    unset = build_graph(plain, open_dataset)
    (unit,) = unset.distil.values()
    assert "every" not in unit.identity.spec["config"]["evaluate"]
    assert unset.cells[0].along == ()
    assert unit.key == KEY, "that of commit b0a1261, which had no interval"
    along = build_graph(spec(methods=[DM], seeds=1), open_dataset)
    assert along.distil.keys() != unset.distil.keys()


def test_a_selection_has_one_point() -> None:
    bench_spec = spec(methods=["random"], seeds=1, set={"arch": "convnet1_w8", "evaluate.every": 10})
    assert [[step for step, _ in cell.along] for cell in build_graph(bench_spec, open_dataset).cells] == [
        [0],
        [0],
    ]


def test_seconds_with_the_pool_count_its_training_in_every_bench(tmp_path: Path) -> None:
    """Also where another bench had trained its networks."""
    scored = {"archs": ["convnet1_w8"], "epochs": 1, "seeds": 1}
    row = {"name": "herding", "set": {"method.feature_epochs": 1}}
    for folder in (tmp_path / "first", tmp_path / "second"):
        run(folder, spec(methods=[row], seeds=1, evaluate=scored))
        (distilled,) = Ledger(folder).rows("distill")
        (key,) = distilled.result["pool"]
        entry = PoolFiles(home() / "pool").describe(key)
        network = PoolFiles(home() / "pool").describe(*entry["spec"]["parents"])
        difference = distilled.result["seconds_with_pool"] - distilled.result["seconds"]
        assert difference == pytest.approx(entry["wall_s"] + network["wall_s"])
    assert Ledger(tmp_path / "second").rows("pool") == []


def test_costs_that_some_set_lacks_are_no_mean() -> None:
    """Sets of runs of before it was measured."""
    cell = Cell(
        method="dm",
        name="dm",
        dataset="digits",
        num_classes=10,
        size=("ipc", 1),
        protocol="hard",
        arch="a",
        target="digits",
        keys=("e",),
        sets=("one", "two"),
    )

    def row(key: str, result: dict[str, Any]) -> Row:
        return Row(key=key, kind="distill", spec={}, status="done", result=result, wall_s=1.0)

    rows = {
        "e": row("e", {"per_seed": [0.5]}),
        "one": row("one", {"storage_floats": 4, "seconds": 2.0, "peak_memory_bytes": 10}),
        "two": row("two", {"storage_floats": 6}),
    }
    (scored,) = cells_of([cell], rows.get)
    assert scored["storage_floats"] == 5.0
    assert "seconds" not in scored


class TestWhole:
    rows = ("random", "whole")

    def test_networks_are_trained_on_all_real_images(self, tmp_path: Path) -> None:
        result = run(tmp_path / "run", spec(methods=self.rows, ipc=[1, 2], seeds=2))

        ledger = Ledger(tmp_path / "run")
        whole = [cell for cell in result["cells"] if cell["method"] == "whole"]
        assert [cell["arch"] for cell in whole] == ["convnet1_w8", "convnet1_w8_bn"], "one per network"
        assert all("ipc" not in cell and "seconds" not in cell and cell["n"] == 4 for cell in whole)
        assert {row.spec["method"] for row in ledger.rows("distill")} == {"random"}
        trained = [row for row in ledger.rows("evaluate") if row.spec["method"] == "whole"]
        num = len(open_dataset("digits").train())
        assert [row.result["num_images"] for row in trained] == [num] * 4
        best = max(cell["accuracy_mean"] for cell in result["cells"] if cell["method"] == "random")
        assert min(cell["accuracy_mean"] for cell in whole) > best
        assert [line["method"] for line in lines(tmp_path / "run" / "table.csv")].count("whole") == 2
        table = (tmp_path / "run" / "table.csv").read_bytes()
        run(tmp_path / "run", spec(methods=self.rows, ipc=[1, 2], seeds=2), resume=True)
        assert (tmp_path / "run" / "table.csv").read_bytes() == table
        assert set(starts(tmp_path / "run").values()) == {1}

    def test_it_is_trained_by_the_protocol_as_a_set_of_them_is(self, tmp_path: Path) -> None:
        """An independent derivation: a saved set of all real images, scored by `evaluate`."""
        scored = {"archs": ["convnet1_w8"], "epochs": 1, "seeds": 1}
        bench_spec = spec(methods=["whole"], seeds=1, evaluate=scored)
        result = run(tmp_path / "run", bench_spec)
        (row,) = Ledger(tmp_path / "run").rows("evaluate")

        dataset: Dataset = open_dataset("digits")
        from ddray.jobs.context import make_context
        from ddray.jobs.plan import resolve

        layers = [{"arch": "convnet1_w8", "compile": "off"}]
        plan, split = resolve("random", dataset, ipc=1, layers=layers), dataset.train()
        ctx = make_context(plan, split, split_name="train", device=torch.device("cpu"))
        ctx.make_set(ctx.space.encode(split.images), split.labels).save(tmp_path / "all.pt")
        options = EvaluateOptions(archs=("convnet1_w8",), epochs=1, seeds=1, seed=row.spec["options"]["seed"])
        expected = evaluate(tmp_path / "all.pt", options, device=torch.device("cpu")).results[0]
        assert row.result["per_seed"] == expected.per_seed
        assert result["cells"][0]["accuracy_mean"] == expected.accuracy_mean

    def test_a_scale_cuts_it_and_says_so(self, tmp_path: Path) -> None:
        bench_spec = spec(methods=["whole"], seeds=1, limits={"whole": 50, "networks": 1})
        result = run(tmp_path / "run", bench_spec)
        assert [cell["settings"] for cell in result["cells"]] == ["epochs=1, images=50"] * 2
        assert {row.result["num_images"] for row in Ledger(tmp_path / "run").rows("evaluate")} == {50}

    def test_its_evaluations_depend_on_its_settings(self) -> None:
        def keys(**settings: Any) -> set[str]:
            row = {"name": "whole", "set": settings}
            return set(build_graph(spec(methods=[row], seeds=1), open_dataset).evaluate)

        assert keys() == keys(**{"evaluate.seeds": 7})
        assert keys().isdisjoint(keys(**{"evaluate.lr": 0.5}))

    def test_a_forecast_lists_it(self) -> None:
        result = dry_run(spec(methods=["whole"], seeds=1), LOCAL, run_dir=None)
        assert [(unit["kind"], unit["needs"]) for unit in result["units"]] == [("evaluate", [])] * 2
        assert "whole digits seed 0" in result["units"][0]["unit"]

    def test_a_sweep_has_a_baseline_of_that_name_instead(self) -> None:
        graph = build_graph(spec(methods=self.rows, seeds=1, evaluate=nas_of()), open_dataset)
        assert [[cell.method for cell in sweep.cells] for sweep in graph.sweeps] == [["random"]]

    def test_runs_of_tables_without_it_keep_their_configuration(self, tmp_path: Path) -> None:
        run(tmp_path / "run", spec(methods=["random"], seeds=1, limits={"whole": 50}))
        config = (tmp_path / "run" / "config.yaml").read_text()
        assert "whole" not in config
        assert "whole" not in json.dumps(json.loads((tmp_path / "run" / "cells.json").read_text()))
