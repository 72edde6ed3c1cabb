"""`ddray evaluate` with its record in a run folder: one network after another here, or several by Ray."""

from pathlib import Path

from ddray.cluster.executor import RayExecutor
from ddray.cluster.resources import with_gpus
from ddray.data import Dataset
from ddray.evaluation.options import EvaluateOptions, EvaluateResult, EvaluateRunOptions
from ddray.jobs.context import on_device
from ddray.jobs.score_run import evaluate_in_run
from ddray.runs.executor import LocalExecutor
from ddray.runs.folder import read_config
from ddray.system.worker import device_kind


def evaluate_in_folder(
    path: Path, options: EvaluateOptions, how: EvaluateRunOptions, dataset: Dataset | None
) -> EvaluateResult:
    """Score a distilled set's file as `evaluate_in_run` does, by the workers that the options ask for.

    Raises:
        InputError: also if no worker of this size fits the cluster, or no cluster answers.
        InterruptedRunError: SIGINT or SIGTERM; says how to resume.
        StorageError: a row can't be written.
        DdrayError: every network failed.
    """
    if not how.is_parallel:
        with on_device(how.device) as device:
            executor = LocalExecutor()
            return evaluate_in_run(path, options, how, executor, device=str(device), dataset=dataset)
    if how.device == "cpu":
        how = how.model_copy(update={"gpus_per_unit": 0.0})
    how = with_gpus(how, read_config(how.run_dir) if how.resume else {})
    workers = RayExecutor(how.cpus_per_unit, how.gpus, how.max_concurrent, how.address, "unit")
    return evaluate_in_run(path, options, how, workers, device=device_kind(how.gpus), dataset=dataset)
