"""The parts of `make gpu` in their order, most important first, and how long each may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One part, run in a process of its own.

    Attributes:
        name: for `--parts`.
        title: for people.
        seconds: after which it is killed.
        module: module of this package with a function called `name`.
        headline: beginnings of the names of the figures that the README's table has.
    """

    name: str
    title: str
    seconds: int
    module: str
    headline: tuple[str, ...] = ()


PARTS = (
    Part("devices", "devices, and waits for the device in steady steps", 70, "correctness", ("steps that",)),
    Part("parity", "losses and images of the GPU beside the CPU's", 50, "correctness", ("largest",)),
    Part("nas", "NAS training: graph against eager, fused against loop", 55, "networks", ("convnet3_bn",)),
    Part("steps", "distillation steps at 32 px, 10 images per class", 65, "steps", ("",)),
    Part("precisions", "eager against compiled against bfloat16", 80, "steps", ("",)),
    Part("evaluation", "training networks on a set: one by one, and as ddray does it", 40, "networks", ("",)),
    Part("groups", "D3HR's group sampling of 1,000,000 candidates", 30, "sampling", ("",)),
    Part("generative", "self-supervised and diffusion steps", 50, "steps", ("",)),
    Part("memory", "out of memory: smaller groups until a step fits", 35, "memory", ("",)),
    Part("pair", "two processes on one GPU", 30, "memory", ("dm both",)),
    Part("grid", "24 architectures of 400 steps, projected to all 720", 65, "networks", ("720",)),
)
MINUTES = 11
"""What all parts together may take, with their starts."""


def parts_called(names: str) -> list[Part]:
    """Return the parts called `names`, joined by commas, in the plan's order; empty: all.

    Raises:
        ValueError: there is no such part.
    """
    selected = [name.strip() for name in names.split(",") if name.strip()]
    if unknown := sorted({*selected} - {part.name for part in PARTS}):
        raise ValueError(f"no part {', '.join(unknown)}; there are {', '.join(part.name for part in PARTS)}")
    return [part for part in PARTS if not selected or part.name in selected]


def described(parts: Sequence[Part]) -> str:
    """Return the plan as lines, with the minutes."""
    width = max(len(part.name) for part in parts)
    lines = [
        f"{number:>2}. {part.name:<{width}} at most {part.seconds:>2} s  {part.title}"
        for number, part in enumerate(parts, 1)
    ]
    total = sum(part.seconds for part in parts) / 60
    return "\n".join([*lines, f"all: at most {total:.1f} minutes"])
