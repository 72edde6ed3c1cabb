"""`ddray evaluate` in a run folder: rows, resumes, failures, and the same numbers as without one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ddray
from ddray.cli import main
from ddray.cluster.resources import with_gpus
from ddray.errors import DdrayError, DivergedError, InputError, InterruptedRunError
from ddray.evaluation.hard import Hard
from ddray.evaluation.options import EvaluateOptions, EvaluateResult, EvaluateRunOptions
from ddray.jobs import score_run, score_units
from ddray.jobs.distill import distill
from ddray.jobs.plan import resolve
from ddray.jobs.score import evaluate
from ddray.jobs.score_run import evaluate_in_run
from ddray.runs.costs import History, costs_file
from ddray.runs.executor import LocalExecutor
from ddray.runs.ledger import Ledger
from tests.evaluation.test_evaluate import toy_net
from tests.jobs.elsewhere import Elsewhere

CPU = torch.device("cpu")
ARCHS = ("convnet1_w8", "convnet2_w8")
LAYER = {"arch": "convnet1_w8", "compile": "off", "evaluate": {"epochs": 1, "seeds": 2}}
SETS = {
    "soft": ("teacher.epochs=20", "teacher.lr=0.05"),
    "linear": ("probe.steps=2",),
    "distribution": (),
}


@pytest.fixture
def path(digits: Any, tmp_path: Path) -> Path:
    plan = resolve("random", digits, ipc=1, seed=3, layers=[LAYER])
    distill(plan, device=CPU, run_dir=tmp_path / "random", out=tmp_path / "set.pt")
    return tmp_path / "set.pt"


def quick(**options: Any) -> EvaluateOptions:
    return EvaluateOptions(**{"seeds": 2, "epochs": 1, "archs": ARCHS, **options})


def run(path: Path, folder: Path, options: EvaluateOptions, **how: Any) -> EvaluateResult:
    executor = Elsewhere() if how.pop("elsewhere", False) else LocalExecutor()
    where = EvaluateRunOptions(run_dir=folder, **how)
    return evaluate_in_run(path, options, where, executor, device="cpu")


def plain(result: EvaluateResult) -> dict[str, Any]:
    """Return a result without what differs from run to run, and what only runs in a folder have."""
    values = result.dump()
    for name in ("run_dir", "num_failed", "failures"):
        values.pop(name, None)
    for one in values["results"]:
        one.pop("wall_s")
        one.pop("peak_memory_bytes", None)
    return values


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_row_per_network_and_the_numbers_of_one_process(
    elsewhere: bool, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluate(path, quick(), device=CPU)
    parallel = {"elsewhere": True, "max_concurrent": 2} if elsewhere else {}

    result = run(path, tmp_path / "scores", quick(), **parallel)

    assert plain(result) == plain(expected)
    assert all(one["peak_memory_bytes"] > 1e6 for one in result["results"])
    rows = Ledger(tmp_path / "scores").rows("evaluate")
    assert len(rows) == 4
    assert {(row.result["arch"], row.spec["seed"]) for row in rows} == {(a, s) for a in ARCHS for s in (0, 1)}
    assert (result["run_dir"], result["num_failed"]) == (str(tmp_path / "scores"), 0)
    assert {"results.csv", "evaluate.json", "config.yaml"} <= {
        p.name for p in (tmp_path / "scores").iterdir()
    }
    monkeypatch.setattr(score_run, "prepare_task", None)  # nothing is prepared or trained again
    monkeypatch.setattr(score_run, "score_task", None)
    again = run(path, tmp_path / "scores", quick(), resume=True)
    assert again.dump() == result.dump()


def test_a_resume_trains_what_is_missing(path: Path, tmp_path: Path) -> None:
    first = run(path, tmp_path / "scores", quick())
    ledger = Ledger(tmp_path / "scores")
    *others, last = ledger.rows()
    before = {row.key: ledger._path(row.key).stat().st_mtime_ns for row in others}
    ledger._path(last.key).unlink()

    again = run(path, tmp_path / "scores", quick(), resume=True, elsewhere=True, max_concurrent=2)

    assert plain(again) == plain(first)
    assert {key: ledger._path(key).stat().st_mtime_ns for key in before} == before
    starts = [event["key"] for event in ledger.events() if event["event"] == "start"]
    assert sorted(starts) == sorted([*before, last.key, last.key])


@pytest.mark.parametrize("protocol", ["soft", "linear", "robust", "continual", "distribution"])
def test_every_protocol_gives_the_same_as_in_one_process(protocol: str, path: Path, tmp_path: Path) -> None:
    options = quick(protocol=protocol, archs=("convnet1_w8",), sets=SETS.get(protocol, ()))
    if protocol == "soft":
        options = options.model_copy(update={"teachers": ("convnet1_w8",)})

    result = run(path, tmp_path / "scores", options, elsewhere=True, max_concurrent=2)

    assert plain(result) == plain(evaluate(path, options, device=CPU))
    assert len(Ledger(tmp_path / "scores").rows("evaluate")) == 2


def diverging(monkeypatch: pytest.MonkeyPatch, *seeds: int) -> list[list[int]]:
    """Let trainings of these seeds diverge; return what was trained together."""
    trained: list[list[int]] = []
    together = Hard.evaluate_together

    def evaluate_together(self: Hard, *args: Any, seeds: Any, **options: Any) -> Any:
        trained.append(list(seeds))
        if bad & {*seeds}:
            raise DivergedError("training diverged")
        return together(self, *args, seeds=seeds, **options)

    bad = set(seeds)
    monkeypatch.setattr(Hard, "evaluate_together", evaluate_together)
    return trained


def test_a_network_that_diverges_leaves_the_others(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    diverging(monkeypatch, 1)
    command = (
        f"evaluate {path} --seeds 2 --epochs 1 --arch convnet1_w8 --device cpu --run-dir {tmp_path / 'a'}"
    )

    with pytest.raises(SystemExit) as stopped:
        main(command.split())

    assert stopped.value.code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: 1 networks failed, among them convnet1_w8 seed 1: training diverged")
    assert [row.status for row in Ledger(tmp_path / "a").rows()].count("failed") == 1
    diverging(monkeypatch, 0, 1)
    with pytest.raises(DdrayError, match="no network was scored: training diverged"):
        run(path, tmp_path / "b", quick(archs=("convnet1_w8",)))


def test_a_crashed_network_is_tried_again_on_a_resume(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score_task = score_units.score_task

    def crash(job: Any, data: Any, task: Any) -> None:
        if task.arch == ARCHS[1]:
            raise RuntimeError("the worker died")
        score_task(job, data, task)

    monkeypatch.setattr(score_run, "score_task", crash)
    result = run(path, tmp_path / "scores", quick(seeds=1))
    assert [one["arch"] for one in result["results"]] == [ARCHS[0]]
    (failure,) = result["failures"]
    assert failure == {"unit": "convnet2_w8 seed 0", "reason": "failed 3 times; last: the worker died"}
    monkeypatch.setattr(score_run, "score_task", score_task)
    assert run(path, tmp_path / "scores", quick(seeds=1), resume=True)["num_failed"] == 0


def test_networks_trained_together_are_tried_one_by_one_where_one_diverges(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = quick(archs=("convnet1_w8",), seeds=3)
    run(path, tmp_path / "scores", options)  # for its units
    rows = sorted(Ledger(tmp_path / "scores").rows(), key=lambda row: row.spec["seed"])
    units = tuple(score_units.Unit(kind=row.kind, spec=row.spec) for row in rows)
    assert [unit.key for unit in units] == [row.key for row in rows]
    ledger = Ledger(tmp_path / "again")
    ledger.folder.mkdir(parents=True)
    sets, target = score_run.read_sets(path, options)
    scorer = score_units.Scorer.of(sets, target, options, CPU)
    job = score_units.ScoreJob(
        tmp_path / "again", 0, "token", target.name, target.fingerprint, options, "cpu"
    )
    diverging(monkeypatch, 1)

    task = score_units.ScoreTask(units, 0, "convnet1_w8")
    score_units._score_group(job, scorer, scorer.train_set(0), task)

    again = {row.spec["seed"]: row for row in ledger.rows()}
    assert [again[seed].status for seed in range(3)] == ["done", "failed", "done"]
    assert again[2].result["per_seed"] == rows[2].result["per_seed"]


def test_a_signal_says_how_to_resume(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(score_run, "score_task", interrupt)
    with pytest.raises(InterruptedRunError, match=r"run again with --run-dir .*scores --resume"):
        run(path, tmp_path / "scores", quick())


def test_what_is_refused_leaves_no_folder(path: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--num-tasks must be in 2\.\.10"):
        run(path, tmp_path / "tasks", quick(protocol="continual", num_tasks=11))
    with pytest.raises(InputError, match="--ipc is for sets that store statistics"):
        run(path, tmp_path / "ipc", quick(ipc=2))
    assert not (tmp_path / "tasks").exists()
    assert not (tmp_path / "ipc").exists()
    run(path, tmp_path / "scores", quick(seeds=1))
    with pytest.raises(InputError, match=r"changed: options\.epochs: 1 -> 2; use the old values"):
        run(path, tmp_path / "scores", quick(seeds=1, epochs=2), resume=True)
    with pytest.raises(InputError, match="exists; add --resume to continue it"):
        run(path, tmp_path / "scores", quick(seeds=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpus_per_unit": 2}, "--cpus-per-unit needs --max-concurrent N"),
        ({"gpus_per_unit": 1}, "--gpus-per-unit needs --max-concurrent N"),
        ({"max_concurrent": 0}, "--max-concurrent: input should be greater than or equal to 1"),
        ({"max_concurrent": 2, "device": "cuda:1"}, "--device must be left out, or cpu"),
        ({"max_concurrent": 2, "device": "cpu", "gpus_per_unit": 1}, "--gpus-per-unit must be 0"),
        ({"resume": True}, "--resume needs --run-dir"),
        ({"save": True, "archs": [lambda *_: toy_net()]}, "must have a name"),
    ],
)
def test_options_that_do_not_go_together(options: Any, message: str, path: Path) -> None:
    if "archs" in options:

        def network(image_shape: Any, num_classes: int) -> Any:
            return toy_net(pixels=256, classes=num_classes)

        network.__qualname__ = "some_network"
        options = {**options, "archs": [network]}
        message = "must have a name that other processes know, got the function some_network"
    with pytest.raises(InputError, match=message):
        ddray.evaluate(path, **options)


def test_a_dataset_that_workers_cant_open_is_refused(path: Path, digits: Any, tmp_path: Path) -> None:
    where = EvaluateRunOptions(run_dir=tmp_path / "scores", max_concurrent=2)
    for other in (replace(digits, name="/nowhere"), replace(digits, load_train=digits.load_test)):
        with pytest.raises(InputError, match="a dataset that workers can open by its name"):
            evaluate_in_run(path, quick(), where, Elsewhere(), device="cpu", dataset=other)
    assert not (tmp_path / "scores").exists()


def test_the_default_of_gpus_is_what_the_run_had(monkeypatch: pytest.MonkeyPatch) -> None:
    options = EvaluateRunOptions(max_concurrent=2)
    assert with_gpus(options, {"device": "cuda", "gpus_per_unit": 0.5}).gpus == 0.5
    assert with_gpus(options, {"device": "cpu"}).gpus == 0


def test_networks_count_for_estimates(path: Path, tmp_path: Path) -> None:
    run(path, tmp_path / "scores", quick())
    kinds = [json.loads(line)["kind"] for line in costs_file().read_text().splitlines()]
    assert kinds == ["distill", *["evaluate"] * 4]
    estimate = History("cpu").estimate({"kind": "evaluate", "what": "hard", "which": ARCHS[0]}, 1e6)
    assert estimate.units == 2
    assert estimate.wall_s is not None
    assert estimate.peak_memory_bytes is not None


def test_save_keeps_the_record_in_a_numbered_folder(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = ddray.evaluate(path, seeds=1, epochs=1, archs=["convnet1_w8"], save=True, device="cpu")
    assert Path(result["run_dir"]) == tmp_path / "runs" / "evaluate-0001"
    assert len(Ledger(tmp_path / "runs" / "evaluate-0001").rows("evaluate")) == 1
    assert "run_dir" not in ddray.evaluate(path, seeds=1, epochs=1, archs=["convnet1_w8"], device="cpu")
