"""Measure again what reports/ holds: `make reports`, or this script with the names of parts.

Each part runs `ddray` commands and keeps what they printed in reports/<part>.json, with the commands, the
hardware and the date; README.md is then written from all parts that are there.
"""

from __future__ import annotations

import concurrent.futures
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

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


def ddray(*arguments: str) -> dict[str, Any]:
    """Run a command on one thread (two run side by side); return its JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "ddray", *arguments, "--json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
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
        made = ("distill", "--method", *method, "--dataset", dataset, "--ipc", "1", "--seed", str(seed))
        ddray(*made, "--out", out, "--run-dir", out + ".run")
        scored = ("evaluate", out, "--seeds", str(nets), "--seed", str(100 * seed))
        values += ddray(*scored)["results"][0]["per_seed"]
        commands = [
            f"ddray {' '.join(made)} --out FILE",
            f"ddray evaluate FILE --seeds {nets} --seed {100 * seed}",
        ]
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
    with tempfile.TemporaryDirectory() as held, concurrent.futures.ThreadPoolExecutor(2) as threads:
        folder = Path(held)
        jobs = [threads.submit(score, folder, label, m, dataset, seeds, nets) for label, m in methods.items()]
        return {"rows": [job.result() for job in jobs]}


def tune() -> dict[str, Any]:
    """Search DataDAM on digits."""
    with tempfile.TemporaryDirectory() as held:
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
        found = ddray(*arguments, "--run-dir", str(Path(held) / "run"))
    for path in ("run_dir", "artifact"):
        found.pop(path)
    return {"result": found, "command": "ddray " + " ".join(arguments)}


def benchmarks() -> dict[str, Any]:
    """Run tests/benchmarks and keep the ratios."""
    with tempfile.TemporaryDirectory() as held:
        out = Path(held) / "benchmark.json"
        command = ["-m", "pytest", "tests/benchmarks", "-q", f"--benchmark-json={out}"]
        subprocess.run([sys.executable, *command], check=True, cwd=HERE.parent)
        found = json.loads(out.read_text())["benchmarks"]
    return {
        "rows": [{"name": row["name"], **row["extra_info"]} for row in found],
        "command": "pytest tests/benchmarks",
    }


PARTS = {
    "digits": lambda: accuracies("digits", {m: (m,) for m in DIGITS}, seeds=3, nets=3),
    "cifar10": lambda: accuracies("cifar10", CIFAR10, seeds=1, nets=3),
    "tune": tune,
    "benchmarks": benchmarks,
}


def stamp() -> dict[str, Any]:
    """Return hardware, versions and date."""
    from ddray.run import environment

    held = environment()
    return {
        name: held[name] for name in ("processor", "cpu_count", "devices", "versions", "git_commit", "date")
    }


def percent(mean: float | None, std: float | None) -> str:
    """Return `12.34 +- 0.56` in percent."""
    if mean is None:
        return "-"
    return f"{100 * mean:.2f}" + ("" if std is None else f" +- {100 * std:.2f}")


def published(method: str) -> str:
    """Return a method's published CIFAR-10 ipc 1 accuracy on ConvNet-3, from published.csv."""
    wanted = {
        "dataset": "cifar10",
        "ipc": "1",
        "arch": "convnet3",
        "metric": "top1_accuracy",
        "method": method,
    }
    with (HERE / "published.csv").open() as file:
        for row in csv.DictReader(file):
            if all(row[name] == value for name, value in wanted.items()) and not row["setting"]:
                return f"{row['value']} +- {row['std']} ({row['paper']}, {row['table']})"
    return "-"


def where(held: dict[str, Any]) -> str:
    """Return a line on hardware and date."""
    env = held["environment"]
    devices = ", ".join(env["devices"]) or "no GPU"
    return (
        f"{env['processor']}, {env['cpu_count']} cores, {devices}; torch {env['versions']['torch']}; "
        f"commit {(env['git_commit'] or 'unknown')[:12]}; {env['date']}"
    )


def accuracy_table(held: dict[str, Any], with_published: bool) -> list[str]:
    """Return the lines of an accuracy table."""
    head = ["method", "test accuracy %", "n (sets x networks)"] + (["published %"] if with_published else [])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in held["rows"]:
        cells = [
            row["method"],
            percent(row["mean"], row["std"]),
            f"{row['n']} ({row['sets']} x {row['n'] // row['sets']})",
        ]
        if with_published:
            cells.append(published(row["method"].split()[0].rstrip(",")))
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", f"{where(held)}. Example: `{held['rows'][-1]['command']}`"]


def render() -> None:
    """Write README.md from the parts that are there."""
    held = {name: json.loads(path.read_text()) for name in PARTS if (path := HERE / f"{name}.json").exists()}
    lines = [
        "# Measured results",
        "",
        "Written by `make reports`; do not edit. Means +- sample standard deviation.",
        "",
    ]
    lines += ["## Digits, ipc 1, protocol `hard`", "", *_section(held, "digits", False)]
    lines += ["## CIFAR-10, ipc 1, protocol `hard`", ""]
    lines += [
        "Scaled to 2 CPU cores as named in each row (the paper: 8,000 steps, 256 real images per class).",
        "",
    ]
    lines += _section(held, "cifar10", True)
    lines += ["## Search: DataDAM on digits, ipc 1", ""]
    if "tune" in held:
        found, paper = held["tune"]["result"], held["tune"]["result"]["paper_point"]
        best = found["best"]
        lines += [
            "| point | val % | test % (fresh seeds) |",
            "|---|---|---|",
            f"| paper's | {percent(paper['val_accuracy'], None)} | "
            f"{percent(paper['test_accuracy_mean'], paper['test_accuracy_std'])} |",
            f"| best: `{json.dumps(best['config'])}` | {percent(best['val_accuracy'], None)} | "
            f"{percent(found['test_accuracy_mean'], found['test_accuracy_std'])} |",
            "",
            f"{found['num_trials']} trials, {found['num_failed']} failed, "
            f"{found['num_stopped_early']} stopped early; "
            f"test: 3 fresh sets x 5 networks. `{held['tune']['command']}`. {where(held['tune'])}.",
            "",
        ]
    else:
        lines += ["not measured", ""]
    lines += ["## Benchmarks", ""]
    if "benchmarks" in held:
        lines += ["| benchmark | measured |", "|---|---|"]
        for row in held["benchmarks"]["rows"]:
            values = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items() if k != "name"}
            lines.append(f"| {row['name']} | `{json.dumps(values)}` |")
        lines += ["", f"`{held['benchmarks']['command']}`, 1 run. {where(held['benchmarks'])}.", ""]
    else:
        lines += ["not measured", ""]
    lines += [
        "## On a GPU",
        "",
        "| what | published | ours |",
        "|---|---|---|",
        "| CIFAR-10 ipc 1 / 10 / 50, DataDAM, preset paper | 32.0 / 54.2 / 67.0 | not measured |",
        "| CIFAR-10 ipc 1 / 10 / 50, DataDAM, preset repo | 32.0 / 54.2 / 67.0 | not measured |",
        "| CIFAR-10 ipc 10, 8,000 steps: seconds per step, fp32 against autocast | - | not measured |",
        "| vectorised step against a per-class loop (bar 3x) | - | not measured |",
        "",
    ]
    (HERE / "README.md").write_text("\n".join(lines))


def _section(held: dict[str, Any], part: str, with_published: bool) -> list[str]:
    return [*accuracy_table(held[part], with_published), ""] if part in held else ["not measured", ""]


def main() -> None:
    """Run the named parts (default: all), then write README.md."""
    for name in sys.argv[1:] or list(PARTS):
        if name != "render":
            found = {**PARTS[name](), "environment": stamp()}
            found["environment"]["date"] = datetime.now(UTC).isoformat(timespec="seconds")
            (HERE / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
    render()


if __name__ == "__main__":
    main()
