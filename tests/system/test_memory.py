"""Freed memory is reused instead of being mapped anew."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from ddray.system import memory
from ddray.system.memory import available_bytes, halved_budget, is_short, memory_budget, parse_bytes

CPU = torch.device("cpu")

_PROBE = """
import resource, sys, torch
from ddray.system.memory import reuse_freed_memory
if sys.argv[1] == "yes":
    reuse_freed_memory()
torch.set_num_threads(1)
def step():
    torch.zeros(2**24).add_(1)  # 64 MiB
for _ in range(6):
    step()
faults = []
for _ in range(11):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(faults)[-2])  # but for the worst step: once in a while the system takes the pages away
"""


def faults(reuse: str) -> int:
    done = subprocess.run([sys.executable, "-c", _PROBE, reuse], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_a_step_maps_no_fresh_pages() -> None:
    without, with_it = faults("no"), faults("yes")
    assert without > 1000, "the probe sees nothing"
    assert with_it < without / 20


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/meminfo")
def test_the_memory_of_a_machine_is_what_is_free_of_it() -> None:
    facts = Path("/proc/meminfo").read_text(encoding="ascii").split("\n")
    total, free = (
        next(int(line.split()[1]) * 1024 for line in facts if line.startswith(name))
        for name in ("MemTotal:", "MemFree:")
    )
    assert 0.5 * free < available_bytes(torch.device("cpu")) < total


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1, 1),
        ("64MiB", 64 * 2**20),
        ("64 mib", 64 * 2**20),
        ("1.5GiB", 3 * 2**29),
        ("2TiB", 2**41),
        ("512 KiB", 2**19),
        ("100B", 100),
        ("123456", 123456),
    ],
)
def test_sizes_are_read_with_their_unit(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1", "0", "0.1B", "64MB", "64 MiBs", "1e9", "nan", True, -5])
def test_what_is_no_size_is_refused(text: str | int) -> None:
    with pytest.raises(ValueError, match="such as 64MiB"):
        parse_bytes(text)


def test_a_budget_is_the_setting_or_a_third_of_the_whole_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "total_bytes", lambda device: 3 * 2**30)

    assert memory_budget(CPU) == 2**30
    assert memory_budget(CPU, 2**20) == 2**20


def test_a_budget_does_not_depend_on_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    before = memory_budget(CPU)
    ballast = torch.ones(2**24)  # 64 MiB
    assert memory_budget(CPU) == before > ballast.numel()
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1)
    assert memory_budget(CPU) == before


def test_a_budget_is_halved_for_a_while() -> None:
    before = memory_budget(CPU)

    with ExitStack() as halved:
        halved.enter_context(halved_budget())
        assert (memory_budget(CPU), memory_budget(CPU, 2**20), is_short()) == (before // 2, 2**19, True)
        for _ in range(100):
            halved.enter_context(halved_budget())
        assert memory_budget(CPU) == 1
    assert (memory_budget(CPU), is_short()) == (before, False)
