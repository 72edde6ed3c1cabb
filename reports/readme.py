"""README.md of the measured parts (reports/<part>.json), as regenerate.py writes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from reports import bars, claims, findings
from reports.findings import Part
from reports.sections import SECTIONS, commit, hardware, table

HERE = Path(__file__).resolve().parent
BENCHMARKS = ("benchmarks", "benchmarks_slow", "benchmarks_dsdm", "benchmarks_pool")
CHANGED_SINCE = (
    "Numbers are of the commit that stands below them. Since 2026-11-29 these are other conditions under the "
    "same name, and were not measured again: soft labels (recipes `paper` and `repo`; RDED's and SRe2L's "
    "own), DSDM's preset `paper` (DM's augmentation and momentum), D3HR's preset `repo` (skewness), "
    "NAS-Bench-201's cells (no augmentation, a rate that falls after each epoch). Since 2026-12-01: D3HR, "
    "dit and minimax with a generator that is trained here, whose latents had the wrong scale before "
    "([why](../docs/anomalies.md))."
)
OTHER_PAGES = {
    "claims.md": "Which claims of the papers hold at this scale, by paired tests over sets.",
    "d3hr.md": "D3HR: candidates and weights, what its score selects by, inversion, group sampling.",
    "optimisation.md": "KIP against its authors' notebook; MTT, DATM and DD beside DM and random images.",
    "decoupled.md": "DWA's parts one by one; ESFR, minimax and generators beside their bases.",
    "scale.md": "Shards, a killed node, images on the disk, decoding, evaluation in parallel.",
    "leaderboard.html": "The leaderboard with pictures and plots.",
}
NOT_MEASURED_YET = (
    ("CIFAR-10 ipc 1 / 10 / 50, DataDAM, preset paper", "32.0 / 54.2 / 67.0"),
    ("CIFAR-10 ipc 1 / 10 / 50, DataDAM, preset repo", "32.0 / 54.2 / 67.0"),
    ("CIFAR-10 ipc 10, 8,000 steps: seconds per step, fp32 against autocast", "-"),
    ("vectorised step against a per-class loop (bar 3x)", "-"),
    ("`ddray nas`, CIFAR-10 ipc 50, >= 144 ConvNets: Spearman, DataDAM", "0.72 (720)"),
    ("the 720 grid on an ipc-50 proxy, 200 epochs, one seed (bar 10 min)", "34.8 min"),
    ("training against a plain loop (bar 5x)", "-"),
)


def write_readme(parts: Mapping[str, Part]) -> None:
    """Write README.md."""
    (HERE / "README.md").write_text(readme(parts), encoding="utf-8")


def readme(parts: Mapping[str, Part]) -> str:
    """Return README.md: contents with the main finding of each part, then the parts."""
    machine = Counter(map(hardware, parts.values())).most_common(1)[0][0]
    contents, sections = [], []
    for part, (title, finding, lines) in SECTIONS.items():
        contents.append((link(title), finding(parts[part]) if part in parts else "Not measured."))
        body = (
            [*lines(parts[part]), "", provenance(parts[part], machine)]
            if part in parts
            else ["Not measured."]
        )
        sections += [f"## {title}", "", *body, ""]
    measured = [parts[part] for part in BENCHMARKS if part in parts]
    contents += [
        (link("Benchmarks"), findings.benchmarks(measured)),
        (link("On a GPU"), "Not measured."),
        *((f"[{name}]({name})", text) for name, text in OTHER_PAGES.items()),
    ]
    return "\n".join(
        [
            "# Measured results",
            "",
            "Written by `make reports`; do not edit. Means ± sample standard deviation.",
            f"Unless a part says otherwise, measured on {machine}.",
            "",
            *("## Claims of the papers", ""),
            "Decided by a paired test over sets, at budgets far below the papers': [claims.md](claims.md).",
            "",
            *claims.overview(claims.read(claims.RECORD)),
            CHANGED_SINCE,
            "",
            "## Contents",
            "",
            *table(("part", "main finding"), contents),
            *sections,
            *["## Benchmarks", "", *benchmarks(measured, machine), ""],
            *["## On a GPU", ""],
            *table(("what", "published", "ours"), [(*row, "not measured") for row in NOT_MEASURED_YET]),
        ]
    )


def link(title: str) -> str:
    """Return a link to a section."""
    anchor = "".join(c for c in title.lower() if c.isalnum() or c in "-_ ").replace(" ", "-")
    return f"[{title}](#{anchor})"


def provenance(part: Part, machine: str) -> str:
    """Return where a part's numbers are from: commit, date, the machine if it is another one, a note."""
    other = "" if hardware(part) == machine else f" On {hardware(part)}."
    note = f" {part['note']}" if "note" in part else ""
    return f"Measured at {commit(part)}.{other}{note}"


def benchmarks(measured: list[Part], machine: str) -> list[str]:
    """Return the table of benchmarks, and their commands."""
    rows = [row for part in measured for row in bars.rows(part["rows"])]
    ends = [f"- `{part['command']}`, 1 run. {provenance(part, machine)}" for part in measured]
    return [
        *table(("benchmark", "measured", "bar", ""), rows),
        "The bars are those that the tests state today.",
        "",
        *ends,
    ]
