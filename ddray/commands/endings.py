"""How commands end: with a picture, a table, and what to type next."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddray.commands.display import evaluate_tables, next_step, table_of, typed
from ddray.drawing.text import percent
from ddray.evaluation.options import EvaluateOptions

if TYPE_CHECKING:
    from ddray.evaluation.options import EvaluateResult
    from ddray.jobs.distill import DistillResult
    from ddray.tuning.result import BestTrial, PaperPoint, TuneResult


def distill_tables(result: DistillResult, reading: Sequence[object] = ()) -> list[Any]:
    """Return a summary of a distillation and the next step, with `reading`: options of its dataset."""
    from ddray.tuning.settings import method_protocol

    values, artifact = result.dump(), Path(result.artifact)
    rows = {
        **_if_there("picture", artifact.with_suffix(".png")),
        "artifact": artifact,
        "run": values.pop("run_dir"),
        **{name: values.pop(name, None) for name in ("method", "dataset", "ipc", "budget", "steps")},
        "resumed from step": values.pop("resumed_from_step") or None,
        **_changed(values.pop("cut", None), values.pop("overridden", None)),
        "loss": _loss(values.pop("first_loss"), values.pop("final_loss")),
        "seconds": _seconds(values),
        **_size(values.pop("size_bytes", None), values.pop("made_of", None)),
        "peak memory": _bytes(values.pop("peak_memory_bytes", None)),
        "values stored": _thousands(values.pop("storage_floats", None)),
        "half memory budget": "yes: memory had run out" if values.pop("half_memory_budget", None) else None,
        "sets along the steps": values.pop("snapshots", None),
    }
    title = values.pop("name", None) or artifact.stem
    del values["artifact"]
    rows |= {name.replace("_", " "): value for name, value in values.items()}
    words = (*_protocol_words(method_protocol(result.method)), *reading)
    return [
        table_of(title, {name: value for name, value in rows.items() if value is not None}),
        next_step("evaluate", artifact, *words),
    ]


def _if_there(title: str, file: Path) -> dict[str, Path]:
    return {title: file} if file.is_file() else {}


def _changed(cut: str | None, overridden: Iterable[str] | None) -> dict[str, str]:
    """Return rows of what a run changed of its preset, if anything."""
    changed = {"cut": cut, "overridden": ", ".join(overridden or ())}
    return {f"{name} in the preset": text for name, text in changed.items() if text}


def _protocol_words(protocol: str) -> tuple[str, ...]:
    """Return the options of `ddray evaluate` for a protocol, none for its default."""
    return () if protocol == EvaluateOptions.model_fields["protocol"].default else ("--protocol", protocol)


def _loss(first: float | None, final: float | None) -> str | None:
    if first is None or final is None:
        return None
    return f"{first:.4g} in the first tenth of the steps, {final:.4g} in the last"


def _seconds(values: dict[str, Any]) -> str:
    """Take a distillation's seconds out of its values, and return them as text.

    Beside them stands what its pool and whitening took, whenever that was.
    """
    wall, per_step = values.pop("wall_s"), values.pop("seconds_per_step")
    of_all, with_pool, whitening = (
        values.pop(name, None) for name in ("seconds", "seconds_with_pool", "whitening_s")
    )
    seconds = wall if of_all is None else of_all
    notes = [] if per_step is None else [f"{per_step:.3g} per step"]
    with_pool, whitening = with_pool or seconds, whitening or 0.0
    totals = (seconds, with_pool, with_pool + whitening)
    if all(abs(wall - total) > max(1.0, 0.05 * total) for total in totals):
        notes.append(f"{wall:.4g} since this start")  # a part of them was another process's
    parts = {"pool": with_pool - seconds, "whitening": whitening}
    beside = ", ".join(f"{name} {value:.4g}" for name, value in parts.items() if value > 0)
    notes += [f"beside it: {beside}"] if beside else []
    return f"{seconds:.4g}" + (f" ({'; '.join(notes)})" if notes else "")


def _bytes(size: int | None) -> str | None:
    """Return a size as `13.6 kB`."""
    from rich.filesize import decimal

    return None if size is None else decimal(size)


def _thousands(number: int | None) -> str | None:
    return None if number is None else f"{number:,}"


def _size(size_bytes: int | None, made_of: dict[str, int] | None) -> dict[str, str]:
    """Return the row of a file's size, and of what it is made of."""
    if size_bytes is None:
        return {}
    parts = ", ".join(f"{name} {_bytes(size)}" for name, size in (made_of or {}).items())
    return {"size": f"{_bytes(size_bytes)}" + (f" ({parts})" if parts else "")}


def evaluation(file: Path, result: EvaluateResult, reading: Sequence[object] = ()) -> list[Any]:
    """Return an evaluation's picture and tables, and the next step: the page of the run it is noted in.

    `reading` are the options that say where datasets are.
    """
    picture, folder = file.with_suffix(".png"), result.run_dir or result.recorded_in
    name = result.name or file.stem
    return [
        *([f"picture: {typed(picture)}"] if picture.is_file() else []),
        *evaluate_tables(f"{name}: {result.protocol}, {result.split}", result.protocol, result.dump()),
        *([next_step("report", Path(folder), *reading)] if folder else []),
    ]


def tune_tables(result: TuneResult, scoring: Sequence[object] = ()) -> list[Any]:
    """Return a table of a search's results and files, and the next step, with `scoring` as its options."""
    best, preset, folder = result.best, result.paper_point, Path(result.run_dir)
    tests = ", ".join(map(str, result.earlier_tests))
    summary = {
        "trials": f"{result.num_trials} ({result.num_failed} failed, "
        f"{result.num_stopped_early} stopped early)",
        **_changed(result.cut, result.overridden),
        "protocol": result.protocol,
        "best trial": best.trial,
        "best config": best.config or "the preset's",
        **_val_line(result.objective, best, preset),
        "test accuracy %": percent(result.test_accuracy_mean, result.test_accuracy_std)
        + f" (preset {percent(preset.test_accuracy_mean, preset.test_accuracy_std)})",
        "verdict": result.verdict,
        **({"test opened before": f"after {tests} trials"} if tests else {}),
        "seconds": f"{result.wall_s:.0f}",
        "artifact": result.artifact,
        **_if_there("picture", Path(result.artifact).with_suffix(".png")),
        "best settings": folder / "best.yaml",
        "report": folder / "report.html",
        "table": folder / "results.csv",
    }
    words = (*_protocol_words(result.protocol), *scoring)
    return [table_of("search", summary), next_step("evaluate", Path(result.artifact), *words)]


def _val_line(objective: str, best: BestTrial, preset: PaperPoint) -> dict[str, str]:
    """Return the row of the objective."""
    if objective == "val_accuracy":
        return {"val accuracy %": f"{percent(best[objective])} (preset {percent(preset[objective])})"}
    return {"val Spearman": f"{_rho(best[objective])} (preset {_rho(preset[objective])})"}


def _rho(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
