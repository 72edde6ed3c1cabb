"""KIP's anchor and its rivals under its own score: `python -m reports.kip` writes kip.jsonl and kip.md.

The authors' notebook, with the kernel of one hidden layer on CIFAR-10 by channel mean and std, without ZCA,
on 100 images with fixed labels, prints test accuracies of 24.3 % at the start, 45.4 % after 100 steps, 46.2 %
after 200 and 46.7 % after 300; ours must end within a point. Random and DM sets are scored by the same
regression.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from reports.scale.lab import Lab, ddray, environments, opened

_RECORD: Final = Path(__file__).resolve().parent / "kip.jsonl"
_KIP: Final = ("--method", "kip", "--preset", "repo", "--set", "method.kernel=fc1")
# Figure -> what is distilled; a seed follows. Of `along`, the sets of every 100th step are scored too.
CIFAR10: Final[Mapping[str, Sequence[object]]] = {
    "kip": (*_KIP, "--dataset", "cifar10", "--ipc", 10, "--steps", 300, "--set", "evaluate.every=100"),
    "random": ("--method", "random", "--dataset", "cifar10", "--ipc", 10),
}
DIGITS: Final[Mapping[str, Sequence[object]]] = {
    "kip": (*_KIP, "--dataset", "digits", "--ipc", 1, "--steps", 500),
    "kip, labels learned": ("--method", "kip", "--dataset", "digits", "--ipc", 1, "--steps", 500),
    "random": ("--method", "random", "--dataset", "digits", "--ipc", 1),
    "dm": ("--method", "dm", "--dataset", "digits", "--ipc", 1),
}
PARTS: Final = {"cifar10": CIFAR10, "digits": DIGITS}
_ANCHOR: Final = {"at_100": 0.454, "at_200": 0.462, "accuracy": 0.467}
_BAR: Final = 0.01


def measure(lab: Lab, part: str, figure: str) -> None:
    """Distil a figure's sets, one per seed, and score them by the kernel; record it unless it is there."""
    if (part, figure) in lab.measured():
        return
    arguments = PARTS[part][figure]
    runs = [
        _run(lab, f"{part}-{figure.replace(', ', '-').replace(' ', '-')}-{seed}", arguments, seed)
        for seed in range(lab.repeats)
    ]
    lab.record(part, figure, " ".join(["ddray distill", *map(str, arguments), "--seed 0.."]), runs)


def _run(lab: Lab, name: str, arguments: Sequence[object], seed: int) -> dict[str, Any]:
    """Return a set's accuracies by the kernel of one hidden layer, and the seconds of its distillation."""
    folder = lab.folder / "runs" / name
    steps = ("--steps", 2) if lab.is_tiny and "random" not in arguments else ()
    shutil.rmtree(folder, ignore_errors=True)  # of a start that was killed
    ran = ddray(lab, "distill", *arguments, *steps, "--seed", seed, "--run-dir", folder)
    sets = {"accuracy": Path(ran.out["artifact"])}
    for path in sorted((folder / "distilled-steps").glob("*.pt")):
        sets[f"at_{int(''.join(filter(str.isdigit, path.stem)))}"] = path
    scores = {each: _score(lab, path) for each, path in sets.items()}
    return {**scores, "seconds": ran.seconds, "seed": seed}


def _score(lab: Lab, path: Path) -> float:
    out = ddray(lab, "evaluate", path, "--protocol", "kernel", "--set", "kernel=fc1").out
    return float(out["results"][0]["accuracy_mean"])


def verdict(measured: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[str]:
    """Return a line for each comparison whose figures are there."""
    lines = []
    anchor = measured.get(("cifar10", "kip"))
    if anchor is not None:
        for name, theirs in _ANCHOR.items():
            if name in anchor["mean"]:
                ours = anchor["mean"][name]
                met = "within" if abs(ours - theirs) <= _BAR else "NOT within"
                lines.append(
                    f"CIFAR-10, {name}: {ours:.2%} against the notebook's {theirs:.1%}, {met} a point"
                )
    for part in PARTS:
        ours_row, random = measured.get((part, "kip")), measured.get((part, "random"))
        if ours_row and random:
            gain = ours_row["mean"]["accuracy"] - random["mean"]["accuracy"]
            lines.append(f"{part}: kip is {100 * gain:.1f} points above random real images")
    return lines


def page(measured: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[str]:
    """Return the lines of kip.md."""
    lines = ["# Measured: KIP by the kernel of one hidden layer", ""]
    lines += [
        "Written by `python -m reports.kip`; do not edit. Test accuracies by protocol `kernel`, means +-"
    ]
    lines += [
        "sample standard deviation over seeds.",
        "",
        "| dataset | set | n | accuracy | along | seconds | command |",
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for (part, figure), row in measured.items():
        along = ", ".join(
            f"step {name.removeprefix('at_')}: {value:.2%}"
            for name, value in row["mean"].items()
            if name.startswith("at_")
        )
        cells = (part, figure, str(row["n"]), _cell(row), along, f"{row['mean']['seconds']:.0f}")
        lines.append("| " + " | ".join(cells) + f" | `{row['command']}` |")
    lines += ["", *(f"- {line}" for line in verdict(measured)), ""]
    return [*lines, *environments(measured), ""]


def _cell(row: Mapping[str, Any]) -> str:
    values = [run["accuracy"] for run in row["runs"]]
    spread = f" +- {statistics.stdev(values):.2%}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2%}{spread}"


def main() -> None:
    """Measure the parts that are named, or all, but for what is recorded."""
    lab, parts = opened("kip", __doc__, _RECORD, list(PARTS))
    for part in parts:
        for figure in PARTS[part]:
            measure(lab, part, figure)
    for line in verdict(lab.measured()):
        print(line)  # noqa: T201
    if not lab.is_tiny:
        lab.lines.with_suffix(".md").write_text("\n".join(page(lab.measured())), encoding="utf-8")


if __name__ == "__main__":
    main()
