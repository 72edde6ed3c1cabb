"""`make gpu`: measure on this machine's GPU what only a GPU can show. See docs/gpu.md.

python3 -m reports.gpu [--plan | --wheels | --table] [--parts a,b] [--out FOLDER] [--device cpu]

Without a GPU it says so in one line, writes nothing and exits with 0. Standard library only: parts, which
need torch, run in processes of their own.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reports.gpu import record, table, wheels
from reports.gpu.plan import MINUTES, PARTS, Part, described, parts_called
from reports.gpu.runner import ROOT, NoGpuError, Run, probe

REPORTS = ROOT / "reports"
_PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; return the exit code."""
    options = _options(arguments)
    if options.part:
        _end_with_parent()
        from reports.gpu.child import run_part

        return run_part(options.part, options.device, options.lines)
    try:
        parts = parts_called(options.parts)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if options.plan:
        print(described(parts))  # noqa: T201
    elif options.wheels:
        print(f"{wheels.fetch() / 2**20:.0f} MiB in {wheels.FOLDER.relative_to(ROOT)}")  # noqa: T201
    elif options.table:
        table.write(ROOT / "README.md", json.loads((REPORTS / "gpu.json").read_text(encoding="utf-8")))
    else:
        return _measure(parts, options)
    return 0


def _end_with_parent() -> None:
    """Let this process be killed when the one that started it is: nobody else would keep its limit."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python3 -m reports.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--plan", action="store_true", help="print the parts and their minutes")
    parser.add_argument("--wheels", action="store_true", help="fetch what a machine without a network lacks")
    parser.add_argument("--table", action="store_true", help="write README's table from reports/gpu.json")
    parser.add_argument("--parts", default="", metavar="A,B", help="only these")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together")
    parser.add_argument("--out", type=Path, help="folder of gpu.json and gpu.jsonl; default reports/")
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: a dry run that measures nothing",
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _measure(parts: Sequence[Part], options: argparse.Namespace) -> int:
    """Run the parts, writing the report after each; return the exit code."""
    ends_at = time.monotonic() + 60 * options.minutes
    is_dry_run = options.device == "cpu"
    out = options.out or (ROOT / "build" / "gpu" if is_dry_run else REPORTS)
    with tempfile.TemporaryDirectory(prefix="ddray-gpu-") as scratch:
        environment = _environment(Path(scratch), is_dry_run)
        try:
            machine = probe(environment, is_dry_run=is_dry_run)
        except NoGpuError as error:
            sys.stderr.write(f"no GPU here, nothing measured: {error}\n")
            return 0
        machine["command"] = " ".join(["python3 -m reports.gpu", *(sys.argv[1:])])
        out.mkdir(parents=True, exist_ok=True)
        lines, path = out / "gpu.jsonl", out / "gpu.json"
        lines.unlink(missing_ok=True)
        earlier = _earlier(path)
        command = [sys.executable, "-m", "reports.gpu", "--device", options.device, "--lines", str(lines)]
        run = Run([*command, "--part"], lines, environment, ends_at)
        record.write(path, record.assembled([], parts, machine, earlier))
        for part in parts:
            run.part(part)
            record.write(path, report := record.assembled(record.read(lines), parts, machine, earlier))
            result = report["parts"][part.name]
            sys.stderr.write(f"{part.name}: {result['status']} {result['reason']} ({result['seconds']} s)\n")
    if out == REPORTS:
        table.write(ROOT / "README.md", report)
    statuses = [report["parts"][part.name]["status"] for part in parts]
    print(f"{statuses.count('ok')} of {len(parts)} parts ended well; figures: {path}")  # noqa: T201
    return 0 if statuses.count("ok") == len(parts) else 1


def _environment(scratch: Path, is_dry_run: bool) -> dict[str, str]:
    """Return the environment of parts: this checkout, the wheels that are missing, a pool of their own."""
    threads = {"GOMP_SPINCOUNT": "1000", **({"OMP_NUM_THREADS": "1"} if is_dry_run else {})}
    site = scratch / "site"
    wheels.unpack(site)
    path = os.pathsep.join(filter(None, (str(ROOT), str(site), os.environ.get("PYTHONPATH", ""))))
    (scratch / "home").mkdir()
    return {**os.environ, **threads, "PYTHONPATH": path, "DDRAY_HOME": str(scratch / "home")}


def _earlier(path: Path) -> dict[str, Any] | None:
    """Return the report that is there, or the repository's; None if there is none that can be read."""
    for candidate in (path, REPORTS / "gpu.json"):
        try:
            report: dict[str, Any] = json.loads(candidate.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if report.keys() >= {"parts", "measured"} and report["parts"].keys() == {part.name for part in PARTS}:
            return report
    return None


if __name__ == "__main__":
    sys.exit(main())
