"""Plots of a bench beside its bars: spread over sets, varied settings, storage, distances under networks."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import plotly.graph_objects as go
from torch import Tensor

from ddray.drawing.html import COLOURS, to_html
from ddray.report.runs import RunView, Scored
from ddray.system.grouping import grouped
from ddray.tables.spec import MethodSpec
from ddray.tables.table import accuracy_of

_MANY_SETS: Final = 6  # fewer are seen as well in the bars' deviations
_MEGABYTE: Final = 2**20


def charts(run: RunView) -> Iterator[dict[str, str]]:
    """Yield `{"title", "html"}` of every plot that a bench's rows give; nothing for other runs."""
    scored = [one for one in run.scored if one.rows]
    for title, group in grouped(scored, lambda one: one.group).items():
        if any(len(one.per_set) > 1 and len(one.per_set[0]) > 1 for one in group):
            yield {"title": f"Spread over sets and networks: {title}", "html": accuracy_points(group)}
        if any(len(one.per_set) >= _MANY_SETS for one in group):
            yield {"title": f"Set by set: {title}", "html": accuracy_by_seed(group)}
        if any(len(_distances(one)) > 1 for one in group):
            yield {"title": f"Distance under each network: {title}", "html": network_bars(group)}
    for sweep in sweeps(run.config):
        varied = [one for one in scored if one.cell.method in sweep.values]
        for title, group in grouped(varied, lambda one: one.group).items():
            if len({one.cell.method for one in group}) > 2:
                yield {"title": f"{sweep.title}: {title}", "html": sweep_curve(sweep, group)}
    if (html := storage_bars(run)) is not None:
        yield {"title": "Storage, with the generator where a set needs it", "html": html}


@dataclass(frozen=True)
class Sweep:
    """A row of a bench file that varies one number."""

    title: str  # such as `dsdm, lambda1`
    setting: str  # its dotted name
    values: Mapping[str, float]  # by the label of the table's row


def sweeps(config: Mapping[str, Any]) -> list[Sweep]:
    """Return the sweeps over one number in a bench's config.yaml."""
    varied = []
    for entry in config.get("methods", ()) if config.get("command") == "bench" else ():
        method = MethodSpec.parse(entry)
        if len(method.sweep) != 1:
            continue
        ((setting, values),) = method.sweep.items()
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            labels = [row.row for row in method.expanded()]
            title = f"{method.row}, {setting.removeprefix('method.')}"
            varied.append(Sweep(title, setting, dict(zip(labels, values, strict=True))))
    return varied


def sweep_curve(sweep: Sweep, group: Sequence[Scored]) -> str:
    """Return accuracies in percent over a setting's value, a line per network; logarithmic over decades."""
    figure, values = go.Figure(), sorted(sweep.values.values())
    for index, (name, same) in enumerate(grouped(group, lambda one: one.network).items()):
        points = sorted((sweep.values[one.cell.method], _accuracy(one)) for one in same)
        figure.add_scatter(
            x=[value for value, _ in points],
            y=[100 * mean for _, (mean, _) in points],
            error_y={"type": "data", "array": [100 * (std or 0) for _, (_, std) in points]},
            mode="lines+markers",
            line={"color": COLOURS[index % len(COLOURS)]},
            name=name,
            hovertemplate=f"{sweep.setting} %{{x}}<br>%{{y:.2f}} %<extra>{name}</extra>",
        )
    kind = "log" if values[0] > 0 and values[-1] >= 100 * values[0] else "linear"
    axes = {"xaxis_title": sweep.setting, "yaxis_title": "accuracy (%)", "xaxis_type": kind}
    return to_html(figure, **axes, showlegend=True)


def accuracy_points(group: Sequence[Scored]) -> str:
    """Return all networks' accuracies of each row in percent, with mean and deviation (as D3HR's Fig 4)."""
    figure = go.Figure()
    methods = list(dict.fromkeys(one.cell.method for one in group))
    networks = grouped(group, lambda one: one.network)
    width = 0.8 / len(networks)
    for index, (name, same) in enumerate(networks.items()):
        colour = COLOURS[index % len(COLOURS)]
        centres = [methods.index(one.cell.method) - 0.4 + width * (index + 0.5) for one in same]
        values = [[100 * value for values in one.per_set for value in values] for one in same]
        figure.add_scatter(
            x=[
                x for centre, ys in zip(centres, values, strict=True) for x in _beside(centre, width, len(ys))
            ],
            y=[y for ys in values for y in ys],
            mode="markers",
            marker={"color": colour, "size": 6, "opacity": 0.7},
            name=name,
            legendgroup=name,
            hovertemplate="%{y:.2f} %<extra>" + name + "</extra>",
        )
        means = [_accuracy(one) for one in same]
        figure.add_scatter(
            x=centres,
            y=[100 * mean for mean, _ in means],
            error_y={"type": "data", "array": [100 * (std or 0) for _, std in means], "color": colour},
            mode="markers",
            marker={"color": colour, "symbol": "line-ew-open", "size": 22, "line": {"width": 2}},
            name="mean",
            legendgroup=name,
            showlegend=False,
            hovertemplate="mean %{y:.2f} %<extra>" + name + "</extra>",
        )
    figure.update_xaxes(tickvals=list(range(len(methods))), ticktext=methods, showgrid=False)
    return to_html(figure, yaxis_title="accuracy (%)", showlegend=True)


def _beside(centre: float, width: float, num: int) -> list[float]:
    """Return `num` places side by side within half of `width`."""
    return [centre + 0.5 * width * ((index + 0.5) / num - 0.5) for index in range(num)]


def accuracy_by_seed(group: Sequence[Scored]) -> str:
    """Return the mean accuracy of each set in percent over its seed, a line per row (D3HR, Fig 7)."""
    figure = go.Figure()
    for index, one in enumerate(group):
        name = f"{one.cell.method}, {one.network}"
        figure.add_scatter(
            x=[row.spec["seed"] for row in one.rows],
            y=[100 * statistics.fmean(values) for values in one.per_set],
            mode="lines+markers",
            line={"color": COLOURS[index % len(COLOURS)]},
            name=name,
            hovertemplate="seed %{x}<br>%{y:.2f} %<extra>" + name + "</extra>",
        )
    return to_html(figure, xaxis_title="seed of the set", yaxis_title="accuracy (%)", showlegend=True)


def network_bars(group: Sequence[Scored]) -> str:
    """Return the distance of each row's first set from the real images, per network (DSDM, Fig 3b)."""
    figure = go.Figure()
    for index, one in enumerate(group):
        distances = _distances(one)
        figure.add_bar(
            x=[f"{one.cell.arch} {network}" for network in range(1, len(distances) + 1)],
            y=distances,
            name=one.cell.method,
            marker_color=COLOURS[index % len(COLOURS)],
        )
    axes = {"xaxis_title": "network", "yaxis_title": "prototype loss"}
    return to_html(figure, **axes, barmode="group", showlegend=True)


def network_scatter(points: Sequence[Tensor]) -> str:
    """Return one class's images as t-SNE points [M, 2] under each network (DSDM, Fig 3a)."""
    figure = go.Figure()
    for index, part in enumerate(points):
        figure.add_scatter(
            x=part[:, 0].tolist(),
            y=part[:, 1].tolist(),
            mode="markers",
            marker={"color": COLOURS[index % len(COLOURS)], "size": 7},
            name=f"network {index + 1}",
        )
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False, scaleanchor="x")
    return to_html(figure, showlegend=True)


def storage_bars(run: RunView) -> str | None:
    """Return each row's storage in MB of float32, generators apart (D3HR, Fig A2); None if none has one."""
    rows = {row.key: row for row in run.rows if row.kind == "distill" and row.status == "done"}
    sizes: dict[str, tuple[int, int]] = {}
    for one in run.scored:
        row = next((rows[key] for key in one.cell.sets if key in rows), None)
        if row is not None and "storage_floats" in row.result:
            kind, size = one.cell.size
            floats = row.result["storage_floats"]
            whole = int(row.result.get("storage_with_generator_floats", floats))
            sizes[f"{one.cell.method}, {kind} {size}"] = floats, whole - floats
    if not any(generator for _, generator in sizes.values()):
        return None
    figure = go.Figure()
    for index, name in enumerate(("set", "generator")):
        megabytes = [4 * parts[index] / _MEGABYTE for parts in sizes.values()]
        figure.add_bar(x=list(sizes), y=megabytes, name=name, marker_color=COLOURS[index])
    return to_html(figure, yaxis_title="MB of float32", barmode="stack", showlegend=True)


def _distances(one: Scored) -> list[float]:
    """Return the first set's prototype loss under each network; empty under other protocols."""
    per_seed = one.rows[0].result.get("measures_per_seed", {}) if one.rows else {}
    return list(per_seed.get("prototype_loss", ()))


def _accuracy(one: Scored) -> tuple[float, float | None]:
    accuracy = accuracy_of([value for values in one.per_set for value in values])
    return accuracy["accuracy_mean"], accuracy["accuracy_std"]
