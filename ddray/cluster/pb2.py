"""PB2: settings change inside a trial.

Parker-Holder et al., "Provably Efficient Online Hyperparameter Optimization with Population-Based Bandits",
NeurIPS 2020.

A population is distilled in lock step, a generation at a time. After each generation the worst members clone
the state of the best ones (`state_dict` holds no settings) and get new settings from Ray's own PB2 model, a
time-varying Gaussian process of the gain in val accuracy. Member 0 keeps the paper's settings throughout, so
that they are compared at full length. Every segment's outcome is a file, so a resumed search repeats no
finished segment and makes the same choices.
"""

from __future__ import annotations

import json
import logging
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from ddray.distillation.loop import Distillation
from ddray.errors import DivergedError, InputError, StorageError, one_line
from ddray.runs.executor import Task, WorkerPool
from ddray.runs.ledger import Row
from ddray.seeding import derive_numpy, derive_seed, forked_numpy
from ddray.system.files import write_text
from ddray.system.memory import peak_bytes
from ddray.system.progress import progress
from ddray.tuning.payload import Payload
from ddray.tuning.shards import Schedule, distil, distil_in_shards
from ddray.tuning.space import Range, Space, sample
from ddray.tuning.study import write_study
from ddray.tuning.trial import trial_result
from ddray.tuning.worker import SearchJob, SearchWorker

if TYPE_CHECKING:
    from ddray.tuning.search import Search

log = logging.getLogger(__name__)

GENERATIONS: Final = 4
_QUANTILE: Final = 0.25


@dataclass
class Member:
    """One member of the population, a trial by its number.

    Its `schedule` is what its state was distilled with: `{"until": step, "params": settings}` in order.
    """

    number: int
    params: dict[str, Any]  # in the next segment
    schedule: list[dict[str, Any]] = field(default_factory=list)
    state: Path | None = None  # checkpoint that its next segment starts from; None at the start
    value: float = -math.inf  # val accuracy after the last segment; -inf if that diverged
    values: dict[int, float] = field(default_factory=dict)  # step -> val accuracy along its present lineage
    error: str | None = None  # why the last segment failed
    device_seconds: float = 0.0  # of its segments, whatever lineage they are of
    peak_memory_bytes: int = 0  # the largest of them


def check_space(space: Space, paper: Mapping[str, Any], num_samples: int) -> None:
    """Refuse what PB2 can't search with an InputError.

    That is no numeric range or one with a step or a condition, a paper's value that is no number or has no
    logarithm, or too small a population.
    """
    for name, value_range in _numeric(space).items():
        if value_range.step is not None or value_range.when:
            what = "when" if value_range.when else "step"
            rule = f"strategy pb2 varies settings inside a trial, so it takes no {what}, {name} has one"
            raise InputError(f"{rule}; leave it out, or use another --strategy")
        least = "> 0 (its range is loguniform)" if value_range.kind == "loguniform" else "that is a number"
        value = paper[name]
        if not isinstance(value, int | float) or (value_range.kind == "loguniform" and value <= 0):
            raise InputError(f"strategy pb2 needs a {name} {least} to start from, got {value}; --set one")
    if not _numeric(space):
        raise InputError("strategy pb2 needs a uniform or loguniform range, the space file has none")
    if num_samples < 3:
        raise InputError(f"--num-samples is pb2's population and must be >= 3, got {num_samples}")


def _numeric(space: Space) -> dict[str, Range]:
    return {name: entry for name, entry in space.items() if entry.kind in ("uniform", "loguniform")}


def segment_ends(steps: int) -> list[int]:
    """Return the steps at which the generations end; InputError if there are fewer steps than generations."""
    if steps < GENERATIONS:
        raise InputError(f"strategy pb2 needs a method with steps >= {GENERATIONS}, got {steps}")
    return [steps * (generation + 1) // GENERATIONS for generation in range(GENERATIONS)]


def run_pb2(search: Search, payload: Payload, workers: WorkerPool) -> None:
    """Run or continue a PB2 search; publish every member's row at the end."""
    space, job = _numeric(search.space), search.job
    if left_out := sorted(search.space.keys() - space.keys()):
        log.info("pb2 varies numbers only: %s keep the paper's values", ", ".join(left_out))
    ends = segment_ends(search.plan.config.steps)
    drawn = (sample(space, job.seed, number) if number else {} for number in range(search.num_samples))
    initial = [
        {**search.paper, **search.start_points.get(number, params)} for number, params in enumerate(drawn)
    ]
    members = [Member(number, dict(params)) for number, params in enumerate(initial)]
    for number, params in enumerate(initial):
        search.run.ledger.begin(search.unit(number, params), epoch=job.epoch, number=number, params=params)
    begin = time.perf_counter()
    shared = workers.share(payload)
    history: list[list[Any]] = []  # the Gaussian process's data
    for generation, end in enumerate([0, *ends]):  # the scores at step 0 are those of the initial images
        _run_segments(search, members, end, shared, workers, generation)
        history += (
            [str(member.number), end, *_encode(member.params, space), member.value]
            for member in members
            if member.error is None
        )
        if 0 < generation < len(ends):
            history = _exploit(members, history, space, job.seed, generation)
    for member, params in zip(members, initial, strict=True):
        _publish(search, member, params, time.perf_counter() - begin)
    write_study(search.run.folder, search.name, search.space, search.rows())


def _run_segments(
    search: Search, members: Sequence[Member], end: int, payload: Any, workers: WorkerPool, generation: int
) -> None:
    """Bring every member to step `end` in parallel; a segment with a file is done."""
    folder, job = search.run.folder / "pb2", search.job
    paths = [folder / f"{member.number:04d}-generation{generation}.json" for member in members]
    missing = {
        str(member.number): (member, path)
        for member, path in zip(members, paths, strict=True)
        if not path.exists()
    }
    schedules = {key: _schedule(*one, end) for key, one in (missing.items() if job.shards else ())}
    joined = distil_in_shards(workers, job, payload, schedules)
    tasks = [
        Task(key, run_segment, (job, payload, member, end, path, joined.get(key)))
        for key, (member, path) in missing.items()
    ]
    errors = {}
    title = f"pb2, members at step {end:,}"
    with progress(title, len(members), start=len(members) - len(tasks), watch=search.run.reports) as show:
        for outcome in workers.run(tasks):
            if isinstance(outcome.error, StorageError):
                raise outcome.error
            if outcome.error is not None:
                errors[int(outcome.key)] = one_line(outcome.error, 300)
            show(show.done + 1, "")
    for member, path in zip(members, paths, strict=True):
        segment: dict[str, Any] = {"error": errors.get(member.number)}
        if path.exists():
            segment = json.loads(path.read_text("utf-8"))
        member.error = segment.get("error")
        if member.error is not None:
            member.value = -math.inf
            continue
        member.value = member.values[end] = float(segment["score"])
        member.device_seconds += segment.get("device_seconds", 0.0)
        member.peak_memory_bytes = max(member.peak_memory_bytes, segment.get("peak_memory_bytes", 0))
        if end:
            member.state = path.with_suffix(".pt")
            member.schedule.append({"until": end, "params": dict(member.params)})


def _schedule(member: Member, path: Path, end: int) -> Schedule:
    """Return what brings a member to step `end`; step 0 is its initial images."""
    segments = [{"until": end, "params": member.params}]
    return Schedule(segments, None, path.with_suffix(".pt"), source=member.state)


def run_segment(
    job: SearchJob,
    payload: Payload,
    member: Member,
    end: int,
    path: Path,
    joined: Distillation | Exception | None = None,
) -> None:
    """Continue from a member's state to step `end`, score on val, write the outcome to `path`.

    Runs in a worker. A diverged segment's outcome is its error; step 0 scores the initial images. `joined` is
    what its shards have distilled, or why one failed.
    """
    begin, worker = time.perf_counter(), SearchWorker(job, payload)
    try:
        if isinstance(joined, Exception):
            raise joined
        before_s = 0.0 if joined is None else joined.seconds or 0.0
        distillation = distil(worker, _schedule(member, path, end)) if joined is None else joined
        plan = worker.plan(member.params)
        outcome: dict[str, Any] = {"score": worker.val_score(plan, distillation.distilled)}
        peak = max(distillation.peak_memory_bytes or 0, peak_bytes(worker.device))
        outcome |= {"device_seconds": before_s + time.perf_counter() - begin, "peak_memory_bytes": peak}
    except DivergedError as error:
        outcome = {"error": str(error)}
    write_text(path, json.dumps({"number": member.number, "until": end, "params": member.params, **outcome}))


def _to_scale(value: float, value_range: Range) -> float:
    """Return a setting as an input of the Gaussian process: its logarithm if its range is loguniform."""
    return math.log(value) if value_range.kind == "loguniform" else float(value)


def _encode(params: Mapping[str, Any], space: Space) -> list[float]:
    """Return the settings as inputs of the Gaussian process."""
    return [_to_scale(params[name], value_range) for name, value_range in space.items()]


def _decode(values: Sequence[float], space: Space) -> dict[str, float]:
    """Return the process's proposal as settings, clamped to their ranges."""
    params = {}
    for value, (name, value_range) in zip(values, space.items(), strict=True):
        plain = math.exp(value) if value_range.kind == "loguniform" else float(value)
        params[name] = min(max(plain, value_range.low), value_range.high)
    return params


def _exploit(
    members: list[Member], history: list[list[Any]], space: Space, seed: int, generation: int
) -> list[list[Any]]:
    """Let the worst members clone the best ones and give them new settings; return the extended data.

    The paper's own point (member 0) clones nobody; a diverged member always clones.
    """
    from ray.tune.schedulers.pb2 import _explore

    ranked = sorted(members, key=lambda member: (member.value, -member.number))
    num_clones = max(1, math.ceil(len(members) * _QUANTILE))
    top = [member for member in ranked[-num_clones:] if member.error is None]
    if not top:
        return history
    others = [member for member in ranked if member.number != 0 and member not in top]
    bottom = [member for rank, member in enumerate(others) if rank < num_clones or member.error is not None]
    rng = derive_numpy(seed, "pb2", generation)
    columns = ["Trial", "Time", *space, "Reward"]
    bounds = {name: (_to_scale(r.low, r), _to_scale(r.high, r)) for name, r in space.items()}
    data = pd.DataFrame(history, columns=columns)
    proposals: list[list[float]] = []
    for member in bottom:
        parent = top[int(rng.integers(len(top)))]
        values = dict(zip(space, _encode(parent.params, space), strict=True))
        with forked_numpy(derive_seed(seed, "pb2", generation, member.number)), warnings.catch_warnings():
            # Ray passes SciPy a deprecated option, and the process rarely converges on so few points.
            warnings.simplefilter("ignore")
            current = np.array(proposals) if proposals else None
            values, data = _explore(data, bounds, current, str(parent.number), str(member.number), values)  # type: ignore[arg-type]
        proposal = [float(values[name]) for name in space]
        proposals.append(proposal)
        member.params = {**parent.params, **_decode(proposal, space)}
        member.schedule = [dict(segment) for segment in parent.schedule]
        member.values = dict(parent.values)
        member.state, member.error = parent.state, None
        log.info("pb2 generation %d: trial %d clones trial %d", generation, member.number, parent.number)
    return [list(row) for row in data[columns].itertuples(index=False)]


def _publish(search: Search, member: Member, initial: dict[str, Any], wall_s: float) -> None:
    """Publish a member's row: its schedule is what other seeds replay."""
    unit = search.unit(member.number, initial)
    if member.error is None:
        result = trial_result(unit, member.values, search.job.objective)
        costs = {name: getattr(member, name) for name in ("device_seconds", "peak_memory_bytes")}
        row = Row.done(unit, {**result, "schedule": member.schedule, **costs}, wall_s)
    else:
        row = Row.failed(unit, member.error, result={"number": member.number}, wall_s=wall_s)
    search.run.ledger.publish(unit, row, epoch=search.job.epoch)
