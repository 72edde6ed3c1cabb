"""What the parts share: made datasets, commands with their memory, and the record."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddray.runs.environment import environment
from ddray.runs.ledger import Ledger, Row
from reports.gpu.record import append, read

_LOOK_S = 0.02
Measured = Mapping[tuple[str, str], Mapping[str, Any]]
"""Recorded figures by part and name."""


@dataclass(frozen=True)
class Lab:
    """Where things are measured, and how much of them.

    Attributes:
        folder: for datasets, runs and $DDRAY_HOME; what is there from an earlier start is used again.
        lines: the record.
        repeats: runs of a figure.
        is_tiny: sizes that show that the parts work, and measure nothing.
    """

    folder: Path
    lines: Path
    repeats: int
    is_tiny: bool

    def size(self, full: int, tiny: int) -> int:
        """Return a size, or the one that only shows that a part works."""
        return tiny if self.is_tiny else full

    @property
    def home(self) -> Path:
        """The $DDRAY_HOME of commands."""
        return self.folder / "home"

    def measured(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Return the record's lines by part and figure."""
        return {(row["part"], row["figure"]): row for row in read(self.lines) if row["tiny"] == self.is_tiny}

    def record(self, part: str, figure: str, command: str, runs: Sequence[Mapping[str, Any]]) -> None:
        """Append a figure: its runs' values, with mean and sample standard deviation of the numbers."""
        names = [name for name, value in runs[0].items() if isinstance(value, int | float)]
        columns = {name: [float(run[name]) for run in runs] for name in names}
        append(
            self.lines,
            part=part,
            figure=figure,
            command=command.replace(f"{self.folder}/", ""),
            n=len(runs),
            mean={name: statistics.fmean(values) for name, values in columns.items()},
            std={name: statistics.stdev(values) for name, values in columns.items() if len(values) > 1},
            runs=list(runs),
            tiny=self.is_tiny,
            environment={name: value for name, value in environment().items() if name != "command"},
        )


@dataclass(frozen=True)
class Ran:
    """A command that has ended: its JSON, its seconds, and the most anonymous memory of its own process."""

    out: dict[str, Any]
    seconds: float
    anonymous_bytes: int


def opened(name: str, doc: str | None, record: Path, parts: Sequence[str]) -> tuple[Lab, list[str]]:
    """Return the lab that the command line of `python -m reports.<name>` describes, and its parts."""
    parser = argparse.ArgumentParser(prog=f"python -m reports.{name}", description=doc)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)}; default all")
    parser.add_argument("--folder", type=Path, default=Path("build") / name, help="datasets and runs")
    parser.add_argument("--lines", type=Path, default=record, help="the record, a JSON line per figure")
    parser.add_argument("--repeats", type=int, default=3, help="runs of a figure")
    parser.add_argument("--tiny", action="store_true", help="show that the parts work; measures nothing")
    options = parser.parse_args()
    if unknown := {*options.parts} - {*parts}:
        parser.error(f"parts must be of {', '.join(parts)}, got {', '.join(sorted(unknown))}")
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    repeats = 1 if options.tiny else options.repeats
    return Lab(folder, options.lines.absolute(), repeats, options.tiny), options.parts or [*parts]


def run_parts(
    lab: Lab,
    figures: Mapping[str, Iterable[str]],
    measure: Callable[[Lab, str, str], None],
    verdict: Callable[[Measured], list[str]],
    page: Callable[[Measured], list[str]],
) -> None:
    """Measure the figures of each part that are not recorded, print the verdict, and write the page."""
    for part, names in figures.items():
        for name in names:
            if (part, name) not in lab.measured():
                measure(lab, part, name)
    for line in verdict(lab.measured()):
        print(line)  # noqa: T201
    if not lab.is_tiny:
        lab.lines.with_suffix(".md").write_text("\n".join(page(lab.measured())), encoding="utf-8")


def percent(row: Mapping[str, Any], name: str) -> str:
    """Return the mean of a figure's runs in percent, +- their sample deviation; empty if none has `name`."""
    if name not in row["mean"]:
        return ""
    spread = f" +- {row['std'][name]:.2%}" if name in row["std"] else ""
    return f"{row['mean'][name]:.2%}{spread}"


def figures_table(measured: Measured, columns: Mapping[str, Callable[[Mapping[str, Any]], str]]) -> list[str]:
    """Return a Markdown table of figures: part, set, n, `columns`, seconds of each run, commands."""
    titles = ("part", "set", "n", *columns, "seconds", "commands")
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for (part, figure), row in measured.items():
        seconds = ", ".join(f"{run['seconds']:.0f}" for run in row["runs"])
        cells = (part, figure, str(row["n"]), *(cell(row) for cell in columns.values()), seconds)
        lines.append("| " + " | ".join(cells) + f" | `{row['command']}` |")
    return lines


def environments(measured: Measured) -> list[str]:
    """Return a line for each machine and commit that figures are of."""
    return sorted(
        {
            f"{env['processor']}, {env['cpu_count']} cores, {', '.join(env['devices']) or 'no GPU'}; torch "
            f"{env['versions']['torch']}; commit {(env['git_commit'] or 'unknown')[:12]}; {env['date'][:10]}"
            for env in (row["environment"] for row in measured.values())
        }
    )


def ddray(lab: Lab, *arguments: object, home: Path | None = None) -> Ran:
    """Run a command of one thread per process.

    Raises:
        SystemExit: it failed.
    """
    command = [sys.executable, "-m", "ddray", *map(str, arguments), "--json"]
    begin, most = time.perf_counter(), 0
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "DDRAY_HOME": str(home or lab.home)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
    ) as process:
        while process.poll() is None:
            most = max(most, _anonymous(process.pid))
            time.sleep(_LOOK_S)
        out, errors = process.communicate()
    seconds = time.perf_counter() - begin
    if process.returncode:
        raise SystemExit(f"{typed(arguments)} -> exit {process.returncode}\n{errors[-2000:]}")
    return Ran(json.loads(out), seconds, most)


def typed(arguments: Iterable[object]) -> str:
    """Return a command as it is typed."""
    return " ".join(["OMP_NUM_THREADS=1 ddray", *map(str, arguments)])


def _anonymous(pid: int) -> int:
    """Return a process's anonymous resident memory in bytes; 0 once it has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
    except (OSError, StopIteration):
        return 0


def shard_rows(run_dir: Path) -> list[Row]:
    """Return the rows of a run's shards, each once.

    Raises:
        SystemExit: a shard was published more than once.
    """
    ledger = Ledger(run_dir)
    rows = [row for row in ledger.rows() if row.kind == "shard"]
    keys = {row.key for row in rows}
    ends = [event["key"] for event in ledger.events() if event["event"] == "finish" and event["key"] in keys]
    if len(ends) != len(set(ends)) or len(set(ends)) != len(rows):
        raise SystemExit(f"{run_dir}: {len(rows)} shards, published {len(ends)} times")
    return rows


def digest(artifact: str | Path) -> str:
    """Return the sha256 (hex) of a set's images and labels."""
    values = torch.load(artifact, weights_only=True)
    parts = (values["images"].contiguous().numpy().tobytes(), values["labels"].numpy().tobytes())
    return hashlib.sha256(b"".join(parts)).hexdigest()


def made_arrays(lab: Lab, classes: int, per_class: int, size: int) -> Path:
    """Return an .npz dataset of random images, each near its class's pattern."""
    path = lab.folder / f"made-{classes}x{per_class}-{size}px.npz"
    if path.is_file():
        return path
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(classes), per_class))
    patterns = rng.integers(0, 128, (classes, 3, size, size), dtype=np.uint8)
    images = patterns[labels] + rng.integers(0, 128, (len(labels), 3, size, size), dtype=np.uint8)
    few = np.arange(min(len(labels), 10 * classes))
    halves = {"x_test": images[few].transpose(0, 2, 3, 1), "y_test": labels[few]}
    draft = path.with_suffix(".tmp.npz")
    np.savez(draft, x_train=images.transpose(0, 2, 3, 1), y_train=labels, **halves)
    draft.rename(path)
    return path


def made_folder(lab: Lab, classes: int, per_class: int, size: int) -> Path:
    """Return an image folder of JPEG files: smooth pictures with some noise, which pack as photographs do."""
    from PIL import Image

    folder = lab.folder / f"pictures-{classes}x{per_class}-{size}px"
    if (folder / "done").is_file():
        return folder
    rng = np.random.default_rng(0)
    for half, num in (("train", per_class), ("val", 2)):
        for label in range(classes):
            place = folder / half / f"class{label:02d}"
            place.mkdir(parents=True, exist_ok=True)
            for index in range(num):
                coarse = Image.fromarray(rng.integers(0, 256, (14, 14, 3), dtype=np.uint8))
                smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.int16)
                noisy = smooth + rng.integers(-12, 13, smooth.shape, dtype=np.int16)
                picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
                picture.save(place / f"{index:05d}.jpg", quality=90)
    (folder / "done").touch()
    return folder
