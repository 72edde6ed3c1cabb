"""`ddray evaluate --max-concurrent`: networks are trained by Ray workers."""

from pathlib import Path

from ddray.cluster.executor import RayExecutor
from ddray.cluster.resources import with_gpus
from ddray.data import Dataset
from ddray.evaluation.options import EvaluateOptions, EvaluateResult, EvaluateRunOptions
from ddray.jobs.score_run import evaluate_in_run
from ddray.runs.folder import read_config
from ddray.system.worker import device_kind


def evaluate_on_workers(
    path: Path, options: EvaluateOptions, how: EvaluateRunOptions, dataset: Dataset | None
) -> EvaluateResult:
    """Score a distilled set's file by workers, as `evaluate_in_run` does.

    Raises:
        InputError: also if no worker of this size fits the cluster, or no cluster answers.
        InterruptedRunError: SIGINT or SIGTERM; says how to resume.
        StorageError: a row can't be written.
        DdrayError: every network failed.
    """
    if how.device == "cpu":
        how = how.model_copy(update={"gpus_per_unit": 0.0})
    how = with_gpus(how, read_config(how.run_dir) if how.resume else {})
    executor = RayExecutor(how.cpus_per_unit, how.gpus, how.max_concurrent, how.address, "unit")
    return evaluate_in_run(path, options, how, executor, device=device_kind(how.gpus), dataset=dataset)
