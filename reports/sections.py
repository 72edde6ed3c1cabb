"""The sections of README.md: title, main finding and tables of each part (reports/<part>.json)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from ddray.drawing.text import percent_short, size_of
from ddray.ranking.figures_of_merit import is_telling
from ddray.report.board import Mark, matrix_by
from ddray.tables.columns import Entry
from reports import findings
from reports.findings import Part
from reports.tables import TITLES, described

DATASETS = ("digits", "mnist", "cifar10")
LEADERBOARD = (
    "Test accuracy in percent of 2 networks on 1 set (100 epochs), ± their deviation; **bold**: the best of "
    "a column, and what is within its error. Distilled in 100 steps on digits, 50 elsewhere, DC and DSA in "
    "10 to 100, with 32 real images per class: a comparison under one small budget, far from the papers'. "
    "Settings: [leaderboard.yaml](../configs/bench/leaderboard.yaml), scale cpu, recipe `vico` with DSA. [A "
    "page with pictures and plots](leaderboard.html)."
)
SCALED_RANKING = (
    "Scaled to 2 CPU cores: a sample of the cheaper half of the grid, the whole set for one epoch, "
    "DM and DataDAM of 100 steps with 64 real images per class."
)
CELLS = (
    "Each bug of the public harness on its own, as a further proxy. 20 cells, so the intervals are wide; "
    "after 10 epochs on 100 images many networks are at chance, and the order of the others says little."
)
ROBUST = "DD-Ranking's scores LRS / ARS in percent, of 1 network (20 epochs):"
Lines = Callable[[Part], list[str]]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table, and an empty one."""
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def hardware(part: Part) -> str:
    """Return what a part was measured on."""
    env = part["environment"]
    devices = ", ".join(env["devices"]) or "no GPU"
    return f"{env['processor']}, {env['cpu_count']} cores, {devices}; torch {env['versions']['torch']}"


def commit(part: Part) -> str:
    """Return a part's commit and date."""
    env = part["environment"]
    return f"commit {(env['git_commit'] or 'unknown')[:12]}, {env['date'][:10]}"


def digits(part: Part) -> list[str]:
    """Return accuracies on digits, and DataDAM's images."""
    return [*_accuracies(part, False), "", "![DataDAM's images](digits_datadam.png)"]


def cifar10(part: Part) -> list[str]:
    """Return accuracies on CIFAR-10 beside the published ones."""
    text = "Scaled to 2 CPU cores as named in each row (the paper: 8,000 steps, 256 real images per class)."
    return [text, "", *_accuracies(part, True)]


def _accuracies(part: Part, with_published: bool) -> list[str]:
    head = ("method", "test %", "sets x networks", *["published %, at the paper's scale"] * with_published)
    rows = [
        (
            row["method"],
            percent_short(row["mean"], row["std"]),
            f"{row['sets']} x {row['n'] // row['sets']}",
            *[findings.published(row["method"].split()[0].rstrip(","))] * with_published,
        )
        for row in part["rows"]
    ]
    return [*table(head, rows), f"Example: `{part['rows'][-1]['command']}`."]


def search(part: Part) -> list[str]:
    """Return the preset's and the best trial's accuracies of a search, and the best settings."""
    result, preset, best = part["result"], part["result"]["paper_point"], part["result"]["best"]
    rows = [
        (
            label,
            percent_short(val["val_accuracy"]),
            percent_short(test["test_accuracy_mean"], test["test_accuracy_std"]),
        )
        for label, val, test in (("preset", preset, preset), ("best trial", best, result))
    ]
    settings = (f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in best["config"].items())
    return [
        *table(("", "val %", "test %, fresh seeds"), rows),
        f"The best trial's settings: {', '.join(f'`{setting}`' for setting in settings)}.",
        "",
        f"{result['num_trials']} trials, {result['num_failed']} failed, {result['num_stopped_early']} "
        f"stopped early; test: 3 fresh sets x 5 networks. `{part['command']}`.",
    ]


def ranking(part: Part) -> list[str]:
    """Return a table of rank correlations, and the scatter plot."""

    def rho(row: Mapping[str, Any], name: str) -> str:
        if not is_telling(row, name):
            return "too few"
        return "-" if row[name] is None else f"{row[name]:.2f}"

    result, rows = part["result"], []
    for row in result["proxies"]:
        interval = row["spearman_ci95"] if is_telling(row, "spearman") else None
        rows.append(
            (
                findings.proxy(row),
                rho(row, "spearman") + (" [{:.2f}, {:.2f}]".format(*interval) if interval else ""),
                *(rho(row, "spearman_top20"), rho(row, "kendall")),
                *(percent_short(row["top1_truth_accuracy"]), str(row["num_at_chance"])),
                *(f"{row['storage_images']:,.0f}", f"{row['wall_s']:.0f}"),
            )
        )
    head = (
        "proxy",
        "Spearman [95 %]",
        "in the top 20 %",
        "Kendall",
        "its pick %",
        "at chance",
        "images",
        "time, s",
    )
    truth = result["truth"]
    spent = f", {truth['wall_s']:.0f} s of training" if "wall_s" in truth else ""
    best = percent_short(result["proxies"][0]["best_truth_accuracy"])
    return [
        *table(head, rows),
        "Its pick: the true accuracy of the architecture that the proxy ranks first "
        f"(the best there is: {best} %). {result['num_archs']} architectures, {result['num_failed']} failed "
        f"units, {part['seeds']} network(s) per architecture and proxy; truth: {truth['source']}{spent}; "
        f"{result['wall_s']:.0f} s in all. `{part['command']}`.",
        "",
        f"![accuracy on the proxy against the truth]({part['picture']})",
    ]


def bench(name: str) -> Lines:
    """Return the lines of a paper's table, scaled down, with its spec."""

    def lines(part: Part) -> list[str]:
        cells = part["cells"]
        several = len({cell["dataset"] for cell in cells}) > 1
        return [
            *(described(name), ""),
            *_matrix(cells, lambda cell: findings.column_of(cell, several)),
            f"Test accuracy in percent of {cells[0]['n']} networks; **bold**: the best, and what is within "
            f"its error. {part['num_failed']} units failed; {part['wall_s']:.0f} s. "
            f"`{_bench_command(part, name)}` ([the spec](specs/{name}.yaml)).",
        ]

    return lines


def _bench_command(part: Part, name: str) -> str:
    """Return the command of a table, whose spec was first in the part's JSON alone."""
    stored = str(part["command"]).replace(", FILE being the spec in this part's JSON", "")
    return stored.replace("FILE", f"reports/specs/{name}.yaml")


def _matrix(cells: Sequence[Entry], column: Callable[[Entry], str]) -> list[str]:
    """Return accuracies by method and column, in bold what is within the error of a column's best."""

    def text(mark: Mark | None) -> str:
        if mark is None:
            return "-"
        number = percent_short(mark.entry["accuracy_mean"], mark.entry["accuracy_std"])
        return f"**{number}**" if mark.is_best else number

    matrix = matrix_by(cells, column, column)
    rows, methods = dict(matrix.rows), dict.fromkeys(str(cell["method"]) for cell in cells)
    return table(("method", *matrix.heads), [(method, *map(text, rows[method])) for method in methods])


def leaderboard(part: Part) -> list[str]:
    """Return accuracies, and LRS / ARS where measured, by method and column."""

    def cells_of(protocol: str) -> list[Entry]:
        cells = [cell for cell in part["cells"] if cell["protocol"] == protocol]
        return sorted(cells, key=lambda cell: (DATASETS.index(cell["dataset"]), cell["ipc"]))

    def column(cell: Entry) -> str:
        return f"{cell['dataset']} {size_of(cell)}, {cell['arch']}"

    robust = {(cell["method"], column(cell)): cell for cell in cells_of("robust")}
    methods, columns = (list(dict.fromkeys(key[i] for key in robust)) for i in (0, 1))
    scores = [
        (
            method,
            *(
                " / ".join(percent_short(robust[method, c][name]) for name in ("lrs", "ars"))
                if (method, c) in robust
                else "-"
                for c in columns
            ),
        )
        for method in methods
    ]
    end = f"{part['num_failed']} units failed; {part['wall_s']:.0f} s. `{part['command']}`."
    return [
        *_matrix(cells_of("hard"), column),
        LEADERBOARD,
        "",
        ROBUST,
        "",
        *table(("method", *columns), scores),
        end,
    ]


def scaling(part: Part) -> list[str]:
    """Return units per second by number of workers."""
    rows = [
        (
            str(row["workers"]),
            f"{row['units_per_s']:.2f} ± {row['std']:.2f}",
            f"{row['speedup']:.2f}",
            f"{100 * row['efficiency']:.1f} %",
        )
        for row in part["rows"]
    ]
    unit = part["unit_s"]
    return [
        *table(("workers", "units per second", "speed-up", "efficiency"), rows),
        f"Units that sleep {unit} s and publish a row, {part['rows'][0]['n']} runs each; efficiency: against "
        f"{unit} s per unit and worker. `{part['command']}`.",
    ]


def simulation(part: Part) -> list[str]:
    """Return what the simulated cluster did."""
    return [
        f"{part['units']:,} units of {part['unit_s']} s on {part['workers']} workers, {part['fake_gpus']} "
        f"fake GPUs: {part['wall_s']:.0f} s with the start of all processes on this machine "
        f"({part['ideal_s']:.1f} s without any overhead), {part['units_per_s']:.1f} units per second once "
        "all had started; every tenth unit crashed its worker, every hundredth on all three tries: "
        f"{part['retries']} retries, {part['failed']} failed. `{part['command']}`."
    ]


def faults(part: Part) -> list[str]:
    """Return the faults that the tests inject."""
    rows = [(r["fault"], str(r["injected"]), str(r["survived"]), r["lost_work"]) for r in part["rows"]]
    return [
        *table(("fault", "injected", "survived", "lost work"), rows),
        "Survived: every unit once, nothing finished repeated, tables as without the fault. "
        f"`{part['command']}`.",
    ]


def ranking_after(text: str) -> Lines:
    """Return the lines of a ranking after a text."""
    return lambda part: [text, "", *ranking(part)]


SECTIONS: Final[Mapping[str, tuple[str, Callable[[Part], str], Lines]]] = {
    "digits": ("Digits, one image per class", findings.accuracies, digits),
    "cifar10": ("CIFAR-10, one image per class", findings.cifar10, cifar10),
    "leaderboard": ("Leaderboard", findings.leaderboard, leaderboard),
    "tune": ("A search: DataDAM on digits", findings.search, search),
    "nas_digits": ("Ranking the 720 ConvNets: digits", findings.ranking, ranking),
    "nas_cifar10": (
        "Ranking the 720 ConvNets: CIFAR-10",
        findings.ranking,
        ranking_after(SCALED_RANKING),
    ),
    "nas_cells": (
        "Ranking NAS-Bench-201: distilled digits",
        findings.ranking,
        ranking_after(CELLS),
    ),
    "nas_whole": ("Ranking NAS-Bench-201: all digits", findings.ranking, ranking),
    **{part: (title, findings.bench, bench(part)) for part, title in TITLES.items()},
    "scaling": ("Scaling of the fan-out", findings.scaling, scaling),
    "simulation": ("Simulation of a large cluster", findings.simulation, simulation),
    "faults": ("Faults injected and survived", findings.faults, faults),
}
"""By part."""
