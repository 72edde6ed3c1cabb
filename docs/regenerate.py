"""Write docs/methods/<method>.md from the sources: `python docs/regenerate.py`. A test checks them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ddray.commands.methods import description_of, fields_of, summary_of
from ddray.config import Config, merge
from ddray.distillation.method import Target
from ddray.evaluation.options import EvaluateConfig
from ddray.evaluation.published import read_numbers
from ddray.methods import REGISTRY, get_method
from ddray.runs.results import flatten
from ddray.tables.published import find
from ddray.tables.units import Cell

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
_HEAD = "<!-- Written by docs/regenerate.py from the sources; do not edit. -->"


def page(method: str) -> str:
    """Return a method's page."""
    method_type = get_method(method)
    text, _, deviations = description_of(method).partition("**Deviations**")
    budget = bool(getattr(method_type, "uses_budget", False))
    size = "--budget 200" if budget else "--ipc 1"
    sections = [
        f"# {method}",
        _HEAD,
        text.strip(),
        f"```console\n$ ddray distill --method {method} --dataset digits {size}\n"
        f"$ ddray tune --method {method} --dataset digits {size} --num-samples 16\n```",
        *_presets(method, budget),
        *_settings(method_type.config_type),
        *_space(method),
        *_published(method, budget),
    ]
    if deviations:
        sections += ["## Deviations", "Paper, authors' code, ours" + _list(deviations)]
    return "\n\n".join(part for part in sections if part) + "\n"


def _list(deviations: str) -> str:
    """Return the docstring's list of deviations, introduced by its first line."""
    head, _, rest = deviations.partition("\n")
    label = head.strip().strip(":").strip("()")
    named = "" if label in ("", "paper | authors' code | ours") else f" ({label})"
    return f"{named}:\n\n{rest.strip()}" if rest.strip() else f":\n\n- {head.strip(': ')}"


def _target(method: str, budget: bool) -> Target:
    """Return the target that presets are shown for."""
    size = {"budget": 100} if budget else {}
    name, classes = ("cifar100", 100) if budget else ("cifar10", 10)
    return Target(name, (3, 32, 32), classes, 1 if budget else 10, **size)


def _presets(method: str, budget: bool) -> Iterator[str]:
    """Yield a table of the presets' settings."""
    target = _target(method, budget)
    method_type = get_method(method)
    defaults = {
        "evaluate": EvaluateConfig().dump(),
        "pixel_space": "normalized",
        "arch": "auto",
        "method": method_type.config_type().every_value(),
    }
    preset_layers = {name: method_type.preset(name, target) for name in ("paper", "repo")}
    variants = getattr(method_type.config_type, "variants", {})
    preset_layers |= {name: merge(preset_layers["paper"], layer) for name, layer in variants.items()}
    names = sorted({key for one in preset_layers.values() for key in flatten(one)})
    both = {name: flatten(merge(defaults, one)) for name, one in preset_layers.items()}
    where = "CIFAR-100, 100 images of storage" if budget else "CIFAR-10, 10 images per class"
    yield f"## Presets\n\nSettings for {where}."
    titles = "".join(f" `{name}` |" for name in preset_layers)
    lines = [f"| setting |{titles}", "|---" * (1 + len(preset_layers)) + "|"]
    for name in names:
        cells = [f" {_cell(values.get(name))} |" for values in both.values()]
        lines.append(f"| `{name}` |{''.join(cells)}")
    yield "\n".join(lines)


def _settings(config: type[Config], prefix: str = "method.") -> Iterator[str]:
    """Yield a table of the method's own settings."""
    lines = []
    for name, default, meaning in fields_of(config, prefix):
        text = meaning.replace("|", "\\|")
        lines.append(f"| `{name}` | {_cell(default)} | {text} |")
    if lines:
        yield "## Settings"
        yield "\n".join(["| `--set` | default | meaning |", "|---|---|---|", *lines])


def _cell(value: Any) -> str:
    """Return a value as a table cell."""
    if value is None:
        return "-"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"`{text}`"


def _space(method: str) -> Iterator[str]:
    """Yield the search space: the shipped file's, or the settings' own."""
    path = ROOT / "search_spaces" / "hpo" / f"{method}.yaml"
    declared = getattr(get_method(method).config_type, "search_space", None)
    if path.is_file():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        ranges, title = "\n".join(lines).strip(), f"[{path.name}](../../search_spaces/hpo/{path.name})"
    else:
        ranges, title = yaml.safe_dump(dict(declared or {}), sort_keys=False).strip(), "The method's own."
    if ranges and ranges != "{}":
        yield f"## Search space\n\n{title}"
        yield f"```yaml\n{ranges}\n```"


def _published(method: str, budget: bool) -> Iterator[str]:
    """Yield published accuracies under the protocol and on the network that papers mostly use."""
    scores = [("hard", "convnet3"), ("soft", "resnet18"), ("steps", "alexcifar"), ("kernel", "ntk_fc")]
    scores = [("linear", "convnet3")] if budget else scores
    tables = ("\n\n".join(_numbers(method, protocol, arch)) for protocol, arch in scores)
    yield next((table for table in tables if table), "")


def _numbers(method: str, protocol: str, arch: str) -> Iterator[str]:
    """Yield the published accuracies under one protocol."""
    dataset, classes, sizes = ("cifar10", 10, [("ipc", size) for size in (1, 10, 50)])
    if protocol == "linear":
        dataset, classes, sizes = "cifar100", 100, [("budget", size) for size in (25, 100, 1000)]
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
        )
        number = find(read_numbers(), cell)
        if number is not None:
            std = "" if number.std is None else f" +- {number.std}"
            lines.append(f"| {size[0]} {size[1]} | {number.value}{std} | {number.paper}, {number.table} |")
    if lines:
        where = f"Accuracy in percent on {dataset}, {arch}, protocol `{protocol}`"
        yield f"## Published\n\n{where} ([notes](../published.md))."
        yield "\n".join(["| size | published | source |", "|---|---|---|", *lines])


def index(pages: Mapping[str, str]) -> str:
    """Return the list of all pages."""
    lines = ["# Methods", "", _HEAD, "", "| method | summary |", "|---|---|"]
    for method in pages:
        lines.append(f"| [{method}]({method}.md) | {summary_of(method)} |")
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """Return the text of every file below docs/methods, by file name."""
    method_pages = {method: page(method) for method in REGISTRY.builtin_names()}
    return {
        "README.md": index(method_pages),
        **{f"{method}.md": text for method, text in method_pages.items()},
    }


def main() -> None:
    """Write the pages; delete pages of removed methods."""
    folder = HERE / "methods"
    folder.mkdir(exist_ok=True)
    written = pages()
    for path in folder.glob("*.md"):
        if path.name not in written:
            path.unlink()
    for name, text in written.items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
