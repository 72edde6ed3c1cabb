"""How commands end: with a picture, a table, and what to type next."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddray.commands.display import evaluate_tables, next_step, table_of, typed
from ddray.drawing.text import percent

if TYPE_CHECKING:
    from ddray.evaluation.options import EvaluateResult
    from ddray.jobs.distill import DistillResult
    from ddray.tuning.result import BestTrial, PaperPoint, TuneResult


def distill_tables(result: DistillResult) -> list[Any]:
    """Return a summary of a distillation: picture, set, loss, time; and the next step."""
    values, artifact = result.dump(), Path(result.artifact)
    loss = [values.pop(name) for name in ("first_loss", "final_loss")]
    seconds, pool, whitening = (
        values.pop(name, None) for name in ("seconds", "seconds_with_pool", "whitening_s")
    )
    picture = artifact.with_suffix(".png")
    summary: dict[str, Any] = {
        **({"picture": picture} if picture.is_file() else {}),
        "artifact": values.pop("artifact"),
        **(
            {}
            if None in loss
            else {"loss": "{:.4g} in the first tenth of the steps, {:.4g} in the last".format(*loss)}
        ),
        "seconds": _seconds(seconds, pool, whitening),
        **_size(values.pop("size_bytes", None), values.pop("made_of", None)),
    }
    summary |= {name: value for name, value in values.items() if value is not None and name != "name"}
    return [table_of(values["name"], summary), next_step("evaluate", artifact)]


def _seconds(seconds: float | None, with_pool: float | None, whitening: float | None) -> str:
    """Return what a distillation took, and beside it what its pool and whitening did, whenever that was."""
    if seconds is None:
        return "-"
    parts = {"pool": (with_pool or seconds) - seconds, "whitening": whitening or 0.0}
    beside = ", ".join(f"{name} {value:.4g}" for name, value in parts.items() if value > 0)
    return f"{seconds:.4g}" + (f" (beside it: {beside})" if beside else "")


def _size(size_bytes: int | None, made_of: dict[str, int] | None) -> dict[str, str]:
    """Return the row of a file's size, and of what it is made of."""
    if size_bytes is None:
        return {}
    parts = ", ".join(f"{name} {size / 1e6:.3g}" for name, size in (made_of or {}).items())
    return {"MB": f"{size_bytes / 1e6:.3g}" + (f" ({parts})" if parts else "")}


def evaluation(file: Path, result: EvaluateResult) -> list[Any]:
    """Return an evaluation's picture and tables, and the next step: the page of the run it is noted in."""
    picture, folder = file.with_suffix(".png"), result.run_dir or result.recorded_in
    name = result.name or file.stem
    return [
        *([f"picture: {typed(picture)}"] if picture.is_file() else []),
        *evaluate_tables(f"{name}: {result.protocol}, {result.split}", result.protocol, result.dump()),
        *([next_step("report", Path(folder))] if folder else []),
    ]


def tune_tables(result: TuneResult) -> list[Any]:
    """Return a table of a search's results and files, and the next step."""
    best, preset, folder = result.best, result.paper_point, Path(result.run_dir)
    tests = ", ".join(map(str, result.earlier_tests))
    changed = {"cut": result.cut, "overridden": ", ".join(result.overridden or ())}
    summary = {
        "trials": f"{result.num_trials} ({result.num_failed} failed, "
        f"{result.num_stopped_early} stopped early)",
        **{f"{name} in the preset": text for name, text in changed.items() if text},
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
        "picture": Path(result.artifact).with_suffix(".png"),
        "best settings": folder / "best.yaml",
        "report": folder / "report.html",
        "table": folder / "results.csv",
    }
    return [table_of("search", summary), next_step("evaluate", Path(result.artifact))]


def _val_line(objective: str, best: BestTrial, preset: PaperPoint) -> dict[str, str]:
    """Return the row of the objective."""
    if objective == "val_accuracy":
        return {"val accuracy %": f"{percent(best[objective])} (preset {percent(preset[objective])})"}
    return {"val Spearman": f"{_rho(best[objective])} (preset {_rho(preset[objective])})"}


def _rho(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
