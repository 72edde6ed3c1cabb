"""report.html and scatter plots of `ddray nas`: ranks of architectures on proxies against true ranks.

The plots follow DataDAM's supplement, Figs 7 and 8, the summary its Tables 4 and 5, with published figures.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddray.drawing.html import COLOURS, GREY, to_html, write_run_page
from ddray.drawing.plots import DIM, save_plot
from ddray.evaluation.published import read_numbers
from ddray.methods import method_names
from ddray.ranking import get_definition, space_names
from ddray.ranking.figures_of_merit import ENOUGH_ARCHS, TOO_FEW, Array, is_telling

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure, SubFigure

_PUBLISHED: Final = {
    "nas_top1_accuracy": "top1_test_accuracy",
    "spearman": "spearman",
    "spearman_top20": "spearman_top20",
    "search_time": "minutes",
    "storage_images": "storage_images",
}
_NUM_RANKED: Final = 20
_MANY_POINTS: Final = 3000
_LARGE: Final = 40.0  # a dot's area in square points
_FIXED: Final = (
    *("proxy", "index", "name", "params_m", "flops_m", "proxy_accuracy", "proxy_accuracy_std", "proxy_rank"),
    *("truth_accuracy", "truth_rank", "num_seeds", "failed", "truth_test_accuracy"),
)
_X_TITLE: Final = "validation accuracy, trained on the proxy (%)"
_Y_TITLE: Final = "true accuracy (%)"


def write_nas_report(run_dir: Path, result: Mapping[str, Any], table: pd.DataFrame) -> None:
    """Write `<run>/report.html`, a self-contained page that shows config.yaml and environment.json too.

    `result` is the dump of the sweep's result, `table` has the lines of results.csv.

    Raises:
        StorageError: the page can't be written.
    """
    choices = [name for name in table.columns if name not in _FIXED]
    proxies = []
    for figures in result["proxies"]:
        proxy_table = table[table["proxy"] == figures["proxy"]]
        ranked = proxy_table[proxy_table["proxy_rank"].notna()].nsmallest(_NUM_RANKED, "proxy_rank")
        proxies.append({"figures": figures, "plot": scatter_plot(proxy_table), "ranked": _records(ranked)})
    write_run_page(
        run_dir,
        "nas.html",
        title=sweep_title(
            result["space"],
            result.get("dataset"),
            result["num_archs"],
            telling_correlations(result["proxies"]),
        ),
        is_telling=is_telling,
        too_few=TOO_FEW,
        result=result,
        truth_text=truth_text(result.get("truth")),
        lines=summary(result),
        proxies=proxies,
        choices=choices,
        failures=_records(table[table["failed"].astype(bool)]),
    )


def telling_correlations(rankings: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return the Spearman correlation of each proxy; None if undefined or over too few architectures."""
    return {
        figures["proxy"]: figures["spearman"] if is_telling(figures, "spearman") else None
        for figures in rankings
    }


def sweep_title(
    space: str, dataset: str | None, num_archs: int, correlations: Mapping[str, float | None]
) -> str:
    """Return what a sweep came to: the proxy with the highest Spearman correlation, None if undefined."""
    where = f"{num_archs} architectures of {space}" + (f" on {dataset}" if dataset else "")
    defined = {proxy: value for proxy, value in correlations.items() if value is not None}
    if num_archs < ENOUGH_ARCHS:
        return f"{where}: {TOO_FEW}"
    if not defined:
        return f"{where}: no proxy's ranking has a correlation with the truth"
    best = max(defined, key=lambda proxy: defined[proxy])
    return f"{best} ranks {where} with Spearman {defined[best]:.2f}"


def _records(table: pd.DataFrame) -> list[dict[Any, Any]]:
    """Return a table's lines as mappings, NaN as None."""
    return table.astype(object).where(table.notna(), None).to_dict("records")


class _Points(NamedTuple):
    """The points of a scatter plot: architectures with a score and a truth, accuracies in percent [A]."""

    x: Array
    y: Array
    groups: dict[str, NDArray[np.bool_]]
    """Masks [A] by label, one per colour."""
    table: pd.DataFrame

    def line(self) -> tuple[Array, Array] | None:
        """Return x [2] and y [2] of the ends of the least-squares line, or None if undefined."""
        if len(self.x) < 3 or np.ptp(self.x) == 0:
            return None
        centred = self.x - self.x.mean()
        slope = float(centred @ self.y / (centred @ centred))
        ends = np.array([self.x.min(), self.x.max()])
        return ends, slope * ends + float(self.y.mean() - slope * self.x.mean())

    def border(self) -> float:
        """Return the lowest whole-set accuracy among the top 20 %; there must be points."""
        return float(np.sort(self.y)[-math.ceil(len(self.y) / 5)])


def _points(table: pd.DataFrame) -> _Points:
    """Return the points of one proxy's lines, coloured by depth if the space has depths."""
    complete = table[table["proxy_accuracy"].notna() & table["truth_accuracy"].notna()]
    x, y = (100 * complete[f"{name}_accuracy"].to_numpy(dtype=np.float64) for name in ("proxy", "truth"))
    groups = {"architectures": np.ones(len(complete), dtype=bool)}
    if "depth" in complete.columns:
        depths = complete["depth"].to_numpy()
        groups = {f"depth {depth}": depths == depth for depth in np.unique(depths)}
    return _Points(x, y, groups, complete)


def scatter_plot(table: pd.DataFrame) -> str:
    """Return one proxy's interactive scatter plot as an HTML fragment, with at most 3000 of the points."""
    import plotly.graph_objects as go

    points = _points(table)
    figure = go.Figure()
    drawn = np.arange(len(points.x)) % math.ceil(max(1, len(points.x)) / _MANY_POINTS) == 0
    for colour, (label, mask) in zip(itertools.cycle(COLOURS), points.groups.items(), strict=False):
        visible = mask & drawn
        names = points.table.loc[visible, ["name", "index", "proxy_rank", "truth_rank"]]
        figure.add_scatter(
            x=points.x[visible],
            y=points.y[visible],
            mode="markers",
            name=label,
            marker={"color": colour, "size": 7, "opacity": 0.9},
            customdata=names.to_numpy(object),
            hovertemplate="%{customdata[0]}<br>index %{customdata[1]}"
            "<br>proxy %{x:.2f} % (rank %{customdata[2]:.0f})"
            "<br>truth %{y:.2f} % (rank %{customdata[3]:.0f})<extra></extra>",
        )
    if (line := points.line()) is not None:
        style = {"mode": "lines", "line_color": GREY, "hoverinfo": "skip", "name": "line"}
        figure.add_scatter(x=line[0], y=line[1], **style)
    if len(points.x):
        figure.add_hline(points.border(), line_dash="dot", line_color=GREY, annotation_text="top 20 %")
    showlegend = len(points.groups) > 1
    return to_html(figure, height=480, xaxis_title=_X_TITLE, yaxis_title=_Y_TITLE, showlegend=showlegend)


def save_scatters(run_dir: Path, table: pd.DataFrame, proxies: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write one PNG per proxy, `scatter-<number>-<name>.png`, and `scatter.png` with all; return the files.

    `table` has the lines of results.csv, `proxies` the figures of the command's JSON.

    Raises:
        StorageError: a file can't be written.
    """
    truth = _points(table).y
    paths, panels = [], []
    for number, figures in enumerate(proxies, start=1):
        points = _points(table[table["proxy"] == figures["proxy"]])
        panels.append(partial(draw_panel, figures=figures, points=points, truth=truth))
        slug = re.sub(r"[^A-Za-z0-9]+", "-", Path(figures["proxy"]).stem).strip("-").lower()
        paths.append(run_dir / f"scatter-{number}-{slug or 'proxy'}.png")
        save_plot(paths[-1], (900, 700), panels[-1])
    columns = min(3, math.ceil(math.sqrt(len(panels))))
    rows = math.ceil(len(panels) / columns)

    def draw_all(sheet: Figure) -> None:
        for draw, part in zip(panels, sheet.subfigures(rows, columns, squeeze=False).flat, strict=False):
            draw(part)

    save_plot(run_dir / "scatter.png", (columns * 640, rows * 520), draw_all)
    return [*paths, run_dir / "scatter.png"]


def draw_panel(figure: Figure | SubFigure, figures: Mapping[str, Any], points: _Points, truth: Array) -> None:
    """Draw one proxy's scatter plot; all panels of a run span the same true accuracies, `truth`."""
    name = str(figures["proxy"])
    figure.suptitle(name if len(name) <= 48 else f"...{name[-45:]}", x=0.02, ha="left")
    axes = figure.subplots()
    axes.set(title=_title(figures), xlabel=_X_TITLE, ylabel=_Y_TITLE)
    if not len(points.x):
        axes.text(0.5, 0.5, "no architecture was ranked", ha="center", color=DIM, transform=axes.transAxes)
        return
    pad = 0.05 * float(np.ptp(truth)) or 1.0
    axes.set_ylim(truth.min() - pad, truth.max() + pad)
    if (line := points.line()) is not None:
        axes.plot(*line, color=DIM, zorder=4, label="linear fit")
    axes.axhline(points.border(), color=DIM, linestyle=":", zorder=4, label="top 20 %")
    area = _LARGE if len(points.x) <= 200 else 20 if len(points.x) <= _MANY_POINTS else 5
    for colour, (label, mask) in zip(itertools.cycle(COLOURS), points.groups.items(), strict=False):
        edge = {"edgecolors": "white", "linewidths": 0.5} if area > 5 else {"linewidths": 0}
        axes.scatter(points.x[mask], points.y[mask], area, colour, label=label, zorder=3, **edge)
    figure.legend(loc="outside lower center", ncols=6, markerscale=math.sqrt(_LARGE / area))


def _title(figures: Mapping[str, Any]) -> str:
    """Return a plot title with the correlations of a proxy."""

    def text(key: str) -> str:
        if not is_telling(figures, key):
            return TOO_FEW
        if figures.get(key) is None:
            return "undefined"
        interval = figures.get(f"{key}_ci95")
        return f"{figures[key]:.2f}" + ("" if interval is None else " [{:.2f}, {:.2f}]".format(*interval))

    return f"Spearman {text('spearman')}, top 20 %: {text('spearman_top20')}"


def published_figures(space: str) -> dict[str, dict[str, float | None]]:
    """Return a space's published figures by method, named as in the command's JSON; None: not published."""
    definition = get_definition(space)
    figures: dict[str, dict[str, float | None]] = {}
    for number in read_numbers():
        if (number.paper, number.table) == definition.published and number.metric in _PUBLISHED:
            scale = 0.01 if number.unit == "percent" else 1.0
            method_figures = figures.setdefault(number.method, dict.fromkeys(_PUBLISHED.values()))
            method_figures[_PUBLISHED[number.metric]] = round(scale * number.value, 6)
    for method, in_text in definition.published_in_text.items():
        figures[method] |= in_text
    return figures


def truth_text(truth: Mapping[str, Any] | None) -> str:
    """Return which accuracies a ranking is compared with, as far as known."""
    facts = truth or {}
    of_what = " ".join(f"{facts[name]}" for name in ("dataset", "split") if name in facts)
    epochs = f"{facts['epochs']} epochs" if "epochs" in facts else ""
    return ", ".join(filter(None, (facts.get("column"), of_what, epochs)))


def summary(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the summary's lines, with figures named as in the command's JSON.

    Each proxy, and the whole set if it was trained, is followed by its published figures, if any; published
    figures of other methods come last.
    """
    published = {
        method: {"label": f"{method} (published)", "published": True, **figures}
        for method, figures in published_figures(result["space"]).items()
    }
    lines: list[dict[str, Any]] = []
    for figures in result["proxies"]:
        lines.append({**figures, "label": figures["proxy"], "counts": _counts(figures)})
        if (method := _method_of(figures)) in published:
            lines.append(published.pop(method))
    truth = result.get("truth", {})
    if "wall_s" in truth:
        best = result["proxies"][0]["best_truth_accuracy"]
        perfect = dict.fromkeys(("spearman", "spearman_top20", "kendall"), 1)
        whole = {"label": "whole set", "top1_truth_accuracy": best, **perfect, **truth}
        lines.append({**whole, "counts": _counts(truth)})
        if "whole" in published:
            lines.append(published.pop("whole"))
    return [*lines, *published.values()]


def _counts(figures: Mapping[str, Any]) -> str:
    """Return the counts of a proxy's architectures as text."""
    names = {"tied": "tied", "at_chance": "at chance", "diverged": "diverged", "failed": "left out"}
    counts = {label: figures.get(f"num_{key}") for key, label in names.items()}
    return ", ".join(f"{count} {label}" for label, count in counts.items() if count)


def _method_of(figures: Mapping[str, Any]) -> str | None:
    """Return a proxy's method: the one it states, or the one that its name contains as a word.

    For a path, the file's stem is tried first, then the nearest folder: `random/dm.pt` is DM's.
    """
    methods = {*method_names(), *(method for space in space_names() for method in published_figures(space))}
    path = Path(str(figures.get("method") or figures["proxy"]))
    for part in (path.stem, *reversed(path.parts[:-1])):
        text = part.lower().replace("-", "_")
        matches = [method for method in methods if re.search(rf"(?<![a-z]){method}(?![a-z])", text)]
        if matches:
            return max(matches, key=lambda method: (len(method), method))  # random_ssl is not random
    return None
