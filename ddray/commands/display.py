"""The tables that commands print for people."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddray.drawing.text import percent
from ddray.system.progress import plain_console

if TYPE_CHECKING:
    from ddray.commands.methods import MethodLine, MethodList, MethodPage
    from ddray.pool.listing import PoolEntryInfo, PoolModel
    from ddray.ranking.result import NasResult
    from ddray.tables.columns import Column
    from ddray.tables.result import BenchResult
    from ddray.tuning.costs import SearchForecast


def show(tables: Any) -> None:
    """Print a table, or a list of tables and lines, on stdout; a line is not broken."""
    console = plain_console()
    for table in tables if isinstance(tables, list) else (tables,):
        is_line = isinstance(table, str)
        console.print(table, soft_wrap=is_line, highlight=False if is_line else None)


def next_step(*words: object) -> str:
    """Return the line that says what to type next: `ddray` with these words."""
    return "next: " + shlex.join(["ddray", *map(typed, words)])


def typed(word: object) -> str:
    """Return a word as people type it: a path below this folder from here."""
    here = Path.cwd()
    if isinstance(word, Path) and word.is_relative_to(here):
        word = word.relative_to(here)
    return str(word)


def without(option: str) -> str:
    """Return the line that says to type the command again, without an option."""
    return next_step(*(word for word in sys.argv[1:] if word != option))


def table_of(title: str, values: Mapping[str, Any]) -> Any:
    """Return a two-column table of a mapping."""
    from rich.table import Table

    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(overflow="fold")  # a long path is not cut
    for name, value in values.items():
        text = _value(value)
        table.add_row(name, text if len(text) < 400 else text[:400] + " ...")
    return table


def _value(value: Any) -> str:
    """Return a value as people read it: floats with four digits, lists and mappings without quotes."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value))
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_value(one)}" for name, one in value.items())
    return str(value)


def table(title: str | None, headers: Sequence[Any], rows: Iterable[Iterable[object]]) -> Any:
    """Return a table of texts; None is an empty cell."""
    from rich.table import Table

    drawn = Table(*headers, title=title)
    for row in rows:
        drawn.add_row(*(None if cell is None else str(cell) for cell in row))
    return drawn


def pool_list(models: Sequence[PoolModel]) -> list[Any]:
    """Return a table of a pool's entries, and the next step."""
    words = (
        ("show", models[0].key[:12]) if models else ("train", "--kind", "supervised", "--dataset", "digits")
    )
    return [pool_table(models), next_step("pool", *words)]


def pool_table(models: Sequence[PoolModel]) -> Any:
    """Return a table of a pool's entries."""
    from rich.table import Column

    headers = (Column("key", no_wrap=True), "kind", "dataset", "arch", "epochs", "times trained", "MB")
    rows = (
        (
            *(model.key[:12], model.kind, model.dataset, model.arch),
            *("-" if model.epochs is None else model.epochs, model.times_trained),
            f"{model.size_bytes / 1e6:.1f}",
        )
        for model in models
    )
    return table("pool", headers, rows)


def entry_tables(result: PoolEntryInfo) -> list[Any]:
    """Return tables of a pool entry's meta and of its tensors."""
    tensors = {name: f"{tensor['dtype']} {tensor['shape']}" for name, tensor in result.tensors.items()}
    return [table_of(result.key[:12], result.meta or {}), table_of("tensors", tensors)]


def evaluate_tables(title: str, protocol: str, result: dict[str, Any]) -> list[Any]:
    """Return tables of an evaluation's accuracies, in percent, of its protocol's other measures, and files.

    Accuracies are mean and sample standard deviation over networks.
    """
    from ddray.evaluation import get_protocol
    from ddray.evaluation.protocol import balance_matters

    results = result["results"]
    balanced = ("balanced_accuracy_mean",) if balance_matters(results) else ()
    peak = ("peak_memory_bytes",) if all("peak_memory_bytes" in one for one in results) else ()
    rows = (
        (
            *(one["arch"], percent(one["accuracy_mean"]), percent(one["accuracy_std"])),
            *(percent(one.get(name)) for name in balanced),
            *(len(one["per_seed"]), one["num_images"], f"{one['wall_s']:.1f}"),
            *(f"{one[name] / 1e6:,.0f}" for name in peak),
        )
        for one in results
    )
    extra, memory = ("balanced %",) * len(balanced), ("peak MB",) * len(peak)
    headers = ("arch", "accuracy %", "std", *extra, "networks", "images", "seconds", *memory)
    if "learned_lr" in result:
        title += f", at the learned rate {result['learned_lr']:.4g}"
    tables = [table(title, headers, rows)]
    if measures := get_protocol(protocol).measures:
        lines = [dict(_measured(one, measures)) for one in results]
        titles = ("arch", *lines[0])
        pairs = zip(results, lines, strict=True)
        tables.append(table(None, titles, ((one["arch"], *line.values()) for one, line in pairs)))
    if folder := result.get("run_dir"):
        tables.append(table_of("record", {"run": folder, "failed networks": result["num_failed"]}))
    return tables


def _measured(result: dict[str, Any], measures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a header and a text per measure, or per step of a measure."""
    for name, measure in measures.items():
        value, std = result[name], result[f"{name}_std"]
        if isinstance(value, list):
            for step, pair in enumerate(zip(value, std, strict=True), start=1):
                yield f"{measure.title} {step}, %", percent(*pair)
        elif measure.is_fraction:
            yield f"{measure.title} %", percent(value, std)
        else:
            yield measure.title, f"{value:.4g}" + ("" if std is None else f" +- {std:.2g}")


def methods_table(result: MethodList) -> Any:
    """Return a table of all methods, with the cost of their presets."""
    from rich import box
    from rich.table import Column, Table

    right: dict[str, Any] = {"justify": "right", "no_wrap": True}
    headers: tuple[Column | str, ...] = (
        *(Column("method", no_wrap=True), "what it is, paper", Column("protocol", no_wrap=True)),
        *(Column(name, **right) for name in ("steps", "networks", "time here")),
    )
    title = f"methods, with the cost of their presets on {result.dataset}, ipc {result.ipc}"
    caption = (
        "networks: trained before, once for all runs (new: not in the pool yet); time here: of the "
        "steps, by past runs on this machine, if there are any. ddray methods NAME shows settings."
    )
    table = Table(*headers, title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for line in result.methods:
        what = f"{line.summary.rstrip('.')} ({line.paper})" if line.paper else line.summary
        table.add_row(line.name, what, line.protocol, *_method_costs(line))
    return table


def _method_costs(line: MethodLine) -> tuple[str, str, str]:
    """Return steps, networks (of which missing) and time of a method."""
    if line.steps is None:
        return ("-", "-", "-")
    num, missing = line.networks, line.networks_missing
    new = "" if not missing else " new" if missing == num else f", {missing} new"
    networks = "?" if num is None else f"{num}{new}"
    return f"{line.steps:,}", networks, "-" if line.estimate_s is None else _duration(line.estimate_s)


def method_tables(page: MethodPage, dataset: str, ipc: int, last: str) -> list[Any]:
    """Return what a method is, its cost, its settings, and a last line."""
    steps, networks, seconds = _method_costs(page)
    costs = f"{steps} steps; networks trained before: {networks}; time here: {seconds}"
    column = f"on {dataset}, ipc {ipc}"
    facts = {
        "paper": page.paper or "-",
        "scored by": f"--protocol {page.protocol}",
        "presets": page.presets,
        column: page.unsuited or costs,
        "tune varies": {name: _ranges(space) for name, space in page.search_space.items()},
    }
    values = "default" if page.unsuited else column
    settings = (
        (one["name"], _value(one.get("value", one["default"])), one["meaning"]) for one in page.settings
    )
    return [
        *(page.description, "", table_of(page.name, facts)),
        *([table("settings", ("--set", values, "meaning"), settings)] if page.settings else ()),
        last,
    ]


def _ranges(space: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_value(value)}" for name, value in space.items())


def archs_table(space: str, archs: Sequence[dict[str, Any]]) -> Any:
    """Return a table of a NAS space's architectures."""
    rows = (
        (
            *(arch["index"], arch.get("arch_str", arch["name"])),
            *(f"{arch['params_m']:.4f}", f"{arch['flops_m']:.2f}"),
        )
        for arch in archs
    )
    return table(space, ("index", "architecture", "million parameters", "million FLOPs"), rows)


def nas_tables(result: NasResult, reading: Sequence[object] = ()) -> list[Any]:
    """Return tables of how well each proxy ranks architectures, and of the sweep's files.

    `reading` are the options that say where datasets are, for the next step.
    """
    from rich import box
    from rich.table import Table

    from ddray.ranking.figures_of_merit import ENOUGH_ARCHS, TOO_FEW, is_telling
    from ddray.ranking.report import truth_text

    truth = truth_text(result.truth)
    title = f"{result.num_archs} architectures of {result.space}" + (f"; truth: {truth}" if truth else "")
    table = Table(title=title, box=box.SIMPLE, padding=0)
    table.add_column("proxy", overflow="fold")
    for name in ("Spearman", "95 %", "top 20 %", "top-1 %", "best %", "test %", "images", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for proxy in result.proxies:
        figures = proxy.dump()
        low, high = figures["spearman_ci95"] or (None, None)
        few = [not is_telling(figures, name) for name in ("spearman", "spearman_top20")]
        table.add_row(
            *(proxy.proxy, "too few" if few[0] else _number(proxy.spearman)),
            "" if few[0] else f"{_number(low)}..{_number(high)}",
            *("too few" if few[1] else _number(proxy.spearman_top20), percent(proxy.top1_truth_accuracy)),
            *(percent(proxy.best_truth_accuracy), percent(proxy.top1_test_accuracy)),
            f"{proxy['storage_images']:g}",
            f"{proxy['wall_s']:.1f}",
        )
    least = min((proxy.dump().get("num_archs", 0) for proxy in result.proxies), default=0)
    notes = [f"note: {least} architectures are {TOO_FEW}"] if 0 < least < ENOUGH_ARCHS else []
    if result.run_dir is None:
        return [table, *notes]
    names = {"report": "report.html", "table": "results.csv", "plot": "scatter.png"}
    files = {label: Path(result.run_dir) / name for label, name in names.items()}
    return [table, *notes, table_of("files", files), next_step("report", Path(result.run_dir), *reading)]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def bench_tables(result: BenchResult, reading: Sequence[object] = ()) -> list[Any]:
    """Return a bench's table in percent, its failures, and where its files are.

    Columns with the same value in every cell go into the title; so do the generators, which stay in the rows.
    `reading` are the options that say where datasets are, for the next step.
    """
    from ddray.tables.columns import columns_of, generators_of

    cells = result.dump()["cells"]
    columns = columns_of(cells)
    fixed = [
        column
        for column in columns[1:]
        if column.kind in ("name", "setting") and len({column.text_of(cell) for cell in cells}) == 1
        if column.name != "generator"
    ]
    varied = [column for column in columns if column not in fixed]
    title = ", ".join([result.name, *(column.text_of(cells[0]) for column in fixed), *generators_of(cells)])
    rows = ([_text(column, cell) for column in varied] for cell in cells)
    tables = [table(title, [column.header for column in varied], rows)]
    if result.failures:
        failures = ((failure["unit"], failure["reason"][:400]) for failure in result.failures)
        tables.append(table("failures", ("unit", "reason"), failures))
    names = {"costs": "costs.csv", "along the steps": "along.png"}
    files = {title: Path(result.run_dir) / name for title, name in names.items()}
    summary = {
        "failed units": result.num_failed,
        "not run because of them": len(result.skipped),
        "seconds": f"{result.wall_s:.0f}",
        "table": Path(result.run_dir) / "table.csv",
        **{name: path for name, path in files.items() if path.is_file()},
    }
    remarks = [f"note: {sentence}" for sentence in result.anomalies]
    return [
        *tables,
        *remarks,
        table_of("bench", summary),
        next_step("report", Path(result.run_dir), *reading),
    ]


def _text(column: Column, cell: dict[str, Any]) -> str:
    """Return a cell's text, with its source."""
    text = column.text_of(cell)
    return text if column.note is None or text == "-" else f"{text} ({column.note(cell)})"


def forecast_tables(forecast: dict[str, Any]) -> list[Any]:
    """Return a dry run: the unit graph by groups, its expected cost, and what is set beside what."""
    from ddray.tables.columns import comparisons_of, generators_of
    from ddray.tables.cost import summarise

    rows = []
    for group in summarise(forecast["units"]):
        trainings, needs = group["trainings"], group["needs"]
        others = f" and {len(needs) - 1} more" if len(needs) > 1 else ""
        rows.append(
            (
                group["kind"],
                group["unit"] + (f" ({trainings:,} trainings)" if trainings else ""),
                *(group["units"], group["missing"], needs[0] + others if needs else "-"),
                *(_duration(group["estimate_s"]), _megabytes(group["peak_memory_bytes"])),
            )
        )
    summary = {
        "units": f"{forecast['num_units']} ({forecast['num_missing']} missing)",
        **_expected(forecast),
        "units without an estimate": forecast["num_without_estimate"],
    }
    if num_smaller := forecast["num_from_smaller"]:
        summary["too high for"] = f"{num_smaller} units: only far smaller ones have been run here"
    if not forecast["pool_known"]:
        summary["pool"] = "some methods report which networks they need only once they start"
    of_units = ("kind", "unit", "units", "missing", "needs", "device time", "peak MB")
    title = ", ".join([forecast["name"], forecast["scale"], *generators_of(forecast["cells"])])
    tables = [table(title, of_units, rows), table_of("forecast", summary)]
    comparisons = list(comparisons_of(forecast["cells"]))
    if comparisons:
        headers = ("method", "dataset", "size", "arch", "beside the published", "differs")
        tables.append(table("comparisons", headers, comparisons))
    return tables


def search_forecast_tables(forecast: SearchForecast) -> list[Any]:
    """Return a search's dry run: its units by kind, and what the missing ones are expected to take."""
    rows = (
        (
            *(line["kind"], line["units"], line["missing"], _duration(line["estimate_s"])),
            _megabytes(line["peak_memory_bytes"]),
        )
        for line in forecast.units
    )
    title = f"{forecast.strategy}: {forecast.method} on {forecast.dataset}"
    headers = ("kind", "units", "missing", "device time of one", "peak MB")
    summary = {
        "units": f"{forecast.num_units} ({forecast.num_missing} missing)",
        **_expected(forecast.dump()),
        "units without an estimate": forecast.num_without_estimate,
    }
    if forecast.is_upper_bound:
        summary["at most"] = "every trial is counted at full length, of which some are stopped early"
    return [table(title, headers, rows), table_of("forecast", summary)]


def _expected(forecast: Mapping[str, Any]) -> dict[str, str]:
    """Return the lines of a forecast's totals."""
    seconds, peak = forecast["estimate_s"], forecast["peak_memory_bytes"]
    workers, source = forecast["num_workers"], ", from past units on this machine"
    at_a_time = f" on this machine, {workers} unit{'s' if workers != 1 else ''} at a time"
    wall = {"wall time": _duration(forecast["estimate_wall_s"]) + ("" if seconds is None else at_a_time)}
    return {
        **({} if workers is None else wall),
        "device time": _duration(seconds) + ("" if seconds is None else f" of one worker{source}"),
        "peak MB": _megabytes(peak) + ("" if peak is None else f" of the largest unit{source}"),
    }


def _megabytes(size: int | None) -> str:
    return "no estimate" if size is None else f"{size / 1e6:,.0f}"


def _duration(seconds: float | None) -> str:
    """Return seconds in readable units."""
    if seconds is None:
        return "no estimate"
    hours, minutes = seconds / 3600, seconds / 60
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.1f} s"
