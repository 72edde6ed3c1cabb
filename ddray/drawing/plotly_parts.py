"""Colours, layout and HTML that all plotly figures share."""

from collections.abc import Mapping
from typing import Any, Final

# Okabe and Ito's colour-blind safe palette with a lighter blue, readable on white and on black.
COLOURS: Final = ("#1f84c9", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#b8a100", "#8a94a3")
# Transparent, so that plots take the page's background, light or dark.
_LAYOUT: Final[Mapping[str, Any]] = {
    "template": "plotly_white",
    "height": 380,
    "margin": {"l": 55, "r": 15, "t": 30, "b": 50},
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "#8a94a3"},
    "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
}
_CONFIG: Final = {"responsive": True, "displaylogo": False}


def to_html(figure: Any, **layout: Any) -> str:
    """Return a figure as an HTML fragment; the page itself includes plotly's script.

    Args:
        figure: plotly's figure.
        layout: changes to the common layout.
    """
    figure.update_layout(**{**_LAYOUT, **layout})
    return str(figure.to_html(full_html=False, include_plotlyjs=False, config=_CONFIG))
