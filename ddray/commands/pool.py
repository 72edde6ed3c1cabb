"""`ddray pool`: networks that many runs share."""

from typing import Any

from ddray.commands import display
from ddray.commands.options import Emit, command
from ddray.config import Config, parse_overrides
from ddray.jobs.options import PoolOptions


class KeyArgument(Config):
    """The entry to describe."""

    key: str
    """Key of an entry, or its first characters."""


@command(PoolOptions, example="ddray pool train --kind supervised --dataset digits --num-models 10")
def pool_train(emit: Emit, **options: Any) -> None:
    """Train the networks of a pool that are not there yet."""
    from ddray.data import open_dataset
    from ddray.jobs import pool_training
    from ddray.jobs.context import on_device
    from ddray.runs.recovery import recovering

    parsed = PoolOptions.pick(options)
    limited = {"--arch": parsed.arch, "--num-models": parsed.num_models, "--seed": parsed.seed}
    pool_training.check_kind(parsed.kind, [name for name, value in limited.items() if value is not None])
    recipe = parse_overrides(parsed.sets) | ({} if parsed.epochs is None else {"epochs": parsed.epochs})
    opened = open_dataset(parsed.dataset, **parsed.opening())
    settings: dict[str, Any] = {"arch": parsed.arch or "auto", "seed": parsed.seed or 0, "folder": parsed.out}
    num = 1 if parsed.num_models is None else parsed.num_models
    with on_device(parsed.device) as device:
        where: dict[str, Any] = {"recipe": recipe, "device": device}
        if parsed.kind == "diffusion":
            result = recovering(pool_training.train_diffusion, opened, **where, out=parsed.out)
        elif parsed.kind == "ssl":
            result = recovering(pool_training.train_teacher, opened, **where, **settings)
        else:
            result = recovering(pool_training.train_pool, opened, **where, **settings, num_models=num)
    emit(result, display.table_of("pool", {**result.dump(), "keys": "\n".join(result.keys)}))


@command(example="ddray pool list --json")
def pool_list(emit: Emit) -> None:
    """List what the pool under $DDRAY_HOME holds."""
    from ddray.pool.listing import list_pool

    result = list_pool()
    emit(result, lambda: display.pool_table(result.models))


@command(KeyArgument, example="ddray pool show 3f2a", arguments=("key",))
def pool_show(emit: Emit, key: str) -> None:
    """Say what an entry is and which tensors it holds."""
    from ddray.pool.listing import show_entry

    result = show_entry(key)
    emit(result, lambda: display.entry_tables(result))
