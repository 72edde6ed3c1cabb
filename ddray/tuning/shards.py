"""The shards of a search's trials: each distilled by a worker of its own, then joined to the trial's set."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddray.artifact.distilled_set import DistilledSet
from ddray.distillation.loop import Distillation, run_distillation
from ddray.errors import DivergedError, StorageError
from ddray.jobs.context import make_distiller
from ddray.jobs.shard_worker import join_distillations
from ddray.runs.executor import Task, WorkerPool
from ddray.runs.ledger import Row, Unit
from ddray.system.files import copy_atomically, write_text
from ddray.system.memory import peak_bytes
from ddray.tuning.payload import Payload
from ddray.tuning.trial import done_row, failed_row, read_rungs, rung_metrics, rung_steps, save_picture
from ddray.tuning.worker import SearchJob, SearchWorker, shard_checkpoint


@dataclass(frozen=True)
class Schedule:
    """What a set is distilled with.

    Attributes:
        segments: `{"until": step, "params": settings}` in order; until 0 is the end.
        seed: of its draws; None: the search's.
        checkpoint: the unit's; those of its shards stand beside it.
        source: the checkpoint that it begins from, PB2's clones that of another trial; None: the start.
    """

    segments: Sequence[Mapping[str, Any]]
    seed: int | None
    checkpoint: Path
    source: Path | None = None


def distil(worker: SearchWorker, schedule: Schedule, classes: range | None = None) -> Distillation:
    """Distil a set, or some classes of it, from where its checkpoint is.

    Raises:
        DivergedError: the loss became NaN.
        StorageError: a file can't be written.
    """
    checkpoint, source = schedule.checkpoint, schedule.source
    if classes is not None:
        checkpoint = shard_checkpoint(checkpoint, classes)
        source = None if source is None else shard_checkpoint(source, classes)
    if source is not None and not checkpoint.exists():
        copy_atomically(source, checkpoint)
    for segment in schedule.segments:
        plan = worker.plan(segment["params"], schedule.seed)
        distillation = run_distillation(
            make_distiller(plan),
            worker.context(plan, classes),
            checkpoint=checkpoint,
            until=segment["until"] or None,
        )
    return distillation


def distil_shard(job: SearchJob, payload: Payload, schedule: Schedule, classes: range) -> Distillation:
    """Distil some classes of a set; runs in a worker. Errors as for `distil`."""
    return distil(SearchWorker(job, payload), schedule, classes)


def distil_in_shards(
    workers: WorkerPool, job: SearchJob, payload: Any, schedules: Mapping[str, Schedule]
) -> dict[str, Distillation | Exception]:
    """Distil sets in shards, those of all sets at once; return each set's distillation, or why it failed.

    `payload` is what `WorkerPool.share` returned. StorageError if a file can't be written.
    """
    tasks = [
        Task(f"{key}.{classes.start}", distil_shard, (job, payload, schedule, classes))
        for key, schedule in schedules.items()
        for classes in job.shards
    ]
    parts = {outcome.key: outcome.error or outcome.value for outcome in workers.run(tasks)}
    if (error := next((part for part in parts.values() if isinstance(part, StorageError)), None)) is not None:
        raise error
    return {
        key: _joined(job, schedule, [parts[f"{key}.{classes.start}"] for classes in job.shards])
        for key, schedule in schedules.items()
    }


def _joined(
    job: SearchJob, schedule: Schedule, parts: Sequence[Distillation | Exception]
) -> Distillation | Exception:
    distillations = [part for part in parts if isinstance(part, Distillation)]
    if len(distillations) < len(parts):
        return next(part for part in parts if isinstance(part, Exception))
    config, _ = job.settings.configs(schedule.segments[-1]["params"])
    return join_distillations(distillations, takes_steps=config.steps > 0, wall_s=0.0)


def score_set(
    job: SearchJob, payload: Payload, params: Mapping[str, Any], distilled: DistilledSet
) -> tuple[float, float, int]:
    """Return the score of a trial's set, the seconds that it took, and the peak memory in bytes.

    Runs in a worker.
    """
    begin, worker = time.perf_counter(), SearchWorker(job, payload)
    value = worker.val_score(worker.plan(params), distilled)
    return value, time.perf_counter() - begin, peak_bytes(worker.device)


@dataclass
class _Scores:
    """A trial's scores along its way, and what they took."""

    job: SearchJob
    payload: Any
    unit: Unit
    seconds: float = 0.0
    peak_memory_bytes: int = 0

    def __post_init__(self) -> None:
        self.rungs, self._path = read_rungs(self.job, self.unit)

    def add(self, workers: WorkerPool, budget: int, distilled: DistilledSet) -> None:
        """Score a set in a worker."""
        arguments = (self.job, self.payload, self.unit.spec["params"], distilled)
        (outcome,) = workers.run([Task("score", score_set, arguments)])
        if outcome.error is not None:
            raise outcome.error
        value, seconds, peak = outcome.value
        self.rungs[budget] = value
        self.seconds += seconds
        self.peak_memory_bytes = max(self.peak_memory_bytes, peak)
        write_text(self._path, json.dumps(self.rungs))


def run_in_shards(
    workers: WorkerPool, job: SearchJob, payload: Any, unit: Unit, report: Callable[[dict[str, Any]], None]
) -> Row:
    """Distil a trial in shards, scoring the joined set on val at every rung; return its row.

    Raises:
        Exception: a crash, or lack of memory or disk space; the caller retries it.
    """
    begin, last = time.perf_counter(), job.budgets[-1]
    scores = _Scores(job, payload, unit)
    try:
        for step, budget in _stops(job, unit.spec["params"]):
            loss = None
            if budget == last or budget not in scores.rungs:
                distillation = _distil_trial(workers, job, payload, unit, step)
                loss = float(distillation.losses[-1]) if len(distillation.losses) else None
                if budget not in scores.rungs:
                    scores.add(workers, budget, distillation.distilled)
                    save_picture(job, unit, step, distillation.distilled)
            if budget != last:
                report(rung_metrics(job, unit, budget, scores.rungs, step, loss))
    except DivergedError as error:
        return failed_row(unit, error, scores.rungs, time.perf_counter() - begin)
    costs = {
        "device_seconds": (distillation.seconds or 0.0) + scores.seconds,
        "peak_memory_bytes": max(distillation.peak_memory_bytes or 0, scores.peak_memory_bytes),
        "shards": len(job.shards),
    }
    return done_row(job, unit, scores.rungs, distillation, costs, time.perf_counter() - begin)


def _distil_trial(workers: WorkerPool, job: SearchJob, payload: Any, unit: Unit, step: int) -> Distillation:
    """Distil a trial's set up to a step; 0 is the end."""
    segments = [{"until": step, "params": unit.spec["params"]}]
    schedule = Schedule(segments, None, job.checkpoint(unit.key))
    distillation = distil_in_shards(workers, job, payload, {unit.key: schedule})[unit.key]
    if isinstance(distillation, Exception):
        raise distillation
    return distillation


def _stops(job: SearchJob, params: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return (step, budget) of a trial's rungs, the last of which is its end."""
    steps = job.settings.configs(params)[0].steps
    return list(rung_steps(job, steps).items()) or [(0, job.budgets[-1])]
