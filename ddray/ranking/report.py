"""report.html and scatter plots of `ddray nas`: ranks of architectures on proxies against true ranks.

The plots follow DataDAM's supplement, Figs 7 and 8, the summary its Tables 4 and 5.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from ddray.drawing.plotly_parts import LAYOUT, to_html
from ddray.ranking.summary import summary
from ddray.system.files import write_atomically, write_text

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image, ImageDraw

_NUM_RANKED: Final = 20
_MANY_POINTS: Final = 3000
_FIXED: Final = (
    *("proxy", "index", "name", "params_m", "flops_m", "proxy_accuracy", "proxy_accuracy_std", "proxy_rank"),
    *("truth_accuracy", "truth_rank", "num_seeds", "failed", "truth_test_accuracy"),
)
# Okabe and Ito's colours with a lighter blue: distinct for colour-blind readers, on white and on black.
_COLOURS: Final = ("#1f84c9", "#e69f00", "#009e73", "#cc79a7")
_X_TITLE: Final = "validation accuracy, trained on the proxy (%)"
_Y_TITLE: Final = "true accuracy (%)"


def write_nas_report(run_dir: Path, result: Mapping[str, Any], table: pd.DataFrame) -> None:
    """Write `<run>/report.html`, a self-contained page.

    Args:
        run_dir: the run's folder; its config.yaml and environment.json are shown.
        result: the command's JSON.
        table: one line per proxy and architecture, as in results.csv.

    Raises:
        StorageError: the page can't be written.
    """
    from jinja2 import Environment, PackageLoader, select_autoescape
    from plotly.offline import get_plotlyjs

    loader = Environment(loader=PackageLoader("ddray.drawing"), autoescape=select_autoescape())
    choices = [name for name in table.columns if name not in _FIXED]
    proxies = []
    for figures in result["proxies"]:
        proxy_table = table[table["proxy"] == figures["proxy"]]
        ranked = proxy_table[proxy_table["proxy_rank"].notna()].nsmallest(_NUM_RANKED, "proxy_rank")
        proxies.append({"figures": figures, "plot": scatter_plot(proxy_table), "ranked": _records(ranked)})
    page = loader.get_template("nas.html").render(
        result=result,
        lines=summary(result),
        proxies=proxies,
        choices=choices,
        failures=_records(table[table["failed"].astype(bool)]),
        config=(run_dir / "config.yaml").read_text(encoding="utf-8"),
        environment=json.loads((run_dir / "environment.json").read_text(encoding="utf-8")),
        plotly=get_plotlyjs(),
    )
    write_text(run_dir / "report.html", page)


def _records(table: pd.DataFrame) -> list[dict[Any, Any]]:
    """Return a table's lines as mappings, NaN as None."""
    return table.astype(object).where(table.notna(), None).to_dict("records")


class _Points(NamedTuple):
    """The points of a scatter plot: architectures with a score and a truth, accuracies in percent [A]."""

    x: np.ndarray[Any, Any]
    y: np.ndarray[Any, Any]
    groups: list[tuple[str, np.ndarray[Any, Any]]]
    """Label and mask [A] per colour."""
    table: pd.DataFrame

    def line(self) -> tuple[float, float] | None:
        """Return slope and intercept of the least-squares line, or None if undefined."""
        if len(self.x) < 3 or np.ptp(self.x) == 0:
            return None
        centred = self.x - self.x.mean()
        slope = float(centred @ self.y / (centred @ centred))
        return slope, float(self.y.mean() - slope * self.x.mean())

    def border(self) -> float | None:
        """Return the lowest whole-set accuracy among the top 20 %."""
        return float(np.sort(self.y)[-math.ceil(len(self.y) / 5)]) if len(self.y) else None


def _points(table: pd.DataFrame) -> _Points:
    """Return the points of one proxy's lines, coloured by depth if the space has depths."""
    complete = table[table["proxy_accuracy"].notna() & table["truth_accuracy"].notna()]
    x, y = (100 * complete[f"{name}_accuracy"].to_numpy(dtype=np.float64) for name in ("proxy", "truth"))
    groups = [("", np.ones(len(complete), dtype=bool))]
    if "depth" in complete.columns:
        groups = [
            (f"depth {depth}", (complete["depth"] == depth).to_numpy())
            for depth in sorted(complete["depth"].unique())
        ]
    return _Points(x, y, groups, complete)


def scatter_plot(table: pd.DataFrame) -> str:
    """Return one proxy's interactive scatter plot as an HTML fragment."""
    import plotly.graph_objects as go

    points = _points(table)
    figure = go.Figure()
    kind = go.Scattergl if len(points.x) > _MANY_POINTS else go.Scatter
    for group_index, (label, mask) in enumerate(points.groups):
        group = points.table[mask]
        figure.add_trace(
            kind(
                x=points.x[mask],
                y=points.y[mask],
                mode="markers",
                name=label,
                marker={"color": _COLOURS[group_index % len(_COLOURS)], "size": 7, "opacity": 0.9},
                customdata=group[["name", "index", "proxy_rank", "truth_rank"]].to_numpy(dtype=object),
                hovertemplate="%{customdata[0]}<br>index %{customdata[1]}"
                "<br>proxy %{x:.2f} % (rank %{customdata[2]:.0f})"
                "<br>truth %{y:.2f} % (rank %{customdata[3]:.0f})<extra></extra>",
            )
        )
    line, border = points.line(), points.border()
    if line is not None:
        ends = np.array([points.x.min(), points.x.max()])
        figure.add_scatter(
            x=ends,
            y=line[0] * ends + line[1],
            mode="lines",
            line_color="#8a94a3",
            hoverinfo="skip",
            name="line",
        )
    if border is not None:
        figure.add_hline(border, line_dash="dot", line_color="#8a94a3", annotation_text="top 20 %")
    figure.update_layout(
        **{**LAYOUT, "height": 480},
        xaxis_title=_X_TITLE,
        yaxis_title=_Y_TITLE,
        showlegend=len(points.groups) > 1,
    )
    return to_html(figure)


def save_scatters(run_dir: Path, table: pd.DataFrame, proxies: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write one PNG per proxy, `scatter-<number>-<name>.png`, and `scatter.png` with all of them.

    Args:
        run_dir: target folder.
        table: one line per proxy and architecture, as in results.csv.
        proxies: the proxies' figures, as in the command's JSON.

    Returns:
        The files, scatter.png last.

    Raises:
        StorageError: a file can't be written.
    """
    from PIL import Image

    written, panels = [], []
    y_range = _range(_points(table).y)
    for proxy_number, figures in enumerate(proxies, start=1):
        points = _points(table[table["proxy"] == figures["proxy"]])
        slug = re.sub(r"[^A-Za-z0-9]+", "-", Path(figures["proxy"]).stem).strip("-").lower()
        path = run_dir / f"scatter-{proxy_number}-{slug or 'proxy'}.png"
        _save(_panel(figures, points, y_range, (900, 700)), path)
        written.append(path)
        panels.append(_panel(figures, points, y_range, (640, 520)))
    columns = min(3, math.ceil(math.sqrt(len(panels))))
    sheet = Image.new("RGB", (columns * 640, math.ceil(len(panels) / columns) * 520), "white")
    for position, panel in enumerate(panels):
        sheet.paste(panel, (position % columns * 640, position // columns * 520))
    _save(sheet, run_dir / "scatter.png")
    return [*written, run_dir / "scatter.png"]


def _save(image: Image.Image, path: Path) -> None:
    write_atomically(path, lambda file: image.save(file, format="PNG", optimize=True))


def _title(figures: Mapping[str, Any]) -> str:
    """Return a plot title with the correlations of a proxy."""

    def text(key: str) -> str:
        if figures.get(key) is None:
            return "undefined"
        interval = figures.get(f"{key}_ci95")
        return f"{figures[key]:.2f}" + ("" if interval is None else " [{:.2f}, {:.2f}]".format(*interval))

    return f"Spearman {text('spearman')}, top 20 %: {text('spearman_top20')}"


def _range(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Return an axis range: that of the values plus a margin."""
    if not len(values):
        return 0.0, 100.0
    low, high = float(values.min()), float(values.max())
    pad = 0.05 * (high - low) or 1.0
    return low - pad, high + pad


def _ticks(low: float, high: float) -> Iterator[float]:
    """Yield 4 to 10 round numbers from low to high."""
    raw = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    for multiple in range(math.ceil(low / step), math.floor(high / step) + 1):
        yield round(multiple * step, 10)


_FINE: Final = 3  # supersampling factor, for smooth edges
_INK, _DIM, _GRID = "#1c2430", "#5a6675", "#e3e6ea"


class _Frame:
    """The canvas of one panel and the position of its axes."""

    def __init__(self, size: tuple[int, int], x: tuple[float, float], y: tuple[float, float]) -> None:
        from PIL import Image, ImageDraw

        self.size, self.x, self.y = size, x, y
        self.image = Image.new("RGB", (size[0] * _FINE, size[1] * _FINE), "white")
        self.draw: ImageDraw.ImageDraw = ImageDraw.Draw(self.image)
        self.left, self.top, self.right, self.bottom = 76, 88, size[0] - 24, size[1] - 64

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the position of a pair of accuracies, in the panel's pixels."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + across * (self.right - self.left), self.bottom - up * (self.bottom - self.top)

    def stroke(self, points: Sequence[tuple[float, float]], colour: str, width: float = 1.0) -> None:
        """Draw a line through points."""
        fine = [(x * _FINE, y * _FINE) for x, y in points]
        self.draw.line(fine, fill=colour, width=round(width * _FINE))

    def dot(self, position: tuple[float, float], radius: float, colour: str) -> None:
        """Draw a filled circle."""
        self.draw.circle((position[0] * _FINE, position[1] * _FINE), radius * _FINE, fill=colour)

    def text(self, position: tuple[float, float], text: str, size: int, colour: str, anchor: str) -> float:
        """Draw text and return its width."""
        font = _font(size)
        self.draw.text(
            (position[0] * _FINE, position[1] * _FINE), text, fill=colour, font=font, anchor=anchor
        )
        return float(font.getlength(text)) / _FINE

    def upright(self, position: tuple[float, float], text: str, size: int, colour: str) -> None:
        """Draw text rotated by 90 degrees: its left edge at `position`, vertically centred on it."""
        from PIL import Image, ImageFont

        turned = ImageFont.TransposedFont(_font(size), Image.Transpose.ROTATE_90)
        length = _font(size).getlength(text)
        self.draw.text(
            (position[0] * _FINE, position[1] * _FINE - length / 2), text, fill=colour, font=turned
        )


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size * _FINE)


def _panel(
    figures: Mapping[str, Any], points: _Points, y_range: tuple[float, float], size: tuple[int, int]
) -> Image.Image:
    """Draw one proxy's scatter plot."""
    from PIL import Image

    frame = _Frame(size, _range(points.x), y_range)
    _axes(frame)
    line, border = points.line(), points.border()
    if line is not None:
        along = np.linspace(points.x.min(), points.x.max(), 200)
        drawn = [frame.at(x, y) for x in along if y_range[0] <= (y := line[0] * x + line[1]) <= y_range[1]]
        frame.stroke(drawn, "#a3acb8", 1.5)
    if border is not None:
        height = frame.at(0, border)[1]
        for start in range(frame.left, frame.right - 4, 10):
            frame.stroke([(start, height), (start + 4, height)], "#8a94a3", 1.2)
        frame.text((frame.left + 6, height - 3), "top 20 %", 12, _DIM, "ls")
    radius = 3.6 if len(points.x) <= 200 else 2.6 if len(points.x) <= _MANY_POINTS else 1.3
    for group_index, (_, mask) in enumerate(points.groups):
        for x, y in zip(points.x[mask], points.y[mask], strict=True):
            frame.dot(frame.at(x, y), radius + 0.7 * (radius > 2), "white")
            frame.dot(frame.at(x, y), radius, _COLOURS[group_index % len(_COLOURS)])
    name = str(figures["proxy"])
    frame.text((frame.left, 30), name if len(name) <= 48 else f"...{name[-45:]}", 20, _INK, "ls")
    frame.text((frame.left, 54), _title(figures), 16, _INK, "ls")
    if len(points.groups) > 1:
        _legend(frame, points)
    if not len(points.x):
        frame.text((size[0] / 2, size[1] / 2), "no architecture was ranked", 16, _DIM, "mm")
    return frame.image.resize(size, Image.Resampling.LANCZOS)


def _axes(frame: _Frame) -> None:
    """Draw grid, tick labels and axis titles."""
    for x in _ticks(*frame.x):
        position = frame.at(x, frame.y[0])
        frame.stroke([position, (position[0], frame.top)], _GRID)
        frame.text((position[0], frame.bottom + 8), f"{x:g}", 14, _DIM, "mt")
    for y in _ticks(*frame.y):
        position = frame.at(frame.x[0], y)
        frame.stroke([position, (frame.right, position[1])], _GRID)
        frame.text((frame.left - 8, position[1]), f"{y:g}", 14, _DIM, "rm")
    corners = [(frame.left, frame.top), (frame.left, frame.bottom), (frame.right, frame.bottom)]
    frame.stroke(corners, _DIM, 1.2)
    middle = ((frame.left + frame.right) / 2, (frame.top + frame.bottom) / 2)
    frame.text((middle[0], frame.size[1] - 12), _X_TITLE, 16, _INK, "ms")
    frame.upright((12, middle[1]), _Y_TITLE, 16, _INK)


def _legend(frame: _Frame, points: _Points) -> None:
    """Draw the colours' labels in a row above the axes."""
    across = float(frame.left)
    for group_index, (label, _) in enumerate(points.groups):
        frame.dot((across + 5, 75), 5, _COLOURS[group_index % len(_COLOURS)])
        across += 15 + frame.text((across + 15, 75), label, 14, _DIM, "lm") + 18
