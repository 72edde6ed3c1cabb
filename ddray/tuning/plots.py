"""A search's trials in plots, those that were stopped early or failed among them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Final

from ddray.drawing.html import COLOURS, GREY, to_html
from ddray.runs.ledger import Row
from ddray.tuning.space import Range, Space
from ddray.tuning.study import score_of, status_of

ACCURACY: Final = "val_accuracy"
_MARKERS: Final[dict[str, dict[str, Any]]] = {
    "done": {"symbol": "circle", "color": COLOURS[0], "size": 8},
    "stopped early": {"symbol": "circle-open", "color": COLOURS[1], "size": 8, "line": {"width": 2}},
}
_FAILED: Final = {"symbol": "x", "color": COLOURS[4], "size": 8}


def objective_of(rows: Sequence[Row]) -> str:
    """Return what a search maximises, by its name in rows' results."""
    return next((row.result["objective"] for row in rows if "objective" in row.result), ACCURACY)


def scale_of(objective: str) -> float:
    """Return what a score is multiplied by for people: accuracies are shown in percent."""
    return 100.0 if objective == ACCURACY else 1.0


def axis_of(objective: str) -> str:
    """Return the title of an axis of scores."""
    return "val accuracy (%)" if objective == ACCURACY else "Spearman on val"


def history_plot(rows: Sequence[Row]) -> str:
    """Return every trial's score by its number, with the best so far and the preset (trial 0)."""
    import plotly.graph_objects as go

    figure, objective = go.Figure(), objective_of(rows)
    for status in _MARKERS:
        same = [row for row in rows if status_of(row) == status]
        numbers = [row.spec["number"] for row in same]
        _add_scores(figure, numbers, _scores(same), status, "trial %{x}<br>%{y:.4g}")
    done = [row for row in rows if status_of(row) == "done"]
    if done:
        best = list(itertools.accumulate(_scores(done), max))
        line = {"color": COLOURS[0], "width": 1.5, "shape": "hv"}
        numbers = [row.spec["number"] for row in done]
        figure.add_scatter(x=numbers, y=best, mode="lines", line=line, name="best so far", hoverinfo="skip")
    if done and done[0].spec["number"] == 0:
        preset = _scores(done[:1])[0]
        figure.add_hline(preset, line_dash="dot", line_color=GREY, annotation_text="preset")
    failed = [row for row in rows if row.status == "failed"]
    if failed:
        lowest = min(_scores([row for row in rows if row.status != "failed"]), default=0.0)
        reasons = [str(row.error or "") for row in failed]
        figure.add_scatter(
            x=[row.spec["number"] for row in failed],
            y=[lowest] * len(failed),
            mode="markers",
            marker=_FAILED,
            text=reasons,
            name="failed",
            hovertemplate="trial %{x}<br>%{text}<extra>failed</extra>",
        )
    return to_html(figure, xaxis_title="trial", yaxis_title=axis_of(objective), showlegend=True)


def slice_plots(space: Space, rows: Sequence[Row]) -> list[dict[str, str]]:
    """Return a plot per setting: every trial's score by the setting's value, without failed trials."""
    return [
        {"title": name, "html": _slice_plot(name, value_range, rows)} for name, value_range in space.items()
    ]


def _slice_plot(name: str, value_range: Range, rows: Sequence[Row]) -> str:
    import plotly.graph_objects as go

    figure = go.Figure()
    for status in _MARKERS:
        same = [row for row in rows if status_of(row) == status and name in row.spec.get("params", {})]
        values = [row.spec["params"][name] for row in same]
        if value_range.kind == "choice":
            values = [str(value) for value in values]
        _add_scores(figure, values, _scores(same), status, f"{name} %{{x}}<br>%{{y:.4g}}")
    if value_range.kind == "choice":
        choices = [str(value) for value in value_range.choices]
        figure.update_xaxes(type="category", categoryorder="array", categoryarray=choices)
    elif value_range.kind == "loguniform":
        figure.update_xaxes(type="log")
    title = axis_of(objective_of(rows))
    return to_html(figure, height=280, xaxis_title=name, yaxis_title=title, showlegend=len(figure.data) > 1)


def _scores(rows: Sequence[Row]) -> list[float]:
    return [scale_of(objective_of(rows)) * score_of(row.result) for row in rows]


def _add_scores(figure: Any, x: Sequence[Any], y: Sequence[float], status: str, hover: str) -> None:
    """Add trials of one status as markers, if there are any."""
    if x:
        template = f"{hover}<extra>{status}</extra>"
        figure.add_scatter(
            x=x, y=y, mode="markers", marker=_MARKERS[status], name=status, hovertemplate=template
        )
