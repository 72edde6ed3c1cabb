"""Measure the results in reports/ again: `make reports`, or this script with the names of parts.

Each part runs `ddray` commands and stores their output in reports/<part>.json with the commands, hardware and
date; README.md is then written from all measured parts.
"""

from __future__ import annotations

import concurrent.futures
import csv
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parent))
import tables

Methods = dict[str, tuple[str, ...]]
HERE = Path(__file__).resolve().parent
DIGITS = ("random", "class_mean", "herding", "kcenter", "kmeans", "mmd_pixel", "dm", "datadam")
SMALL = ("--steps", "300", "--set", "method.batch_real=64")
CIFAR10 = {
    "random": ("random",),
    "class_mean": ("class_mean",),
    "kcenter (2 feature epochs)": ("kcenter", "--set", "method.feature_epochs=2"),
    "dm, 300 steps, batch_real 64": ("dm", *SMALL),
    "datadam paper (ZCA, p=4), 300 steps, batch_real 64": ("datadam", *SMALL),
    "datadam paper without ZCA, 300 steps, batch_real 64": (
        "datadam",
        *SMALL,
        "--set",
        "pixel_space=normalized",
    ),
    "datadam repo (BatchNorm, p=1), 300 steps, batch_real 64": ("datadam", "--preset", "repo", *SMALL),
}
PICTURED = ("datadam", "datadam paper (ZCA, p=4), 300 steps, batch_real 64")  # shown beside their tables


DATASETS = ("digits", "mnist", "cifar10")
LEADERBOARD = (
    "Test accuracy in percent of 2 networks on 1 set (100 epochs), std over them; in brackets LRS / ARS of "
    "1 network (20 epochs). Distilled in 100 steps on digits, 50 elsewhere, DC and DSA in 10 to 100, with 32 "
    "real images per class: a comparison under one small budget, far from the papers'. Settings: "
    "configs/bench/leaderboard.yaml, scale cpu."
)


def ddray(*arguments: str, threads: int | None = 1) -> dict[str, Any]:
    """Run a command on `threads` threads (None: all) and return its JSON; by default two run side by side."""
    done = subprocess.run(
        [sys.executable, "-m", "ddray", *arguments, "--json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})},
    )
    if done.returncode:
        raise SystemExit(f"ddray {' '.join(arguments)} -> exit {done.returncode}\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout))


def score(
    folder: Path, label: str, method: tuple[str, ...], dataset: str, seeds: int, nets: int
) -> dict[str, Any]:
    """Distil `seeds` sets at ipc 1 and score `nets` networks on each."""
    values: list[float] = []
    commands: list[str] = []
    for seed in range(seeds):
        out = str(folder / f"{''.join(c if c.isalnum() else '-' for c in label)}-{seed}.pt")
        distill_arguments = (
            "distill",
            "--method",
            *method,
            "--dataset",
            dataset,
            "--ipc",
            "1",
            "--seed",
            str(seed),
        )
        ddray(*distill_arguments, "--out", out, "--run-dir", out + ".run")
        evaluate_arguments = ("evaluate", out, "--seeds", str(nets), "--seed", str(100 * seed))
        values += ddray(*evaluate_arguments)["results"][0]["per_seed"]
        commands = [
            f"ddray {' '.join(distill_arguments)} --out FILE",
            f"ddray evaluate FILE --seeds {nets} --seed {100 * seed}",
        ]
        if seed == 0 and label in PICTURED:
            shutil.copy(Path(out).with_suffix(".png"), HERE / f"{dataset}_{method[0]}.png")
        sys.stderr.write(f"{dataset} {label} seed {seed}: {statistics.fmean(values):.4f}\n")
    std = statistics.stdev(values) if len(values) > 1 else None
    return {
        "method": label,
        "mean": statistics.fmean(values),
        "std": std,
        "n": len(values),
        "sets": seeds,
        "command": "; ".join(commands),
    }


def accuracies(dataset: str, methods: dict[str, tuple[str, ...]], seeds: int, nets: int) -> dict[str, Any]:
    """Score every method, two at a time."""
    with tempfile.TemporaryDirectory() as temporary, concurrent.futures.ThreadPoolExecutor(2) as threads:
        folder = Path(temporary)
        jobs = [threads.submit(score, folder, label, m, dataset, seeds, nets) for label, m in methods.items()]
        return {"rows": [job.result() for job in jobs]}


def tune() -> dict[str, Any]:
    """Tune DataDAM on digits."""
    with tempfile.TemporaryDirectory() as temporary:
        arguments = (
            "tune",
            "--method",
            "datadam",
            "--dataset",
            "digits",
            "--ipc",
            "1",
            "--num-samples",
            "16",
        )
        result = ddray(*arguments, "--run-dir", str(Path(temporary) / "run"))
    for path in ("run_dir", "artifact"):
        result.pop(path)
    return {"result": result, "command": "ddray " + " ".join(arguments)}


def nas(dataset: str, ipcs: tuple[int, ...], distilled: Methods, options: str) -> dict[str, Any]:
    """Distil proxies without val, and rank architectures on them."""
    nas_arguments = options.split()
    with tempfile.TemporaryDirectory() as temporary:
        proxies: list[str] = []
        commands = []
        for ipc in ipcs:
            for label, method in distilled.items():
                out = str(Path(temporary) / f"{label} ipc {ipc}.pt")
                distill_arguments = (
                    "distill",
                    "--method",
                    *method,
                    "--dataset",
                    dataset,
                    "--ipc",
                    str(ipc),
                    "--val-seed",
                    "0",
                )
                ddray(*distill_arguments, "--out", out, "--run-dir", out + ".run")
                commands.append(f"ddray {' '.join(distill_arguments)} --out FILE")
                proxies += ["--proxy", out]
        result = ddray(
            "nas", *proxies, *nas_arguments, "--run-dir", str(Path(temporary) / "run"), threads=None
        )
        picture = f"nas_{dataset}_{nas_arguments[1]}{'_whole' if 'whole' in nas_arguments else ''}.png"
        shutil.copy(Path(temporary) / "run" / "scatter.png", HERE / picture)
    result.pop("run_dir")
    command = f"{commands[0]} (and so on); ddray nas --proxy FILE ... {options}"
    seeds = int(nas_arguments[nas_arguments.index("--seeds") + 1]) if "--seeds" in nas_arguments else 1
    return {"result": result, "command": command, "seeds": seeds, "picture": picture}


def benchmarks(marker: str, *pytest_arguments: str) -> dict[str, Any]:
    """Run the tests/benchmarks that match a marker; return the ratios and which bars were met."""
    with tempfile.TemporaryDirectory() as temporary:
        cases = Path(temporary) / "cases.xml"
        command = ["-m", "pytest", "tests/benchmarks", "-m", marker, *pytest_arguments, "-q"]
        # A missed bar is a result, not an error.
        subprocess.run(
            [sys.executable, *command, f"--junitxml={cases}"], check=False, cwd=HERE.parent, stdout=sys.stderr
        )
        tests = list(ElementTree.parse(cases).iter("testcase"))
    return {
        "rows": [
            {
                "name": test.get("name"),
                "bar": "met" if test.find("failure") is None else "missed",
                **{item.attrib["name"]: json.loads(item.attrib["value"]) for item in test.iter("property")},
            }
            for test in tests
            if test.find("properties") is not None
        ],
        "command": shlex.join(["pytest", "tests/benchmarks", "-m", marker, *pytest_arguments]),
    }


NAS_DIGITS = (
    "--space convnet720 --sample 72 --max-mflops 20 --epochs 15 --truth-epochs 4 --set recipe.batch=32 "
    "--baseline random --baseline kcenter --baseline early-stopping"
)
NAS_CELLS = "--space nasbench201 --sample 20 --epochs 10 --truth table --compat dcbench --baseline random"
NAS_WHOLE = "--space nasbench201 --sample 20 --truth table --baseline whole --baseline early-stopping"
# The whole set for one epoch on the cheaper half of the grid: minutes on two CPU cores.
NAS_CIFAR10 = (
    "--space convnet720 --sample 12 --max-mflops 8 --epochs 40 --truth-epochs 1 --set recipe.batch=64 "
    "--baseline random --baseline early-stopping"
)
CIFAR10_PROXIES = {
    method: (method, "--steps", "100", "--set", "method.batch_real=64") for method in ("dm", "datadam")
}

PARTS = {
    "digits": lambda: accuracies("digits", {m: (m,) for m in DIGITS}, seeds=3, nets=3),
    "cifar10": lambda: accuracies("cifar10", CIFAR10, seeds=1, nets=3),
    "tune": tune,
    "nas_digits": lambda: nas("digits", (1, 10), {"dm": ("dm",), "datadam": ("datadam",)}, NAS_DIGITS),
    "nas_cifar10": lambda: nas("cifar10", (10,), CIFAR10_PROXIES, NAS_CIFAR10),
    "nas_cells": lambda: nas("digits", (10,), {"datadam": ("datadam",)}, NAS_CELLS),
    "nas_whole": lambda: nas("digits", (10,), {"datadam": ("datadam",)}, NAS_WHOLE),
    "benchmarks": lambda: benchmarks("not slow and not gpu"),
    "benchmarks_slow": lambda: benchmarks("slow and not gpu", "-k", "not pool and not d_by_d"),
    "benchmarks_dsdm": lambda: benchmarks("slow and not gpu", "-k", "d_by_d"),
    "benchmarks_pool": lambda: benchmarks("slow and not gpu", "-k", "pool"),
    "leaderboard": lambda: bench("leaderboard", "cpu"),
    "ablation": lambda: tables.measure(ddray, tables.ABLATION),
    "speech": lambda: tables.speech(ddray),
    "ssdd": lambda: tables.measure(ddray, tables.SSDD),
    "ssdd_cifar100": lambda: tables.cifar100_part(ddray),
    "diffusion_table": lambda: tables.measure(ddray, tables.DIFFUSION),
    "diffusion_mnist": lambda: tables.mnist_part(ddray),
    "imagenette": lambda: tables.imagenette(ddray),
    "scaling": lambda: cluster("scaling"),
    "simulation": lambda: cluster("simulation"),
    "faults": lambda: cluster("faults"),
}


def cluster(part: str) -> dict[str, Any]:
    """Run a part of cluster.py in a separate process."""
    command = [str(HERE / "cluster.py"), part]
    done = subprocess.run([sys.executable, *command], check=True, stdout=subprocess.PIPE, text=True)
    return {**json.loads(done.stdout), "command": f"python reports/cluster.py {part}"}


def bench(name: str, scale: str) -> dict[str, Any]:
    """Run a bench; return its cells and write its page to reports/<name>.html."""
    with tempfile.TemporaryDirectory() as temporary:
        run = str(Path(temporary) / "run")
        arguments = ("bench", str(HERE.parent / "configs" / "bench" / f"{name}.yaml"), "--scale", scale)
        result = ddray(*arguments, "--run-dir", run)
        ddray("report", run, "--out", str(HERE / f"{name}.html"))
    return {
        "cells": result["cells"],
        "num_failed": result["num_failed"],
        "wall_s": result["wall_s"],
        "command": f"ddray bench configs/bench/{name}.yaml --scale {scale}",
    }


def stamp() -> dict[str, Any]:
    """Return hardware, versions and date."""
    from ddray.runs.environment import environment

    full = environment()
    return {
        name: full[name] for name in ("processor", "cpu_count", "devices", "versions", "git_commit", "date")
    }


def percent(mean: float | None, std: float | None) -> str:
    """Return `12.34 +- 0.56` in percent."""
    if mean is None:
        return "-"
    return f"{100 * mean:.2f}" + ("" if std is None else f" +- {100 * std:.2f}")


def published(method: str) -> str:
    """Return a method's published CIFAR-10 ipc 1 accuracy on ConvNet-3, from published.csv."""
    columns = {
        "dataset": "cifar10",
        "ipc": "1",
        "arch": "convnet3",
        "metric": "top1_accuracy",
        "method": method,
    }
    with (HERE / "published.csv").open() as file:
        for row in csv.DictReader(file):
            if all(row[name] == value for name, value in columns.items()) and not row["setting"]:
                return f"{row['value']} +- {row['std']} ({row['paper']}, {row['table']})"
    return "-"


def where(part: dict[str, Any]) -> str:
    """Return one line with hardware, versions, commit and date."""
    env = part["environment"]
    devices = ", ".join(env["devices"]) or "no GPU"
    return (
        f"{env['processor']}, {env['cpu_count']} cores, {devices}; torch {env['versions']['torch']}; "
        f"commit {(env['git_commit'] or 'unknown')[:12]}; {env['date']}"
    )


def accuracy_table(part: dict[str, Any], with_published: bool) -> list[str]:
    """Return the lines of an accuracy table."""
    head = ["method", "test accuracy %", "n (sets x networks)"] + (["published %"] if with_published else [])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in part["rows"]:
        cells = [
            row["method"],
            percent(row["mean"], row["std"]),
            f"{row['n']} ({row['sets']} x {row['n'] // row['sets']})",
        ]
        if with_published:
            cells.append(published(row["method"].split()[0].rstrip(",")))
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", f"{where(part)}. Example: `{part['rows'][-1]['command']}`"]


def scored(cells: list[dict[str, Any]], method: str, column: tuple[str, int, str]) -> str:
    """Return a method's test accuracy in one column of the leaderboard, with LRS / ARS if measured."""
    column_cells = [
        c for c in cells if c["method"] == method and (c["dataset"], c["ipc"], c["arch"]) == column
    ]
    texts = [percent(c["accuracy_mean"], c["accuracy_std"]) for c in column_cells if c["protocol"] == "hard"]
    texts += [f"({c['lrs']:.3f} / {c['ars']:.3f})" for c in column_cells if c["protocol"] == "robust"]
    return " ".join(texts) or "-"


def bench_lines(parts: dict[str, Any]) -> list[str]:
    """Return the lines of the leaderboard and of the fan-out's scaling, simulation and faults."""
    lines = ["## Leaderboard: digits, MNIST and CIFAR-10 under one recipe (`vico` with DSA)", ""]
    if "leaderboard" in parts:
        lines += ["The page with pictures and plots: [leaderboard.html](leaderboard.html).", ""]
        cells = parts["leaderboard"]["cells"]
        columns = list(dict.fromkeys((c["dataset"], c["ipc"], c["arch"]) for c in cells))
        columns.sort(key=lambda column: (DATASETS.index(column[0]), column[1]))
        names = [f"{dataset} ipc {ipc}, {arch}" for dataset, ipc, arch in columns]
        lines += ["| method | " + " | ".join(names) + " |", "|---" * (len(columns) + 1) + "|"]
        for method in dict.fromkeys(c["method"] for c in cells):
            lines.append(f"| {method} | " + " | ".join(scored(cells, method, c) for c in columns) + " |")
        lines += ["", LEADERBOARD, ""]
        run = parts["leaderboard"]
        lines += [
            f"{run['num_failed']} units failed; {run['wall_s']:.0f} s. `{run['command']}`. {where(run)}.",
        ]
    else:
        lines += ["not measured"]
    lines += ["", "## Scaling of the fan-out", ""]
    if "scaling" in parts:
        unit = parts["scaling"]["unit_s"]
        lines += ["| workers | units per second | speed-up | efficiency |", "|---|---|---|---|"]
        lines += [
            f"| {row['workers']} | {row['units_per_s']:.2f} +- {row['std']:.2f} | {row['speedup']:.2f} | "
            f"{100 * row['efficiency']:.1f} % |"
            for row in parts["scaling"]["rows"]
        ]
        count = parts["scaling"]["rows"][0]["n"]
        lines += [
            "",
            f"Units that sleep {unit} s and publish a row, {count} runs each; efficiency: against {unit} s "
            f"per unit and worker. `{parts['scaling']['command']}`. {where(parts['scaling'])}.",
        ]
    else:
        lines += ["not measured"]
    lines += ["", "## Simulation of a large cluster", ""]
    if "simulation" in parts:
        run = parts["simulation"]
        lines += [
            f"{run['units']} units of {run['unit_s']} s on {run['workers']} workers, {run['fake_gpus']} "
            f"fake GPUs: {run['wall_s']:.1f} s with the start of all processes on this machine "
            f"({run['ideal_s']:.1f} s without any overhead), {run['units_per_s']:.1f} units per second once "
            f"all had started; every tenth unit crashed its worker, every hundredth on all three tries: "
            f"{run['retries']} retries, {run['failed']} "
            f"failed, every other unit published exactly once. `{run['command']}`. {where(run)}.",
        ]
    else:
        lines += ["not measured"]
    lines += ["", "## Faults injected and survived", ""]
    if "faults" in parts:
        lines += ["| fault | injected | survived | lost work |", "|---|---|---|---|"]
        lines += [
            f"| {row['fault']} | {row['injected']} | {row['survived']} | {row['lost_work']} |"
            for row in parts["faults"]["rows"]
        ]
        lines += [
            "",
            "Survived: every unit once, nothing finished repeated, tables as without the fault. "
            f"`{parts['faults']['command']}`. {where(parts['faults'])}.",
        ]
    else:
        lines += ["not measured"]
    return [*lines, ""]


def render() -> None:
    """Write README.md from the measured parts."""
    parts = {name: json.loads(path.read_text()) for name in PARTS if (path := HERE / f"{name}.json").exists()}
    lines = [
        "# Measured results",
        "",
        "Written by `make reports`; do not edit. Means +- sample standard deviation.",
        "",
    ]
    lines += ["## Digits, ipc 1, protocol `hard`", "", *_section(parts, "digits", False)]
    lines += ["## CIFAR-10, ipc 1, protocol `hard`", ""]
    lines += [
        "Scaled to 2 CPU cores as named in each row (the paper: 8,000 steps, 256 real images per class).",
        "",
    ]
    lines += _section(parts, "cifar10", True)
    lines += ["## Search: DataDAM on digits, ipc 1", ""]
    if "tune" in parts:
        result, paper = parts["tune"]["result"], parts["tune"]["result"]["paper_point"]
        best = result["best"]
        lines += [
            "| point | val % | test % (fresh seeds) |",
            "|---|---|---|",
            f"| paper's | {percent(paper['val_accuracy'], None)} | "
            f"{percent(paper['test_accuracy_mean'], paper['test_accuracy_std'])} |",
            f"| best: `{json.dumps(best['config'])}` | {percent(best['val_accuracy'], None)} | "
            f"{percent(result['test_accuracy_mean'], result['test_accuracy_std'])} |",
            "",
            f"{result['num_trials']} trials, {result['num_failed']} failed, "
            f"{result['num_stopped_early']} stopped early; "
            f"test: 3 fresh sets x 5 networks. `{parts['tune']['command']}`. {where(parts['tune'])}.",
            "",
        ]
    else:
        lines += ["not measured", ""]
    lines += ["## Ranking architectures: the 720 ConvNets, digits", "", *nas_section(parts, "nas_digits")]
    lines += ["## Ranking architectures: the 720 ConvNets, CIFAR-10", ""]
    lines += [
        "Scaled to 2 CPU cores: a sample of the cheaper half of the grid, the whole set for one epoch, "
        "DM and DataDAM of 100 steps with 64 real images per class.",
        "",
        *nas_section(parts, "nas_cifar10"),
    ]
    lines += ["## Ranking architectures: NAS-Bench-201, digits against the table", ""]
    lines += [
        "Each bug of the public harness on its own, as a further proxy. 20 cells, so the intervals are wide; "
        "after 10 epochs on 100 images many networks are at chance, and the order of the others says little.",
        "",
        *nas_section(parts, "nas_cells"),
        "The whole digits set (10 epochs), and stopped early, on the same cells:",
        "",
        *nas_section(parts, "nas_whole"),
    ]
    lines += ["## Benchmarks", ""]
    for part in ("benchmarks", "benchmarks_slow", "benchmarks_dsdm", "benchmarks_pool"):
        if part not in parts:
            lines += [f"{part}: not measured", ""]
            continue
        run = parts[part]
        lines += ["| benchmark | bar | measured |", "|---|---|---|"]
        for row in run["rows"]:
            values = {
                k: round(v, 4) if isinstance(v, float) else v
                for k, v in row.items()
                if k not in ("name", "bar")
            }
            lines.append(f"| {row['name']} | {row.get('bar', '-')} | `{json.dumps(values)}` |")
        lines += ["", f"`{run['command']}`, 1 run; the bars are in the tests. {where(run)}.", ""]
    lines += tables.lines(parts, percent, where)
    lines += ["D3HR's sweeps, inversion, and what its score selects by: [d3hr.md](d3hr.md).", ""]
    lines += bench_lines(parts)
    lines += [
        "## On a GPU",
        "",
        "| what | published | ours |",
        "|---|---|---|",
        "| CIFAR-10 ipc 1 / 10 / 50, DataDAM, preset paper | 32.0 / 54.2 / 67.0 | not measured |",
        "| CIFAR-10 ipc 1 / 10 / 50, DataDAM, preset repo | 32.0 / 54.2 / 67.0 | not measured |",
        "| CIFAR-10 ipc 10, 8,000 steps: seconds per step, fp32 against autocast | - | not measured |",
        "| vectorised step against a per-class loop (bar 3x) | - | not measured |",
        "| `ddray nas`, CIFAR-10 ipc 50, >= 144 ConvNets: Spearman, DataDAM | 0.72 (720) | not measured |",
        "| the 720 grid on an ipc-50 proxy, 200 epochs, one seed (bar 10 min) | 34.8 min | not measured |",
        "| training against a plain loop (bar 5x) | - | not measured |",
        "",
    ]
    (HERE / "README.md").write_text("\n".join(lines))


def nas_section(parts: dict[str, Any], part: str) -> list[str]:
    """Return the lines of a table of rank correlations."""
    if part not in parts:
        return ["not measured", ""]
    result = parts[part]["result"]
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
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in result["proxies"]:
        low, high = row["spearman_ci95"] or (None, None)
        cells = [
            row["proxy"].removesuffix(".pt"),
            f"{rho(row['spearman'])} [{rho(low)}, {rho(high)}]",
            rho(row["spearman_top20"]),
            rho(row["kendall"]),
            percent(row["top1_truth_accuracy"], None),
            percent(row["best_truth_accuracy"], None),
            str(row["num_at_chance"]),
            f"{row['storage_images']:g}",
            f"{row['wall_s']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    truth = result["truth"]
    spent = f", {truth['wall_s']:.0f} s of training" if "wall_s" in truth else ""
    lines += [
        "",
        f"{result['num_archs']} architectures, {result['num_failed']} failed units, "
        f"{parts[part]['seeds']} network(s) per architecture and proxy; truth: {truth['source']}{spent}; "
        f"{result['wall_s']:.0f} s in all. `{parts[part]['command']}`. {where(parts[part])}.",
        "",
        f"![accuracy on the proxy against the truth]({parts[part]['picture']})",
        "",
    ]
    return lines


def rho(value: float | None) -> str:
    """Return a rank correlation with two decimals."""
    return "-" if value is None else f"{value:.2f}"


def _section(parts: dict[str, Any], part: str, with_published: bool) -> list[str]:
    """Return a table of accuracies, with DataDAM's images if they were saved."""
    if part not in parts:
        return ["not measured", ""]
    lines = [*accuracy_table(parts[part], with_published), ""]
    picture = f"{part}_datadam.png"
    return [*lines, f"![DataDAM's images]({picture})", ""] if (HERE / picture).exists() else lines


def main() -> None:
    """Run the named parts (default: all), then write README.md."""
    for name in sys.argv[1:] or list(PARTS):
        if name != "render":
            measured = {**PARTS[name](), "environment": stamp()}
            measured["environment"]["date"] = datetime.now(UTC).isoformat(timespec="seconds")
            (HERE / f"{name}.json").write_text(json.dumps(measured, indent=2) + "\n")
    render()


if __name__ == "__main__":
    main()
