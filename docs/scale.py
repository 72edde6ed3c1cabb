"""Write the computed tables of docs/scale.md: `python docs/scale.py`. A test checks them.

Nothing is measured here: the figures follow from shapes, from what a forward and a backward pass of the
network save (`groups.image_bytes`), and from the memory budget.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ddray.methods.datadam import attention
from ddray.methods.families.matching.batches import CHUNK_SHARE, chunks
from ddray.methods.families.matching.groups import class_groups, image_bytes
from ddray.nets import Net, build_net, default_arch

PAGE = Path(__file__).resolve().parent / "scale.md"
CLASSES, IMAGES, LARGEST_CLASS = 1000, 1_281_167, 1300  # ImageNet-1K's train
SIZES = (64, 128, 224)
SHARDS = (1, 8, 64)
IPC, BATCH_REAL = 10, 256
GPU_BYTES = 80 * 2**30
BUDGET = GPU_BYTES // 3  # of `memory_budget`, by default
PROCESS = 2**29  # Python and torch
PART = 2**25  # read at a time on the way to a GPU that takes all of a shard's images
TEACHER, TEACHER_BATCH, WORKERS = "resnet18", 256, (1, 8)


@dataclass(frozen=True)
class Shard:
    """What the largest of S shards takes, in bytes."""

    images: int
    learned: int
    step: int
    chunk: int
    tables: int

    @property
    def is_resident(self) -> bool:
        """Whether its real images are on the GPU: they take at most half of it."""
        return 2 * self.images <= GPU_BYTES

    @property
    def device(self) -> int:
        """Of a GPU."""
        return self.learned + self.step + self.images * self.is_resident

    @property
    def ram(self) -> int:
        """Of the memory of a process that computes on a GPU: a checkpoint's copies, two parts of images."""
        copies = 2 * self.learned // 3  # images and momentum, without the gradient
        return PROCESS + copies + self.tables + 2 * (PART if self.is_resident else self.chunk)


def statistics(net: Net, images: Tensor) -> tuple[Tensor, ...]:
    """Return DataDAM's statistics of images [N, C, H, W]: attention maps of all layers but the last."""
    _, embedding, maps = net.features(images)
    return (*(attention(each, 4.0, "l2") for each in maps[:-1]), embedding)


@cache
def per_image(size: int) -> tuple[int, int, int]:
    """Return bytes of an image's largest map, of its pass forward and backward, and of its statistics."""
    net = build_net(default_arch((3, size, size)), (3, size, size), CLASSES, seed=0)
    blank, largest = torch.zeros(2, 3, size, size), max(net.map_bytes())
    both = image_bytes(lambda images: statistics(net, images), blank, largest, net.parameters())
    with torch.no_grad():
        return largest, both, 4 * sum(values.shape[1] for values in statistics(net, blank))


def shard(size: int, num_shards: int) -> Shard:
    """Return what a shard takes of DataDAM with the default network for images of `size` px."""
    classes, pixels = -(-CLASSES // num_shards), 3 * size * size
    largest, both, row = per_image(size)
    group = class_groups(classes, IPC * both, BUDGET)[0]
    rows = classes * BATCH_REAL
    chunk = next(chunks(rows, largest, torch.device("cuda"), BUDGET))
    images = min(IMAGES, classes * LARGEST_CLASS)
    return Shard(
        images=images * pixels,
        learned=3 * 4 * classes * IPC * pixels,  # images, their gradient, its momentum
        step=max((group.stop - group.start) * IPC * both, CHUNK_SHARE * (chunk.stop - chunk.start) * largest)
        + 2 * classes * row,
        chunk=(chunk.stop - chunk.start) * pixels,
        tables=8 * (2 * images + classes * LARGEST_CLASS),  # labels, their order, every class's members
    )


def teacher_bytes(size: int) -> int:
    """Return what an image takes of a teacher's pass forward and backward."""
    net = build_net(TEACHER, (3, size, size), CLASSES, seed=0)
    blank = torch.zeros(2, 3, size, size)
    return image_bytes(net, blank, max(net.map_bytes()), net.parameters())


def gib(size: float) -> str:
    """Return bytes as GiB."""
    return f"{size / 2**30:.3g}" if size < 100 * 2**30 else f"{size / 2**30:.0f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def shard_rows(size: int) -> list[Sequence[str]]:
    """Return the rows of a size: its shards."""
    rows = []
    for num_shards in SHARDS:
        each = shard(size, num_shards)
        where = "GPU" if each.is_resident else "disk, by the batch"
        parts = (IMAGES * 3 * size * size, each.ram, each.images, each.learned, each.step, each.device)
        rows.append((f"{size} px", str(num_shards), *map(gib, parts), where))
    return rows


def tables() -> dict[str, str]:
    """Return the page's tables by name."""
    names = ("disk", "RAM", "real images", "what is learned", "step", "GPU in all", "real images are on the")
    teachers = (
        (f"{size} px", *(gib(teacher_bytes(size) * TEACHER_BATCH / workers) for workers in WORKERS))
        for size in SIZES
    )
    return {
        "shards": table(("size", "shards", *names), [row for size in SIZES for row in shard_rows(size)]),
        "teachers": table(("size", *(f"{n} worker{'s' * (n > 1)}" for n in WORKERS)), teachers),
    }


def written(text: str) -> str:
    """Return the page's text with its tables as they are computed now."""
    for name, lines in tables().items():
        pattern = rf"(<!-- computed: {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda match, lines=lines: f"{match[1]}{lines}\n{match[2]}", text, flags=re.S)
    return text


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
