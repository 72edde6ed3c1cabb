"""The tables that commands print for people."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddray.drawing.text import percent

if TYPE_CHECKING:
    from ddray.pool.listing import PoolEntryInfo, PoolModel
    from ddray.ranking.result import NasResult
    from ddray.tuning.result import BestTrial, PaperPoint, TuneResult


def show(*tables: Any) -> None:
    """Print tables on stdout."""
    from rich.console import Console

    console = Console()
    for table in tables:
        for renderable in table if isinstance(table, list | tuple) else (table,):
            console.print(renderable)


def table_of(title: str, values: dict[str, Any]) -> Any:
    """Return a two-column table of a mapping."""
    from rich.table import Table

    table = Table(title=title, show_header=False)
    for name, value in values.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        table.add_row(name, text if len(text) < 400 else text[:400] + " ...")
    return table


def accuracy_table(title: str, results: list[dict[str, Any]]) -> Any:
    """Return a table of accuracies in percent: mean and sample standard deviation over networks."""
    from rich.table import Table

    table = Table("arch", "accuracy %", "std", "networks", "images", "seconds", title=title)
    for result in results:
        std = result["accuracy_std"]
        table.add_row(
            result["arch"],
            f"{100 * result['accuracy_mean']:.2f}",
            "-" if std is None else f"{100 * std:.2f}",
            str(len(result["per_seed"])),
            str(result["num_images"]),
            f"{result['wall_s']:.1f}",
        )
    return table


def pool_table(models: Sequence[PoolModel]) -> Any:
    """Return a table of a pool's entries."""
    from rich.table import Column, Table

    key = Column("key", no_wrap=True)
    table = Table(key, "kind", "dataset", "arch", "epochs", "times trained", "MB", title="pool")
    for model in models:
        epochs = "-" if model.epochs is None else str(model.epochs)
        size = f"{model.size_bytes / 1e6:.1f}"
        names = (model.key[:12], model.kind, model.dataset, model.arch)
        table.add_row(*names, epochs, str(model.times_trained), size)
    return table


def entry_tables(result: PoolEntryInfo) -> list[Any]:
    """Return tables of a pool entry's meta and of its tensors."""
    tensors = {name: f"{tensor['dtype']} {tensor['shape']}" for name, tensor in result.tensors.items()}
    return [table_of(result.key[:12], result.meta or {}), table_of("tensors", tensors)]


def evaluate_tables(title: str, protocol: str, results: list[dict[str, Any]]) -> list[Any]:
    """Return tables of an evaluation's accuracies and, in percent, of its protocol's other measures."""
    from rich.table import Table

    from ddray.evaluation import get_protocol

    tables = [accuracy_table(title, results)]
    measures = get_protocol(protocol).measures
    if not measures:
        return tables
    lines = [list(_measured(result, measures)) for result in results]
    table = Table("arch", *(f"{header} %" for header, _ in lines[0]))
    for result, line in zip(results, lines, strict=True):
        table.add_row(result["arch"], *(text for _, text in line))
    return [*tables, table]


def _measured(result: dict[str, Any], measures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a header and a text per measure, or per step of a measure."""
    for name, measure in measures.items():
        value, std = result[name], result[f"{name}_std"]
        if isinstance(value, list):
            for step, pair in enumerate(zip(value, std, strict=True), start=1):
                yield f"{measure.title} {step},", percent(*pair)
        else:
            yield measure.title, percent(value, std)


def tune_tables(result: TuneResult) -> list[Any]:
    """Return a table of a search's results and files."""
    best, paper = result.best, result.paper_point
    summary = {
        "trials": f"{result.num_trials} ({result.num_failed} failed, "
        f"{result.num_stopped_early} stopped early)",
        "best config": json.dumps(best.config) + f" (trial {best.trial})",
        **_val_line(result.objective, best, paper),
        "test accuracy %": percent(result.test_accuracy_mean, result.test_accuracy_std)
        + f" (paper's point {percent(paper.test_accuracy_mean, paper.test_accuracy_std)})",
        "seconds": f"{result.wall_s:.0f}",
        "artifact": result.artifact,
        "picture": str(Path(result.artifact).with_suffix(".png")),
        "report": str(Path(result.run_dir) / "report.html"),
        "table": str(Path(result.run_dir) / "results.csv"),
    }
    return [table_of("search", summary)]


def _val_line(objective: str, best: BestTrial, paper: PaperPoint) -> dict[str, str]:
    """Return the row of the objective."""
    if objective == "val_accuracy":
        return {"val accuracy %": f"{percent(best[objective])} (paper's point {percent(paper[objective])})"}
    return {"val Spearman": f"{_number(best[objective])} (paper's point {_number(paper[objective])})"}


def archs_table(space: str, archs: Sequence[dict[str, Any]]) -> Any:
    """Return a table of a NAS space's architectures."""
    from rich.table import Table

    table = Table("index", "architecture", "million parameters", "million FLOPs", title=space)
    for arch in archs:
        name = arch.get("arch_str", arch["name"])
        table.add_row(str(arch["index"]), name, f"{arch['params_m']:.4f}", f"{arch['flops_m']:.2f}")
    return table


def nas_tables(result: NasResult) -> list[Any]:
    """Return tables of how well each proxy ranks architectures, and of the sweep's files."""
    from rich import box
    from rich.table import Table

    title = f"{result.num_archs} architectures of {result.space}"
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("proxy", overflow="fold")
    for name in ("Spearman", "95 %", "top 20 %", "top-1 %", "best %", "images", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for proxy in result.proxies:
        low, high = proxy.spearman_ci95 or (None, None)
        table.add_row(
            proxy.proxy,
            _number(proxy.spearman),
            f"{_number(low)}..{_number(high)}",
            _number(proxy.spearman_top20),
            percent(proxy.top1_truth_accuracy),
            percent(proxy.best_truth_accuracy),
            f"{proxy['storage_images']:g}",
            f"{proxy['wall_s']:.1f}",
        )
    if result.run_dir is None:
        return [table]
    names = {"report": "report.html", "table": "results.csv", "plot": "scatter.png"}
    files = {label: str(Path(result.run_dir) / name) for label, name in names.items()}
    return [table, table_of("files", files)]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
