"""The main finding of each part (reports/<part>.json), in a sentence that is made of its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ddray.drawing.text import listed, percent_short, size_of
from ddray.evaluation.published import read_numbers
from ddray.ranking.figures_of_merit import TOO_FEW, is_telling
from ddray.system.grouping import grouped
from ddray.tables.table import is_tied

Part = Mapping[str, Any]


def accuracies(part: Part) -> str:
    """Name the best method beside random images, and methods whose numbers are the same."""
    rows = {row["method"]: row for row in part["rows"]}
    best = max(rows.values(), key=lambda row: row["mean"])
    text = f"`{best['method']}` is best with {percent_short(best['mean'])} %"
    text += "".join(
        f", {words} {percent_short(rows[name]['mean'])} %"
        for name, words in (("class_mean", "a class's mean image reaches"), ("random", "random images"))
        if name in rows and name != best["method"]
    )
    equal = [name for name, row in rows.items() if [r["mean"] for r in rows.values()].count(row["mean"]) > 1]
    return text + (f"; {listed(equal)} tie exactly." if equal else ".")


def published(method: str) -> str:
    """Return a method's published CIFAR-10 ipc 1 accuracy on ConvNet-3."""
    for number in read_numbers():
        at = (number.method, number.dataset, number.ipc, number.arch, number.metric, number.setting)
        if at == (method, "cifar10", 1, "convnet3", "top1_accuracy", ""):
            return f"{number.value} ± {number.std} ({number.paper}, {number.table})"
    return "-"


def cifar10(part: Part) -> str:
    """Say the same of CIFAR-10, with the best method's published number."""
    method = max(part["rows"], key=lambda row: row["mean"])["method"].split()[0].rstrip(",")
    return f"{accuracies(part)} Published for {method}, at the paper's scale: {published(method)}."


def search(part: Part) -> str:
    """Say what the search gained over the preset, and whether that is more than the spread."""
    result, preset = part["result"], part["result"]["paper_point"]
    gain = result["test_accuracy_mean"] - preset["test_accuracy_mean"]
    spread = math.hypot(result["test_accuracy_std"], preset["test_accuracy_std"])
    end = "within the spread: no improvement is shown" if gain < spread else "more than the spread"
    return f"{result['num_trials']} trials gain {100 * gain:.1f} points over the preset on test, {end}."


def ranking(part: Part) -> str:
    """Name the best proxy, how many others can't be told from it, and how many say nothing."""
    proxies = [row for row in part["result"]["proxies"] if row["spearman_ci95"] is not None]
    rows = [row for row in proxies if is_telling(row, "spearman")]
    if not rows:
        return f"{part['result']['num_archs']} architectures: {TOO_FEW}."
    best = max(rows, key=lambda row: row["spearman"])
    low, high = best["spearman_ci95"]
    others = sum(row["spearman_ci95"][1] >= low for row in rows) - 1
    nothing = sum(row["spearman_ci95"][0] <= 0 <= row["spearman_ci95"][1] for row in rows)
    text = "No proxy is clearly best: " if others else ""
    text += f"{proxy(best)} leads with Spearman {best['spearman']:.2f} [{low:.2f}, {high:.2f}]"
    text += f", and the intervals of {others} of the {len(rows) - 1} others reach its own" if others else ""
    text += f"; {nothing} of all {len(rows)} include 0" if nothing else ""
    most: dict[float, float] = {}
    for row in rows:
        images = row["storage_images"]
        most[images] = max(row["spearman"], most.get(images, -1.0))
    sizes = [f"{value:.2f} with {images:,.0f} images" for images, value in sorted(most.items())]
    return f"{text}. At most {listed(sizes)}." if len(sizes) > 1 else f"{text}."


def proxy(row: Mapping[str, Any]) -> str:
    """Return a proxy's name without its file's ending."""
    return str(row["proxy"]).replace(".pt", "")


def column_of(cell: Mapping[str, Any], several_datasets: bool) -> str:
    """Return the column of a bench's cell: size, protocol, target, and dataset where there are several."""
    target = f" on {cell['target']}" if cell.get("target") else ""
    dataset = f"{cell['dataset']}, " if several_datasets else ""
    return f"{dataset}{size_of(cell)}, `{cell.get('protocol', 'hard')}`{target}"


def winners(cells: Iterable[Mapping[str, Any]], column: Callable[[Mapping[str, Any]], str]) -> str:
    """Name the columns that each method is best in, beside random images and what is within its error."""
    wins: dict[str, list[str]] = {}
    for name, rows in grouped(cells, column).items():
        best = max(rows, key=lambda cell: cell["accuracy_mean"])
        text = f"{percent_short(best['accuracy_mean'])} %"
        equal = sum(is_tied(cell, best) for cell in rows) - 1
        text += f", {equal} other{'s' * (equal > 1)} within its error" if equal else ""
        baseline = next((cell for cell in rows if str(cell["method"]).startswith("random")), best)
        if baseline is not best:
            text += f", {baseline['method']} {percent_short(baseline['accuracy_mean'])}"
        wins.setdefault(str(best["method"]), []).append(f"{name} ({text})")
    return "; ".join(f"**{method}** is best at {listed(names)}" for method, names in wins.items()) + "."


def bench(part: Part) -> str:
    """Name the best method of each column of a table."""
    several = len({cell["dataset"] for cell in part["cells"]}) > 1
    return winners(part["cells"], lambda cell: column_of(cell, several))


def leaderboard(part: Part) -> str:
    """Name the best method of each dataset and size."""
    cells = [cell for cell in part["cells"] if cell["protocol"] == "hard"]
    return winners(cells, lambda cell: f"{cell['dataset']} ipc {cell['ipc']}")


def benchmarks(parts: Iterable[Part]) -> str:
    """Count the bars that were met."""
    rows = [row for part in parts for row in part["rows"]]
    return f"{sum(row['bar'] == 'met' for row in rows)} of {len(rows)} bars are met."


def scaling(part: Part) -> str:
    """Say how near the fan-out comes to as many times the speed as there are workers."""
    last = part["rows"][-1]
    return f"{last['workers']} workers do {last['speedup']:.2f} times the work of one."


def simulation(part: Part) -> str:
    """Say whether every unit was published once."""
    times = "exactly once" if part["exactly_once"] else "NOT exactly once"
    return f"Of {part['units']:,} units on {part['workers']} workers that crash, each is published {times}."


def faults(part: Part) -> str:
    """Count the faults that were survived."""
    injected, survived = (sum(row[name] for row in part["rows"]) for name in ("injected", "survived"))
    return f"{survived} of {injected} injected faults are survived."
