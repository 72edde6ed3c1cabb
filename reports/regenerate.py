"""Measure the results in reports/ again: `make reports`, or this script with the names of parts.

Each part runs `ddray` commands and stores their output in reports/<part>.json with the commands, hardware and
date; README.md is then written from all measured parts.
"""

from __future__ import annotations

import concurrent.futures
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reports import tables
from reports.readme import HERE, write_readme

Methods = dict[str, tuple[str, ...]]
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
    command = "; ".join([*commands, f"ddray nas --proxy FILE ... {options}"])
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
# The benchmark has no accuracies on digits: those on CIFAR-10 stand in, which the tables name.
CIFAR10_TRUTH = "--truth table --truth-column cifar10_test_200_mean"
NAS_CELLS = f"--space nasbench201 --sample 20 --epochs 10 {CIFAR10_TRUTH} --compat dcbench --baseline random"
NAS_WHOLE = f"--space nasbench201 --sample 20 {CIFAR10_TRUTH} --baseline whole --baseline early-stopping"
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
    "ablation": lambda: tables.measure(ddray, "ablation"),
    "speech": lambda: tables.speech(ddray),
    "ssdd": lambda: tables.measure(ddray, "ssdd"),
    "ssdd_cifar100": lambda: tables.cifar100_part(ddray),
    "diffusion_table": lambda: tables.measure(ddray, "diffusion_table"),
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


def main() -> None:
    """Run the named parts (default: all), then write README.md."""
    for name in sys.argv[1:] or list(PARTS):
        if name != "render":
            measured = {**PARTS[name](), "environment": stamp()}
            measured["environment"]["date"] = datetime.now(UTC).isoformat(timespec="seconds")
            (HERE / f"{name}.json").write_text(json.dumps(measured, indent=2) + "\n")
    write_readme(
        {name: json.loads(path.read_text()) for name in PARTS if (path := HERE / f"{name}.json").exists()}
    )


if __name__ == "__main__":
    main()
