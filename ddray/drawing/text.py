"""Numbers and sizes as people read them."""

from collections.abc import Mapping, Sequence
from typing import Any


def percent(mean: object, std: float | None = None, *, digits: int = 2) -> str:
    """Return a fraction as `12.34` or `12.34 +- 0.56` (percent); `-` if it is no number."""
    if not isinstance(mean, int | float):
        return "-"
    return f"{100 * mean:.{digits}f}" + ("" if std is None else f" +- {100 * std:.{digits}f}")


def percent_short(mean: object, std: float | None = None) -> str:
    """Return a fraction as papers' tables do, `12.3` or `12.3 \u00b1 0.6` (percent)."""
    return percent(mean, std, digits=1).replace("+-", "\u00b1")


def size_of(cell: Mapping[str, Any]) -> str:
    """Return what a cell or a configuration distils: `ipc 10` or `100 images`; empty without a size."""
    if "budget" in cell:
        return f"{cell['budget']} images"
    return f"ipc {cell['ipc']}" if "ipc" in cell else ""


def settings_text(settings: Mapping[str, Any]) -> str:
    """Return settings as `epochs=300, teacher.epochs=30`; those under `sets` have such texts already."""
    texts = (value if name == "sets" else [f"{name}={value}"] for name, value in settings.items())
    return ", ".join(text for each in texts for text in each)


def listed(words: Sequence[str]) -> str:
    """Return `a`, `a and b`, or `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
