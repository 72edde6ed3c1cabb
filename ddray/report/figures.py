"""The plots of a report: plotly figures as parts of a page; the page's style sheet gives them its colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from torch import Tensor

from ddray.report.plane import Plane
from ddray.report.runs import RunView, SetView, size_of

# Okabe and Ito's colours, the blue lighter: told apart by colour-blind readers, on white and on black.
COLOURS: Final = ("#1f84c9", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#b8a100", "#8a94a3")
# Without a ground of its own a plot takes the page's, light or dark.
LAYOUT: Final[Mapping[str, Any]] = {
    "template": "plotly_white",
    "height": 380,
    "margin": {"l": 55, "r": 15, "t": 30, "b": 50},
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "#8a94a3"},
    "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
}
_CONFIG: Final = {"responsive": True, "displaylogo": False}


def to_html(figure: Any) -> str:
    """Return a figure as a part of a page that holds plotly's script."""
    return str(figure.to_html(full_html=False, include_plotlyjs=False, config=_CONFIG))


def group_of(cell: Mapping[str, Any]) -> str:
    """Return what cells must share to stand in one plot: data, size and protocol."""
    target = f" on {cell['target']}" if "target" in cell else ""
    return f"{cell['dataset']}, {size_of(cell)}, {cell['protocol']}{target}"


def accuracy_bars(cells: Sequence[Mapping[str, Any]]) -> str:
    """Return bars of accuracy in percent, a colour per architecture, with standard deviations.

    Published numbers are diamonds.

    Args:
        cells: of one group.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    names = ["teacher", "augment"]
    if len({cell.get("settings") for cell in cells}) > 1:  # what all share would only fill the legend
        names.append("settings")
    archs = list(dict.fromkeys(_arch(cell, names) for cell in cells))
    for number, arch in enumerate(archs):
        own = [cell for cell in cells if _arch(cell, names) == arch and cell["accuracy_mean"] is not None]
        figure.add_bar(
            x=[cell["method"] for cell in own],
            y=[100 * cell["accuracy_mean"] for cell in own],
            error_y={"type": "data", "array": [100 * (cell["accuracy_std"] or 0) for cell in own]},
            name=arch,
            offsetgroup=arch,
            marker_color=COLOURS[number % len(COLOURS)],
            hovertemplate="%{x}<br>%{y:.2f} %<extra>" + arch + "</extra>",
        )
        printed = [cell for cell in own if "published" in cell]
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
    figure.update_layout(
        **LAYOUT, yaxis_title="accuracy (%)", barmode="group", scattermode="group", showlegend=True
    )
    return to_html(figure)


def _arch(cell: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return what tells bars of one method apart: the network, and what `names` say."""
    more = [str(cell[name]) for name in names if cell.get(name)]
    return ", ".join([str(cell["arch"]), *more])


def loss_curves(sets: Sequence[SetView]) -> str:
    """Return one line of loss over steps per set, relative to its first value; losses of methods differ.

    Args:
        sets: of one dataset and size; those without steps are left out.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    labels = list(dict.fromkeys(view.label for view in sets))
    for view in sets:
        if not view.losses:
            continue
        number = labels.index(view.label)
        first = abs(view.losses[0][1]) or 1.0
        name = view.label if view.seed is None else f"{view.label}, seed {view.seed}"
        figure.add_scatter(
            x=[step for step, _ in view.losses],
            y=[loss / first for _, loss in view.losses],
            customdata=[loss for _, loss in view.losses],
            mode="lines",
            line={
                "color": COLOURS[number % len(COLOURS)],
                "dash": "solid" if number < len(COLOURS) else "dot",
                "width": 1.6,
            },
            name=name,
            legendgroup=view.label,
            hovertemplate="step %{x}<br>loss %{customdata:.4g}<extra>" + name + "</extra>",
        )
    figure.update_layout(
        **LAYOUT, xaxis_title="step", yaxis_title="loss / its first value", yaxis_type="log", showlegend=True
    )
    return to_html(figure)


def rung_curves(run: RunView) -> str | None:
    """Return the val accuracy of a search's trials at their looks; None if none looked twice."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for row in sorted((row for row in run.rows if row.kind == "trial"), key=lambda row: row.spec["number"]):
        looks = sorted((int(budget), value) for budget, value in row.result.get("rungs", {}).items())
        if len(looks) < 2:
            continue
        number = row.spec["number"]
        figure.add_scatter(
            x=[budget for budget, _ in looks],
            y=[100 * value for _, value in looks],
            mode="lines+markers",
            line={"color": COLOURS[number % len(COLOURS)], "width": 1.4},
            name=f"trial {number}",
            hovertemplate="part %{x}<br>val %{y:.2f} %<extra>trial " + str(number) + "</extra>",
        )
    if not figure.data:
        return None
    figure.update_layout(
        **LAYOUT, xaxis_title="part of the steps", yaxis_title="val accuracy (%)", showlegend=True
    )
    return to_html(figure)


def plane_scatter(plane: Plane, row: int) -> str:
    """Return real images as small points and one row's distilled images as stars, a colour per class.

    Args:
        plane: all points.
        row: which of `plane.distilled`.
    """
    import plotly.graph_objects as go

    label, points, classes = plane.distilled[row]
    figure = go.Figure()
    many = len(plane.class_names) > 20  # more colours would tell nothing
    figure.add_scatter(
        x=_places(plane.real[:, 0]),
        y=_places(plane.real[:, 1]),
        mode="markers",
        marker={"size": 4, "opacity": 0.45, "color": _class_colours(plane.real_labels.tolist(), many)},
        text=[plane.class_names[held] for held in plane.real_labels.tolist()],
        hovertemplate="%{text}<extra>real</extra>",
        name="real",
    )
    figure.add_scatter(
        x=_places(points[:, 0]),
        y=_places(points[:, 1]),
        mode="markers",
        marker={
            "symbol": "star",
            "size": 12,
            "color": _class_colours(classes.tolist(), many),
            "line": {"width": 1, "color": "#12161c"},
        },
        text=["no class" if held < 0 else plane.class_names[held] for held in classes.tolist()],
        hovertemplate="%{text}<extra>" + label + "</extra>",
        name=label,
    )
    figure.update_layout(**LAYOUT, showlegend=True)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False, scaleanchor="x")
    return to_html(figure)


def _places(values: Tensor) -> list[float]:
    """Return coordinates to a hundredth, which is less than a point's size: a third of the digits."""
    return [round(value, 2) for value in values.tolist()]


def _class_colours(classes: Sequence[int], many: bool) -> list[str]:
    if many:
        return ["#8a94a3" if held >= 0 else "#d55e00" for held in classes]
    from plotly.colors import qualitative

    palette = [*COLOURS[:7], *qualitative.Dark24]
    return ["#d55e00" if held < 0 else palette[held % len(palette)] for held in classes]
