"""`ddray pool`: networks that many runs share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ddray.commands import display
from ddray.commands.options import Emit, command
from ddray.config import Config, parse_overrides
from ddray.jobs.options import PoolOptions

if TYPE_CHECKING:
    from ddray.data import Dataset
    from ddray.jobs.pool_training import PoolResult


class KeyArgument(Config):
    """The entry to describe."""

    key: str
    """Key of an entry, or its first characters."""


@command(PoolOptions, example="ddray pool train --kind supervised --dataset digits --num-models 10")
def pool_train(emit: Emit, **options: Any) -> None:
    """Train the networks of a pool that are not there yet."""
    from ddray.data import open_dataset
    from ddray.jobs.pool_training import check_kind

    parsed = PoolOptions.pick(options)
    check_kind(parsed.kind, parsed.limited())
    recipe = parse_overrides(parsed.sets) | ({} if parsed.epochs is None else {"epochs": parsed.epochs})
    opened = open_dataset(parsed.dataset, **parsed.opening())
    if parsed.num_workers is None:
        result = _train_here(opened, parsed, recipe)
    else:
        result = _train_on_workers(opened, parsed, recipe)
    lines = {**result.dump(), "keys": "\n".join(result.keys)}
    in_pool = parsed.out is None  # `pool show` looks nowhere else
    next_steps = [display.next_step("pool", "show", result.key[:12])] if in_pool else []
    emit(result, lambda: [display.table_of("pool", lines), *next_steps])


def _train_on_workers(opened: Dataset, options: PoolOptions, recipe: dict[str, Any]) -> PoolResult:
    """Train on a cluster: a network on all workers, or a network on each."""
    if options.kind == "trajectory":
        from ddray.cluster.pretrain import train_experts

        return train_experts(opened, options, recipe)
    from ddray.cluster.data_parallel import train_parallel

    return train_parallel(opened, options, recipe)


def _train_here(opened: Dataset, options: PoolOptions, recipe: dict[str, Any]) -> PoolResult:
    """Train in this process."""
    from ddray.jobs import pool_training
    from ddray.jobs.context import on_device
    from ddray.runs.recovery import recovering

    settings: dict[str, Any] = {"arch": options.arch or "auto", "seed": options.seed or 0}
    with on_device(options.device) as device:
        where: dict[str, Any] = {"recipe": recipe, "device": device}
        if options.kind == "diffusion":
            return recovering(pool_training.train_diffusion, opened, **where, out=options.out)
        where["folder"] = options.out
        if options.kind == "ssl":
            return recovering(pool_training.train_teacher, opened, **where, **settings)
        num = 1 if options.num_models is None else options.num_models
        settings["num_models"] = num
        if options.kind == "trajectory":
            return recovering(pool_training.train_experts, opened, **where, **settings)
        return recovering(pool_training.train_pool, opened, **where, **settings)


@command(example="ddray pool list --json")
def pool_list(emit: Emit) -> None:
    """List what the pool under $DDRAY_HOME holds."""
    from ddray.pool.listing import list_pool

    result = list_pool()
    emit(result, lambda: display.pool_list(result.models))


@command(KeyArgument, example="ddray pool show 3f2a", arguments=("key",))
def pool_show(emit: Emit, key: str) -> None:
    """Say what an entry is and which tensors it holds."""
    from ddray.pool.listing import show_entry

    result = show_entry(key)
    emit(result, lambda: display.entry_tables(result))
