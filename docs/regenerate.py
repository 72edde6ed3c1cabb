"""Write docs/methods/<method>.md from the sources: `python docs/regenerate.py`. A test says when to."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ddray.methods
from ddray.bench.spec import Source
from ddray.bench.units import Cell
from ddray.config import Config, merge
from ddray.distill import Target
from ddray.methods import get_method
from ddray.plan import EvaluateConfig
from ddray.report.published import find, read_numbers
from ddray.report.table import flatten

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
_HEAD = "<!-- Written by docs/regenerate.py from the sources; do not edit. -->"


def own_methods() -> list[str]:
    """Return the names of ddray's own methods."""
    found = pkgutil.iter_modules(ddray.methods.__path__)
    return sorted(module.name for module in found if not module.name.startswith("_"))


def page(method: str) -> str:
    """Return a method's page."""
    chosen = get_method(method)
    module = importlib.import_module(f"ddray.methods.{method}")
    text, _, deviations = (module.__doc__ or "").strip().partition("**Deviations**")
    budget = bool(getattr(chosen, "uses_budget", False))
    size = "--budget 200" if budget else "--ipc 1"
    parts = [
        f"# {method}",
        _HEAD,
        text.strip(),
        f"```console\n$ ddray distill --method {method} --dataset digits {size}\n"
        f"$ ddray tune --method {method} --dataset digits {size} --num-samples 16\n```",
        *_presets(method, budget),
        *_settings(chosen.config_type),
        *_space(method),
        *_published(method, budget),
    ]
    if deviations:
        parts += ["## Deviations", "Paper, authors' code, ours" + _list(deviations)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _list(deviations: str) -> str:
    """Return the docstring's list with its head as the sentence before it."""
    head, _, rest = deviations.partition("\n")
    wanted = head.strip().strip(":").strip("()")
    named = "" if wanted in ("", "paper | authors' code | ours") else f" ({wanted})"
    return f"{named}:\n\n{rest.strip()}" if rest.strip() else f":\n\n- {head.strip(': ')}"


def _target(method: str, budget: bool) -> Target:
    """Return what presets are shown for."""
    more = {"budget": 100} if budget else {}
    name, classes = ("cifar100", 100) if budget else ("cifar10", 10)
    return Target(name, (3, 32, 32), classes, 1 if budget else 10, **more)


def _presets(method: str, budget: bool) -> Iterator[str]:
    """Yield what the presets set."""
    target = _target(method, budget)
    chosen = get_method(method)
    shown = {
        "evaluate": EvaluateConfig().dump(),
        "pixel_space": "normalized",
        "arch": "auto",
        "method": chosen.config_type().dump(),
    }
    held = {name: chosen.preset(name, target) for name in ("paper", "repo")}
    names = sorted({key for one in held.values() for key in flatten(one)})
    both = {name: flatten(merge(shown, one)) for name, one in held.items()}
    where = "CIFAR-100, 100 images of storage" if budget else "CIFAR-10, 10 images per class"
    yield f"## Presets\n\nWhat they set for {where}."
    lines = ["| setting | `paper` | `repo` |", "|---|---|---|"]
    for name in names:
        cells = [_cell(both[preset].get(name)) for preset in ("paper", "repo")]
        lines.append(f"| `{name}` | {cells[0]} | {cells[1]} |")
    yield "\n".join(lines)


def _settings(config: type[Config], prefix: str = "method.") -> Iterator[str]:
    """Yield a table of the method's own settings."""
    lines = list(_fields(config, prefix))
    if lines:
        yield "## Settings"
        yield "\n".join(["| `--set` | default | what |", "|---|---|---|", *lines])


def _fields(config: type[Config], prefix: str) -> Iterator[str]:
    for name, field in config.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Config):
            yield from _fields(kind, f"{prefix}{name}.")
            continue
        default = field.get_default(call_default_factory=True)
        what = " ".join((field.description or "").split()).replace("|", "\\|")
        yield f"| `{prefix}{name}` | {_cell(default)} | {what} |"


def _cell(value: Any) -> str:
    """Return a value for a table."""
    if value is None:
        return "-"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"`{text}`"


def _space(method: str) -> Iterator[str]:
    """Yield the shipped search space."""
    path = ROOT / "search_spaces" / "hpo" / f"{method}.yaml"
    if path.is_file():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        held = "\n".join(lines).strip()
        if held and held != "{}":
            yield f"## Search space\n\n[{path.name}](../../search_spaces/hpo/{path.name})"
            yield f"```yaml\n{held}\n```"


def _published(method: str, budget: bool) -> Iterator[str]:
    """Yield published accuracies on the network that the method is mostly scored with."""
    dataset, classes, sizes = ("cifar10", 10, [("ipc", size) for size in (1, 10, 50)])
    protocol, arch = "hard", "convnet3"
    if budget:
        dataset, classes, sizes = "cifar100", 100, [("budget", size) for size in (25, 100, 1000)]
        protocol = "linear"
    if method in ("d3hr", "rded", "sre2l"):
        protocol, arch = "soft", "resnet18"
    lines = []
    for size in sizes:
        cell = Cell(
            method=method,
            name=method,
            dataset=dataset,
            num_classes=classes,
            size=size,
            protocol=protocol,
            arch=arch,
            target=dataset,
            teacher="resnet18" if protocol == "soft" else None,
            augment=None,
            settings=None,
            keys=(),
            source=Source(),
        )
        number = find(read_numbers(), cell)
        if number is not None:
            std = "" if number.std is None else f" +- {number.std}"
            lines.append(f"| {size[0]} {size[1]} | {number.value}{std} | {number.paper}, {number.table} |")
    if lines:
        where = f"Accuracy in percent on {dataset}, {arch}, protocol `{protocol}`"
        yield f"## Published\n\n{where} ([notes](../published.md))."
        yield "\n".join(["| size | published | where |", "|---|---|---|", *lines])


def index(pages: Mapping[str, str]) -> str:
    """Return the list of all pages."""
    lines = ["# Methods", "", _HEAD, "", "| method | what |", "|---|---|"]
    for method in pages:
        text = importlib.import_module(f"ddray.methods.{method}").__doc__ or ""
        what = re.sub(r"^[^:]{1,40}: ", "", text.strip().split("\n")[0])
        lines.append(f"| [{method}]({method}.md) | {what} |")
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """Return every file's text by its name below docs/methods."""
    held = {method: page(method) for method in own_methods()}
    return {"README.md": index(held), **{f"{method}.md": text for method, text in held.items()}}


def main() -> None:
    """Write the pages; remove those of methods that are gone."""
    folder = HERE / "methods"
    folder.mkdir(exist_ok=True)
    made = pages()
    for path in folder.glob("*.md"):
        if path.name not in made:
            path.unlink()
    for name, text in made.items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
