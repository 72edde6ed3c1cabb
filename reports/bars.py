"""The table of benchmarks: what was measured, in units, beside the bar that the test's docstring states."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).resolve().parents[1] / "tests" / "benchmarks"
_UNITS = {"seconds": "s", "s": "s", "mib": "MiB", "gib": "GiB", "bytes": "bytes"}


def rows(measured: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return name, figures, bar and verdict of each benchmark."""
    known_bars = bars()
    return [
        (
            re.sub(r"\[(.*)\]", r" (\1)", name).replace("_", " ").removeprefix("test "),
            "; ".join(figure(key, value) for key, value in row.items() if key not in ("name", "bar")),
            known_bars.get(name.partition("[")[0], "-"),
            row["bar"] if row["bar"] == "met" else f"**{row['bar']}**",
        )
        for row in measured
        if (name := str(row["name"]))
    ]


def bars() -> dict[str, str]:
    """Return the bar of each benchmark: the first paragraph of the test's docstring."""
    functions = (
        node
        for path in _TESTS.glob("test_*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    )
    texts = {node.name: ast.get_docstring(node) or "" for node in functions}
    return {
        name: re.sub(r"^Bars?: ", "", " ".join(text.partition("\n\n")[0].split())).removesuffix(".")
        for name, text in texts.items()
    }


def figure(key: str, value: Any) -> str:
    """Return a figure in words, as `loop 5.4 s`, `2.49 times faster`; a table of figures as a list."""
    words = key.removesuffix("_per_s").split("_")
    unit = next((_UNITS[word] for word in words if word in _UNITS), "per s" * key.endswith("_per_s"))
    title = " ".join(word for word in words if word not in _UNITS)
    if isinstance(value, Mapping):
        return f"{title}: " + ", ".join(f"{name} {quantity(each, unit)}" for name, each in value.items())
    text = quantity(value, unit)
    return f"{text} {title}" if title.startswith("times ") else f"{title} {text}".strip()


def quantity(value: float, unit: str) -> str:
    """Return a number with its unit; short times in milliseconds, bytes in GiB."""
    if unit == "s" and value < 0.1:
        value, unit = 1000 * value, "ms"
    if unit == "bytes":
        value, unit = value / 2**30, "GiB"
    return f"{value:.3g} {unit}".strip() if value < 1000 else f"{value:,.0f} {unit}".strip()
