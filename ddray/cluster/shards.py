"""Where the shards of a distillation are run: in this process, or on Ray."""

from ddray.cluster.executor import shard_executor
from ddray.cluster.resources import with_gpus
from ddray.errors import InputError
from ddray.jobs.context import on_device
from ddray.jobs.distill import DistillResult
from ddray.jobs.options import DistillOptions, ShardOptions
from ddray.jobs.plan import Plan
from ddray.jobs.shards import distill_shards
from ddray.runs.folder import read_config


def distill_on(plan: Plan, how: DistillOptions, shards: ShardOptions, more_steps: bool) -> DistillResult:
    """Distil in shards on the executor that the options name; errors as for `jobs.shards.distill_shards`.

    Raises:
        InputError: the device is none of Ray's workers, or a worker does not fit.
    """
    if shards.executor == "local":
        with on_device(how.device) as device:
            executor = shard_executor(shards)
            return distill_shards(plan, how, shards, executor, device=device.type, more_steps=more_steps)
    if how.device not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device must be auto, cpu or cuda for shards on Ray, got {how.device}")
    if how.device == "cpu":
        if shards.gpus:
            raise InputError(f"--gpus-per-shard must be 0 with --device cpu, got {shards.gpus:g}")
        shards = shards.model_copy(update={"gpus_per_shard": 0.0})
    shards = with_gpus(shards, read_config(how.run_dir) if how.resume else {})
    if how.device == "cuda" and not shards.gpus:
        raise InputError(
            "--device cuda needs GPUs that torch can use for the shards, got 0 of them per shard"
        )
    executor = shard_executor(shards)
    return distill_shards(plan, how, shards, executor, device=shards.device, more_steps=more_steps)
