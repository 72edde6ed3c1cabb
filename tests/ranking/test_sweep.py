from __future__ import annotations

import io
import itertools
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console

from ddray.commands.display import nas_tables
from ddray.data import Dataset, open_dataset
from ddray.errors import DdrayError, InputError
from ddray.jobs import distill as api
from ddray.jobs.plan import resolve
from ddray.nets import Net
from ddray.ranking import command as rank
from ddray.ranking.convnet720 import ConvNet720
from ddray.ranking.nasbench201 import NasBench201
from ddray.ranking.options import NasRequest
from ddray.ranking.result import NasResult
from ddray.ranking.sweep import (
    NasConfig,
    NasOptions,
    choose_architectures,
    patience,
    resolve_config,
)
from ddray.ranking.training import train_seeds
from ddray.ranking.worker import NasTask, SweepData, SweepJob, Workbench, run_task, truth_ledger
from ddray.runs.executor import LocalExecutor
from ddray.runs.ledger import Ledger

CPU = torch.device("cpu")
SMALL = {"recipe": {"batch": 1024, "augment": "none"}}


@pytest.fixture(scope="session")
def proxies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two distilled sets of digits: one without val, one from all of train."""
    folder = tmp_path_factory.mktemp("proxies")
    paths = {}
    for method, ipc, val_seed in (("class_mean", 1, 0), ("random", 2, None)):
        plan = resolve(method, open_dataset("digits"), ipc=ipc)
        path = folder / f"{method}.pt"
        api.distill(plan, device=CPU, run_dir=folder / method, out=path, val_seed=val_seed)
        paths[method] = path
    return paths


@pytest.fixture(autouse=True)
def small_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample from the 48 cheapest ConvNets: seconds, not minutes."""

    def drawn(nas_options: NasOptions, config: NasConfig, dataset: Dataset) -> tuple[int, ...]:
        indices = choose_architectures(nas_options, config, dataset)
        if nas_options.space != "convnet720":
            return indices
        space = ConvNet720()
        cheap = sorted(range(len(space)), key=lambda index: space.cost(index, (1, 16, 16), 10))
        return tuple(sorted(cheap[:: max(1, 48 // len(indices))][: len(indices)]))

    monkeypatch.setattr(rank, "choose_architectures", drawn)


def options(**overrides: Any) -> NasOptions:
    return NasOptions(**{"sample": 4, "epochs": 1, "executor": "local", **overrides})


def config_of(nas_options: NasOptions) -> NasConfig:
    return resolve_config(nas_options, (SMALL,))


def run(folder: Path, paths: Sequence[Path], *, resume: bool = False, **overrides: Any) -> dict[str, Any]:
    request = {name: overrides.pop(name) for name in ("baselines", "compat") if name in overrides}
    nas_options = options(**overrides)
    return rank.run_nas(
        NasRequest(proxies=tuple(paths), **request),
        nas_options,
        config_of(nas_options),
        LocalExecutor(),
        run_dir=folder,
        resume=resume,
    ).dump()


def test_a_sweep_ranks_and_reports(
    tmp_path: Path, proxies: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    out = run(folder, list(proxies.values()), seeds=2, baselines=("early-stopping", "random"))
    assert out["num_archs"] == 4
    assert [figures["proxy"] for figures in out["proxies"]] == [
        "class_mean.pt",
        "random.pt",
        "early-stopping (1 steps)",
        "random (ipc 1)",
        "random (ipc 2)",
    ]
    assert [figures["storage_images"] for figures in out["proxies"]] == [10, 20, 1293, 10, 20]
    assert "random.pt: may have been distilled from val images" in caplog.text
    assert "class_mean.pt" not in caplog.text
    rows = Ledger(folder).rows()
    assert len([row for row in rows if row.kind == "nas"]) == 4 * 2 * 5
    assert len([row for row in rows if row.kind == "truth"]) == 4
    table = pd.read_csv(folder / "results.csv")
    assert list(table.columns)[-1] == "truth_test_accuracy"
    assert sum("test" in name for name in table.columns) == 1
    # The table's accuracies are the means of the rows over seeds, ranked by val.
    proxy_table = table[table["proxy"] == "random.pt"].set_index("index")
    for index, line in proxy_table.iterrows():
        values = [
            row.result["val_accuracy"]
            for row in rows
            if row.kind == "nas" and row.spec["index"] == index and row.spec["proxy"] == "random.pt"
        ]
        assert len(values) == line["num_seeds"] == 2
        assert line["proxy_accuracy"] == pytest.approx(np.mean(values))
    figures = out["proxies"][1]
    first = proxy_table.sort_values(["proxy_rank", "truth_rank"]).iloc[0]
    assert (
        figures["top1_truth_accuracy"]
        <= figures["best_truth_accuracy"]
        == proxy_table["truth_accuracy"].max()
    )
    assert first["proxy_rank"] == 1
    assert (folder / "results.parquet").is_file()
    assert (folder / "scatter.png").is_file()
    assert "random.pt" in (folder / "report.html").read_text()

    stamps = {path: path.stat().st_mtime_ns for path in (folder / "ledger").iterdir()}
    again = run(folder, list(proxies.values()), seeds=2, baselines=("early-stopping", "random"), resume=True)
    assert [p["spearman"] for p in again["proxies"]] == [p["spearman"] for p in out["proxies"]]
    assert {path: path.stat().st_mtime_ns for path in (folder / "ledger").iterdir()} == stamps


def test_truth_is_trained_once_for_all_runs(
    tmp_path: Path, proxies: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "one", [proxies["random"]])
    assert len(truth_ledger().rows("truth")) == 4
    trained: list[str] = []

    def spy(job: SweepJob, data: SweepData, task: NasTask) -> None:
        trained.append(task.units[0].kind)
        run_task(job, data, task)

    monkeypatch.setattr("ddray.ranking.sweep.run_task", spy)
    run(tmp_path / "two", [proxies["class_mean"]])
    assert trained == ["nas"] * 4
    assert len(Ledger(tmp_path / "two").rows("truth")) == 4
    run(tmp_path / "three", [proxies["random"]], truth_epochs=2)
    assert trained == ["nas"] * 4 + ["truth", "nas"] * 4 or sorted(trained[4:]) == ["nas"] * 4 + ["truth"] * 4


@pytest.mark.parametrize("second", ["b/run", "a/run"])
def test_sweeps_in_one_process_train_on_their_own_images(
    tmp_path: Path, proxies: dict[str, Path], second: str
) -> None:
    """Equal basenames, or a folder that was deleted and recreated: no sweep uses the other's data."""
    for folder, method, num_images in (("a/run", "class_mean", 10), (second, "random", 20)):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
        proxy = tmp_path / method / "set.pt"
        proxy.parent.mkdir()
        shutil.copyfile(proxies[method], proxy)
        run(tmp_path / folder, [proxy], sample=1, truth=_csv(tmp_path))
        (row,) = Ledger(tmp_path / folder).rows("nas")
        assert row.result["num_images"] == num_images


def _csv(folder: Path) -> str:
    """Write a truth for all 720 architectures, so that none is trained on the whole set."""
    path = folder / "truth.csv"
    lines = [f"{index},{0.5 + index / 2000}" for index in range(720)]
    path.write_text("\n".join(["index,accuracy", *lines, ""]))
    return str(path)


def test_a_broken_test_set_costs_the_last_column_alone(
    tmp_path: Path,
    proxies: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(self: Dataset) -> Any:
        raise InputError("the test file is torn")

    with monkeypatch.context() as patch:
        patch.setattr(Dataset, "test", broken)
        out = run(tmp_path / "run", [proxies["random"]])
    assert out["num_failed"] == 0
    assert "no test column: the test file is torn" in caplog.text
    assert pd.read_csv(tmp_path / "run" / "results.csv")["truth_test_accuracy"].isna().all()

    # The failure does not affect runs that can read test.
    run(tmp_path / "next", [proxies["random"]])
    assert pd.read_csv(tmp_path / "next" / "results.csv")["truth_test_accuracy"].notna().all()


def test_a_crashing_unit_is_tried_again_then_marked(
    tmp_path: Path, proxies: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, int] = {}
    broken: list[int] = []

    def fragile(job: SweepJob, data: SweepData, task: NasTask) -> None:
        seen[task.key] = seen.get(task.key, 0) + 1
        if not broken and task.units[0].kind == "nas":
            broken.append(task.index)
        if task.units[0].kind == "nas" and task.index == broken[0]:
            raise MemoryError("no memory for this one")
        if seen[task.key] == 1:
            raise RuntimeError("a first try fails")
        run_task(job, data, task)

    monkeypatch.setattr("ddray.ranking.sweep.run_task", fragile)
    folder = tmp_path / "run"
    out = run(folder, [proxies["random"]])
    assert out["num_failed"] == 1
    assert out["proxies"][0]["num_failed"] == 1
    assert out["proxies"][0]["num_archs"] == 3
    (failed,) = [row for row in Ledger(folder).rows() if row.status == "failed"]
    assert failed.result == {"attempts": 3}
    assert failed.error == "no memory for this one"
    events = [event["event"] for event in Ledger(folder).events() if event["key"] == failed.key]
    assert events == ["start", "retry", "retry", "fail"]
    table = pd.read_csv(folder / "results.csv")
    assert table["failed"].sum() == 1
    # A failed row is final: nothing is rerun.
    seen.clear()
    run(folder, [proxies["random"]], resume=True)
    assert not seen


def test_a_proxy_on_which_nothing_finishes_costs_its_own_figures_alone(
    tmp_path: Path, proxies: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = {"random.pt"}

    def fragile(job: SweepJob, data: SweepData, task: NasTask) -> None:
        if task.units[0].spec["proxy"] in broken:
            raise MemoryError("no memory for this one")
        run_task(job, data, task)

    monkeypatch.setattr("ddray.ranking.sweep.run_task", fragile)
    folder = tmp_path / "run"
    out = run(folder, [proxies["random"], proxies["class_mean"]], truth=_csv(tmp_path))
    bad, good = out["proxies"]
    assert (bad["num_archs"], bad["num_failed"], good["num_archs"]) == (0, 4, 4)
    assert bad["spearman"] is bad["top1_truth_accuracy"] is bad["kendall"] is None
    assert bad["best_truth_accuracy"] == good["best_truth_accuracy"]
    table = pd.read_csv(folder / "results.csv").set_index("proxy")
    assert table.loc["random.pt", "failed"].all()
    assert table.loc["class_mean.pt", "proxy_accuracy"].notna().all()
    assert (folder / "scatter.png").is_file()
    assert "random.pt" in (folder / "report.html").read_text()
    Console(file=io.StringIO()).print(*nas_tables(NasResult.parse(out)))

    broken.add("class_mean.pt")
    with pytest.raises(DdrayError, match="no memory for this one"):
        run(tmp_path / "none", [proxies["random"], proxies["class_mean"]], truth=_csv(tmp_path))
    assert pd.read_csv(tmp_path / "none" / "results.csv")["failed"].all()
    assert (tmp_path / "none" / "report.html").is_file()


CIFAR10_TRUTH: dict[str, Any] = {"truth": "table", "truth_column": "cifar10_test_200_mean"}
VARIANTS = ["softmax over one-hot", "softmax, one_hot cut", "unshuffled", "all three"]


def test_dcbench_bugs_are_proxies_of_their_own(tmp_path: Path, proxies: dict[str, Path]) -> None:
    settings = {"space": "nasbench201", "sample": 3, "compat": "dcbench", **CIFAR10_TRUTH}
    out = run(tmp_path / "run", [proxies["random"]], **settings)
    assert [figures["proxy"] for figures in out["proxies"]] == [
        "random.pt",
        *(f"random.pt [{label}]" for label in VARIANTS),
    ]
    assert len(Ledger(tmp_path / "run").rows("nas")) == 15
    assert out["proxies"][0]["best_truth_accuracy"] > 0.5


def test_every_dcbench_bug_makes_another_network(
    proxies: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For files and image baselines; early stopping is not part of the harness."""
    trained: list[torch.Tensor] = []

    def spy(nets: Sequence[Net], *rest: Any, **options: Any) -> str:
        mode = train_seeds(nets, *rest, **options)
        trained.append(nets[0](torch.linspace(-1, 1, 256).view(1, 1, 16, 16).expand(4, 1, 16, 16)).detach())
        return mode

    monkeypatch.setattr("ddray.ranking.worker.train_seeds", spy)
    nas_options = NasOptions(space="nasbench201", sample=1, epochs=2, executor="local", **CIFAR10_TRUTH)
    config = resolve_config(nas_options, ({"recipe": {"batch": 4}, "whole_epochs": 1},))
    request = NasRequest(
        proxies=(proxies["random"],), baselines=("random", "early-stopping"), compat="dcbench"
    )
    sweep = rank.prepare(request, nas_options, config)
    names = [proxy.name for proxy in sweep.proxies]
    bases = ["random.pt", "random (ipc 2)"]
    assert names == [
        *bases,
        "early-stopping (10 steps)",
        *(f"{base} [{label}]" for base in bases for label in VARIANTS),
    ]
    # Only none and skip_connect occur: one_hot's width, the highest op plus 1, is cut to 2 of 5.
    index = NasBench201().index_of("|skip_connect~0|+|skip_connect~0|none~1|+|none~0|skip_connect~1|none~2|")
    planned = replace(sweep, indices=(index,)).tasks(fused=False)
    tasks = {task.units[0].spec["proxy"]: task for task in planned}
    bench = Workbench(sweep.data(planned), CPU)
    for base in bases:
        trained.clear()
        for name in (base, *(f"{base} [{label}]" for label in VARIANTS)):
            bench.run(tasks[name])
        assert len(trained) == 5
        for one, other in itertools.combinations(trained, 2):
            assert (one - other).abs().max() > 1e-3


def test_cost_orders_tasks_longest_first(proxies: dict[str, Path], tmp_path: Path) -> None:
    nas_options = options(sample=8)
    sweep = rank.prepare(NasRequest(proxies=(proxies["random"],)), nas_options, config_of(nas_options))
    tasks = sweep.tasks(fused=False)
    costs = [task.cost for task in tasks]
    assert costs == sorted(costs, reverse=True)
    assert len({task.key for task in tasks}) == len(tasks) == 16
    fused = rank.prepare(
        NasRequest(proxies=(proxies["random"],)), options(sample=8, seeds=3), config_of(nas_options)
    ).tasks(fused=True)
    assert sorted(len(task.units) for task in fused) == [1] * 8 + [3] * 8


@pytest.mark.parametrize("is_open", [True, False])
def test_networks_that_see_mirrored_images_are_units_of_their_own(
    is_open: bool, proxies: dict[str, Path]
) -> None:
    nas_options, dataset = options(sample=2), open_dataset("digits") if is_open else None
    requests = [NasRequest(proxies=(proxies["random"],), can_flip=can_flip) for can_flip in (None, True)]
    plain, flipped = (
        rank.prepare(request, nas_options, config_of(nas_options), dataset=dataset) for request in requests
    )
    assert plain.dataset.fingerprint == flipped.dataset.fingerprint
    assert (plain.dataset.can_flip, flipped.dataset.can_flip) == (False, True)
    one, other = ({task.key for task in sweep.tasks(fused=False)} for sweep in (plain, flipped))
    assert len(one) == len(other) == 4
    assert one.isdisjoint(other)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sample": 721}, ["720", "721"]),
        ({"truth": "nofile.csv"}, ["nofile.csv"]),
        ({"truth": "table"}, ["nasbench201"]),
        ({"truth": "api:any.pth"}, ["nasbench201"]),
        ({"baselines": ("datadam",)}, ["datadam", "--proxy"]),
        ({"baselines": ("randon",)}, ["randon", "random"]),
        ({"baselines": ("random", "random")}, ["--baseline", "random", "2 times"]),
        ({"compat": "dcbench"}, ["nasbench201"]),
    ],
)
def test_bad_input_is_one_line_before_anything_is_made(
    tmp_path: Path,
    proxies: dict[str, Path],
    change: dict[str, Any],
    words: list[str],
) -> None:
    with pytest.raises(InputError) as caught:
        run(tmp_path / "run", [proxies["random"]], **change)
    assert all(word in str(caught.value) for word in words), caught.value
    assert not (tmp_path / "run").exists()


def test_the_same_proxy_twice_is_refused(tmp_path: Path, proxies: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="once"):
        run(tmp_path / "run", [proxies["random"], proxies["random"]])


def test_a_file_called_as_a_baseline_is(tmp_path: Path, proxies: dict[str, Path]) -> None:
    """A file named like a baseline keeps its own images; with that baseline present it is an error."""
    path = tmp_path / "whole"
    shutil.copyfile(proxies["random"], path)
    nas_options = options()
    sweep = rank.prepare(
        NasRequest(proxies=(path,), baselines=("early-stopping",)), nas_options, config_of(nas_options)
    )
    data = sweep.data(sweep.tasks(fused=False))
    assert [len(data.sets[proxy.set_name].labels) for proxy in sweep.proxies] == [20, 1293]
    with pytest.raises(InputError, match="2 are called whole; use --proxy NAME=FILE"):
        rank.prepare(NasRequest(proxies=(path,), baselines=("whole",)), nas_options, config_of(nas_options))


def test_resume_under_another_proxy_is_refused(tmp_path: Path, proxies: dict[str, Path]) -> None:
    run(tmp_path / "run", [proxies["random"]], sample=1)
    with pytest.raises(InputError, match="proxies"):
        run(tmp_path / "run", [proxies["class_mean"]], sample=1, resume=True)


def test_config_layers() -> None:
    nas_options = NasOptions(epochs=7, truth_epochs=9)
    config = resolve_config(nas_options, ({"recipe": {"lr": 0.1, "epochs": 8}},))
    assert (config.recipe.epochs, config.truth_recipe.epochs) == (8, 9)
    assert config.recipe.lr == config.truth_recipe.lr == 0.1
    with pytest.raises(InputError, match=r"cells\.\* needs --space nasbench201, got --space convnet720"):
        resolve_config(nas_options, ({"cells": {"channels": 8}},))
    with pytest.raises(InputError, match=r"--truth-column needs .* got accuracy"):
        NasOptions.parse({"truth_column": "accuracy"})
    config = resolve_config(NasOptions(space="nasbench201"), ({"truth_recipe": {"lr": 0.2}},))
    assert (config.recipe.lr, config.truth_recipe.lr, config.recipe.clip) == (0.025, 0.2, 5.0)


def test_dcbench_trains_the_whole_set_as_a_proxy_for_10_epochs(proxies: dict[str, Path]) -> None:
    """50 epochs on a distilled set, 10 on the whole one, unless the user sets the epochs."""

    def epochs(layer: dict[str, Any], **overrides: Any) -> int:
        return resolve_config(NasOptions(**overrides), (layer,)).whole_recipe().epochs

    cells = {"space": "nasbench201"}
    assert epochs({}, **cells) == 10
    assert epochs({}, epochs=3, **cells) == epochs({"recipe": {"epochs": 3}}, **cells) == 3
    assert epochs({"whole_epochs": 7}, epochs=3, **cells) == 7
    assert epochs({}) == 200
    nas_options = NasOptions(sample=2, executor="local", **CIFAR10_TRUTH, **cells)
    request = NasRequest(proxies=(proxies["random"],), baselines=("whole",))
    sweep = rank.prepare(request, nas_options, resolve_config(nas_options))
    assert [proxy.num_steps for proxy in sweep.proxies] == [None, 10 * math.ceil(1293 / 64)]


def test_patience_grows_with_what_a_task_holds(proxies: dict[str, Path]) -> None:
    nas_options = options(sample=8, seeds=3, truth="some.csv")
    sweep = rank.prepare(NasRequest(proxies=(proxies["random"],)), nas_options, config_of(nas_options))
    tasks = sweep.tasks(fused=True)
    assert patience(options(unit_timeout=60.0), tasks) == 180.0
    assert patience(nas_options, tasks) == 7200.0
    long = [replace(task, cost=1e9) for task in tasks]
    assert patience(nas_options, long) == 1e6 > patience(options(gpus_per_worker=1), long) == 20_000.0


def test_workers_leave_shared_arrays_alone(proxies: dict[str, Path], tmp_path: Path) -> None:
    """A worker's arrays are the object store's own memory (docs/ray.md, 11)."""
    nas_options = options(sample=1, truth="whole")
    sweep = rank.prepare(NasRequest(proxies=(proxies["random"],)), nas_options, config_of(nas_options))
    tasks = sweep.tasks(fused=False)
    data = sweep.data(tasks)
    arrays = [data.val[0], *(train_set.images for train_set in data.sets.values())]
    before = [array.copy() for array in arrays]
    folder = tmp_path / "run"
    Ledger(folder).folder.mkdir(parents=True)
    epoch = Ledger(folder).open_epoch()
    for task in tasks:
        run_task(SweepJob(str(folder), epoch, "x", "cpu"), data, task)
    assert all(np.array_equal(a, b) for a, b in zip(arrays, before, strict=True))
    assert json.loads((folder / "epoch").read_text()) == 1
