"""A small search on digits for the fault tests: as a function call, and as a command's arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddray.cluster.tune import tune
from ddray.data import open_dataset
from ddray.jobs.plan import resolve
from ddray.runs.ledger import Ledger, Row
from ddray.tuning.options import TuneOptions

TINY = {"arch": "convnet2_w8", "steps": 9, "checkpoint_every": 3, "evaluate": {"epochs": 2, "seeds": 1}}


def search(
    run_dir: Path,
    space: str,
    *,
    method: str = "datadam",
    resume: bool = False,
    layers: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Run a search in this process; `space` is the space file's text. One trial at a time, unless asked."""
    options.setdefault("max_concurrent", 1)  # each further process costs seconds of importing torch
    path = run_dir.parent / f"{run_dir.name}.yaml"
    path.write_text(space)
    settings = {"batch_real": 4} if method != "random" else {}
    plan = resolve(method, open_dataset("digits"), ipc=1, layers=[layers or {**TINY, "method": settings}])
    return tune(
        plan,
        TuneOptions(space=path, final_sets=1, **options),
        run_dir=run_dir,
        resume=resume,
    ).dump()


def arguments(run_dir: Path, *extra_arguments: str) -> list[str]:
    """Return the arguments of a search with 4 random trials, slow enough to be killed halfway."""
    return [
        *("tune", "--method", "datadam", "--ipc", "1", "--strategy", "random", "--num-samples", "4"),
        *("--steps", "60", "--set", "evaluate.epochs=2", "--set", "evaluate.seeds=1"),
        *("--set", "method.batch_real=8", "--set", "checkpoint_every=5", "--set", "arch=convnet3_w32"),
        *("--max-concurrent", "1", "--final-sets", "1", "--run-dir", str(run_dir), *extra_arguments),
    ]


def trials(run_dir: Path) -> list[Row]:
    """Return the trial rows by number."""
    return sorted(Ledger(run_dir).rows("trial"), key=lambda row: int(row.spec["number"]))
