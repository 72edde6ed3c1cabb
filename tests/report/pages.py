"""What tests of the page read it with."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from typing import Any

SPEC: dict[str, Any] = {
    "name": "<b>mini</b>",
    "dataset": "digits",
    "methods": [
        "random",
        {"name": "dm", "label": "dm & co", "steps": 3, "set": {"method.batch_real": 4}},
        {"name": "dm", "label": "wild", "steps": 2, "set": {"method.lr_img": 1e30, "method.batch_real": 4}},
    ],
    "ipc": [1, 2],
    "set": {"arch": "convnet1_w8", "compile": "off"},
    "evaluate": {"archs": ["convnet1_w8", "convnet1_w8_bn"], "epochs": 1, "seeds": 2},
}


class Tables(HTMLParser):
    """Reads the text of every table's cells."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self._cell: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = []

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            self.tables[-1][-1].append(" ".join("".join(self._cell).split()))
            self._cell = None


def body(page: str) -> str:
    """Return the page without the bodies of its scripts."""
    return re.sub(r"(<script[^>]*>).*?(</script>)", r"\1\2", page, flags=re.S)


def tables(page: str) -> list[list[list[str]]]:
    parser = Tables()
    parser.feed(body(page))
    return parser.tables


def board(page: str) -> list[list[str]]:
    """The first table with every figure of the cells."""
    return next(table for table in tables(page) if "accuracy %" in table[0])


def heading(page: str) -> str:
    """The text of the page's only h1."""
    (text,) = re.findall(r"(?s)<h1>(.*?)</h1>", page)
    return html.unescape(text)


def traces(figure: str) -> list[dict[str, Any]]:
    """A figure's data, read from the page's own script."""
    start = figure.index("[", figure.index("Plotly.newPlot("))
    data: list[dict[str, Any]] = json.JSONDecoder().raw_decode(figure[start:])[0]
    return data
