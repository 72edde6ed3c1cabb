"""`ddray report`: one or more runs as one self-contained HTML page; nothing is fetched from a network."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import yaml

from ddray.data import open_dataset
from ddray.errors import DdrayError, InputError
from ddray.files import write_text
from ddray.methods import get_method
from ddray.report import figures
from ddray.report.images import data_uri, grid
from ddray.report.plane import make_plane
from ddray.report.published import FIGURES
from ddray.report.runs import RunView, SetView, read_run, size_of
from ddray.report.tune_page import search_figures
from ddray.space import Range, Space

log = logging.getLogger(__name__)

_MAX_PLANES: Final = 6
_MAX_CURVES: Final = 12
# Columns of the leaderboard that stand only where a cell has them.
_OPTIONAL: Final = ("target", "teacher", "augment", "settings", "published")
_SAID: Final = {"teacher": "teacher", "augment": "augmentation", "settings": "settings"}


def write_page(
    folders: Sequence[Path], out: Path, *, planes: bool = True, data_dir: Path | None = None
) -> dict[str, Any]:
    """Write the page.

    Args:
        folders: run folders of distill, tune, nas or bench, finished or not.
        out: the file.
        planes: whether to draw t-SNE planes, which need the datasets and some seconds each.
        data_dir: where datasets are; None is $DDRAY_DATA.

    Returns:
        `{"report", "runs", "num_cells", "num_sets", "num_failed"}`.

    Raises:
        InputError: a folder is not a run's, or `out` is a folder.
        StorageError: the page can't be written.
    """
    if out.is_dir():
        raise InputError(f"--out must be a file, {out} is a folder; add the page's name")
    from jinja2 import Environment, PackageLoader, select_autoescape
    from plotly.offline import get_plotlyjs

    runs = _told_apart([read_run(folder) for folder in dict.fromkeys(path.resolve() for path in folders)])
    cells = [cell for run in runs for cell in run.cells]
    sets = [view for run in runs for view in run.sets]
    loader = Environment(loader=PackageLoader("ddray.report"), autoescape=select_autoescape())
    page = loader.get_template("report.html").render(
        runs=runs,
        title=" + ".join(run.title for run in runs),
        boards=list(_leaderboards(cells, sets)),
        methods=list(_methods(cells, sets)),
        curves=list(_curves(sets, runs)),
        searches=[_search(run) for run in runs if run.command == "tune"],
        rankings=[part for run in runs for part in _rankings(run)],
        planes=list(_planes(sets, data_dir)) if planes else [],
        num_curves_left=max(0, len({v.place()[:2] for v in sets if v.losses}) - _MAX_CURVES),
        num_planes_left=max(0, len({v.place()[:2] for v in sets}) - _MAX_PLANES) if planes else 0,
        failures=[{**one, "run": run.title} for run in runs for one in run.failures],
        skipped=[f"{run.title}: {name}" for run in runs for name in run.skipped],
        corrupt=[f"{run.title}: {name}" for run in runs for name in run.corrupt],
        plotly=get_plotlyjs(),
    )
    write_text(out, page)
    for run in runs:
        if not (run.cells or run.sets or run.failures or any(row.status == "done" for row in run.rows)):
            log.warning("%s has finished no unit yet: the page shows its configuration only", run.folder)
    return {
        "report": str(out),
        "runs": [str(run.folder) for run in runs],
        "num_cells": len(cells),
        "num_sets": len(sets),
        "num_failed": sum(len(run.failures) for run in runs),
    }


def _told_apart(runs: Sequence[RunView]) -> list[RunView]:
    """Return the runs with their names in labels that several use for one dataset and size."""
    owners: dict[tuple[str, str, str], set[Path]] = {}
    for run in runs:
        for view in run.sets:
            owners.setdefault((view.label, view.dataset, view.size), set()).add(run.folder)
        for cell in run.cells:
            owners.setdefault((str(cell["method"]), cell["dataset"], size_of(cell)), set()).add(run.folder)
    shared = {label for (label, _, _), held in owners.items() if len(held) > 1}
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
    """Yield one table per protocol, best first within data, size and network; a plot per group."""
    for protocol in dict.fromkeys(cell["protocol"] for cell in cells):
        own = [cell for cell in cells if cell["protocol"] == protocol]
        data, archs = (list(dict.fromkeys(cell[name] for cell in own)) for name in ("dataset", "arch"))

        def place(cell: Mapping[str, Any], data: list[str] = data, archs: list[str] = archs) -> Any:
            where = (data.index(cell["dataset"]), str(cell.get("target", "")), _number(cell))
            return (*where, archs.index(cell["arch"]), -(cell["accuracy_mean"] or 0.0))

        own.sort(key=place)
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for cell in own:
            groups.setdefault(figures.group_of(cell), []).append(cell)
        lines = [_line(cell, sets) for cell in own]
        columns = [name for name in _OPTIONAL if any(line[name] is not None for line in lines)]
        # What is the same in every line is said once: such settings would push the numbers off the page.
        alike = [
            name
            for name in columns
            if name in _SAID and len({line[name] for line in lines}) == 1 < len(lines)
        ]
        yield {
            "protocol": protocol,
            "lines": lines,
            "shared": "; ".join(f"{_SAID[name]} {lines[0][name]}" for name in alike),
            "columns": [name for name in columns if name not in alike],
            "figures": {k: v for k, v in FIGURES.items() if any(line[k] is not None for line in lines)},
            "plots": [{"title": name, "html": figures.accuracy_bars(held)} for name, held in groups.items()],
        }


def _number(cell: Mapping[str, Any]) -> int:
    """Return a cell's size as a number to sort by."""
    return int(cell.get("ipc") or cell.get("budget") or 0)


def _line(cell: Mapping[str, Any], sets: Sequence[SetView]) -> dict[str, Any]:
    """Return what the leaderboard shows of a cell."""
    own = [view for view in sets if _is_of(view, cell)]
    times = [view.wall_s for view in own if view.wall_s is not None]
    made = next((held for view in own if (held := view.load()) is not None), None)
    return {
        **{name: cell.get(name) for name in (*_OPTIONAL, *FIGURES)},
        "method": cell["method"],
        "dataset": cell["dataset"],
        "size": size_of(cell),
        "number": _number(cell),
        "arch": cell["arch"],
        "mean": cell["accuracy_mean"],
        "std": cell["accuracy_std"],
        "n": cell["n"],
        "num_sets": cell["num_sets"],
        "storage": made.meta.storage_floats if made is not None else None,
        "wall_s": sum(times) / len(times) if times else None,
    }


def _is_of(view: SetView, cell: Mapping[str, Any]) -> bool:
    return (view.label, view.dataset, view.size) == (cell["method"], cell["dataset"], size_of(cell))


def _methods(cells: Sequence[Mapping[str, Any]], sets: Sequence[SetView]) -> Iterator[dict[str, Any]]:
    """Yield a card per row: what it is, its settings, what it reached, and pictures of its sets."""
    labels = dict.fromkeys([*(str(cell["method"]) for cell in cells), *(view.label for view in sets)])
    for label in labels:
        own = [view for view in sets if view.label == label]
        reached = [cell for cell in cells if cell["method"] == label and cell["accuracy_mean"] is not None]
        first: dict[tuple[str, str], SetView] = {}
        for view in own:
            first.setdefault((view.dataset, view.size), view)
        pictures = [
            {"title": f"{view.dataset}, {view.size}", "data": picture}
            for view in first.values()
            if (picture := _picture(view)) is not None
        ]
        made = next((held for view in own if (held := view.load()) is not None), None)
        best = max(reached, key=lambda cell: cell["accuracy_mean"], default=None)
        yield {
            "label": label,
            "about": _about(own[0].method) if own else "",
            "num_sets": len(own),
            "best": best,
            "best_where": "" if best is None else f"{figures.group_of(best)}, {best['arch']}",
            "pictures": pictures,
            "settings": "" if made is None else yaml.safe_dump(dict(made.meta.config), sort_keys=False),
        }


def _about(method: str) -> str:
    """Return the first line of a method's page in the source."""
    try:
        module = importlib.import_module(f"ddray.methods.{method}")
    except ImportError:  # of a package of the user's own, or one that is not installed here
        try:
            module = importlib.import_module(get_method(method).__module__)
        except (DdrayError, ImportError):
            return ""
    return (module.__doc__ or "").strip().split("\n")[0]


def _picture(view: SetView) -> str | None:
    """Return a set's image grid as a picture's `src`; None for one that is gone, or generates its images."""
    made = view.load()
    shown = None if made is None else grid(made)
    return None if shown is None else data_uri(shown)


def _curves(sets: Sequence[SetView], runs: Sequence[RunView]) -> Iterator[dict[str, str]]:
    """Yield learning curves: losses of sets by data and size, and looks of searches."""
    groups: dict[str, list[SetView]] = {}
    for view in sets:
        if view.losses:
            groups.setdefault(f"{view.dataset}, {view.size}", []).append(view)
    for name, held in list(groups.items())[:_MAX_CURVES]:
        yield {"title": f"Loss: {name}", "html": figures.loss_curves(held)}
    for run in runs:
        if run.command == "tune" and (html := figures.rung_curves(run)) is not None:
            yield {"title": f"Looks at val: {run.title}", "html": html}


def _search(run: RunView) -> dict[str, Any]:
    """Return a search's figures (history, parallel coordinates, importances) and its trials."""
    trials = sorted((row for row in run.rows if row.kind == "trial"), key=lambda row: row.spec["number"])
    space = _space(run.config.get("space", {}))
    return {
        "title": run.title,
        "figures": search_figures(space, trials) if space and trials else [],
        "names": list(space),
        "trials": [
            {
                "number": row.spec["number"],
                "status": "stopped early" if row.result.get("stopped_early") else row.status,
                "val": row.result.get(row.result.get("objective", "val_accuracy")),
                "values": [row.spec["params"].get(name) for name in space],
                "wall_s": row.wall_s,
            }
            for row in trials
        ],
    }


def _space(held: Mapping[str, Any]) -> Space:
    """Return the ranges that a search's config.yaml names."""
    found = {}
    for name, given in held.items():
        ((kind, ends),) = given.items()
        found[name] = (
            Range("choice", choices=tuple(ends)) if kind == "choice" else Range(kind, ends[0], ends[-1])
        )
    return found


def _rankings(run: RunView) -> Iterator[dict[str, Any]]:
    """Yield the proxies of a NAS run, or of those below a bench, as scatter plots."""
    import pandas as pd

    from ddray.report.nas_page import scatter_plot

    folders = [run.folder] if run.command == "nas" else sorted((run.folder / "nas").glob("*/"))
    for folder in folders:
        path = folder / "results.csv"
        if not path.is_file():
            continue
        table = pd.read_csv(path)
        for proxy in dict.fromkeys(table["proxy"]):
            own = table[table["proxy"] == proxy]
            both = own[["proxy_accuracy", "truth_accuracy"]].dropna()
            rho = both.corr(method="spearman").iloc[0, 1] if len(both) > 2 else None
            yield {
                "title": f"{folder.name}: {proxy}",
                "spearman": rho if rho == rho else None,
                "num_archs": len(both),
                "html": scatter_plot(own),
            }


def _planes(sets: Sequence[SetView], data_dir: Path | None) -> Iterator[dict[str, Any]]:
    """Yield a t-SNE plane per data and size, a plot per row; or the reason why there is none."""
    groups: dict[tuple[str, str], dict[str, SetView]] = {}
    for view in sets:
        groups.setdefault((view.dataset, view.size), {}).setdefault(view.label, view)
    for (name, size), held in list(groups.items())[:_MAX_PLANES]:
        title = f"{name}, {size}"
        try:
            plane = make_plane(open_dataset(name, data_dir=data_dir), list(held.values()))
        except DdrayError as error:
            yield {"title": title, "reason": str(error), "plots": [], "network": ""}
            continue
        if plane is not None:
            plots = [
                {"title": label, "html": figures.plane_scatter(plane, row)}
                for row, (label, _, _) in enumerate(plane.distilled)
            ]
            yield {"title": title, "reason": "", "plots": plots, "network": plane.network}


def default_out(folders: Sequence[Path]) -> Path:
    """Return where the page goes: into the run's folder, or here if there are several.

    Raises:
        InputError: no folder was given.
    """
    if not folders:
        raise InputError("ddray report needs at least one run folder, got none")
    return folders[0] / "report.html" if len(folders) == 1 else Path("report.html").absolute()
