"""The plots of a report: plotly figures as HTML fragments, coloured by the page's style sheet."""

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.colors import qualitative
from torch import Tensor

from ddray.drawing.html import COLOURS, to_html
from ddray.report.plane import Plane
from ddray.report.runs import RunView, SetView, grouped
from ddray.tables.along import curve, curve_names


def accuracy_bars(cells: Sequence[Mapping[str, Any]]) -> str:
    """Return a bar chart of a group's accuracies in percent with standard deviations.

    An architecture has a colour, a published number is a diamond.
    """
    figure = go.Figure()
    names = ["teacher", "augment"]
    if len({cell.get("settings") for cell in cells}) > 1:  # a shared setting would only clutter the legend
        names.append("settings")
    for arch_index, (arch, all_cells) in enumerate(grouped(cells, lambda cell: _arch(cell, names)).items()):
        arch_cells = [cell for cell in all_cells if cell["accuracy_mean"] is not None]
        figure.add_bar(
            x=[cell["method"] for cell in arch_cells],
            y=[100 * cell["accuracy_mean"] for cell in arch_cells],
            error_y={"type": "data", "array": [100 * (cell["accuracy_std"] or 0) for cell in arch_cells]},
            name=arch,
            offsetgroup=arch,
            marker_color=COLOURS[arch_index % len(COLOURS)],
            hovertemplate="%{x}<br>%{y:.2f} %<extra>" + arch + "</extra>",
        )
        printed = [cell for cell in arch_cells if "published" in cell]
        if printed:
            figure.add_scatter(
                x=[cell["method"] for cell in printed],
                y=[100 * cell["published"]["accuracy_mean"] for cell in printed],
                mode="markers",
                marker={"symbol": "diamond-open", "size": 11, "color": "#d55e00", "line": {"width": 2}},
                name=f"{arch}, published",
                offsetgroup=arch,
                hovertemplate="%{x}<br>published %{y:.2f} %<extra>" + arch + "</extra>",
            )
    return to_html(figure, yaxis_title="accuracy (%)", barmode="group", scattermode="group", showlegend=True)


def _arch(cell: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return the legend label that separates a method's bars: the network and the fields in `names`."""
    qualifiers = [str(cell[name]) for name in names if cell.get(name)]
    return ", ".join([str(cell["arch"]), *qualifiers])


def loss_curves(sets: Sequence[SetView]) -> str:
    """Return the loss curves of sets, relative to the first value (methods' losses differ in scale)."""
    figure = go.Figure()
    labels = list(dict.fromkeys(view.label for view in sets))
    for view in sets:
        label_index = labels.index(view.label)
        first = abs(view.losses[0][1]) or 1.0
        name = view.label if view.seed is None else f"{view.label}, seed {view.seed}"
        figure.add_scatter(
            x=[step for step, _ in view.losses],
            y=[loss / first for _, loss in view.losses],
            customdata=[loss for _, loss in view.losses],
            mode="lines",
            line={
                "color": COLOURS[label_index % len(COLOURS)],
                "dash": "solid" if label_index < len(COLOURS) else "dot",
                "width": 1.6,
            },
            name=name,
            legendgroup=view.label,
            hovertemplate="step %{x}<br>loss %{customdata:.4g}<extra>" + name + "</extra>",
        )
    return to_html(
        figure, xaxis_title="step", yaxis_title="loss / its first value", yaxis_type="log", showlegend=True
    )


def along_curves(cells: Sequence[Mapping[str, Any]]) -> str:
    """Return a group's accuracies along the steps in percent, each with a band of a standard deviation."""
    figure = go.Figure()
    for index, (name, cell) in enumerate(zip(curve_names(cells), cells, strict=True)):
        steps, means, stds = curve(cell)
        colour = COLOURS[index % len(COLOURS)]
        upper, lower = ([m + sign * s for m, s in zip(means, stds, strict=True)] for sign in (1, -1))
        red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
        figure.add_scatter(
            x=[*steps, *reversed(steps)],
            y=[*upper, *reversed(lower)],
            fill="toself",
            fillcolor=f"rgba({red},{green},{blue},0.18)",
            mode="lines",
            line={"width": 0},
            hoverinfo="skip",
            legendgroup=name,
            showlegend=False,
        )
        figure.add_scatter(
            x=steps,
            y=means,
            customdata=stds,
            mode="lines+markers",
            line={"color": colour, "width": 1.8},
            marker={"size": 5},
            name=name,
            legendgroup=name,
            hovertemplate="step %{x}<br>%{y:.2f} &plusmn; %{customdata:.2f} %<extra>" + name + "</extra>",
        )
    return to_html(figure, xaxis_title="step", yaxis_title="accuracy (%)", showlegend=True)


def rung_curves(run: RunView) -> str | None:
    """Return val accuracy curves of a search's trials; None if no trial was evaluated twice."""
    figure = go.Figure()
    for row in run.trials:
        scores = sorted((int(budget), value) for budget, value in row.result.get("rungs", {}).items())
        if len(scores) < 2:
            continue
        trial_id = row.spec["number"]
        figure.add_scatter(
            x=[budget for budget, _ in scores],
            y=[100 * value for _, value in scores],
            mode="lines+markers",
            line={"color": COLOURS[trial_id % len(COLOURS)], "width": 1.4},
            name=f"trial {trial_id}",
            hovertemplate="rung %{x}<br>val %{y:.2f} %<extra>trial " + str(trial_id) + "</extra>",
        )
    if not figure.data:
        return None
    return to_html(
        figure, xaxis_title="rung (relative steps)", yaxis_title="val accuracy (%)", showlegend=True
    )


def plane_scatter(plane: Plane, row: int) -> str:
    """Return a scatter plot: real images as small points, a row's as stars, a colour per class."""
    label, points, classes = plane.distilled[row]
    small = {"size": 4, "opacity": 0.45}
    star = {"symbol": "star", "size": 12, "line": {"width": 1, "color": "#12161c"}}
    figure = go.Figure()
    many = len(plane.class_names) > 20  # too many to tell apart by colour
    for name, xy, labels, marker in (
        ("real", plane.real, plane.real_labels.tolist(), small),
        (label, points, classes.tolist(), star),
    ):
        figure.add_scatter(
            x=_rounded(xy[:, 0]),
            y=_rounded(xy[:, 1]),
            mode="markers",
            marker={**marker, "color": _class_colours(labels, many)},
            text=["no class" if label_id < 0 else plane.class_names[label_id] for label_id in labels],
            hovertemplate="%{text}<extra>" + name + "</extra>",
            name=name,
        )
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False, scaleanchor="x")
    return to_html(figure, showlegend=True)


def _rounded(values: Tensor) -> list[float]:
    """Return coordinates rounded to 0.01, less than a point's size; makes the page much smaller."""
    return [round(value, 2) for value in values.tolist()]


def _class_colours(classes: Sequence[int], many: bool) -> list[str]:
    if many:
        return ["#8a94a3" if label_id >= 0 else "#d55e00" for label_id in classes]
    palette = [*COLOURS[:7], *qualitative.Dark24]
    return ["#d55e00" if label_id < 0 else palette[label_id % len(palette)] for label_id in classes]
