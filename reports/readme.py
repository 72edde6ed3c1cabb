"""README.md of the measured parts (reports/<part>.json), as regenerate.py writes it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tables import TITLES

from ddray.drawing.text import percent
from ddray.evaluation.published import read_numbers

Part = dict[str, Any]
Parts = dict[str, Part]
HERE = Path(__file__).resolve().parent
DATASETS = ("digits", "mnist", "cifar10")
SCALED_RANKING = (
    "Scaled to 2 CPU cores: a sample of the cheaper half of the grid, the whole set for one epoch, "
    "DM and DataDAM of 100 steps with 64 real images per class."
)
CELLS = (
    "Each bug of the public harness on its own, as a further proxy. 20 cells, so the intervals are wide; "
    "after 10 epochs on 100 images many networks are at chance, and the order of the others says little."
)
CHANGED_SINCE = (
    "Numbers are of the commit that stands below them. Since 2026-11-29 these are other conditions under the "
    "same name, and were not measured again: soft labels (recipes `paper` and `repo`; RDED's and SRe2L's "
    "own), DSDM's preset `paper` (DM's augmentation and momentum), D3HR's preset `repo` (skewness), "
    "NAS-Bench-201's cells (no augmentation, a rate that falls after each epoch)."
)
LEADERBOARD = (
    "Test accuracy in percent of 2 networks on 1 set (100 epochs), std over them; in brackets LRS / ARS of "
    "1 network (20 epochs). Distilled in 100 steps on digits, 50 elsewhere, DC and DSA in 10 to 100, with 32 "
    "real images per class: a comparison under one small budget, far from the papers'. Settings: "
    "configs/bench/leaderboard.yaml, scale cpu."
)
NOT_MEASURED_YET = (
    ("CIFAR-10 ipc 1 / 10 / 50, DataDAM, preset paper", "32.0 / 54.2 / 67.0"),
    ("CIFAR-10 ipc 1 / 10 / 50, DataDAM, preset repo", "32.0 / 54.2 / 67.0"),
    ("CIFAR-10 ipc 10, 8,000 steps: seconds per step, fp32 against autocast", "-"),
    ("vectorised step against a per-class loop (bar 3x)", "-"),
    ("`ddray nas`, CIFAR-10 ipc 50, >= 144 ConvNets: Spearman, DataDAM", "0.72 (720)"),
    ("the 720 grid on an ipc-50 proxy, 200 epochs, one seed (bar 10 min)", "34.8 min"),
    ("training against a plain loop (bar 5x)", "-"),
)


def write_readme(parts: Parts) -> None:
    """Write README.md."""

    def section(part: str, lines: Callable[..., list[str]], *options: Any) -> list[str]:
        return [*(lines(parts[part], *options) if part in parts else ["not measured"]), ""]

    lines = ["# Measured results", ""]
    lines += ["Written by `make reports`; do not edit. Means +- sample standard deviation.", ""]
    lines += [CHANGED_SINCE, ""]
    lines += ["## Digits, ipc 1, protocol `hard`", "", *section("digits", accuracies, "digits", False)]
    lines += ["## CIFAR-10, ipc 1, protocol `hard`", ""]
    lines += [
        "Scaled to 2 CPU cores as named in each row (the paper: 8,000 steps, 256 real images per class).",
        "",
    ]
    lines += section("cifar10", accuracies, "cifar10", True)
    lines += ["## Search: DataDAM on digits, ipc 1", "", *section("tune", search)]
    lines += ["## Ranking architectures: the 720 ConvNets, digits", "", *section("nas_digits", ranking)]
    lines += ["## Ranking architectures: the 720 ConvNets, CIFAR-10", "", SCALED_RANKING, ""]
    lines += section("nas_cifar10", ranking)
    lines += ["## Ranking architectures: NAS-Bench-201, digits against the table", "", CELLS, ""]
    lines += section("nas_cells", ranking)
    lines += ["The whole digits set (10 epochs), and stopped early, on the same cells:", ""]
    lines += section("nas_whole", ranking)
    lines += ["## Benchmarks", ""]
    for part in ("benchmarks", "benchmarks_slow", "benchmarks_dsdm", "benchmarks_pool"):
        lines += section(part, benchmarks) if part in parts else [f"{part}: not measured", ""]
    for part, title in TITLES.items():
        lines += [f"## {title}", "", *section(part, bench_table)]
    lines += ["D3HR's sweeps, inversion, and what its score selects by: [d3hr.md](d3hr.md).", ""]
    lines += ["## Leaderboard: digits, MNIST and CIFAR-10 under one recipe (`vico` with DSA)", ""]
    lines += section("leaderboard", leaderboard)
    lines += ["Shards, images on the disk, evaluation in parallel: [scale.md](scale.md).", ""]
    lines += ["## Scaling of the fan-out", "", *section("scaling", scaling)]
    lines += ["## Simulation of a large cluster", "", *section("simulation", simulation)]
    lines += ["## Faults injected and survived", "", *section("faults", faults)]
    unmeasured = [(*row, "not measured") for row in NOT_MEASURED_YET]
    lines += ["## On a GPU", "", *table(("what", "published", "ours"), unmeasured), ""]
    (HERE / "README.md").write_text("\n".join(lines))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def where(part: Part) -> str:
    """Return one line with hardware, versions, commit and date."""
    env = part["environment"]
    devices = ", ".join(env["devices"]) or "no GPU"
    return (
        f"{env['processor']}, {env['cpu_count']} cores, {devices}; torch {env['versions']['torch']}; "
        f"commit {(env['git_commit'] or 'unknown')[:12]}; {env['date']}"
    )


def published(method: str) -> str:
    """Return a method's published CIFAR-10 ipc 1 accuracy on ConvNet-3."""
    for number in read_numbers():
        at = (number.method, number.dataset, number.ipc, number.arch, number.metric, number.setting)
        if at == (method, "cifar10", 1, "convnet3", "top1_accuracy", ""):
            return f"{number.value} +- {number.std} ({number.paper}, {number.table})"
    return "-"


def accuracies(part: Part, name: str, with_published: bool) -> list[str]:
    """Return a table of accuracies, with DataDAM's images if they were saved."""
    head = [
        "method",
        "test accuracy %",
        "n (sets x networks)",
        *["published %, at the paper's scale"] * with_published,
    ]
    rows = [
        [
            row["method"],
            percent(row["mean"], row["std"]),
            f"{row['n']} ({row['sets']} x {row['n'] // row['sets']})",
            *[published(row["method"].split()[0].rstrip(","))] * with_published,
        ]
        for row in part["rows"]
    ]
    lines = [*table(head, rows), "", f"{where(part)}. Example: `{part['rows'][-1]['command']}`"]
    picture = f"{name}_datadam.png"
    return [*lines, "", f"![DataDAM's images]({picture})"] if (HERE / picture).exists() else lines


def search(part: Part) -> list[str]:
    """Return the paper's and the best point of a search."""
    result, paper, best = part["result"], part["result"]["paper_point"], part["result"]["best"]
    rows = [
        (label, percent(val["val_accuracy"]), percent(test["test_accuracy_mean"], test["test_accuracy_std"]))
        for label, val, test in (
            ("paper's", paper, paper),
            (f"best: `{json.dumps(best['config'])}`", best, result),
        )
    ]
    return [
        *table(("point", "val %", "test % (fresh seeds)"), rows),
        "",
        f"{result['num_trials']} trials, {result['num_failed']} failed, "
        f"{result['num_stopped_early']} stopped early; "
        f"test: 3 fresh sets x 5 networks. `{part['command']}`. {where(part)}.",
    ]


def ranking(part: Part) -> list[str]:
    """Return a table of rank correlations."""

    def rho(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    result, rows = part["result"], []
    for row in result["proxies"]:
        low, high = row["spearman_ci95"] or (None, None)
        rows.append(
            (
                row["proxy"].removesuffix(".pt"),
                f"{rho(row['spearman'])} [{rho(low)}, {rho(high)}]",
                *(rho(row["spearman_top20"]), rho(row["kendall"])),
                *(percent(row["top1_truth_accuracy"]), percent(row["best_truth_accuracy"])),
                *(str(row["num_at_chance"]), f"{row['storage_images']:g}", f"{row['wall_s']:.0f}"),
            )
        )
    head = (
        "proxy",
        "Spearman [95 %]",
        "top 20 %",
        "Kendall",
        "top-1 %",
        "best %",
        "at chance",
        "images",
        "unit s",
    )
    truth = result["truth"]
    spent = f", {truth['wall_s']:.0f} s of training" if "wall_s" in truth else ""
    return [
        *table(head, rows),
        "",
        f"{result['num_archs']} architectures, {result['num_failed']} failed units, "
        f"{part['seeds']} network(s) per architecture and proxy; truth: {truth['source']}{spent}; "
        f"{result['wall_s']:.0f} s in all. `{part['command']}`. {where(part)}.",
        "",
        f"![accuracy on the proxy against the truth]({part['picture']})",
    ]


def benchmarks(part: Part) -> list[str]:
    """Return the measured ratios and whether they met their bars."""
    rows = []
    for row in part["rows"]:
        measured = {k: v for k, v in row.items() if k not in ("name", "bar")}
        values = {k: round(v, 4) if isinstance(v, float) else v for k, v in measured.items()}
        rows.append((row["name"], row.get("bar", "-"), f"`{json.dumps(values)}`"))
    end = f"`{part['command']}`, 1 run; the bars are in the tests. {where(part)}."
    return [*table(("benchmark", "bar", "measured"), rows), "", end]


def bench_table(part: Part) -> list[str]:
    """Return a paper's table, scaled down."""

    def column_of(cell: dict[str, Any]) -> str:
        size = f"ipc {cell['ipc']}" if cell.get("ipc") else f"budget {cell.get('budget')}"
        target = f" on {cell['target']}" if cell.get("target") else ""
        dataset = f"{cell['dataset']}, " if several_datasets else ""
        return f"{dataset}{size}, `{cell.get('protocol', 'hard')}`{target}"

    def scored(cell: dict[str, Any] | None) -> str:
        return (
            "-" if cell is None else f"{percent(cell['accuracy_mean'], cell['accuracy_std'])} ({cell['n']})"
        )

    several_datasets = len({cell["dataset"] for cell in part["cells"]}) > 1
    cells = {(cell["method"], column_of(cell)): cell for cell in part["cells"]}
    methods, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    rows = [(method, *(scored(cells.get((method, column))) for column in columns)) for method in methods]
    return [
        *table(("method", *columns), rows),
        "",
        "Test accuracy in percent, n networks in brackets. "
        f"{part['num_failed']} units failed; {part['wall_s']:.0f} s. `{part['command']}`. {where(part)}.",
        "",
        f"Spec: `{json.dumps(part['spec'])}`",
    ]


def leaderboard(part: Part) -> list[str]:
    """Return accuracies, with LRS / ARS if measured, by method and column."""
    cells = part["cells"]

    def column_of(cell: dict[str, Any]) -> tuple[str, int, str]:
        return cell["dataset"], cell["ipc"], cell["arch"]

    def scored(method: str, column: tuple[str, int, str]) -> str:
        column_cells = [cell for cell in cells if cell["method"] == method and column_of(cell) == column]
        hard = [c for c in column_cells if c["protocol"] == "hard"]
        texts = [percent(c["accuracy_mean"], c["accuracy_std"]) for c in hard]
        texts += [f"({c['lrs']:.3f} / {c['ars']:.3f})" for c in column_cells if c["protocol"] == "robust"]
        return " ".join(texts) or "-"

    columns = list(dict.fromkeys(map(column_of, cells)))
    columns.sort(key=lambda column: (DATASETS.index(column[0]), column[1]))
    names = [f"{dataset} ipc {ipc}, {arch}" for dataset, ipc, arch in columns]
    methods = dict.fromkeys(cell["method"] for cell in cells)
    return [
        "The page with pictures and plots: [leaderboard.html](leaderboard.html).",
        "",
        *table(("method", *names), [(method, *(scored(method, c) for c in columns)) for method in methods]),
        "",
        LEADERBOARD,
        "",
        f"{part['num_failed']} units failed; {part['wall_s']:.0f} s. `{part['command']}`. {where(part)}.",
    ]


def scaling(part: Part) -> list[str]:
    """Return units per second by number of workers."""
    rows = [
        (
            str(row["workers"]),
            f"{row['units_per_s']:.2f} +- {row['std']:.2f}",
            f"{row['speedup']:.2f}",
            f"{100 * row['efficiency']:.1f} %",
        )
        for row in part["rows"]
    ]
    unit = part["unit_s"]
    return [
        *table(("workers", "units per second", "speed-up", "efficiency"), rows),
        "",
        f"Units that sleep {unit} s and publish a row, {part['rows'][0]['n']} runs each; efficiency: against "
        f"{unit} s per unit and worker. `{part['command']}`. {where(part)}.",
    ]


def simulation(part: Part) -> list[str]:
    """Return what the simulated cluster did."""
    return [
        f"{part['units']} units of {part['unit_s']} s on {part['workers']} workers, {part['fake_gpus']} "
        f"fake GPUs: {part['wall_s']:.1f} s with the start of all processes on this machine "
        f"({part['ideal_s']:.1f} s without any overhead), {part['units_per_s']:.1f} units per second once "
        "all had started; every tenth unit crashed its worker, every hundredth on all three tries: "
        f"{part['retries']} retries, {part['failed']} failed, every other unit published exactly once. "
        f"`{part['command']}`. {where(part)}."
    ]


def faults(part: Part) -> list[str]:
    """Return the faults that the tests inject."""
    rows = [(r["fault"], str(r["injected"]), str(r["survived"]), r["lost_work"]) for r in part["rows"]]
    return [
        *table(("fault", "injected", "survived", "lost work"), rows),
        "",
        "Survived: every unit once, nothing finished repeated, tables as without the fault. "
        f"`{part['command']}`. {where(part)}.",
    ]
