"""What tests of the page read it with."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from ddray.runs.ledger import Row
from ddray.tuning.report import write_report
from ddray.tuning.space import Range

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


def figures_of(page: str) -> list[list[dict[str, Any]]]:
    """The data of every figure, read from the page's own scripts."""
    starts = [match.end() for match in re.finditer(r"Plotly\.newPlot\(", page)]
    return [json.JSONDecoder().raw_decode(page[page.index("[", start) :])[0] for start in starts]


def traces(figure: str) -> list[dict[str, Any]]:
    """The data of the first figure."""
    return figures_of(figure)[0]


SPACE = {"lr_img": Range("loguniform", 0.01, 10.0), "init": Range("choice", choices=("random", "noise"))}
ENVIRONMENT: dict[str, Any] = {
    "date": "2026-01-01",
    "processor": "CPU",
    "cpu_count": 2,
    "devices": ["H200"],
    "versions": {"ddray": "0", "torch": "2"},
    "git_commit": None,
    "command": ["ddray", "tune"],
    "platform": "Linux",
}


def trial_row(trial_id: int, **changes: Any) -> Row:
    """A trial's row; the second was stopped early."""
    values: dict[str, Any] = {
        "key": f"{trial_id}",
        "kind": "trial",
        "spec": {"number": trial_id, "params": {"lr_img": 0.123456 * (trial_id + 1), "init": "random"}},
        "status": "done",
        "result": {
            "number": trial_id,
            "val_accuracy": 0.1234 + trial_id / 100,
            "stopped_early": trial_id == 1,
            "rungs": {"5": 0.1, "10": 0.12},
        },
        "wall_s": 1.5,
    }
    return Row.parse({**values, **changes})


def write_search(folder: Path, rows: Sequence[Row]) -> str:
    """Write the page of a search whose winner, trial 3, is the folder's distilled.pt; return the page."""
    (folder / "config.yaml").write_text("method_name: dm\ndataset: digits\nipc: 1\nname: <b>bold</b>\n")
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    result = {
        "artifact": str(folder / "distilled.pt"),
        "num_trials": len(rows),
        "num_failed": 1,
        "num_stopped_early": 1,
        "objective": "val_accuracy",
        "verdict": "better than the preset by 3.00 points",
        "cut": "steps 3 of 300",
        "best": {"val_accuracy": 0.1534, "trial": 3},
        "paper_point": {"val_accuracy": 0.1234, "test_accuracy_mean": 0.11, "test_accuracy_std": None},
        "test_accuracy_mean": 0.14,
        "test_accuracy_std": 0.01,
    }
    write_report(folder, result, rows, SPACE)
    return (folder / "report.html").read_text()
