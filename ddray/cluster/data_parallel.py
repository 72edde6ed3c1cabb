"""Pool networks that are trained data-parallel: workers of Ray Train share the batches of one network.

The driver holds the entry's lock and publishes it, as for any other entry. Next to the entry's place,
`<key>.training` has Ray Train's checkpoints, from which it starts all workers again after one was lost, and
from which a later driver goes on after this one was killed; and what the workers return.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ddray.cluster.resources import with_gpus
from ddray.cluster.runtime import check_capacity, ray_runtime, sigterm_as_sigint
from ddray.errors import DdrayError, DivergedError, InputError, InterruptedRunError, one_line
from ddray.pool.spec import PoolSpec
from ddray.runs.executor import MAX_ATTEMPTS
from ddray.system.files import home, storage_errors
from ddray.system.worker import prepare_worker, set_threads, worker_device

if TYPE_CHECKING:
    from torch import Tensor

    from ddray.data import Dataset
    from ddray.jobs.options import PoolOptions
    from ddray.jobs.pool_training import PoolResult

CHECKPOINT_S: Final = 60.0
_STATE: Final = "state.pt"
_PEAK: Final = "peak_memory_bytes"


@dataclass(frozen=True)
class ParallelJob:
    """What every worker of a training knows.

    Attributes:
        spec: the entry's, as a dict.
        dataset: what `open_dataset` reopens the dataset by.
        data_dir: where datasets are; None: $DDRAY_DATA.
        folder: where the workers leave what they return; all nodes share it.
        num_workers: how many there are.
        cpus: cores of a worker.
        gpus: GPUs of a worker, 0 or 1.
        checkpoint_s: seconds between checkpoints, which are made at the ends of epochs.
    """

    spec: dict[str, Any]
    dataset: str
    data_dir: Path | None
    folder: Path
    num_workers: int
    cpus: float
    gpus: float
    checkpoint_s: float = CHECKPOINT_S


def train_parallel(
    dataset: Dataset, options: PoolOptions, recipe: Mapping[str, Any], *, checkpoint_s: float = CHECKPOINT_S
) -> PoolResult:
    """Train missing supervised networks, one after another, each on `options.num_workers` workers.

    The entries are those of `train_pool`: the same keys, files and measurements, and `num_workers`.

    Raises:
        InputError: as for `train_pool`; the workers do not fit the cluster, or are more than a batch's rows.
        DivergedError: a loss is NaN.
        InterruptedRunError: a signal came; the command continues when it is run again.
        DdrayError: workers failed again and again.
    """
    import torch

    from ddray.jobs.pool_training import train_pool

    options = with_gpus(options)
    if options.gpus not in (0, 1):
        raise InputError(
            f"--gpus-per-worker must be 0 or 1 (NCCL takes one process per GPU), got {options.gpus:g}"
        )
    folder = options.out or home() / "pool"
    with sigterm_as_sigint(), ray_runtime(options.address):
        _check_room(options)
        trainer = ParallelTrainer(dataset, options, folder, checkpoint_s)
        result = train_pool(
            dataset,
            arch=options.arch or "auto",
            recipe=recipe,
            seed=options.seed or 0,
            num_models=1 if options.num_models is None else options.num_models,
            device=torch.device("cuda" if options.gpus else "cpu"),
            folder=folder,
            trainer=trainer,
        )
    for key in result.keys:
        shutil.rmtree(_training_folder(folder, key), ignore_errors=True)
    return result


def _check_room(options: PoolOptions) -> None:
    """Refuse more workers than fit the cluster at once."""
    fits = check_capacity(options.cpus, options.gpus, per="worker")
    if (options.num_workers or 1) > fits:
        raise InputError(
            f"--num-workers must be <= {fits}, the workers with {options.cpus:g} CPUs and "
            f"{options.gpus:g} GPUs that fit the cluster at once, got {options.num_workers}"
        )


def _training_folder(folder: Path, key: str) -> Path:
    return folder / f"{key}.training"


@dataclass(frozen=True)
class ParallelTrainer:
    """Trains a missing supervised entry on several workers; runs in the driver, inside `ray_runtime`."""

    dataset: Dataset
    options: PoolOptions
    folder: Path
    checkpoint_s: float = CHECKPOINT_S

    def __call__(self, spec: PoolSpec) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """Return an entry's tensors and measurements; errors as of `train_parallel`."""
        num_workers, options = self.options.num_workers or 1, self.options
        if num_workers > (smallest := min(spec.recipe["batch"], len(self.dataset.train()))):
            raise InputError(f"--num-workers must be <= {smallest}, the images of a batch, got {num_workers}")
        folder = _training_folder(self.folder, spec.key)
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        job = ParallelJob(
            spec=spec.dump(),
            dataset=self.dataset.name,
            data_dir=options.data_dir,
            folder=folder,
            num_workers=num_workers,
            cpus=options.cpus,
            gpus=options.gpus,
            checkpoint_s=self.checkpoint_s,
        )
        measured = _fit(job)
        tensors, peak = _collected(folder, num_workers)
        return tensors, {**measured, _PEAK: peak, "num_workers": num_workers}


def _fit(job: ParallelJob) -> dict[str, Any]:
    """Run the workers until the network is trained; return the measurements."""
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    worker: Any = train_worker
    run_config: Any = RunConfig  # its stubs are of Ray Train's first version
    trainer = TorchTrainer(
        worker,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=job.num_workers,
            use_gpu=job.gpus > 0,
            resources_per_worker={"CPU": job.cpus, **({"GPU": job.gpus} if job.gpus else {})},
        ),
        run_config=run_config(
            name=job.folder.name,
            storage_path=str(job.folder.parent),
            failure_config=FailureConfig(max_failures=MAX_ATTEMPTS - 1),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        with warnings.catch_warnings():  # Ray Data, which Ray Train starts, warns of its own settings
            warnings.simplefilter("ignore", DeprecationWarning)
            returned: Any = _in_thread(trainer.fit).return_value
    except KeyboardInterrupt as error:
        raise InterruptedRunError("the training was interrupted") from error
    except Exception as error:
        raise _failure(error) from error
    if isinstance(returned, DdrayError):
        raise returned
    return dict(returned)


def _in_thread(function: Callable[[], Any]) -> Any:
    """Return what a function returns in a thread of its own.

    In the main thread, Ray Train handles SIGINT itself, and ends the process with exit code 0.
    """
    future: Future[Any] = Future()

    def call() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future.result()


def _failure(error: Exception) -> DdrayError:
    """Return ddray's own error of a worker that failed to the end, else one that says why it did."""
    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    causes = [getattr(failure, "cause", None) or failure.__cause__ or failure for failure in failures]
    for cause in causes:
        if isinstance(cause, DdrayError):
            return cause
    return DdrayError(
        f"the training failed {MAX_ATTEMPTS} times: {one_line(causes[0], 200)}; run the command again to "
        "continue from its last checkpoint"
    )


def train_worker(config: Mapping[str, Any]) -> dict[str, Any] | DdrayError:
    """Train as one of the workers of `config["job"]`, and write this one's tensors to its folder.

    Returns the measurements; or the DivergedError, which all workers get at the same step, and which trying
    again would not help.
    """
    from ray import train
    from ray.train.torch import get_device
    from safetensors.torch import save_file

    from ddray.data import open_dataset
    from ddray.jobs.trainers import PoolTrainer
    from ddray.seeding import derive_seed, forked_global
    from ddray.training.team import Team

    job: ParallelJob = config["job"]
    prepare_worker()
    set_threads(job.cpus)
    device = worker_device("cuda" if job.gpus else "cpu")
    if device.type == "cuda":
        device = get_device()  # the workers of a node see all of its GPUs
    context = train.get_context()
    team = Team(context.get_world_rank(), context.get_world_size())
    spec = PoolSpec.parse(job.spec)
    dataset = open_dataset(job.dataset, data_dir=job.data_dir)
    checkpoints = RayCheckpoints(team, device, job.checkpoint_s)
    trainer = PoolTrainer(dataset, dataset.train(), device, team, checkpoints)
    seed = derive_seed(spec.seed, "dropout", team.rank)  # every worker drops other units
    with forked_global(seed, device):
        try:
            tensors, measured = trainer(spec)
        except DivergedError as error:
            return error
    if team.rank:  # the weights are the same everywhere
        tensors = {}
    path, peak = _part(job.folder, team.rank), {_PEAK: str(measured[_PEAK])}
    with storage_errors(path):
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, peak)
    return dict(measured)


def _part(folder: Path, rank: int) -> Path:
    return folder / f"worker-{rank}.safetensors"


def _collected(folder: Path, num_workers: int) -> tuple[dict[str, Tensor], int]:
    """Return the first worker's weights, and the largest peak of the workers' memory."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    files = [_part(folder, rank) for rank in range(num_workers)]
    parts: list[Any] = [safe_open(file, framework="pt") for file in files]
    return load_file(files[0]), max(int(part.metadata()[_PEAK]) for part in parts)


class RayCheckpoints:
    """Checkpoints of Ray Train, at the ends of epochs, at most one in so many seconds; in a worker."""

    def __init__(self, team: Any, device: Any, seconds: float) -> None:
        self._team, self._device, self._seconds = team, device, seconds
        self._last = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """Return the state that this attempt starts from."""
        import torch
        from ray import train

        checkpoint = train.get_checkpoint()
        if checkpoint is None:
            return None
        with checkpoint.as_directory() as folder:
            state: dict[str, Any] = torch.load(Path(folder, _STATE), map_location="cpu", weights_only=True)
        return state

    def save(self, state: Callable[[], dict[str, Any]]) -> None:
        """Let the first worker report its state, if its clock says so; the others report nothing with it."""
        import torch
        from ray import train

        is_due = time.monotonic() - self._last >= self._seconds
        if not self._team.first(float(is_due), self._device):
            return
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if self._team.rank == 0:
                torch.save(state(), Path(folder, _STATE))
                checkpoint = train.Checkpoint.from_directory(folder)
            train.report({}, checkpoint=checkpoint)
        self._last = time.monotonic()
