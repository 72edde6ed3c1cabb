"""One part, in a process of its own: its figures, each a JSON line as it is measured."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from reports.gpu import record
from reports.gpu.lab import Figures, Lab
from reports.gpu.plan import PARTS


def part_function(name: str) -> Callable[[Lab], Figures]:
    """Return the function that measures a part."""
    module = next(part.module for part in PARTS if part.name == name)
    function: Callable[[Lab], Figures] = getattr(importlib.import_module(f"reports.gpu.{module}"), name)
    return function


def run_part(name: str, device: str, lines: Path) -> int:
    """Measure a part and append its figures; return the exit code."""
    lab = Lab(torch.device("cuda:0" if device == "cuda" else "cpu"), is_tiny=device == "cpu")
    for figure_name, value in part_function(name)(lab):
        record.append(lines, part=name, figure=figure_name, value=value)
        sys.stderr.write(f"{name}: {figure_name}: {value}\n")
    return 0
