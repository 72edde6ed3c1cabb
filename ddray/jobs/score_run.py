"""`ddray evaluate` in a run folder: networks are trained by the one executor, and each has a row."""

import json
import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ddray.artifact.decoders import get_decoder
from ddray.artifact.distilled_set import DistilledSet
from ddray.data import Dataset, open_dataset
from ddray.errors import DdrayError, InputError, StorageError, one_line
from ddray.evaluation.options import EvaluateOptions, EvaluateResult, EvaluateRunOptions
from ddray.evaluation.protocol import EvalResult, summarise
from ddray.jobs.score import check_sets, read_sets
from ddray.jobs.score_record import record_score
from ddray.jobs.score_units import (
    Prepared,
    ScoreData,
    ScoreJob,
    ScoreTask,
    describe,
    forget,
    prepare_task,
    result_of,
    score_task,
    score_units,
    set_key,
    title_of,
)
from ddray.nets.build import multiply_adds
from ddray.nets.names import is_registered
from ddray.runs.costs import record_costs
from ddray.runs.executor import Executor, Outcome, Task, WorkerPool
from ddray.runs.folder import Run, open_run
from ddray.runs.ledger import Row
from ddray.runs.results import write_results
from ddray.runs.scores import note_scored_set
from ddray.system.files import write_text
from ddray.system.progress import progress
from ddray.training.recipe import RECIPES, Recipe, named_recipe

log = logging.getLogger(__name__)

PREPARED: Final = "protocol.json"
"""File of a run with what the protocol said of itself, so that a finished run prepares nothing again."""
RESULT: Final = "evaluate.json"
"""File of a run with what the command returned."""


@dataclass
class Evaluation:
    """One evaluation in its run folder.

    Attributes:
        sets: of the file, with their keys.
        dataset: an open one that stands in for the options'; None: workers open the target.
        crashed: why tasks failed that have no row, by the titles of their networks.
    """

    run: Run
    sets: Sequence[tuple[str, DistilledSet]]
    target: Dataset
    archs: tuple[str, ...]
    options: EvaluateOptions
    job: ScoreJob
    dataset: Dataset | None = None
    crashed: dict[str, str] = field(default_factory=dict)

    def tasks(self, prepared: Prepared) -> list[ScoreTask]:
        """Return all tasks, in the order of one process."""
        device = self.job.device.partition(":")[0]
        return [
            ScoreTask(tuple(group), set_index, arch)
            for set_index, arch, units in score_units(
                self.sets, self.target, self.archs, self.options, device=device, num_seeds=prepared.num_seeds
            )
            for group in ([units] if prepared.together else [[unit] for unit in units])
        ]

    def record_costs(self, task: ScoreTask, rows: Sequence[Row]) -> None:
        """Store what a task's networks cost, for estimates."""
        meta, options = self.sets[task.set_index][1].meta, self.options
        settings = meta.config.get("evaluate")
        epochs = options.epochs
        if epochs is None and options.recipe in RECIPES:
            sizes = {"ipc": meta.ipc, "num_classes": len(meta.class_names)}
            epochs = named_recipe({"recipe": options.recipe}, **sizes)["epochs"]  # type: ignore[arg-type]
        if epochs is None:
            epochs = (
                settings.get("epochs", Recipe().epochs) if isinstance(settings, Mapping) else Recipe().epochs
            )
        images = meta.budget or len(meta.class_names) * meta.ipc
        amount = float(epochs * images * multiply_adds(task.arch, meta.image_shape))
        signature = {"kind": "evaluate", "what": options.protocol, "which": task.arch}
        record_costs(signature, [(row, amount) for row in rows], self.job.device.partition(":")[0])

    def earlier(self) -> Prepared | None:
        """Return what an earlier process of the run has prepared; None if it must be prepared (again)."""
        path = self.run.folder / PREPARED
        try:
            return Prepared(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # missing or damaged
            return None


def evaluate_in_run(
    path: Path,
    options: EvaluateOptions,
    how: EvaluateRunOptions,
    executor: Executor,
    *,
    device: str,
    dataset: Dataset | None = None,
) -> EvaluateResult:
    """Score a distilled set's file as `jobs.score.evaluate` does, with a row per network in a run folder.

    Networks that fail are named in the result; those with a row are not trained again on a resume.

    Raises:
        InputError: the file, the dataset, an option or the folder is bad.
        InterruptedRunError: SIGINT or SIGTERM; says how to resume.
        StorageError: a row can't be written.
        DdrayError: every network failed.
    """
    sets, target = read_sets(path, options, dataset)
    archs = check_sets(path, sets, target, options)
    for arch in archs:
        if is_registered(arch):
            raise InputError(
                f"a network of a record must have a name that other processes know, got the function {arch}; "
                "leave out run_dir, save and max_concurrent, or offer it as an entry point of ddray.nets"
            )
        multiply_adds(arch, sets[0].meta.image_shape)  # refused if it does not fit
    keyed = [(set_key(distilled), distilled) for distilled in sets]
    if dataset is not None and how.is_parallel:
        _check_reopens(target, options)
    config = {**_config(keyed, target, archs, options, path), "device": device.partition(":")[0]}
    gpus = {"gpus_per_unit": how.gpus} if how.gpus else {}
    run = open_run(how.run_dir, {**config, **gpus}, command="evaluate", resume=how.resume)
    token, opened = secrets.token_hex(8), None if how.is_parallel else target
    job = ScoreJob(run.folder, run.epoch, token, target.name, target.fingerprint, options, device)
    evaluation = Evaluation(run, keyed, target, archs, options, job, opened)
    try:
        with run.continued("the evaluation"):
            prepared = _run_missing(evaluation, executor, f"evaluating {path.name}")
    except InputError:
        if not run.resumed and not run.ledger.rows():
            run.discard()  # nothing was computed
        raise
    finally:
        forget()
    result = record_score(path, sets, target.name, options, _finish(evaluation, prepared))
    if result.recorded_in is not None:
        note_scored_set(run.folder, path, Path(result.recorded_in))
    return result


def _config(
    sets: Sequence[tuple[str, DistilledSet]],
    target: Dataset,
    archs: Sequence[str],
    options: EvaluateOptions,
    path: Path,
) -> dict[str, Any]:
    """Return what must not change when the run is resumed."""
    return {
        "file": path.name,
        "sets": [key for key, _ in sets],
        "dataset": target.name,
        "fingerprint": target.fingerprint,
        "split": options.split,
        "archs": list(archs),
        **({} if options.seeds is None else {"seeds": options.seeds}),
        "seed": options.seed,
        "options": describe(options),
    }


def _check_reopens(target: Dataset, options: EvaluateOptions) -> None:
    """Refuse an open dataset that workers can't open by its name: InputError."""
    try:
        same = open_dataset(target.name, data_dir=options.data_dir).fingerprint == target.fingerprint
    except InputError as error:
        raise InputError(
            f"max_concurrent needs a dataset that workers can open by its name: {error}"
        ) from None
    if not same:
        raise InputError(
            f"max_concurrent needs a dataset that workers can open by its name, {target.name} is another one"
        )


def _run_missing(evaluation: Evaluation, executor: Executor, label: str) -> Prepared:
    """Train the networks that have no row; return what the protocol says of itself."""
    run, prepared = evaluation.run, evaluation.earlier()
    if prepared is not None and not _missing(evaluation, prepared):
        return prepared
    with executor.workers() as workers:
        sets = tuple(distilled for _, distilled in evaluation.sets)
        data = workers.share(ScoreData(sets, evaluation.dataset))
        samples = any(get_decoder(one.meta.decoder).generate is not None for one in sets)
        if prepared is None or samples:
            prepared = _prepare(evaluation.job, data, workers)
            if prepared.sets is not None:
                data = workers.share(ScoreData(prepared.sets, evaluation.dataset))
            facts = {name: getattr(prepared, name) for name in ("num_seeds", "details", "together")}
            write_text(run.folder / PREPARED, json.dumps(facts))
        all_tasks = evaluation.tasks(prepared)
        tasks = {task.key: task for task in _missing(evaluation, prepared)}
        total, left = (sum(len(task.units) for task in each) for each in (all_tasks, tasks.values()))
        calls = [
            Task(key, score_task, (evaluation.job, data, task), task.arch) for key, task in tasks.items()
        ]
        with progress(label, total, start=total - left, watch=run.reports) as show:
            for outcome in workers.run(calls):
                task = tasks[outcome.key]
                left -= len(task.units)
                show(total - left, _ended(evaluation, task, outcome))
    return prepared


def _missing(evaluation: Evaluation, prepared: Prepared) -> list[ScoreTask]:
    """Return the tasks that are left to do."""
    done = {row.key for row in evaluation.run.ledger.rows("evaluate")}
    tasks = (task.without(done) for task in evaluation.tasks(prepared))
    return [task for task in tasks if task is not None]


def _prepare(job: ScoreJob, data: Any, workers: WorkerPool) -> Prepared:
    """Let a worker prepare the protocol: it has the device that networks are trained on."""
    (outcome,) = workers.run([Task("prepare", prepare_task, (job, data), "preparing the protocol")])
    if outcome.error is not None:
        raise outcome.error
    prepared: Prepared = outcome.value
    return prepared


def _ended(evaluation: Evaluation, task: ScoreTask, outcome: Outcome) -> str:
    """Note how a task ended, and log failures; return a line on it.

    Raises:
        StorageError: the disk is full.
        InputError: the input was bad all the same.
        DdrayError: another process has resumed the run.
    """
    if isinstance(outcome.error, StorageError | InputError):
        raise outcome.error
    rows = [(unit, evaluation.run.ledger.row(unit.key)) for unit in task.units]
    for unit, row in rows:
        if row is None and outcome.error is None:
            raise DdrayError(f"another process has resumed {evaluation.run.folder}: this one ends")
        reason = one_line(outcome.error, 300) if row is None else row.error
        if row is None:
            # No row: a crash is worth another try on --resume.
            evaluation.crashed[title_of(unit)] = f"failed {outcome.attempts} times; last: {reason}"
        if reason is not None:
            log.warning("%s failed: %s", title_of(unit), reason)
    done = [row for _, row in rows if row is not None and row.status == "done"]
    evaluation.record_costs(task, done)
    scores = [row.result["accuracy_mean"] for row in done]
    return f"{task.arch}: {sum(scores) / len(scores):.1%}" if scores else f"{task.arch}: failed"


def _finish(evaluation: Evaluation, prepared: Prepared) -> EvaluateResult:
    """Write the run's table and result, and return the result.

    Raises:
        DdrayError: every network failed.
    """
    run = evaluation.run
    by_arch: dict[str, list[Row]] = {}
    failures = [{"unit": title, "reason": reason} for title, reason in evaluation.crashed.items()]
    for unit in (unit for task in evaluation.tasks(prepared) for unit in task.units):
        row = run.ledger.row(unit.key)
        if row is not None and row.status == "done":
            by_arch.setdefault(row.result["arch"], []).append(row)
        elif row is not None:
            failures.append({"unit": title_of(unit), "reason": str(row.error)})
    write_results(run.folder / "results.csv", run.ledger.rows())
    if not by_arch:
        reasons = sorted({failure["reason"] for failure in failures})
        raise DdrayError(f"no network was scored: {'; '.join(reasons)[:400]}; the record is in {run.folder}")
    result = EvaluateResult.parse(
        {
            **prepared.details,
            "results": [_summary(rows) for rows in by_arch.values()],
            "run_dir": str(run.folder),
            "num_failed": len(failures),
            "failures": failures,
        }
    )
    write_text(run.folder / RESULT, json.dumps(result.dump(), indent=1))
    return result


def _summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the summary of an architecture's networks, as one process returns it, with their peak memory."""
    results: list[EvalResult] = [result_of(row) for row in rows]
    precisions = sorted({str(row.result["precision"]) for row in rows})
    peak = max(int(row.result["peak_memory_bytes"]) for row in rows)
    return {**summarise(results), "precision": "+".join(precisions), "peak_memory_bytes": peak}
