"""The summary of a NAS page, like DataDAM's Tables 4 and 5: published figures beside ours."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ddray.methods import method_names

# DataDAM's supplement, Tables 4 and 5: CIFAR-10, 50 images per class; 0.72 is from its text. Per method:
# accuracy of the best-ranked, Spearman's rho over all and over the top 20 %, minutes, stored images.
PUBLISHED: Final[Mapping[str, Mapping[str, tuple[float | None, ...]]]] = {
    "convnet720": {
        "random": (0.889, None, 0.44, 33.0, 500),
        "dsa": (0.872, None, 0.57, 31.2, 500),
        "dm": (0.872, None, 0.51, 32.2, 500),
        "cafe": (0.836, None, 0.36, 30.7, 500),
        "datadam": (0.890, 0.72, 0.69, 34.8, 500),
        "early_stopping": (0.889, None, 0.64, 37.1, 50000),
        "whole": (0.892, None, 1.00, 5168.9, 50000),
    },
    "nasbench201": {
        "random": (0.919, -0.06, None, None, None),
        "dc": (0.8644, -0.19, None, None, None),
        "dsa": (0.7354, -0.37, None, None, None),
        "dm": (0.9216, -0.37, None, None, None),
        "kip": (0.9291, -0.50, None, None, None),
        "mtt": (0.7354, -0.09, None, None, None),
        "datadam": (0.9396, 0.07, None, None, None),
        "whole": (0.935, 0.7487, None, None, None),
    },
}


def summary(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the summary's lines, with figures named as in the command's JSON.

    Each proxy, and the whole set if it was trained, is followed by its published figures, if any; published
    figures of other methods come last.
    """
    unmatched = dict(PUBLISHED.get(result["space"], {}))
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
    return [*lines, *(_published_line(method, values) for method, values in unmatched.items())]


def _counts(figures: Mapping[str, Any]) -> str:
    """Return the counts of a proxy's architectures as text."""
    names = {"ties": "tied", "at_chance": "at chance", "diverged": "diverged", "failed": "left out"}
    counts = {label: figures.get(f"num_{key}") for key, label in names.items()}
    return ", ".join(f"{count} {label}" for label, count in counts.items() if count)


def _published_line(method: str, values: Sequence[float | None]) -> dict[str, Any]:
    keys = ("top1_truth_accuracy", "spearman", "spearman_top20", "minutes", "storage_images")
    return {"label": f"{method} (published)", "published": True, **dict(zip(keys, values, strict=True))}


def _method_of(figures: Mapping[str, Any]) -> str | None:
    """Return a proxy's method: the one it states, or the one that its name contains as a word.

    For a path, the file's stem is tried first, then the nearest folder: `random/dm.pt` is DM's.
    """
    methods = {*method_names(), *(method for table in PUBLISHED.values() for method in table)}
    path = Path(str(figures.get("method") or figures["proxy"]))
    for part in (path.stem, *reversed(path.parts[:-1])):
        text = part.lower().replace("-", "_")
        matches = [method for method in methods if re.search(rf"(?<![a-z]){method}(?![a-z])", text)]
        if matches:
            return max(matches, key=lambda method: (len(method), method))  # random_ssl is not random
    return None
