"""`ddray report`: one or more runs as one self-contained HTML page that needs no network."""

import importlib
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any, Final

import pandas as pd
import yaml

from ddray.artifact.distilled_set import DistilledSet, Meta
from ddray.config import Result
from ddray.data import open_dataset
from ddray.drawing.html import write_html
from ddray.drawing.images import grid_uri, images_along, page_picture
from ddray.drawing.text import size_of
from ddray.errors import DdrayError, InputError
from ddray.methods import get_method
from ddray.ranking.figures_of_merit import TOO_FEW, is_telling
from ddray.ranking.report import scatter_plot
from ddray.report import charts, figures
from ddray.report.board import matrix_of, of_most_sets, table_of
from ddray.report.costs import unit_costs
from ddray.report.headline import headline, of_cells
from ddray.report.plane import make_plane, under_networks
from ddray.report.runs import RunView, SetView, read_run
from ddray.report.scored import without_stages
from ddray.system.grouping import grouped
from ddray.tables.along import group_of
from ddray.tables.anomalies import anomalies
from ddray.tables.claims import TEST, claims_table
from ddray.tables.columns import generators_of
from ddray.tuning.report import search_view
from ddray.tuning.space import read_space

log = logging.getLogger(__name__)

_MAX_PLANES: Final = 6
_MAX_CURVES: Final = 12
_MAX_SNAPSHOTS: Final = 6
"""Steps before the last in a row's picture along the steps."""


class ReportResult(Result):
    """What `ddray report` returns."""

    report: str
    runs: list[str]
    num_cells: int
    num_sets: int
    num_failed: int


def write_page(
    folders: Sequence[Path], out: Path, *, planes: bool = True, data_dir: Path | None = None
) -> ReportResult:
    """Write the page over run folders of any command; unfinished runs are fine.

    Each of the t-SNE `planes` needs its dataset (`data_dir`; None is $DDRAY_DATA) and takes some seconds.

    Raises:
        InputError: a folder is not a run folder, or `out` is a folder.
        StorageError: the page can't be written.
    """
    if out.is_dir():
        raise InputError(f"--out must be a file, {out} is a folder; add the page's name")
    views = [read_run(folder) for folder in dict.fromkeys(path.resolve() for path in folders)]
    runs = _with_unique_labels(views)
    cells = [cell for run in runs for cell in run.cells]
    sets = [view for run in runs for view in run.sets]
    rankings = [part for run in runs for part in _rankings(run)]
    write_html(
        out,
        "report.html",
        runs=runs,
        title=headline(runs[0], rankings) if len(runs) == 1 else of_cells(cells, f"{len(runs)} runs"),
        claims=claims_table([verdict for run in runs for verdict in run.claims]),
        claims_test=TEST,
        boards=list(_leaderboards(cells, sets)),
        charts=[{**chart, "run": run.title} for run in views for chart in charts.charts(run)],
        methods=list(_methods(cells, sets)),
        along=list(_along(cells, sets)),
        curves=list(_curves(sets, runs)),
        searches=list(_searches(runs)),
        rankings=rankings,
        planes=list(_planes(sets, runs, data_dir)) if planes else [],
        networks=list(_networks(views, data_dir)) if planes else [],
        num_curves_left=max(0, len({v.sort_key()[:2] for v in sets if v.losses}) - _MAX_CURVES),
        num_planes_left=max(0, len({v.sort_key()[:2] for v in sets}) - _MAX_PLANES) if planes else 0,
        costs=[costs for run in runs if (costs := unit_costs(run))["kinds"]],
        failures=[{**one, "run": run.title} for run in runs for one in run.failures],
        skipped=[f"{run.title}: {name}" for run in runs for name in run.skipped],
        corrupt=[f"{run.title}: {name}" for run in runs for name in run.corrupt],
    )
    _warn_of_empty(runs)
    return ReportResult(
        report=str(out),
        runs=[str(run.folder) for run in runs],
        num_cells=len(cells),
        num_sets=len(sets),
        num_failed=sum(len(run.failures) for run in runs),
    )


def _searches(runs: Sequence[RunView]) -> Iterator[dict[str, Any]]:
    """Yield the trials of each search."""
    for run in runs:
        if run.command == "tune":
            space = read_space(run.config.get("space", {}))
            yield {"title": run.title, **search_view(space, run.trials)}


def _warn_of_empty(runs: Sequence[RunView]) -> None:
    for run in runs:
        if not (run.cells or run.sets or run.failures or any(row.status == "done" for row in run.rows)):
            log.warning("%s has finished no unit yet: the page shows its configuration only", run.folder)


def _with_unique_labels(runs: Sequence[RunView]) -> list[RunView]:
    """Return the runs, with the run's name added to labels that several runs use for one dataset and size."""
    num_runs: Counter[tuple[str, str, str]] = Counter()
    for run in runs:
        num_runs.update(
            {(view.label, view.dataset, view.size) for view in run.sets}
            | {(str(cell["method"]), cell["dataset"], size_of(cell)) for cell in run.cells}
        )
    shared = {label for (label, _, _), count in num_runs.items() if count > 1}
    names = [run.folder.name for run in runs]

    def renamed(label: str, run: RunView) -> str:
        if label not in shared:
            return label
        return f"{label} ({run.folder if names.count(run.folder.name) > 1 else run.folder.name})"

    return [
        replace(
            run,
            cells=tuple({**cell, "method": renamed(str(cell["method"]), run)} for cell in run.cells),
            sets=tuple(replace(view, label=renamed(view.label, run)) for view in run.sets),
        )
        for run in runs
    ]


def _leaderboards(cells: Sequence[Mapping[str, Any]], sets: Sequence[SetView]) -> Iterator[dict[str, Any]]:
    """Yield one table per protocol, best first within dataset, size and network, with a plot per group."""
    for protocol, protocol_cells in grouped(cells, itemgetter("protocol")).items():
        data, archs = (
            list(dict.fromkeys(cell[name] for cell in protocol_cells)) for name in ("dataset", "arch")
        )

        def sort_key(cell: Mapping[str, Any], data: list[str] = data, archs: list[str] = archs) -> Any:
            size = int(cell.get("ipc") or cell.get("budget") or 0)
            where = (data.index(cell["dataset"]), str(cell.get("target", "")), size)
            merit = cell.get("spearman" if cell["protocol"] == "nas" else "accuracy_mean")
            return (*where, archs.index(cell["arch"]), math.inf if merit is None else -merit)

        protocol_cells.sort(key=sort_key)
        entries = [_with_sets(cell, sets) for cell in protocol_cells]
        compared = of_most_sets(entries)
        yield {
            "protocol": protocol,
            "matrix": matrix_of(entries if protocol != "nas" else []),  # its accuracies are of architectures
            **table_of(entries),
            "generators": "; ".join(generators_of(entries)),
            "anomalies": anomalies(compared),
            "plots": [
                {"title": name, "html": figures.accuracy_bars(group)}
                for name, group in grouped(compared, group_of).items()
                if len(group) > 1
            ],
        }


def _with_sets(cell: Mapping[str, Any], sets: Sequence[SetView]) -> dict[str, Any]:
    """Return a cell with the storage and the seconds of its sets, which older runs' cells lack."""
    if "stage" in cell:
        return dict(cell)
    where = (cell["method"], cell["dataset"], size_of(cell))
    cell_sets = [view for view in sets if (view.label, view.dataset, view.size) == where]
    times = [view.wall_s for view in cell_sets if view.wall_s is not None]
    distilled = _first_readable(cell_sets) if "storage_floats" not in cell else None
    return {
        "storage_floats": distilled.meta.storage_floats if distilled is not None else None,
        "seconds": sum(times) / len(times) if times else None,
        **cell,
    }


def _along(cells: Sequence[Mapping[str, Any]], sets: Sequence[SetView]) -> Iterator[dict[str, Any]]:
    """Yield a plot of accuracies along the steps per group, with pictures along each row's first set."""
    for title, group in grouped((cell for cell in cells if "along" in cell), group_of).items():
        last = {(cell["method"], cell["dataset"], size_of(cell)): cell["along"][-1]["step"] for cell in group}
        views = grouped(sets, lambda view: (view.label, view.dataset, view.size))
        rows = [
            {"label": name[0], **picture}
            for name, row_views in views.items()
            if name in last and (picture := _picture_along(row_views[0], last[name])) is not None
        ]
        yield {"title": title, "html": figures.along_curves(group), "rows": rows}


def _picture_along(view: SetView, last: int) -> dict[str, Any] | None:
    """Return a set's images at evenly spaced steps, first and last among them, with these; None without."""
    snapshots = view.snapshots()
    num = min(len(snapshots), _MAX_SNAPSHOTS)
    indices = sorted({round(i * (len(snapshots) - 1) / max(1, num - 1)) for i in range(num)})
    views = [*(snapshots[index] for index in indices), (last, view)] if indices else []
    sets = {step: distilled for step, one in views if (distilled := one.load()) is not None}
    images = images_along(list(sets.values()))
    if images is None:
        return None
    uri, width = grid_uri(images.flatten(0, 1), images.shape[1])
    return {"steps": list(sets), "uri": uri, "width": width}


def _first_readable(sets: Iterable[SetView]) -> DistilledSet | None:
    return next((distilled for view in sets if (distilled := view.load()) is not None), None)


def _methods(cells: Sequence[Mapping[str, Any]], sets: Sequence[SetView]) -> Iterator[dict[str, Any]]:
    """Yield a card per method: description, settings, best accuracy, and pictures of its sets."""
    labels = dict.fromkeys([*(str(cell["method"]) for cell in cells), *(view.label for view in sets)])
    for label in labels:
        method_sets = [view for view in sets if view.label == label]
        method_cells = [cell for cell in without_stages(cells) if cell["method"] == label]
        reached = [
            cell
            for cell in method_cells
            if cell["accuracy_mean"] is not None and cell["protocol"] != "nas"  # those are of architectures
        ]
        pictures = [
            {"title": "; ".join([title, *_learned(distilled.meta)]), "picture": picture}
            for title, views in grouped(method_sets, attrgetter("group")).items()
            if (distilled := views[0].load()) is not None and (picture := page_picture(distilled)) is not None
        ]
        readable = _first_readable(method_sets)
        best = max(reached, key=lambda cell: cell["accuracy_mean"], default=None)
        yield {
            "label": label,
            "about": _about(method_sets[0].method) if method_sets else "",
            "num_sets": len(method_sets),
            "best": best,
            "best_where": "" if best is None else f"{group_of(best)}, {best['arch']}",
            "pictures": pictures,
            "settings": yaml.safe_dump(dict(readable.meta.config), sort_keys=False) if readable else "",
        }


def _learned(meta: Meta) -> Iterator[str]:
    """Yield what a set holds beside images and classes, in words."""
    if meta.label_kind is not None:
        yield f"soft labels: {meta.label_kind}"
    if meta.learned_lr is not None:
        yield f"learned rate {meta.learned_lr:.3g}"
    if meta.schedule is not None:
        yield f"{len(meta.schedule.order)} steps, {meta.schedule.init} initialisation"


def _about(method: str) -> str:
    """Return the first line of a method's module docstring."""
    try:
        module = importlib.import_module(f"ddray.methods.{method}")
    except ImportError:  # a plug-in's method, or one that is not installed here
        try:
            module = importlib.import_module(get_method(method).__module__)
        except (DdrayError, ImportError):
            return ""
    return (module.__doc__ or "").strip().split("\n")[0]


def _curves(sets: Sequence[SetView], runs: Sequence[RunView]) -> Iterator[dict[str, str]]:
    """Yield learning curves: losses of sets by dataset and size, and val accuracies of search trials."""
    groups = grouped((view for view in sets if view.losses), attrgetter("group"))
    for name, group_sets in list(groups.items())[:_MAX_CURVES]:
        yield {"title": f"Loss: {name}", "html": figures.loss_curves(group_sets)}
    for run in runs:
        if run.command == "tune" and (html := figures.rung_curves(run)) is not None:
            yield {"title": f"Val accuracy: {run.title}", "html": html}


def _rankings(run: RunView) -> Iterator[dict[str, Any]]:
    """Yield a scatter plot per proxy of a NAS run, or of the NAS sweeps of a bench."""
    folders = [run.folder] if run.command == "nas" else sorted((run.folder / "nas").glob("*/"))
    for folder in folders:
        path = folder / "results.csv"
        if not path.is_file():
            continue
        table = pd.read_csv(path)
        for proxy, proxy_rows in table.groupby("proxy", sort=False):
            both = proxy_rows[["proxy_accuracy", "truth_accuracy"]].dropna()
            rho: Any = both.corr(method="spearman").iloc[0, 1] if len(both) > 2 else None
            figures = {"num_archs": len(both), "spearman": None if pd.isna(rho) else float(rho)}
            if not is_telling(figures, "spearman"):
                result = f"{len(both)} architectures: {TOO_FEW}"
            elif figures["spearman"] is None:
                result = f"{len(both)} architectures: no correlation is defined"
            else:
                result = f"Spearman {rho:.3g} over {len(both)} architectures"
            yield {
                "title": f"{folder.name}: {proxy}",
                "proxy": str(proxy),
                **figures,
                "result": result,
                "html": scatter_plot(proxy_rows),
            }


def _planes(
    sets: Sequence[SetView], runs: Sequence[RunView], data_dir: Path | None
) -> Iterator[dict[str, Any]]:
    """Yield a t-SNE plane per dataset, size and network with all methods; or why it can't be drawn.

    The networks are the first ones of the runs' protocol `distribution`, or else one of the pool.
    """
    rows = [row for run in runs for row in run.rows if row.kind == "evaluate" and "networks" in row.result]
    firsts = grouped(rows, lambda row: str(row.spec["dataset"]))
    groups = grouped(sets, attrgetter("group"))
    for title, group_sets in list(groups.items())[:_MAX_PLANES]:
        name = group_sets[0].dataset
        networks = {keys[0]: None for row in firsts.get(name, ()) for keys in row.result["networks"].values()}
        for network in networks or [None]:
            yield from _plane(title, group_sets, network, data_dir)


def _plane(
    title: str, group_sets: Sequence[SetView], network: str | None, data_dir: Path | None
) -> Iterator[dict[str, Any]]:
    """Yield the plane of a group's first sets, or why it can't be drawn; nothing without a readable set."""
    first_sets = [views[0] for views in grouped(group_sets, attrgetter("label")).values()]
    try:
        dataset = open_dataset(group_sets[0].dataset, data_dir=data_dir)
        plane = make_plane(dataset, first_sets, network=network)
    except DdrayError as error:
        yield {"title": title, "reason": str(error), "html": "", "network": ""}
        return
    if plane is not None:
        yield {"title": title, "reason": "", "html": figures.plane_scatter(plane), "network": plane.network}


def _networks(runs: Sequence[RunView], data_dir: Path | None) -> Iterator[dict[str, str]]:
    """Yield a plot per row and size that was compared under several networks; or why there is none."""
    for run in runs:
        views = {view.path.stem: view for view in run.sets}
        for one in run.scored:
            networks = one.rows[0].result.get("networks", {}).get(one.cell.arch, ()) if one.rows else ()
            view = views.get(one.cell.sets[0]) if len(networks) > 1 and one.cell.sets else None
            if view is None:
                continue
            title = f"{one.cell.method}, {one.group}"
            try:
                dataset = open_dataset(view.dataset, data_dir=data_dir)
                points = under_networks(dataset, view, networks)
            except DdrayError as error:
                yield {"title": title, "reason": str(error), "html": ""}
                continue
            if points:
                yield {
                    "title": f"{title}: {dataset.class_names[0]}",
                    "reason": "",
                    "html": charts.network_scatter(points),
                }


def default_out(folders: Sequence[Path]) -> Path:
    """Return the page's default path: in the run's folder, or in the working directory for several runs.

    Raises:
        InputError: no folder was given.
    """
    if not folders:
        raise InputError("ddray report needs at least one run folder, got none")
    return folders[0] / "report.html" if len(folders) == 1 else Path("report.html").absolute()
