"""The plots of a report: plotly figures as HTML fragments, coloured by the page's style sheet."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import plotly.graph_objects as go
import torch
from plotly.colors import qualitative
from torch import Tensor

from ddray.drawing.html import COLOURS, GREY, to_html
from ddray.report.plane import Plane
from ddray.report.runs import RunView, SetView
from ddray.system.grouping import grouped
from ddray.tables.along import curve, curve_names

_MAX_COLOURS: Final = 20
_DISTILLED: Final = "#d55e00"  # a star whose class has no colour of its own
_PLANE: Final[Mapping[str, Any]] = {
    "height": 560,
    "margin": {"l": 5, "r": 5, "t": 45, "b": 40},
    "legend": {"orientation": "h", "y": -0.02, "yanchor": "top", "x": 0, "itemsizing": "constant"},
    "showlegend": True,
}
_MENU: Final[Mapping[str, Any]] = {"x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}


def accuracy_bars(cells: Sequence[Mapping[str, Any]]) -> str:
    """Return a bar chart of a group's accuracies in percent with standard deviations, the first row on top.

    An architecture has a colour, a published number is a diamond.
    """
    figure = go.Figure()
    names = ["teacher", "augment"]
    if len({cell.get("settings") for cell in cells}) > 1:  # a shared setting would only clutter the legend
        names.append("settings")
    for arch_index, (arch, all_cells) in enumerate(grouped(cells, lambda cell: _arch(cell, names)).items()):
        arch_cells = [cell for cell in all_cells if cell["accuracy_mean"] is not None]
        figure.add_bar(
            orientation="h",
            y=[cell["method"] for cell in arch_cells],
            x=[100 * cell["accuracy_mean"] for cell in arch_cells],
            error_x={
                "type": "data",
                "array": [100 * (cell["accuracy_std"] or 0) for cell in arch_cells],
                "color": GREY,
                "thickness": 1.5,
                "width": 3,
            },
            name=arch,
            offsetgroup=arch,
            marker_color=COLOURS[arch_index % len(COLOURS)],
            hovertemplate="%{y}<br>%{x:.2f} %<extra>" + arch + "</extra>",
        )
        printed = [cell for cell in arch_cells if "published" in cell]
        if printed:
            figure.add_scatter(
                orientation="h",
                y=[cell["method"] for cell in printed],
                x=[100 * cell["published"]["accuracy_mean"] for cell in printed],
                mode="markers",
                marker={"symbol": "diamond-open", "size": 11, "color": "#d55e00", "line": {"width": 2}},
                name=f"{arch}, published",
                offsetgroup=arch,
                hovertemplate="%{y}<br>published %{x:.2f} %<extra>" + arch + "</extra>",
            )
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(rangemode="tozero")
    height = 130 + max(18 * len(cells), 26 * len({cell["method"] for cell in cells}))
    axes = {"xaxis_title": "accuracy (%)", "barmode": "group", "scattermode": "group", "bargap": 0.25}
    return to_html(figure, **axes, height=height, showlegend=len(figure.data) > 1)


def _arch(cell: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return the legend label that separates a method's bars: the network and the fields in `names`."""
    qualifiers = [str(cell[name]) for name in names if cell.get(name)]
    return ", ".join([str(cell["arch"]), *qualifiers])


def loss_curves(sets: Sequence[SetView]) -> str:
    """Return the loss curves of sets, relative to the first value (methods' losses differ in scale)."""
    figure = go.Figure()
    labels = list(dict.fromkeys(view.label for view in sets))
    named = set()  # a row's seeds share an entry of the legend
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
            name=view.label,
            legendgroup=view.label,
            showlegend=view.label not in named,
            hovertemplate="step %{x}<br>loss %{customdata:.4g}<extra>" + name + "</extra>",
        )
        named.add(view.label)
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


def plane_scatter(plane: Plane) -> str:
    """Return a scatter plot: real images as small points, one row's as stars, a colour per class.

    A menu changes the row. More than 20 classes can't be told apart by colour: hovering names them.
    """
    figure = go.Figure()
    colours = _class_colours(plane)
    for name, mask in _real_groups(plane, colours).items():
        labels = plane.real_labels[mask].tolist()
        figure.add_scatter(
            **_points(plane.real[mask]),
            marker={"size": 4, "opacity": 0.5, "color": colours.get(name, GREY)},
            text=None if name in colours else [plane.class_names[label] for label in labels],
            hovertemplate=("" if name in colours else "%{text}, ") + "real<extra>" + name + "</extra>",
            name=name,
        )
    num_real = len(figure.data)
    buttons = []
    for row, (label, points, classes) in enumerate(plane.distilled):
        names = [plane.class_names[one] if one >= 0 else "no class" for one in classes.tolist()]
        colour = [colours.get(name, _DISTILLED) for name in names]
        figure.add_scatter(
            **_points(points),
            marker={"symbol": "star", "size": 12, "color": colour, "line": {"width": 1, "color": "#12161c"}},
            text=names,
            hovertemplate="%{text}<extra>" + label + "</extra>",
            name=label,
            visible=row == 0,
            showlegend=False,
        )
        visible = [True] * num_real + [index == row for index in range(len(plane.distilled))]
        buttons.append({"label": label, "method": "restyle", "args": [{"visible": visible}]})
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False, scaleanchor="x")
    return to_html(figure, **_PLANE, updatemenus=[{"buttons": buttons, **_MENU}])


def _class_colours(plane: Plane) -> dict[str, str]:
    """Return a colour per class name; empty if there are too many classes to tell apart."""
    palette = [*COLOURS[:7], *qualitative.Dark24]
    names = plane.class_names
    return dict(zip(names, palette, strict=False)) if len(names) <= _MAX_COLOURS else {}


def _real_groups(plane: Plane, colours: Mapping[str, str]) -> dict[str, Tensor]:
    """Return masks [N] of the real images by what the legend calls them: their class, if it has a colour."""
    if not colours:
        return {"real images": torch.ones_like(plane.real_labels, dtype=torch.bool)}
    return {name: plane.real_labels == label for label, name in enumerate(plane.class_names)}


def _points(points: Tensor) -> dict[str, Any]:
    """Return points [N, 2] as a trace's coordinates, rounded to less than a pixel: pages are smaller so."""
    x, y = ([round(value, 1) for value in column.tolist()] for column in points.T)
    return {"x": x, "y": y, "mode": "markers"}
