"""report.html of a search: one self-contained page that needs no network, with Optuna's plotly figures."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ddray.artifact.reading import load
from ddray.drawing.html import to_html, write_run_page
from ddray.drawing.images import set_uri
from ddray.runs.ledger import Row
from ddray.tuning.importances import importance_plot
from ddray.tuning.space import Space
from ddray.tuning.study import status_of, study_of

_ACCURACY: Final = "val_accuracy"
_WORST_TO_BEST: Final = ("#8a94a3", "#d55e00")


def write_report(run_dir: Path, result: Mapping[str, Any], rows: Sequence[Row], space: Space) -> None:
    """Write `<run>/report.html` from the dump of the search's result and its trials' rows, in order.

    StorageError if the page can't be written.
    """
    picture = set_uri(load(Path(result["artifact"])))
    write_run_page(run_dir, "tune.html", result=result, search=search_view(space, rows), picture=picture)


def search_view(space: Space, rows: Sequence[Row]) -> dict[str, Any]:
    """Return what the templates show of a search: its settings' names, trials, and figures."""
    return {
        "names": list(space),
        "objective": next((row.result["objective"] for row in rows if "objective" in row.result), _ACCURACY),
        "trials": [
            {
                "number": row.spec["number"],
                "status": status_of(row),
                "val": row.result.get(row.result.get("objective", _ACCURACY)),
                "num_evaluations": len(row.result.get("rungs", {})),
                "values": [row.spec["params"].get(name) for name in space],
                "wall_s": row.wall_s,
                "error": row.error,
            }
            for row in rows
        ],
        "figures": search_figures(space, rows) if space and rows else [],
    }


def search_figures(space: Space, rows: Sequence[Row]) -> list[dict[str, str]]:
    """Return Optuna's figures as HTML fragments; one that can't be drawn is replaced by the reason."""
    import optuna.visualization as plots

    study = study_of(space, rows)
    plot_functions: dict[str, Callable[..., Any]] = {
        "Optimisation history": plots.plot_optimization_history,
        "Parallel coordinates": plots.plot_parallel_coordinate,
        "Hyperparameter importances": importance_plot,
    }
    figures = []
    for title, plot in plot_functions.items():
        try:
            with warnings.catch_warnings():
                # Optuna warns if a plot would be meaningless (importances of too few trials): it is left out.
                warnings.simplefilter("error", UserWarning)
                figure = plot(study)
        except (ValueError, RuntimeError, UserWarning) as error:
            figures.append({"title": title, "html": "", "reason": str(error).splitlines()[0]})
            continue
        if plot is plots.plot_parallel_coordinate:
            _recolour(figure)
        figures.append({"title": title, "html": to_html(figure, height=450, title=None), "reason": ""})
    return figures


def _recolour(figure: Any) -> None:
    """Recolour parallel coordinates to be readable on dark pages too; Optuna draws the best trial darkest.

    A line's first custom value is its objective as text; the last trace is the colour scale.
    """
    from plotly.colors import sample_colorscale

    if not figure.data:  # no trials or no settings to draw
        return
    *lines, bar = figure.data
    low, high = bar.marker.cmin, bar.marker.cmax
    for line in lines:
        share = (float(line.customdata[0][1]) - low) / (high - low) if high > low else 1.0
        line.line.color = sample_colorscale(_WORST_TO_BEST, [min(max(share, 0.0), 1.0)])[0]
        line.opacity = 0.9
    bar.marker.colorscale = [[end, colour] for end, colour in enumerate(_WORST_TO_BEST)]
