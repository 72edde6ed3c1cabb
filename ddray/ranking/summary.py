"""The summary of a NAS page, like DataDAM's Tables 4 and 5: published figures beside ours."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ddray.evaluation.published import read_numbers
from ddray.methods import method_names
from ddray.ranking import get_definition, space_names

_FIGURES: Final = {
    "nas_top1_accuracy": "top1_truth_accuracy",
    "spearman": "spearman",
    "spearman_top20": "spearman_top20",
    "search_time": "minutes",
    "storage_images": "storage_images",
}


def published_figures(space: str) -> dict[str, dict[str, float | None]]:
    """Return a space's published figures by method, named as in the command's JSON; None: not published."""
    definition = get_definition(space)
    figures: dict[str, dict[str, float | None]] = {}
    for number in read_numbers():
        if (number.paper, number.table) == definition.published and number.metric in _FIGURES:
            scale = 0.01 if number.unit == "percent" else 1.0
            method_figures = figures.setdefault(number.method, dict.fromkeys(_FIGURES.values()))
            method_figures[_FIGURES[number.metric]] = round(scale * number.value, 6)
    for method, in_text in definition.published_in_text.items():
        figures[method] |= in_text
    return figures


def summary(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the summary's lines, with figures named as in the command's JSON.

    Each proxy, and the whole set if it was trained, is followed by its published figures, if any; published
    figures of other methods come last.
    """
    unmatched = published_figures(result["space"])
    lines: list[dict[str, Any]] = []
    for figures in result["proxies"]:
        lines.append({**figures, "label": figures["proxy"], "counts": _counts(figures)})
        published_method = _method_of(figures)
        if published_method is not None and published_method in unmatched:
            lines.append(_published_line(published_method, unmatched.pop(published_method)))
    truth = result.get("truth", {})
    if "wall_s" in truth:
        best = result["proxies"][0]["best_truth_accuracy"]
        perfect = dict.fromkeys(("spearman", "spearman_top20", "kendall"), 1)
        lines.append(
            {"label": "whole set", "top1_truth_accuracy": best, **perfect, **truth, "counts": _counts(truth)}
        )
        lines += [_published_line("whole", unmatched.pop("whole"))] if "whole" in unmatched else []
    return [*lines, *(_published_line(method, figures) for method, figures in unmatched.items())]


def _counts(figures: Mapping[str, Any]) -> str:
    """Return the counts of a proxy's architectures as text."""
    names = {"ties": "tied", "at_chance": "at chance", "diverged": "diverged", "failed": "left out"}
    counts = {label: figures.get(f"num_{key}") for key, label in names.items()}
    return ", ".join(f"{count} {label}" for label, count in counts.items() if count)


def _published_line(method: str, figures: Mapping[str, float | None]) -> dict[str, Any]:
    return {"label": f"{method} (published)", "published": True, **figures}


def _method_of(figures: Mapping[str, Any]) -> str | None:
    """Return a proxy's method: the one it states, or the one that its name contains as a word.

    For a path, the file's stem is tried first, then the nearest folder: `random/dm.pt` is DM's.
    """
    methods = {*method_names(), *(method for space in space_names() for method in published_figures(space))}
    path = Path(str(figures.get("method") or figures["proxy"]))
    for part in (path.stem, *reversed(path.parts[:-1])):
        text = part.lower().replace("-", "_")
        matches = [method for method in methods if re.search(rf"(?<![a-z]){method}(?![a-z])", text)]
        if matches:
            return max(matches, key=lambda method: (len(method), method))  # random_ssl is not random
    return None
