"""Measure what docs/scale.md is about, but for what reports/scale.jsonl has already."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reports.bars import figure as figure_text
from reports.scale.lab import environments, opened
from reports.scale.parts import PARTS

_RECORD = Path(__file__).resolve().parents[1] / "scale.jsonl"


def main() -> None:
    """Run the parts that are named, or all, and print the table."""
    lab, parts = opened("scale", __doc__, _RECORD, list(PARTS))
    for part in parts:
        PARTS[part](lab)
    for line in summary(lab.measured()):
        print(line)  # noqa: T201
    if not lab.is_tiny:
        lab.lines.with_suffix(".md").write_text("\n".join(page(lab.measured())), encoding="utf-8")


def page(measured: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[str]:
    """Return the lines of scale.md: the ratios, and a table of the figures with their commands."""
    lines = ["# Measured: one set on many devices, images on the disk, evaluation in parallel", ""]
    lines += ["Written by `python -m reports.scale`; do not edit. Means ± sample standard deviation.", ""]
    ratios = _ratios({key: row["mean"] for key, row in measured.items()})
    lines += [*(f"- {ratio}" for ratio in ratios), ""]
    lines += ["| part | figure | n | measured | command |", "|---|---|---|---|---|"]
    for (part, figure), row in measured.items():
        cells = (part, figure, str(row["n"]), _numbers(row), f"`{row['command']}`")
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", *(f"- {line}" for line in environments(measured)), ""]


def _numbers(row: Mapping[str, Any]) -> str:
    """Return the means, with standard deviations in percent of them where there are several runs."""
    means = dict(row["mean"])
    same = {0: "other bytes", 1: "the same bytes"}.get(means.pop("same_bytes", None))
    stds = {name: f" ± {row['std'][name] / value:.1%}" for name, value in means.items() if name in row["std"]}
    texts = [f"{figure_text(name, value)}{stds.get(name, '')}" for name, value in means.items()]
    return ", ".join([*texts, *filter(None, [same])])


def summary(measured: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[str]:
    """Return a line per figure, and what the issue asks of them."""
    lines = []
    for (part, figure), row in measured.items():
        lines.append(f"{part}, {figure}: {_numbers(row)} (n={row['n']})")
    return lines + _ratios({key: row["mean"] for key, row in measured.items()})


def _ratios(means: Mapping[tuple[str, str], Mapping[str, float]]) -> list[str]:
    """Return the ratios that the figures are for, as far as both of their figures are there."""
    lines = []
    base, one = means.get(("many_classes", "base")), means.get(("many_classes", "1"))
    for num in (2, 4, 8):
        if base and one and (some := means.get(("many_classes", f"{num}"))):
            memory = (some["peak_memory_bytes"] - base["peak_memory_bytes"]) / (
                one["peak_memory_bytes"] - base["peak_memory_bytes"]
            )
            seconds = some["largest_shard_s"] / one["largest_shard_s"]
            lines.append(
                f"{num} shards: memory {num * memory:.3f} / {num}, seconds {num * seconds:.3f} / {num}"
            )
    pairs = (
        ("evaluate, 4 networks, two at a time", ("evaluation", "1"), ("evaluation", "2"), "wall_s"),
        ("datadam, 2 shards", ("two_shards", "datadam 1"), ("two_shards", "datadam 2"), "wall_s"),
        ("dsdm, 2 shards", ("two_shards", "dsdm 1"), ("two_shards", "dsdm 2"), "wall_s"),
        ("decoding", ("data_on_disk", "decode"), ("data_on_disk", "ImageFolder"), "images_per_s"),
    )
    for title, first, second, name in pairs:
        if first in means and second in means:
            lines.append(f"{title}: x{means[first][name] / means[second][name]:.2f} ({name})")
    return lines


if __name__ == "__main__":
    main()
