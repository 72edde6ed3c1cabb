"""Freed memory is reused instead of being mapped anew."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ddray.system.memory import available_bytes

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
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
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
