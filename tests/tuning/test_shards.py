"""Trials in shards: the same sets and scores as without, in every part of a search."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ddray.cluster.pb2 import Member, run_segment
from ddray.data import SplitName, carve_val, search_rows
from ddray.data.pixels import pixel_space
from ddray.distillation.loop import Distillation
from ddray.distillation.shards import shard_classes
from ddray.errors import DivergedError
from ddray.jobs.plan import Plan, resolve
from ddray.runs.executor import LocalExecutor
from ddray.runs.ledger import Ledger
from ddray.tuning import shards
from ddray.tuning.payload import Payload, pack
from ddray.tuning.shards import Schedule, distil, distil_in_shards, run_in_shards, shard_checkpoint
from ddray.tuning.trial import publish_trial, run_trial, trial_unit
from ddray.tuning.worker import SearchJob, SearchWorker

SMALL = {"arch": "convnet2_w8", "compile": "off", "steps": 9, "evaluate": {"epochs": 2, "val_seeds": 1}}
PARAMS = {"lr_img": 0.5}


@pytest.fixture
def plan(digits: Any) -> Plan:
    return resolve("dm", digits, ipc=1, layers=[{**SMALL, "method": {"batch_real": 4}}])


@pytest.fixture
def payload(plan: Plan) -> Payload:
    train, val = carve_val(plan.dataset.train(), seed=0)
    space = pixel_space(plan.config.pixel_space, plan.dataset, train)
    rows = search_rows(plan.dataset.train(), seed=0)
    return pack(plan.dataset, train, str(SplitName(0)), val, space, rows)


def job_in(folder: Path, plan: Plan, num_shards: int = 0) -> SearchJob:
    folder.mkdir(exist_ok=True)
    return SearchJob(
        run_dir=str(folder),
        epoch=0,
        method="dm",
        ipc=1,
        seed=0,
        config=plan.config.dump(),
        budgets=(1, 3, 9),
        cpus=torch.get_num_threads(),
        gpus=0.0,
        shards=tuple(shard_classes(10, num_shards)) if num_shards else (),
    )


def sharded_trial(job: SearchJob, payload: Payload, reports: list[dict[str, Any]]) -> dict[str, Any]:
    unit = trial_unit(job, 1, PARAMS, payload.facts["fingerprint"])
    with LocalExecutor().workers() as workers:
        publish_trial(
            job, unit, reports.append, lambda: run_in_shards(workers, job, payload, unit, reports.append)
        )
    row = Ledger(Path(job.run_dir)).row(unit.key)
    assert row is not None
    return {"status": row.status, **row.result}


def test_a_trial_in_shards_reports_and_publishes_what_one_without_does(
    plan: Plan, payload: Payload, tmp_path: Path
) -> None:
    whole, parts = job_in(tmp_path / "whole", plan), job_in(tmp_path / "parts", plan, 3)
    expected: list[dict[str, Any]] = []
    run_trial(whole, payload, 1, PARAMS, expected.append)
    (row,) = Ledger(tmp_path / "whole").rows("trial")
    reports: list[dict[str, Any]] = []

    result = sharded_trial(parts, payload, reports)

    losses, expected_losses = ([report.pop("loss") for report in each] for each in (reports, expected))
    assert reports == expected
    assert len(reports) == 3
    assert losses == pytest.approx(expected_losses)
    pictures = [
        sorted(path.name for path in (tmp_path / name).rglob("rungs/*/*.png")) for name in ("whole", "parts")
    ]
    assert pictures[0] == pictures[1]
    assert len(pictures[0]) == 3
    assert result["rungs"] == row.result["rungs"]
    assert result["final_loss"] == pytest.approx(row.result["final_loss"])
    assert result["shards"] == 3
    assert result["device_seconds"] > 0
    assert result["peak_memory_bytes"] > 0
    assert not list((tmp_path / "parts" / "checkpoints").iterdir())


def test_a_resumed_trial_repeats_no_rung(
    plan: Plan, payload: Payload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, scored = job_in(tmp_path, plan, 2), list[int]()
    score_set = shards.score_set

    def counted(*arguments: Any) -> Any:
        scored.append(1)
        if len(scored) == 2:
            raise DivergedError("stop")
        return score_set(*arguments)

    monkeypatch.setattr(shards, "score_set", counted)
    assert sharded_trial(job, payload, [])["status"] == "failed"
    Ledger(tmp_path).withdraw(trial_unit(job, 1, PARAMS, payload.facts["fingerprint"]).key, "failed")

    result = sharded_trial(job, payload, [])

    assert result["status"] == "done"
    assert len(scored) == 4
    assert len(result["rungs"]) == 3


def test_a_diverged_shard_fails_its_own_trial(plan: Plan, payload: Payload, tmp_path: Path) -> None:
    job = job_in(tmp_path, plan, 2)
    schedules = {
        name: Schedule([{"until": 9, "params": {"lr_img": rate}}], None, job.checkpoint(name))
        for name, rate in (("good", 0.5), ("bad", 1e38))
    }

    with LocalExecutor().workers() as workers:
        results = distil_in_shards(workers, job, payload, schedules)

    assert isinstance(results["good"], Distillation)
    assert isinstance(results["bad"], DivergedError)


def test_schedules_and_clones_in_shards_give_the_bytes_of_those_without(
    plan: Plan, payload: Payload, tmp_path: Path
) -> None:
    job = job_in(tmp_path, plan, 3)
    worker, first, then = SearchWorker(job, payload), {"lr_img": 0.5}, {"lr_img": 2.0}
    segments = [{"until": 4, "params": first}, {"until": 9, "params": then}]
    expected = distil(worker, Schedule(segments, 7, tmp_path / "whole.pt")).distilled.images

    with LocalExecutor().workers() as workers:
        schedule = Schedule(segments, 7, tmp_path / "parts.pt")
        result = distil_in_shards(workers, job, payload, {"a": schedule})["a"]
        begun = Schedule(segments[:1], 7, tmp_path / "begun.pt")
        distil_in_shards(workers, job, payload, {"a": begun})
        clone = Schedule(segments[1:], 7, tmp_path / "clone.pt", source=tmp_path / "begun.pt")
        cloned = distil_in_shards(workers, job, payload, {"a": clone})["a"]

    assert isinstance(result, Distillation)
    assert torch.equal(result.distilled.images, expected)
    assert isinstance(cloned, Distillation)
    assert torch.equal(cloned.distilled.images, expected)
    assert shard_checkpoint(tmp_path / "clone.pt", job.shards[0]).is_file()


def test_a_pb2_segment_scores_what_its_shards_have_distilled(
    plan: Plan, payload: Payload, tmp_path: Path
) -> None:
    whole = job_in(tmp_path, plan)
    job = replace(whole, shards=tuple(shard_classes(10, 2)))
    member = Member(1, dict(PARAMS))
    run_segment(whole, payload, member, 4, tmp_path / "whole.json")
    schedule = Schedule([{"until": 4, "params": PARAMS}], None, tmp_path / "parts.pt")
    with LocalExecutor().workers() as workers:
        joined = distil_in_shards(workers, job, payload, {"1": schedule})["1"]

    run_segment(job, payload, member, 4, tmp_path / "parts.json", joined)
    run_segment(job, payload, member, 4, tmp_path / "failed.json", DivergedError("the loss"))

    scores = [_read(tmp_path / name) for name in ("whole.json", "parts.json", "failed.json")]
    assert scores[0]["score"] == scores[1]["score"]
    assert scores[2]["error"] == "the loss"


def _read(path: Path) -> dict[str, Any]:
    outcome: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return outcome


def test_a_shard_has_its_classes_images_only(plan: Plan, payload: Payload, tmp_path: Path) -> None:
    worker = SearchWorker(job_in(tmp_path, plan, 3), payload)
    worker.data.__dict__.pop("split", None)

    ctx = worker.context(worker.plan(PARAMS), range(3, 6))

    assert set(ctx.split.labels.tolist()) == {3, 4, 5}
    assert len(ctx.whole) == len(payload.labels)
    assert "split" not in worker.data.__dict__
