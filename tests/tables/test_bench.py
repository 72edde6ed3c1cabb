"""Bench files, the unit graph, the board that hands units out, and the table, all without Ray."""

from __future__ import annotations

import csv
import json
import math
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from ddray.artifact import distilled_set as artifact
from ddray.artifact.reading import load
from ddray.commands.bench_display import bench_tables
from ddray.data import open_dataset
from ddray.distillation.method import DistillContext
from ddray.errors import DdrayError, InputError, StorageError
from ddray.methods import get_method, method_names
from ddray.nets import multiply_adds
from ddray.ranking import worker as nas_units
from ddray.ranking.spaces import get_space
from ddray.ranking.sweep import NasOptions
from ddray.runs.folder import open_run
from ddray.runs.ledger import Ledger
from ddray.system.files import home
from ddray.tables import nas_table as ranking
from ddray.tables import scheduler as board
from ddray.tables import worker as bench_work
from ddray.tables.cost import History, costs_file, summarise, sweep_of
from ddray.tables.dry_run import _facts, dry_run
from ddray.tables.graph import build_graph
from ddray.tables.nas_table import _baseline, cell_of, nas_options
from ddray.tables.published import compare, find, read_numbers
from ddray.tables.run import (
    BenchOptions,
    _drop_scaled_differences,
    prepare,
    run_bench,
    run_local,
    sweep_options,
)
from ddray.tables.spec import BenchSpec, Source, read_spec
from ddray.tables.table import standard_error
from ddray.tables.units import Cell
from ddray.tables.worker import AskingPool, asked_first

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs" / "bench").glob("*.yaml"))
LOCAL = BenchOptions(executor="local")
TINY: dict[str, Any] = {
    "name": "tiny",
    "dataset": "digits",
    "methods": ["random", {"name": "dm", "steps": 2, "set": {"method.batch_real": 4}}],
    "ipc": 1,
    "set": {"arch": "convnet1_w8", "compile": "off"},
    "evaluate": {"archs": ["convnet1_w8", "convnet1_w8_bn"], "epochs": 1, "seeds": 2},
    "seeds": 2,
}


def spec(**changes: Any) -> BenchSpec:
    return BenchSpec.parse({**TINY, **changes})


def run(
    folder: Path, bench_spec: BenchSpec | None = None, *, resume: bool = False, **options: Any
) -> dict[str, Any]:
    """Run a bench in this process."""
    bench_options = BenchOptions(executor="local", **options)
    return run_bench(prepare(bench_spec or spec(), bench_options), run_local, run_dir=folder, resume=resume)


@pytest.mark.parametrize(
    ("name", "value"), [("max_concurrent", 2), ("unit_timeout", 5.0), ("address", "auto")]
)
def test_options_of_a_cluster_are_refused_without_one(name: str, value: Any) -> None:
    option = "--" + name.replace("_", "-")
    with pytest.raises(InputError, match=f"{option} must be left out with --executor local.*got {value}"):
        BenchOptions.parse({"executor": "local", name: value}, prefix="--")
    BenchOptions.parse({"executor": "ray", name: value}, prefix="--")


def starts(folder: Path) -> dict[str, int]:
    """Return how often each unit was started."""
    keys = [event["key"] for event in Ledger(folder).events() if event["event"] == "start"]
    return {key: keys.count(key) for key in keys}


def nas_of(**options: Any) -> dict[str, Any]:
    """Return the settings of a NAS evaluation."""
    return {"protocol": "nas", "options": options}


class TestSpec:
    def test_a_short_file_means_the_long_one(self) -> None:
        short = BenchSpec.parse({"name": "a", "dataset": "digits", "methods": ["dm"], "ipc": 3})
        long = {
            "name": "a",
            "dataset": ["digits"],
            "methods": [{"name": "dm"}],
            "ipc": [3],
            "evaluate": [{"protocol": "hard"}],
        }
        assert short == BenchSpec.parse(long)
        assert BenchSpec.parse(short.dump()) == short

    def test_a_sweep_gives_one_labelled_row_per_combination(self) -> None:
        bench_spec = spec(
            methods=[
                "random",
                {"name": "datadam", "sweep": {"method.p": [1, 4], "method.loss": ["mse", "mae"]}},
            ]
        )
        rows = bench_spec.rows()
        assert [row.row for row in rows] == [
            "random",
            "datadam, p=1, loss=mse",
            "datadam, p=1, loss=mae",
            "datadam, p=4, loss=mse",
            "datadam, p=4, loss=mae",
        ]
        assert rows[2].layers() == [{"method": {"p": 1, "loss": "mae"}}]

    def test_presets_of_one_method_are_rows_of_their_own(self) -> None:
        bench_spec = spec(methods=["datadam", {"name": "datadam", "preset": "repo"}])
        assert [row.row for row in bench_spec.rows()] == ["datadam", "datadam (repo)"]

    @pytest.mark.parametrize(
        ("change", "word"),
        [
            ({"methods": ["dm", "dm"]}, "labels must differ"),
            ({"metods": ["dm"]}, "did you mean 'methods'"),
            ({"ipc": []}, "must have a size"),
            ({"ipc": 0}, "greater than or equal to 1"),
            ({"methods": []}, "at least 1 item"),
            ({"methods": [{"name": "dm", "dataset": "mnist"}]}, "must be among"),
            ({"evaluate": {"dataset": "mnits"}}, "evaluate dataset must be among"),
            (
                {"methods": [{"name": "dm", "ipc": [1, 2]}, {"name": "dm", "ipc": 2, "steps": 5}]},
                "labels must differ",
            ),
            ({"methods": ["dm", {"name": "dm", "steps": 5}], "limits": {"steps": 3}}, "labels must differ"),
            ({"methods": [{"name": "dm", "dataset": "mnits"}], "limits": {"steps": 3}}, "must be among"),
            ({"evaluate": []}, "at least one protocol"),
            ({"evaluate": {"epochs": 0}}, "evaluate"),
            ({"methods": [{"name": "dm", "stepps": 3}]}, "stepps"),
        ],
    )
    def test_a_bad_file_is_refused_with_the_rule(self, change: dict[str, Any], word: str) -> None:
        with pytest.raises(InputError, match=word):
            spec(**change)

    def test_scales_lower_what_exceeds_them(self, tmp_path: Path) -> None:
        path = tmp_path / "a.yaml"
        path.write_text(
            "name: a\ndataset: cifar10\nipc: [1, 10, 50]\nseeds: 5\nmethods: [dm]\n"
            "evaluate: {archs: [convnet3, resnet10], epochs: 1000}\n"
            "scales: {cpu: {limits: {steps: 7}, seeds: 2}}\n"
        )
        paper, cpu, smoke = (read_spec(path, scale) for scale in ("paper", "cpu", "smoke"))
        row = paper.rows()[0]
        assert paper.sizes(row) == [("ipc", 1), ("ipc", 10), ("ipc", 50)]
        assert cpu.sizes(row) == [("ipc", 1), ("ipc", 10)]
        assert smoke.sizes(row) == [("ipc", 1)]
        assert (cpu.limits.steps, cpu.limits.epochs, cpu.seeds) == (7, 300, 2)
        assert (smoke.dataset, smoke.within(smoke.evaluate[0]).archs) == (("digits",), ("convnet3",))
        with pytest.raises(InputError, match="--scale must be one of"):
            read_spec(path, "tiny")
        path.write_text(path.read_text().replace("cpu:", "gpu:"))
        with pytest.raises(InputError, match="must be one of cpu, paper, smoke, got 'gpu'"):
            read_spec(path)

    def test_only_a_scale_with_other_datasets_may_change_what_rows_name(self, tmp_path: Path) -> None:
        path = tmp_path / "a.yaml"
        path.write_text(
            "name: a\ndataset: [mnist, cifar10]\nipc: 1\nmethods:\n  - {name: dm, dataset: mnist}\n"
            "evaluate: {dataset: cifar10}\n"
        )
        smoke, cpu = read_spec(path, "smoke"), read_spec(path, "cpu")
        assert smoke.datasets(smoke.rows()[0]) == smoke.scored(smoke.evaluate[0]) == ["digits"]
        assert (cpu.datasets(cpu.rows()[0]), cpu.scored(cpu.evaluate[0])) == (["mnist"], ["cifar10"])
        path.write_text(
            path.read_text().replace("evaluate: {dataset: cifar10}", "evaluate: {dataset: cifar}")
        )
        with pytest.raises(InputError, match="evaluate dataset must be among"):
            read_spec(path, "cpu")

    def test_a_size_beyond_the_limit_is_cut_where_it_is_the_only_one(self) -> None:
        bench_spec = spec(ipc=[50], limits={"ipc": 10})
        assert bench_spec.sizes(bench_spec.rows()[0]) == [("ipc", 10)]


class TestGraph:
    def test_units_are_the_product_of_the_axes(self) -> None:
        graph = build_graph(spec(ipc=[1, 2]), open_dataset)
        assert (len(graph.distil), len(graph.evaluate), len(graph.cells)) == (
            2 * 2 * 2,
            2 * 2 * 2 * 2,
            2 * 2 * 2,
        )
        assert [len(cell.keys) for cell in graph.cells] == [2] * 8
        amounts = [work.amount for work in graph.distil.values()]
        assert amounts == sorted(amounts, reverse=True)
        for work in graph.evaluate.values():
            (key,) = work.unit.inputs
            distil_spec = graph.distil[key].unit.spec
            assert {k: work.unit.spec[k] for k in ("method", "dataset", "ipc", "seed")} == {
                k: distil_spec[k] for k in ("method", "dataset", "ipc", "seed")
            }

    def test_a_set_is_shared_by_evaluations_and_rows_that_score_more_networks(self) -> None:
        rows = ["random", {"name": "random", "label": "b", "set": {"evaluate.seeds": 7}}]
        scored = [{"seeds": 1, "augment": augment} for augment in ("dsa", "none")] + [{"epochs": 1}]
        graph = build_graph(spec(methods=rows, seeds=1, evaluate=scored), open_dataset)
        assert len(graph.distil) == 1
        assert [work.options.get("augment") for work in graph.evaluate.values()] == [
            "dsa",
            "none",
            None,
            None,
        ]
        assert [work.options["seeds"] for work in graph.evaluate.values()] == [1, 1, 5, 7]
        other = [rows[0], {"name": "random", "label": "b", "set": {"evaluate.lr": 0.5}}]
        assert len(build_graph(spec(methods=other, seeds=1), open_dataset).distil) == 2

    def test_an_evaluation_may_be_of_some_datasets_only(self) -> None:
        bench_spec = spec(
            dataset=["digits", "mnist"],
            evaluate=[{"epochs": 1}, {"protocol": "robust", "dataset": "mnist", "epochs": 1}],
        )
        by_name = {
            name: [one.protocol for one in bench_spec.evaluate if name in bench_spec.scored(one)]
            for name in bench_spec.dataset
        }
        assert by_name == {"digits": ["hard"], "mnist": ["hard", "robust"]}

    def test_a_budget_is_a_size_of_its_own(self) -> None:
        rows = ["random_ssl", {"name": "random", "ipc": 1}]
        bench_spec = spec(
            methods=rows, budget=20, ipc=[], set={}, evaluate={"protocol": "linear", "epochs": 1}
        )
        graph = build_graph(bench_spec, open_dataset)
        sizes = {plan.method: (plan.ipc, plan.budget) for plan in graph.plans.values()}
        assert sizes == {"random_ssl": (2, 20), "random": (1, None)}
        assert [cell.size for cell in graph.cells] == [("budget", 20), ("ipc", 1)]
        specs = {work.method: work.unit.spec for work in graph.distil.values()}
        assert (specs["random_ssl"]["budget"], specs["random"]["ipc"]) == (20, 1)
        pool_specs = {plan.method: asked_first(plan) for plan in graph.plans.values() if plan.seed == 0}
        assert [one.kind for one in pool_specs["random_ssl"] or ()] == ["ssl"]
        with pytest.raises(InputError, match=r"^row random: random takes --ipc K"):
            build_graph(spec(methods=["random"], budget=20, ipc=[]), open_dataset)

    def test_a_scale_bounds_the_teachers_of_soft_labels(self) -> None:
        def sets(limit: int | None, **options: Any) -> Any:
            soft = {"protocol": "soft", "teacher": "convnet1_w8", "options": options}
            bench_spec = spec(evaluate=soft, limits={"teacher_epochs": limit})
            return next(iter(build_graph(bench_spec, open_dataset).evaluate.values())).options.get("sets")

        assert sets(None) is None
        assert sets(5) == ["teacher.epochs=5"]
        assert sets(5, sets=["teacher.epochs=3"]) == ["teacher.epochs=3"]
        assert sets(5, sets=["teacher.epochs=9", "teacher.lr=.1"])[-1] == "teacher.epochs=5"
        assert sets(60) is None, "its own are 50"

    def test_a_scale_bounds_a_methods_own_steps(self) -> None:
        rows = [{"name": "d3hr", "set": {"method.num_inference_steps": 20}}]
        bench_spec = spec(methods=rows, set={}, seeds=1, limits={"steps": 2})
        (plan,) = build_graph(bench_spec, open_dataset).plans.values()
        assert plan.config.method.num_inference_steps == 2
        (plan,) = build_graph(spec(methods=rows, set={}, seeds=1), open_dataset).plans.values()
        assert plan.config.method.num_inference_steps == 20
        linear = {"protocol": "linear", "archs": ["convnet1_w8"]}
        bench_spec = spec(methods=["boost_ssdd"], set={}, seeds=1, evaluate=linear, limits={"steps": 2})
        (plan, *_) = build_graph(bench_spec, open_dataset).plans.values()
        assert plan.config.method.inner_steps_max == 2

    def test_a_scale_bounds_what_an_evaluation_asks_for(self) -> None:
        robust = {"protocol": "robust", "options": {"sets": "epochs=400", "full_epochs": 400}}
        bench_spec = spec(evaluate=robust, seeds=1, methods=["random"], limits={"epochs": 2})
        (score, *_) = build_graph(bench_spec, open_dataset).evaluate.values()
        assert (score.options["sets"], score.options["full_epochs"]) == (["epochs=400", "epochs=2"], 2)

    def test_a_scale_bounds_a_ranking(self) -> None:
        limits = {"epochs": 3, "networks": 2, "sample": 4}

        def bounded(**nas_settings: Any) -> NasOptions:
            bench_spec = spec(evaluate=nas_of(**nas_settings), limits=limits)
            (ranking,) = build_graph(bench_spec, open_dataset).rankings
            return sweep_options(ranking, bench_spec, LOCAL)

        options = bounded(seeds=5)
        assert (options.epochs, options.truth_epochs, options.seeds, options.sample) == (3, 3, 2, 4)
        options = bounded(epochs=2, sample=3)
        assert (options.epochs, options.truth_epochs, options.seeds, options.sample) == (2, None, 1, 3)
        assert bounded(max_mflops=1).sample is None, "fewer may be left than the limit"

    def test_sets_of_other_classes_are_not_scored(self) -> None:
        facts = {name: _facts(name, None) for name in ("digits", "mnist")}
        for one in facts.values():
            one.__dict__["fingerprint"] = "unread"
        with pytest.raises(InputError, match="must have the classes and images of digits"):
            build_graph(spec(evaluate={"target": ["mnist"]}), facts.__getitem__)
        linear = {"protocol": "linear", "target": ["mnist"], "archs": ["convnet1_w8"]}
        assert build_graph(spec(methods=["random_ssl"], set={}, evaluate=linear), facts.__getitem__).cells

    def test_folders_are_absolute_wherever_a_bench_is_continued(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "images").mkdir()
        monkeypatch.chdir(tmp_path)
        bench_spec = spec(dataset=["digits", "images"], evaluate={"target": ["images"]})
        assert bench_spec.dataset == ("digits", str(tmp_path / "images"))
        assert bench_spec.evaluate[0].target == (str(tmp_path / "images"),)

    def test_units_that_differ_have_titles_that_differ(self) -> None:
        evaluations = [
            {"protocol": "soft", "teacher": ["convnet1_w8", "convnet1_w8_bn"], "archs": ["convnet1_w8"]},
            *({"augment": augment, "archs": ["convnet1_w8"]} for augment in ("none", "dsa")),
            {"epochs": 3, "archs": ["convnet1_w8"]},
        ]
        graph = build_graph(spec(evaluate=evaluations, seeds=1, methods=["random"]), open_dataset)
        titles = [work.title for work in graph.works()]
        assert len(set(titles)) == len(titles) == 1 + 5

    def test_the_networks_of_a_seed_are_the_same_for_every_row(self) -> None:
        graph = build_graph(spec(), open_dataset)
        seeds = {(work.unit.spec["seed"], work.options["seed"]) for work in graph.evaluate.values()}
        assert len(seeds) == 2

    def test_limits_lower_settings_and_leave_smaller_ones(self) -> None:
        limits = {"steps": 1, "epochs": 1, "networks": 1, "batch_real": 3}
        graph = build_graph(spec(limits=limits), open_dataset)
        for plan in graph.plans.values():
            assert plan.config.steps == (1 if plan.method == "dm" else 0)
            assert getattr(plan.config.method, "batch_real", 3) == 3
        assert {work.options["seeds"] for work in graph.evaluate.values()} == {1}

    def test_a_methods_own_trainings_are_within_the_limits(self) -> None:
        bench_spec = spec(methods=["kcenter", "rded", "d3hr"], seeds=1, ipc=[1], limits={"epochs": 2})
        epochs = {
            work.method: work.config["method"]
            for work in build_graph(bench_spec, open_dataset).distil.values()
        }
        assert epochs["kcenter"]["feature_epochs"] == 2 == epochs["rded"]["teacher_epochs"]
        generator = epochs["d3hr"]["generator"]
        assert (generator["epochs"], generator["vae_epochs"]) == (2, 2)

    def test_a_recipe_is_the_same_for_every_row_and_within_the_limits(self, tmp_path: Path) -> None:
        scored: dict[str, Any] = {"recipe": "vico", "augment": "dsa", "seeds": 1}
        for evaluation in (scored, {"options": {"recipe": "vico"}, "augment": "dsa", "seeds": 1}):
            bench_spec = spec(methods=["random", "dsdm"], seeds=1, evaluate=evaluation, limits={"epochs": 7})
            works = build_graph(bench_spec, open_dataset).evaluate.values()
            assert {work.options["recipe"] for work in works} == {"vico"}
            assert {work.options["epochs"] for work in works} == {7}
        paper = build_graph(spec(methods=["random", "dsdm"], seeds=1, evaluate=scored), open_dataset)
        assert all("epochs" not in work.options for work in paper.evaluate.values()), "the recipe's own"
        result = run(tmp_path / "run", spec(methods=["random"], seeds=1, evaluate={**scored, "epochs": 1}))
        assert result["num_failed"] == 0

    @pytest.mark.parametrize(
        ("change", "word"),
        [
            ({"evaluate": {"recipe": "vicco"}}, "did you mean 'vico'"),
            ({"evaluate": {"recipe": "vico", "protocol": "soft"}}, "evaluate.recipe of soft must be one of"),
            ({"methods": ["datdam"]}, "did you mean 'datadam'"),
            ({"evaluate": {"protocol": "soft_ish"}}, "evaluate.protocol must be one of"),
            ({"methods": [{"name": "random", "steps": 3}]}, "steps must be 0"),
            ({"ipc": 10_000}, "ipc must be in"),
            ({"methods": [{"name": "datadam", "set": {"method.layers": [9]}}]}, "within 1..1"),
            ({"evaluate": {"archs": ["convnet9"]}}, "arch must be one of"),
            ({"evaluate": {"options": {"train_limits": 5}}}, "did you mean 'train_limit'"),
            ({"evaluate": {"options": {"pixel_space": "raw"}}}, "evaluate.options must be one of"),
            (
                {"evaluate": {"options": {"ipc": 5}}},
                "must be left out for random, whose sets hold their images",
            ),
            ({"evaluate": nas_of(baselines="erly-stopping")}, "did you mean 'early-stopping'"),
            ({"evaluate": nas_of(baselines=["random", "random"])}, "must name each once, got random 2 times"),
            ({"evaluate": nas_of(baselines="dm")}, "a method that selects images, got dm"),
            (
                {"evaluate": {"options": {"sets": "epochs=many"}}, "limits": {"epochs": 2}},
                "evaluate.epochs: input should be a valid integer",
            ),
            ({"evaluate": nas_of(compat="dcbench")}, "needs --space nasbench201"),
            ({"methods": ["random_ssl"], "set": {}}, "must be linear for random_ssl"),
            ({"evaluate": {"teacher": "resnet18"}}, "--teacher must be left out"),
            ({"evaluate": {"protocol": "soft", "teacher": "resnet99"}}, "did you mean 'resnet18'"),
            ({"evaluate": {"augment": "foo"}}, "--augment must be one of"),
            ({"evaluate": {"options": {"train_limit": -3}}}, "--train-limit must be >= 1, got -3"),
            ({"evaluate": {"options": {"sets": ["epchs=3"]}}}, "did you mean 'epochs'"),
            ({"evaluate": {"protocol": "soft", "options": {"sets": ["teacher.epchs=3"]}}}, "'epochs'"),
        ],
    )
    def test_what_cannot_run_is_refused_before_a_folder_is_made(
        self, change: dict[str, Any], word: str, tmp_path: Path
    ) -> None:
        with pytest.raises(InputError, match=word):
            run(tmp_path / "run", spec(**change))
        assert not (tmp_path / "run").exists()


class TestRun:
    def test_rows_artifacts_and_table(self, tmp_path: Path) -> None:
        result = run(tmp_path / "run")
        ledger = Ledger(tmp_path / "run")
        assert (len(ledger.rows("distill")), len(ledger.rows("evaluate"))) == (4, 8)
        assert result["num_failed"] == 0
        assert result["skipped"] == []
        for row in ledger.rows("distill"):
            assert {"method", "dataset", "ipc", "seed"} <= row.spec.keys()
            distilled = load(tmp_path / "run" / row.result["artifact"])
            assert (distilled.meta.method, distilled.meta.seed) == (row.spec["method"], row.spec["seed"])
            curve = json.loads((tmp_path / "run" / row.result["artifact"]).with_suffix(".json").read_text())
            assert len(curve["losses"]) == row.result["steps"]
        assert len(result["cells"]) == 4
        for cell in result["cells"]:
            values = [
                value
                for row in ledger.rows("evaluate")
                if (row.spec["method"], row.spec["arch"]) == (cell["method"], cell["arch"])
                for value in row.result["per_seed"]
            ]
            assert cell["n"] == len(values) == 4
            assert cell["accuracy_mean"] == pytest.approx(statistics.fmean(values), abs=1e-12)
            assert cell["accuracy_std"] == pytest.approx(statistics.stdev(values), abs=1e-12)
        with (tmp_path / "run" / "table.csv").open() as file:
            lines = list(csv.DictReader(file))
        assert [line["method"] for line in lines] == ["random", "random", "dm", "dm"]
        assert [float(line["accuracy_mean"]) for line in lines] == [
            c["accuracy_mean"] for c in result["cells"]
        ]
        assert not list((tmp_path / "run" / "checkpoints").iterdir())
        assert not list((tmp_path / "run").rglob("*.tmp"))

    def test_a_finished_bench_resumes_without_work(self, tmp_path: Path) -> None:
        first = run(tmp_path / "run")
        table = (tmp_path / "run" / "table.csv").read_bytes()
        events = (tmp_path / "run" / "events.jsonl").read_bytes()
        again = run(tmp_path / "run", resume=True)
        assert again["cells"] == first["cells"]
        assert (tmp_path / "run" / "table.csv").read_bytes() == table
        assert (tmp_path / "run" / "events.jsonl").read_bytes() == events
        with pytest.raises(InputError, match="seeds: 2 -> 3"):
            run(tmp_path / "run", spec(seeds=3), resume=True)

    def test_a_bench_cut_off_anywhere_ends_in_the_same_table(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run(tmp_path / "whole")
        table = (tmp_path / "whole" / "table.csv").read_bytes()
        for stop in (1, 5, 9):
            folder = tmp_path / f"cut{stop}"
            count = 0
            real = bench_work.publish

            def publish(*args: Any, stop: int = stop, real: Any = real, **kwargs: Any) -> None:
                nonlocal count
                count += 1
                if count > stop:
                    raise KeyboardInterrupt
                real(*args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(bench_work, "publish", publish)
                with pytest.raises(KeyboardInterrupt):
                    run(folder)
            before = {path: path.stat().st_mtime_ns for path in (folder / "ledger").glob("*.json")}
            assert len(before) == stop
            run(folder, resume=True)
            assert (folder / "table.csv").read_bytes() == table
            assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
            assert all(starts(folder)[path.stem] == 1 for path in before)

    def test_a_diverged_set_fails_alone(self, tmp_path: Path) -> None:
        rows = ["random", {"name": "dm", "steps": 2, "set": {"method.lr_img": 1e30, "method.batch_real": 4}}]
        result = run(tmp_path / "run", spec(methods=rows, seeds=1))
        assert [cell["method"] for cell in result["cells"]] == ["random", "random"]
        assert result["num_failed"] == 1
        (failure,) = result["failures"]
        assert failure["unit"] == "dm digits ipc 1 seed 0"
        assert "lower lr_img" in failure["reason"]
        assert len(result["skipped"]) == 2
        again = run(tmp_path / "run", spec(methods=rows, seeds=1), resume=True, retry_failed=True)
        assert again["failures"] == result["failures"], "what diverged would diverge again"

    def test_a_crash_is_tried_three_times_then_listed_and_can_be_retried(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bench_spec = spec(seeds=1)
        with monkeypatch.context() as patch:
            patch.setattr(get_method("dm"), "step", lambda self: 1 / 0)
            result = run(tmp_path / "run", bench_spec)
        assert result["failures"][0]["reason"] == "failed 3 times; last: ZeroDivisionError: division by zero"
        key = result["failures"][0]["key"]
        kinds = [event["event"] for event in Ledger(tmp_path / "run").events() if event["key"] == key]
        assert kinds == ["start", "retry", "retry", "fail"]
        assert run(tmp_path / "run", bench_spec, resume=True)["num_failed"] == 1
        mended = run(tmp_path / "run", bench_spec, resume=True, retry_failed=True)
        assert (mended["num_failed"], mended["skipped"], len(mended["cells"])) == (0, [], 4)

    def test_a_torn_row_and_a_damaged_set_are_computed_again(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        bench_spec = spec(seeds=1)
        run(tmp_path / "run", bench_spec)
        table = (tmp_path / "run" / "table.csv").read_bytes()
        ledger = Ledger(tmp_path / "run")
        torn_row = ledger.rows("evaluate")[0]
        (source,) = [row for row in ledger.rows("distill") if row.spec["method"] == torn_row.spec["method"]]
        path = tmp_path / "run" / "ledger" / f"{torn_row.key}.json"
        path.write_bytes(path.read_bytes()[:30])
        set_file = tmp_path / "run" / source.result["artifact"]
        set_file.write_bytes(set_file.read_bytes()[:-100])
        run(tmp_path / "run", bench_spec, resume=True)
        assert (tmp_path / "run" / "table.csv").read_bytes() == table
        assert path.with_suffix(".corrupt").exists()
        assert "is torn" in caplog.text
        assert "it is distilled again" in caplog.text
        assert starts(tmp_path / "run")[source.key] == 2

    def test_a_set_that_is_damaged_while_the_bench_runs_is_distilled_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run(tmp_path / "whole", spec(seeds=1))
        real = bench_work.publish
        hurt: list[Path] = []

        def publish(ledger: Ledger, job: Any, work: Any, *args: Any, **kwargs: Any) -> None:
            real(ledger, job, work, *args, **kwargs)
            if work.kind == "distill" and not hurt:
                hurt.append(tmp_path / "run" / bench_work.artifact_name(work.key))
                hurt[0].write_bytes(hurt[0].read_bytes()[:-7])

        monkeypatch.setattr(bench_work, "publish", publish)
        result = run(tmp_path / "run", spec(seeds=1))
        assert (result["num_failed"], result["skipped"]) == (0, [])
        assert load(hurt[0])
        table = (tmp_path / "whole" / "table.csv").read_bytes()
        assert (tmp_path / "run" / "table.csv").read_bytes() == table

    def test_a_set_that_is_damaged_again_and_again_fails_its_evaluations(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bench_work, "is_sound", lambda run_dir, row: False)
        monkeypatch.setattr(board, "is_sound", lambda run_dir, row: False)
        with pytest.raises(DdrayError, match="damaged again and again"):
            run(tmp_path / "run", spec(methods=["random"], seeds=1))
        assert Ledger(tmp_path / "run").rows("evaluate")[0].result["attempts"]

    def test_a_late_worker_does_not_replace_the_published_set(self, tmp_path: Path) -> None:
        """An orphan of a killed driver may finish after the new one has published, with different bytes."""
        bench_spec = spec(methods=["random"], seeds=1)
        run(tmp_path / "run", bench_spec)
        (row,) = Ledger(tmp_path / "run").rows("distill")
        path = tmp_path / "run" / row.result["artifact"]
        before = path.read_bytes()
        (work,) = build_graph(bench_spec, open_dataset).distil.values()
        for epoch in (0, 1):  # an older driver's worker, and a second worker of this one
            job = bench_work.Job(str(tmp_path / "run"), epoch, None, "cpu")
            bench_work._draft(job, work).write_bytes(b"other bytes")
            bench_work.publish(Ledger(tmp_path / "run"), job, work, {"sha256": "other"}, 1.0)
            assert path.read_bytes() == before
        assert bench_work.is_sound(tmp_path / "run", row)

    def test_a_scaled_run_is_no_reproduction(self) -> None:
        cells: list[dict[str, Any]] = [{"published": {"difference": 0.1, "difference_se": 2.0}}, {}]
        _drop_scaled_differences(cells, "paper")
        assert cells[0]["published"]["difference_se"] == 2.0
        _drop_scaled_differences(cells, "cpu")
        assert cells == [{"published": {"difference": 0.1, "difference_se": None}}, {}]

    def test_evaluations_that_differ_in_epochs_or_options_are_told_apart(self, tmp_path: Path) -> None:
        scored = [{"epochs": 1}, {"epochs": 2}, {"epochs": 1, "options": {"train_limit": 5}}]
        bench_spec = spec(methods=["random"], seeds=1, evaluate=[{**one, "seeds": 1} for one in scored])
        result = run(tmp_path / "run", bench_spec)
        expected = ["epochs=1", "epochs=2", "epochs=1, train_limit=5"]
        assert [cell["settings"] for cell in result["cells"]] == expected
        with (tmp_path / "run" / "table.csv").open() as file:
            assert [line["settings"] for line in csv.DictReader(file)] == expected

    def test_a_full_disk_ends_the_bench_and_leaves_it_resumable(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:

            def full(*args: Any, **kwargs: Any) -> None:
                raise StorageError("could not write x: no space left on device")

            patch.setattr(artifact.DistilledSet, "save", full)
            with pytest.raises(StorageError, match="no space"):
                run(tmp_path / "run")
        assert Ledger(tmp_path / "run").rows() == []
        assert run(tmp_path / "run", resume=True)["num_failed"] == 0

    def test_when_nothing_can_be_scored_the_reason_is_said(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(get_method("dm"), "step", lambda self: 1 / 0)
        with pytest.raises(DdrayError, match="no cell of the table was scored: failed 3 times"):
            run(tmp_path / "run", spec(methods=TINY["methods"][1:], seeds=1))


class TestRanking:
    NAS: ClassVar = {
        "evaluate": {
            "protocol": "nas",
            "options": {"sample": 2, "max_mflops": 3, "epochs": 1, "baselines": ["early-stopping"]},
        },
        "seeds": 1,
    }

    def test_sets_rank_architectures_in_a_run_of_their_own(self, tmp_path: Path) -> None:
        bench_spec = spec(**self.NAS)
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

    def test_a_set_that_is_gone_is_distilled_again_and_its_sweep_goes_on(self, tmp_path: Path) -> None:
        bench_spec = spec(**self.NAS)
        result = run(tmp_path / "run", bench_spec)
        for row in Ledger(tmp_path / "run").rows("distill"):
            (tmp_path / "run" / row.result["artifact"]).unlink()
        again = run(tmp_path / "run", bench_spec, resume=True)
        assert again["cells"] == result["cells"]
        rows = Ledger(tmp_path / "run").rows("distill")
        assert rows
        assert all((tmp_path / "run" / row.result["artifact"]).is_file() for row in rows)

    def test_a_set_that_failed_joins_the_sweep_when_the_bench_is_continued(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bench_spec = spec(**self.NAS)
        with monkeypatch.context() as patch:
            patch.setattr(get_method("dm"), "step", lambda self: 1 / 0)
            result = run(tmp_path / "run", bench_spec)
        assert [cell["method"] for cell in result["cells"]] == ["random", "early-stopping (1 steps)"]
        again = run(tmp_path / "run", bench_spec, resume=True, retry_failed=True)
        assert [cell["method"] for cell in again["cells"]] == ["random", "dm", "early-stopping (1 steps)"]
        assert again["failures"] == []
        assert [again["cells"][0], again["cells"][2]] == result["cells"]

    def test_architectures_that_crash_are_listed_and_run_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bench_spec = spec(**self.NAS)
        real = nas_units.run_task

        def broken(job: Any, data: Any, task: Any, *args: Any) -> Any:
            if task.units[0].spec.get("proxy") == "dm-0.pt":
                raise RuntimeError("a worker died")
            return real(job, data, task, *args)

        with monkeypatch.context() as patch:
            patch.setattr(nas_units, "run_task", broken)
            result = run(tmp_path / "run", bench_spec)
        assert [failure["kind"] for failure in result["failures"]] == ["nas", "nas"]
        assert all("on dm-0.pt" in failure["unit"] for failure in result["failures"])
        assert {cell["method"]: cell["num_archs"] for cell in result["cells"]}["dm"] == 0
        again = run(tmp_path / "run", bench_spec, resume=True, retry_failed=True)
        assert again["num_failed"] == 0
        assert {cell["num_archs"] for cell in again["cells"]} == {2}

    def test_rows_whose_labels_make_one_file_name_are_told_apart(self, tmp_path: Path) -> None:
        rows = [{"name": "random", "label": "a+b"}, {"name": "class_mean", "label": "a b"}]
        result = run(tmp_path / "run", spec(**{**self.NAS, "methods": rows, "set": {}}))
        assert [cell["method"] for cell in result["cells"]][:2] == ["a+b", "a b"]
        assert result["failures"] == []

    def test_early_stopping_finds_its_published_number(self) -> None:
        bench_spec = read_spec(ROOT / "configs" / "bench" / "datadam_table4.yaml")
        facts = _facts("cifar10", None)
        facts.__dict__["fingerprint"] = "unread"
        graph = build_graph(bench_spec, lambda name: facts)
        figures = {"top1_truth_accuracy": 0.9, "spearman": 0.6, "spearman_top20": 0.6, "num_archs": 720}
        figures |= {"wall_s": 90.0, "storage_images": 50_000}
        cell = cell_of(_baseline(graph.rankings[0], "early-stopping (150 steps)"), [figures])
        assert cell["published"]["accuracy_mean"] == pytest.approx(0.889)
        assert cell["published_spearman_top20"] == pytest.approx(0.64)
        assert (cell["search_time"], cell["published_search_time"]) == (1.5, 37.1), "minutes"
        assert (cell["storage_images"], cell["published_storage_images"]) == (50_000, 50_000)
        cell = cell_of(_baseline(graph.rankings[0], "whole"), [figures])
        assert (cell["published"]["accuracy_mean"], cell["published_search_time"]) == (0.892, 5168.9)

    @pytest.mark.parametrize("name", ["epochs", "seeds", "archs", "teacher"])
    def test_what_only_other_protocols_take_is_refused(self, name: str) -> None:
        bench_spec = spec(
            evaluate={"protocol": "nas", name: ["vgg11"] if name in ("archs", "teacher") else 3}
        )
        with pytest.raises(InputError, match=f"evaluate.{name} must be left out with protocol nas"):
            build_graph(bench_spec, open_dataset)

    def test_a_sweep_that_fails_is_listed_and_the_rest_is_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*args: Any, **kwargs: Any) -> Any:
            raise DdrayError("no architecture finished on dm-0.pt: out of memory")

        monkeypatch.setattr(ranking, "rank_architectures", broken)
        bench_spec = spec(
            seeds=1, evaluate=[{"epochs": 1, "seeds": 1, "archs": ["convnet1_w8"]}, self.NAS["evaluate"]]
        )
        result = run(tmp_path / "run", bench_spec)
        assert [cell["method"] for cell in result["cells"]] == ["random", "dm"]
        (failure,) = result["failures"]
        assert (failure["kind"], failure["unit"]) == ("nas", "nas sweep of convnet720: digits ipc 1")
        assert "no architecture finished" in failure["reason"]
        for name in ("results.csv", "table.csv", "cells.json"):
            assert (tmp_path / "run" / name).is_file()

    def test_a_dry_run_prices_sweeps_from_past_ones(self, tmp_path: Path) -> None:
        bench_spec = spec(**self.NAS)
        unknown = dry_run(bench_spec, LOCAL, run_dir=None)
        (sweep,) = [unit for unit in unknown["units"] if unit["kind"] == "nas"]
        assert sweep["estimate_s"] is None
        assert len(sweep["needs"]) == 2
        run(tmp_path / "run", bench_spec)
        (sweep,) = [
            unit for unit in dry_run(bench_spec, LOCAL, run_dir=None)["units"] if unit["kind"] == "nas"
        ]
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

    def test_people_see_correlations_and_rows_without_an_architecture(self) -> None:
        shared = {"dataset": "cifar10", "ipc": 50, "protocol": "nas", "n": 1, "accuracy_std": None}
        cells = [
            {**shared, "method": "dm", "accuracy_mean": 0.9, "spearman": 0.512, "storage_images": 50_000.0},
            {**shared, "method": "dc", "accuracy_mean": None, "spearman": None, "published_spearman": -0.19},
        ]
        result = {
            "cells": cells,
            "failures": [],
            "skipped": [],
            "num_failed": 0,
            "wall_s": 1.0,
            "run_dir": "r",
        }
        table = bench_tables("mini", result)[0]
        columns = {str(column.header): list(column.cells) for column in table.columns}
        assert columns["accuracy %"] == ["90.00", "-"]
        assert (columns["Spearman"], columns["published Spearman"]) == (["0.512", "-"], ["-", "-0.19"])
        assert columns["images"] == ["50,000", "-"]

    def test_a_sweep_is_priced_without_architectures_above_its_limit(self) -> None:
        bench_spec = spec(evaluate={"protocol": "nas", "options": {"max_mflops": 2}}, seeds=1)
        (sweep,) = dry_run(bench_spec, LOCAL, run_dir=None)["units"][-1:]
        assert sweep["kind"] == "nas"
        (ranking,) = build_graph(bench_spec, open_dataset).rankings
        digits, space = open_dataset("digits"), get_space("convnet720")
        within = sum(space.cost(i, digits.image_shape, digits.num_classes) <= 2 for i in range(len(space)))
        assert 0 < within < len(space)
        cost = sweep_of(ranking, nas_options(ranking, {}), digits)
        assert cost.num_units == within * (2 + 1), "on two sets, and the truth"

    def test_a_bad_option_is_refused_before_a_folder_is_made(self, tmp_path: Path) -> None:
        bad = {"evaluate": {"protocol": "nas", "options": {"sampel": 2}}}
        with pytest.raises(InputError, match="did you mean 'sample'"):
            run(tmp_path / "run", spec(**bad))
        assert not (tmp_path / "run").exists()
        with pytest.raises(InputError, match="did you mean 'sample'"):
            dry_run(spec(**bad), LOCAL, run_dir=None)

    def test_published_correlations_stand_beside_ours(self) -> None:
        cell = TestPublished().cell(
            size=("ipc", 50),
            protocol="nas",
            arch="convnet720",
            source=Source(paper="datadam", table="Table 4"),
        )
        figures = [
            {
                "top1_truth_accuracy": value,
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


class TestPool:
    def test_networks_that_a_method_asks_for_are_units_trained_once(self, tmp_path: Path) -> None:
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

    def test_entries_of_another_run_are_no_units_of_this_one(self, tmp_path: Path) -> None:
        bench_spec = spec(methods=["kcenter"], set={**TINY["set"], "method.feature_epochs": 1}, seeds=1)
        run(tmp_path / "one", bench_spec)
        # Half of the pool is there: the other seed's network is missing.
        result = run(tmp_path / "two", BenchSpec.parse({**bench_spec.dump(), "seeds": 2}))
        assert (result["skipped"], result["num_failed"]) == ([], 0)
        assert len(Ledger(tmp_path / "two").rows("pool")) == 1

    def test_of_two_entries_asked_for_only_the_missing_one_is_a_unit(self, tmp_path: Path) -> None:
        changes = {"set": {**TINY["set"], "method.feature_epochs": 1}, "seeds": 1}
        bench_spec = spec(methods=["kcenter"], **changes)
        graph = build_graph(bench_spec, open_dataset)
        bench_run = open_run(tmp_path / "run", {"a": 1}, command="bench", resume=False)
        job = bench_work.Job(str(tmp_path / "run"), bench_run.epoch, None, "cpu")
        bench_board = board.Board(graph, bench_run, job)
        (asker,) = bench_board.first()
        (plan,) = graph.plans.values()
        (missing_spec,) = asked_first(plan) or ()
        present_spec = missing_spec.model_copy(update={"seed": 7})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(board, "has_entry", lambda pool_spec: pool_spec.seed == 7)
            needs = bench_work.Needs((missing_spec, present_spec))
            (pool_unit,) = bench_board.after(board.Ended(asker.key, needs, None, 1))
        assert pool_unit.pool == missing_spec
        assert [title for title in bench_board.skipped() if title.startswith("pool")] == [pool_unit.title]

    def test_an_entry_that_is_removed_is_trained_again_and_one_that_never_stays_fails(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bench_spec = spec(methods=["kcenter"], set={**TINY["set"], "method.feature_epochs": 1}, seeds=1)
        real = bench_work._TASKS["pool"]
        lost: list[str] = []

        def train(job: Any, work: Any, most: int = 1) -> Any:
            result = real(job, work)
            if len(lost) < most:
                lost.append(work.key)
                shutil.rmtree(home() / "pool" / work.pool.key)
            return result

        monkeypatch.setitem(bench_work._TASKS, "pool", train)
        outcome = run(tmp_path / "once", bench_spec)
        assert (outcome["num_failed"], outcome["skipped"], len(lost)) == (0, [], 1)
        shutil.rmtree(home() / "pool")
        monkeypatch.setitem(bench_work._TASKS, "pool", lambda job, work: train(job, work, 99))
        with pytest.raises(DdrayError, match="DDRAY_HOME must be one folder"):
            run(tmp_path / "never", bench_spec)
        assert len(lost) == 1 + 3

    def test_a_failed_entry_leaves_its_askers_out_and_the_rest_goes_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bench_spec = spec(methods=["random", "kcenter"], seeds=1)
        with monkeypatch.context() as patch:
            patch.setitem(bench_work._TASKS, "pool", lambda job, work: 1 / 0)
            result = run(tmp_path / "run", bench_spec)
        assert [cell["method"] for cell in result["cells"]] == ["random", "random"]
        assert [failure["kind"] for failure in result["failures"]] == ["pool"]
        assert len(result["skipped"]) == 3
        mended = run(tmp_path / "run", bench_spec, resume=True, retry_failed=True)
        assert (mended["num_failed"], mended["skipped"]) == (0, [])

    def test_an_asking_pool_gives_what_is_there_and_names_the_rest(self, toy: Any, planned: Any) -> None:
        _, ctx, method = planned("kcenter", toy())
        ctx: DistillContext
        asking = AskingPool(ctx.pool)
        object.__setattr__(ctx, "pool", asking)
        with pytest.raises(bench_work._MissingError) as missing:
            method.setup(ctx)
        (missing_spec,) = missing.value.specs
        asking.pool.get([missing_spec])
        method.setup(ctx)
        assert asking.used == [missing_spec.key]

    def test_what_a_method_will_ask_for_is_known_without_images(self, digits: Any) -> None:
        graph = build_graph(spec(methods=["kcenter", "random", "datadam"], seeds=1), lambda name: digits)
        pool_specs = {plan.method: asked_first(plan) for plan in graph.plans.values()}
        assert pool_specs["random"] == () == pool_specs["datadam"]
        assert [pool_spec.arch for pool_spec in pool_specs["kcenter"] or ()] == ["convnet1_w8"]


class TestDryRun:
    def test_the_graph_is_listed_with_what_it_needs_and_nothing_is_made(self, tmp_path: Path) -> None:
        result = dry_run(spec(methods=["random", "kcenter"]), LOCAL, run_dir=tmp_path / "none")
        kinds = [unit["kind"] for unit in result["units"]]
        assert (kinds.count("pool"), kinds.count("distill"), kinds.count("evaluate")) == (2, 4, 8)
        assert result["num_missing"] == result["num_units"] == 14
        assert result["estimate_s"] is None
        pool = {"kind": "pool", "what": "supervised", "which": "convnet1_w8 on digits", "device": "cpu"}
        costs_file().parent.mkdir(parents=True, exist_ok=True)
        costs_file().write_text(json.dumps({**pool, "amount": 0.0, "wall_s": 4.0}) + "\n")
        priced = dry_run(spec(methods=["random", "kcenter"]), LOCAL, run_dir=tmp_path / "none")
        assert priced["estimate_s"] == 8.0, "two networks, four seconds each"
        titles = {unit["unit"] for unit in result["units"]}
        assert all(set(unit["needs"]) <= titles for unit in result["units"])
        assert not list(tmp_path.iterdir()) or not (tmp_path / "none").exists()
        groups = summarise(result["units"])
        assert sum(group["units"] for group in groups) == 14

    def test_a_datasets_facts_are_enough(self) -> None:
        result = dry_run(spec(dataset=["imagenet"], methods=["random"]), LOCAL, run_dir=None)
        assert result["num_units"] == 2 + 4
        with pytest.raises(InputError, match="nowhere"):
            dry_run(spec(dataset=["nowhere"]), LOCAL, run_dir=None)

    def test_units_of_about_the_same_size_are_asked_first(self) -> None:
        graph = build_graph(spec(seeds=1), open_dataset)
        work = next(iter(graph.evaluate.values()))
        past_unit = {"kind": "evaluate", "what": "hard", "which": work.unit.spec["arch"], "device": "cpu"}
        small = [{**past_unit, "amount": work.amount / 1000, "wall_s": 2.0} for _ in range(40)]
        costs_file().parent.mkdir(parents=True, exist_ok=True)
        costs_file().write_text("".join(json.dumps(line) + "\n" for line in small))
        guess = History("cpu").estimate(work)
        assert guess.wall_s == pytest.approx(2000.0)
        assert guess.is_from_smaller, "an upper bound: the start of each was counted as work"
        assert dry_run(spec(seeds=1), LOCAL, run_dir=None)["num_from_smaller"] > 0
        alike = [{**past_unit, "amount": work.amount * 1.1, "wall_s": 5.5} for _ in range(15)]
        with costs_file().open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in alike))
        guess = History("cpu").estimate(work)
        assert guess.wall_s == pytest.approx(5.0)
        assert not guess.is_from_smaller

    def test_estimates_come_from_past_units(self, tmp_path: Path) -> None:
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

    def test_the_work_counts_images_and_multiply_adds(self) -> None:
        graph = build_graph(spec(methods=["dm"], seeds=1), open_dataset)
        (distil_unit,), scored = graph.distil.values(), list(graph.evaluate.values())
        shape = open_dataset("digits").image_shape
        # Grey images are padded by 3: a convolution on 20 x 20, and a classifier on what pooling leaves.
        assert multiply_adds("convnet1_w8", shape) == 9 * 8 * 20 * 20 + 8 * 10 * 10
        plan = graph.plans[distil_unit.key]
        images = 10 * (plan.config.method.dump()["batch_real"] + 1)
        assert distil_unit.amount == (1 + plan.config.steps) * images * multiply_adds("convnet1_w8", shape)
        for work in scored:
            arch = work.unit.spec["arch"]
            assert work.amount == 2 * 1 * 10 * multiply_adds(arch, shape), "networks, epochs, images"

    def test_the_work_of_the_default_network_is_counted(self) -> None:
        (work,) = build_graph(spec(methods=["dm"], set={}, seeds=1), open_dataset).distil.values()
        assert work.amount % multiply_adds("convnet3", open_dataset("digits").image_shape) == 0

    def test_the_work_of_a_budget_counts_no_classes(self) -> None:
        bench_spec = spec(
            methods=[{"name": "krr_st", "steps": 3}], ipc=(), budget=40, evaluate={"protocol": "linear"}
        )
        for work in build_graph(bench_spec, open_dataset).distil.values():
            one = multiply_adds("convnet1_w8", open_dataset("digits").image_shape)
            assert work.amount == (1 + 3) * (40 + work.config["method"]["batch_real"]) * one

    def test_an_estimate_scales_with_the_work(self) -> None:
        costs_file().parent.mkdir(parents=True)
        graph = build_graph(spec(seeds=1), open_dataset)
        work = next(work for work in graph.distil.values() if work.method == "dm")
        line = {"kind": "distill", "what": "dm", "which": "digits", "device": "cpu"}
        costs_file().write_text(
            "\n".join(json.dumps({**line, "amount": work.amount * k, "wall_s": 3.0 * k}) for k in (1, 2, 9))
            + '\n{"torn'
        )
        assert History("cpu").estimate(work).wall_s == pytest.approx(3.0)
        assert History("cpu").estimate(work).units == 3
        assert History("cuda").estimate(work).wall_s is None
        other = next(work for work in graph.distil.values() if work.method != "dm")
        assert History("cpu").estimate(other).wall_s is None, "one method's rate is not another's"


class TestPublished:
    def cell(self, **changes: Any) -> Cell:
        values: dict[str, Any] = {
            "method": "datadam",
            "name": "datadam",
            "dataset": "cifar10",
            "num_classes": 10,
            "size": ("ipc", 1),
            "protocol": "hard",
            "arch": "convnet3",
            "target": "cifar10",
            "teacher": None,
            "augment": None,
            "settings": None,
            "keys": (),
            "source": Source(),
        }
        return Cell(**{**values, **changes})

    def value(self, **changes: Any) -> float | None:
        number = find(read_numbers(), self.cell(**changes))
        return None if number is None else number.value

    def test_all_numbers_are_read(self) -> None:
        numbers = read_numbers()
        assert len(numbers) == 950
        assert len({(number.paper, number.table) for number in numbers}) == 34

    def test_cells_find_their_numbers(self) -> None:
        assert self.value() == 32.0
        assert self.value(name="mmd_pixel", size=("ipc", 50)) == 50.9
        assert self.value(size=("ipc", 2)) is None
        assert self.value(dataset="digits", target="digits") is None
        assert self.value(name="dm", arch="densenet_cifar", size=("ipc", 50)) == 57.4
        source = Source(paper="dsdm", table="Table 1")
        assert self.value(name="dm", size=("ipc", 10), source=source) == 48.9
        assert self.value(source=source) is None, "DataDAM is not in that table"

    def test_boost_counts_images_and_supervised_sets_count_as_their_images(self) -> None:
        fields = {"dataset": "cifar100", "target": "cifar10", "num_classes": 100, "protocol": "linear"}
        source = Source(paper="boost_ssdd", table="Table 1")
        assert self.value(name="boost_ssdd", size=("budget", 100), source=source, **fields) == 76.83
        assert self.value(name="dm", size=("ipc", 1), source=source, arch="vgg11", **fields) == 28.37
        assert self.value(name="kmeans_ssl", size=("budget", 100), arch="mobilenet_v2", **fields) == 33.53

    def test_settings_and_teachers_tell_ablations_and_students_apart(self) -> None:
        fields = {
            "name": "d3hr",
            "dataset": "imagenet",
            "target": "imagenet",
            "num_classes": 1000,
            "size": ("ipc", 10),
        }
        table = Source(paper="d3hr", table="Table 2")
        soft = {"protocol": "soft", "source": table}
        assert self.value(**fields, **soft, teacher="vgg11", arch="mobilenet_v2") == 37.8
        assert self.value(**fields, **soft, teacher="mobilenet_v2", arch="vgg11") == 24.8
        source = Source(paper="d3hr", table="Table 3", setting="L_mu only")
        assert self.value(**fields, protocol="soft", arch="resnet18", source=source) == 42.6
        stated = Source(paper="d3hr", table="Table A10", setting="m=1e5; arch not stated")
        assert (
            self.value(name="d3hr", size=("ipc", 10), arch="resnet18", protocol="soft", source=stated) == 40.4
        )

    def test_differences_are_in_standard_errors_of_both(self) -> None:
        number = find(read_numbers(), self.cell())
        assert number is not None
        comparison = compare(number, 0.35, 0.004)
        assert comparison["accuracy_mean"] == pytest.approx(0.32)
        assert comparison["difference"] == pytest.approx(0.03)
        assert comparison["difference_se"] == pytest.approx(0.03 / math.sqrt(0.004**2 + 0.012**2))
        assert compare(number, 0.35, None)["difference_se"] is None
        printed = replace(number, std=None)
        without_std = compare(printed, 0.35, 0.004)
        assert (without_std["difference_se"], without_std["difference"]) == (None, pytest.approx(0.03)), (
            "it is not exact"
        )

    def test_without_a_table_only_numbers_of_the_same_protocol_are_taken(self) -> None:
        fields = {"name": "d3hr", "size": ("ipc", 10), "arch": "resnet18"}
        assert self.value(**fields, protocol="soft", teacher="resnet18") == 41.3
        assert self.value(**fields, protocol="soft") == 41.3, "the protocol's own teacher"
        assert self.value(**fields, protocol="soft", teacher="vgg11") is None
        assert self.value(**fields) is None, "hard labels are in Table 5 alone, of ImageNet"
        for name in ("rded", "sre2l"):
            assert self.value(name=name, size=("ipc", 10), arch="resnet18") is None
            assert self.value(name=name, size=("ipc", 10), arch="resnet18", protocol="soft") is not None
        plain = {"name": "dm", "size": ("ipc", 10)}
        assert [self.value(**plain, protocol=one) for one in ("hard", "robust")] == [48.9, 48.9]
        assert [self.value(**plain, protocol=one) for one in ("soft", "continual")] == [None, None]

    def test_a_convnet_without_a_width_is_the_papers_plain_one(self) -> None:
        source = Source(paper="d3hr", table="Table A6")
        fields: dict[str, Any] = {"name": "d3hr", "source": source}
        assert self.value(size=("ipc", 10), **fields) == 57.3
        assert self.value(size=("ipc", 50), **fields) == 69.3
        big = {"dataset": "cifar100", "target": "cifar100", "num_classes": 100}
        assert self.value(size=("ipc", 50), **fields, **big) == 54.6

    @pytest.mark.parametrize("figure", [1, 4, 5, 6, 12, 13])
    def test_ablations_are_not_compared_with_the_methods_own_number(self, figure: int) -> None:
        bench_spec = read_spec(ROOT / "configs" / "bench" / f"datadam_fig{figure}.yaml")
        assert self.value(size=("ipc", 10)) == 54.2
        assert self.value(size=("ipc", 10), source=bench_spec.published) is None

    def test_the_standard_error_is_over_sets(self) -> None:
        assert standard_error([[0.5, 0.7], [0.8, 1.0]]) == pytest.approx(
            statistics.stdev([0.6, 0.9]) / 2**0.5
        )
        assert standard_error([[0.5, 0.7, 0.9]]) == pytest.approx(0.2 / 3**0.5)
        assert standard_error([[0.5]]) is None


@pytest.mark.skipif(not FILES, reason="the wheel ships them")
class TestFiles:
    @pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
    @pytest.mark.parametrize("scale", ["smoke", "cpu", "paper"])
    def test_a_shipped_file_parses_and_its_graph_is_listed(self, path: Path, scale: str) -> None:
        result = dry_run(read_spec(path, scale), BenchOptions(scale=scale), run_dir=None)
        assert result["num_units"] > 0

    def test_skips_name_rows_and_leave_one(self) -> None:
        with pytest.raises(InputError, match="skip must name rows, got 'rando'; did you mean 'random'"):
            spec(skip=["rando"])
        with pytest.raises(InputError, match="at least one row must be left"):
            spec(skip=["random", "dm"])
        with pytest.raises(InputError, match="at least 1 item"):
            spec(methods=[{"name": "dm", "sweep": {"method.lr_img": []}}])

    @pytest.mark.slow
    @pytest.mark.timeout(1800)
    @pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
    def test_a_shipped_file_runs_at_its_smallest_scale(self, path: Path, tmp_path: Path) -> None:
        result = run(tmp_path / "run", read_spec(path, "smoke"), scale="smoke")
        assert result["cells"]
        assert result["failures"] == []

    @pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
    def test_a_shipped_file_opens_with_command_numbers_and_cost(self, path: Path) -> None:
        head = [line for line in path.read_text().splitlines() if line.startswith("#")]
        assert head[0] == f"# ddray bench configs/bench/{path.name}"
        assert any(line.startswith("# Expected: ") for line in head)
        assert any(line.startswith("# Cost: ") for line in head)

    @pytest.mark.parametrize("scale", ["smoke", "cpu", "paper"])
    def test_the_leaderboard_scores_every_method_by_one_recipe(self, scale: str) -> None:
        bench_spec = read_spec(ROOT / "configs" / "bench" / "leaderboard.yaml", scale)
        assert {(one.recipe, one.augment) for one in bench_spec.evaluate} == {("vico", "dsa")}
        hard = [one for one in bench_spec.evaluate if one.protocol == "hard"]
        assert [one.protocol for one in bench_spec.evaluate] == ["hard"] * len(hard) + ["robust"]
        scored = [(name, one.archs) for one in hard for name in bench_spec.scored(one)]
        # Narrower networks where images are larger, to finish on two cores; one network per dataset.
        narrow = ("convnet3_w64",) if scale == "cpu" else ("auto",)
        archs = {"digits": ("auto",), "mnist": narrow, "cifar10": narrow}
        assert scored == [(name, archs[name]) for name in bench_spec.dataset]
        assert bench_spec.dataset == (("digits",) if scale == "smoke" else ("digits", "mnist", "cifar10"))
        rows = {row.name for row in bench_spec.rows()}
        unlabelled = {"krr_st", "boost_ssdd", "random_ssl", "kmeans_ssl"}
        assert rows == {*method_names()} - unlabelled, "the header says which are left out"
