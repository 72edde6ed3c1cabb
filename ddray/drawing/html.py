"""HTML pages, one self-contained file each that needs no network, and the plotly figures on them."""

import base64
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from ddray.drawing.text import percent, percent_short
from ddray.system.files import write_text

# Okabe and Ito's colour-blind safe palette with a lighter blue, readable on white and on black.
COLOURS: Final = ("#1f84c9", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#b8a100", "#8a94a3")
GREY: Final = COLOURS[-1]
# The parts of plotly's own templates that show here: these take 7 kB in every figure.
_AXIS: Final = {"gridcolor": "#e3e6ea", "automargin": True, "zeroline": False, "title": {"standoff": 8}}
# Transparent, so that plots take the page's background, light or dark.
_LAYOUT: Final[Mapping[str, Any]] = {
    "template": {"layout": {"xaxis": _AXIS, "yaxis": _AXIS}},
    "height": 380,
    "margin": {"l": 55, "r": 15, "t": 30, "b": 50},
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": GREY},
    "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
}
_CONFIG: Final = {"responsive": True, "displaylogo": False}
BUNDLE: Final = "plotly-basic.min.js"
"""Plotly's own bundle of the traces scatter, bar and pie, a quarter of the whole library's size."""


def to_html(figure: Any, **layout: Any) -> str:
    """Return a plotly figure as an HTML fragment without the script; `layout` changes the common layout.

    Its traces must be of `BUNDLE`: scatter and bar.
    """
    figure.update_layout(**{**_LAYOUT, **layout})
    return str(figure.to_html(full_html=False, include_plotlyjs=False, config=_CONFIG))


def write_html(path: Path, template: str, **values: Any) -> None:
    """Write a page of `values` by a template, a file's name in `templates/`; StorageError if it can't be."""
    from jinja2 import Environment, PackageLoader, select_autoescape

    loader = Environment(loader=PackageLoader("ddray.drawing"), autoescape=select_autoescape())
    loader.filters["percent"] = percent
    loader.filters["percent_short"] = percent_short
    bundle = (files("ddray.drawing") / BUNDLE).read_text(encoding="utf-8")
    write_text(path, loader.get_template(template).render(**values, plotly=bundle))


def write_run_page(run_dir: Path, template: str, **values: Any) -> None:
    """Write `<run>/report.html`, which also shows the run's config.yaml and environment.json."""
    config = (run_dir / "config.yaml").read_text(encoding="utf-8")
    environment = json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))
    write_html(run_dir / "report.html", template, config=config, environment=environment, **values)


def text_uri(text: str, kind: str) -> str:
    """Return a text as a data URI of media type `text/<kind>`: a link that works wherever the page lies."""
    return f"data:text/{kind};charset=utf-8;base64,{base64.b64encode(text.encode()).decode()}"
