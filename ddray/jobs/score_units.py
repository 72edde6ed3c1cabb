"""What `ddray evaluate` keeps in a run folder: each network is a unit with a row; what a worker does with it.

One task trains one network, or several of one architecture: those that a GPU trains together, and those that
share a network (`trains_for_all_seeds`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ddray.artifact.decoders import get_decoder
from ddray.artifact.distilled_set import DistilledSet, TrainSet
from ddray.data import Dataset, open_dataset
from ddray.errors import DivergedError, InputError
from ddray.evaluation import get_protocol
from ddray.evaluation.options import EvaluateOptions
from ddray.evaluation.protocol import EvalResult, evaluate_archs, summarise
from ddray.jobs.score import Scorer, with_images
from ddray.runs.ledger import Ledger, Row, Unit, canonical_json
from ddray.system.memory import peak_bytes, reset_peak
from ddray.system.tensors import sha256_of
from ddray.system.worker import worker_device

# Not part of what a network's score depends on: where the data is, and what other fields of a unit say.
_NOT_DESCRIBED = ("data_dir", "download", "dataset", "archs", "index", "seeds", "seed", "split")


@dataclass(frozen=True)
class ScoreJob:
    """What all tasks of an evaluation share.

    Attributes:
        run_dir: absolute path of the run.
        epoch: run epoch to publish under.
        token: identifies the evaluation, so that a worker prepares for it once.
        dataset: the target's name, by which workers open it.
        fingerprint: what the driver's copy of it has.
        options: of the evaluation.
        device: of a worker, such as `cpu` or `cuda`.
    """

    run_dir: Path
    epoch: int
    token: str
    dataset: str
    fingerprint: str
    options: EvaluateOptions
    device: str


@dataclass(frozen=True)
class ScoreData:
    """The sets to score, and the dataset if it is open in this process; None: workers open it."""

    sets: tuple[DistilledSet, ...]
    dataset: Dataset | None = None


@dataclass(frozen=True)
class Prepared:
    """What is known of an evaluation once its protocol is ready: see `Scorer`.

    Attributes:
        num_seeds: networks per set and architecture.
        details: the command's JSON but for the results.
        together: whether a task trains all networks of an architecture.
        sets: the sets with images, if these had to be sampled.
    """

    num_seeds: int
    details: Mapping[str, Any]
    together: bool
    sets: tuple[DistilledSet, ...] | None = None


@dataclass(frozen=True)
class ScoreTask:
    """Networks of one architecture that are trained on one set."""

    units: tuple[Unit, ...]
    set_index: int
    arch: str

    @property
    def key(self) -> str:
        """Key of the first unit; identifies the task."""
        return self.units[0].key

    def without(self, done: set[str]) -> "ScoreTask | None":
        """Return the task without its finished units; None if nothing is left."""
        units = tuple(unit for unit in self.units if unit.key not in done)
        return replace(self, units=units) if units else None


def title_of(unit: Unit) -> str:
    """Return a network's name for people."""
    return f"{unit.spec['arch']} seed {unit.spec['seed']}"


def set_key(distilled: DistilledSet) -> str:
    """Return the sha256 (hex) of a set's content: the same for another copy of its file."""
    tensors = {
        "images": distilled.images,
        "labels": distilled.labels,
        "targets": distilled.targets,
        "soft_labels": distilled.soft_labels,
        **distilled.zca,
        **distilled.compact,
    }
    digests = {name: sha256_of([tensor]) for name, tensor in tensors.items() if tensor is not None}
    meta = {k: v for k, v in distilled.meta.dump().items() if k not in ("versions", "git_commit")}
    return Unit(kind="distill", spec={"tensors": digests, "meta": canonical_json(meta)}).key


def describe(options: EvaluateOptions) -> dict[str, Any]:
    """Return the options that are set, of those that decide a network's score."""
    values = options.model_dump(mode="json", exclude_defaults=True, exclude=set(_NOT_DESCRIBED))
    return {**values, "protocol": options.protocol}


def score_units(
    sets: Sequence[tuple[str, DistilledSet]],
    target: Dataset,
    archs: Sequence[str],
    options: EvaluateOptions,
    *,
    device: str,
    num_seeds: int,
) -> Iterator[tuple[int, str, list[Unit]]]:
    """Yield for each set and architecture (index of the set, architecture, a unit per network).

    Sets come with their keys (`set_key`); `device` is its type.
    """
    edition = get_protocol(options.protocol).editions.get(options.recipe or "default")
    for set_index, (key, distilled) in enumerate(sets):
        meta, first = distilled.meta, options.seed + set_index * num_seeds
        size = {"ipc": meta.ipc} if meta.budget is None else {"budget": meta.budget}
        for arch in archs:
            spec = {
                "method": meta.method,
                "dataset": meta.dataset,
                **size,
                "set": key,
                "arch": arch,
                "target": target.name,
                "target_fingerprint": target.fingerprint,
                "split": options.split,
                "options": describe(options),
                "device": device,
                **({"edition": edition} if edition else {}),
            }
            seeds = range(first, first + num_seeds)
            yield set_index, arch, [Unit(kind="evaluate", spec={**spec, "seed": seed}) for seed in seeds]


_latest: tuple[str, Scorer] | None = None


def forget() -> None:
    """Let go of the last evaluation's data in this process."""
    global _latest
    _latest = None


def _scorer(job: ScoreJob, data: ScoreData) -> Scorer:
    """Return this worker's scorer of an evaluation, which is made once.

    Raises:
        InputError: this node's copy of the dataset differs from the driver's.
    """
    global _latest
    if _latest is None or _latest[0] != job.token:
        _latest = None  # the earlier one's memory
        dataset = data.dataset or open_dataset(job.dataset, data_dir=job.options.data_dir)
        if dataset.fingerprint != job.fingerprint:
            raise InputError(
                f"{dataset.name} must be the same on every node, this one has {dataset.fingerprint[:12]}, "
                f"the driver {job.fingerprint[:12]}; give all nodes the same --data-dir"
            )
        scorer = Scorer.of(data.sets, dataset, job.options, worker_device(job.device))
        _latest = (job.token, scorer)
    return _latest[1]


def prepare_task(job: ScoreJob, data: ScoreData) -> Prepared:
    """Sample the images of sets that store none, train what the protocol needs, and return what is known.

    Raises:
        Exception: as `Scorer.of`.
    """
    sampled = any(get_decoder(one.meta.decoder).generate is not None for one in data.sets)
    sets = tuple(with_images(data.sets, job.options, worker_device(job.device)))
    scorer = _scorer(job, replace(data, sets=sets))
    fused = hasattr(scorer.scorings[0].evaluator, "evaluate_together") and job.device.startswith("cuda")
    together = fused or get_protocol(job.options.protocol).trains_for_all_seeds
    return Prepared(scorer.num_seeds, scorer.details(), together, sets if sampled else None)


def score_task(job: ScoreJob, data: ScoreData, task: ScoreTask) -> None:
    """Train and score a task's networks, and publish a row for each; a failed one for one that diverges.

    Raises:
        Exception: a crash, bad input, or no memory or disk space; the caller retries.
    """
    ledger = Ledger(job.run_dir)
    units = [unit for unit in task.units if ledger.row(unit.key) is None]
    if not units:
        return
    scorer = _scorer(job, data)
    train_set = scorer.train_set(task.set_index)
    seeds = [unit.spec["seed"] for unit in units]
    # After a resume some may be missing between others.
    fuse = scorer.ctx.device.type == "cuda" and seeds == list(range(seeds[0], seeds[0] + len(seeds)))
    for group in [units] if fuse else [[unit] for unit in units]:
        _score_group(job, scorer, train_set, replace(task, units=tuple(group)))


def _score_group(job: ScoreJob, scorer: Scorer, train_set: TrainSet, task: ScoreTask) -> None:
    """Score networks that are trained together, one by one if one of them diverges; publish their rows."""
    ledger, device = Ledger(job.run_dir), scorer.ctx.device
    for unit in task.units:
        ledger.begin(unit, epoch=job.epoch, title=title_of(unit))
    results: list[EvalResult] = []
    reset_peak(device)
    try:
        (summary,) = evaluate_archs(
            scorer.scorings[task.set_index].evaluator,
            train_set,
            scorer.ctx,
            archs=(task.arch,),
            num_seeds=len(task.units),
            seed=task.units[0].spec["seed"],
            on_result=results.append,
        )
    except DivergedError as error:
        if len(task.units) > 1:
            for unit in task.units:
                _score_group(job, scorer, train_set, replace(task, units=(unit,)))
            return
        ledger.publish(task.units[0], Row.failed(task.units[0], error), epoch=job.epoch)
        return
    costs = {"precision": summary["precision"], "peak_memory_bytes": peak_bytes(device)}
    for unit, result in zip(task.units, results, strict=True):
        row = Row.done(unit, {**summarise([result]), **costs}, result.wall_s)
        ledger.publish(unit, row, epoch=job.epoch)


def result_of(row: Row) -> EvalResult:
    """Return the result that a row was made from."""
    result = row.result
    measures = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in result.items()
        if f"{name}_std" in result
    }
    return EvalResult(
        result["arch"],
        row.spec["seed"],
        result["per_seed"][0],
        result["num_images"],
        result["wall_s"],
        measures,
        tuple(result.get("per_class", ())),
    )
