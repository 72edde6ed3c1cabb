"""Overheads: start of the command line, and time and memory per trial."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ddray.runs.ledger import Ledger
from tests.faults.search import search

pytestmark = pytest.mark.benchmark


def test_help_is_light(figures: dict[str, Any]) -> None:
    """Bar: `ddray --help` < 1 s."""
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "ddray", "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - begin)
    figures.update({"seconds": min(times)})
    assert min(times) < 1.0, times


@pytest.mark.ray
def test_overhead_per_trial(figures: dict[str, Any], tmp_path: Path) -> None:
    """Bar: < 0.3 s between the work of two trials, without Ray's start."""
    run = tmp_path / "run"
    layers = {"steps": 0, "evaluate": {"epochs": 1, "seeds": 1}, "method": {"batch_real": 4}}
    search(
        run,
        "lr_img: {loguniform: [0.1, 1.0]}",
        num_samples=20,
        strategy="random",
        max_concurrent=1,
        layers=layers,
    )
    rows = {row.key: row for row in Ledger(run).rows("trial")}
    assert len(rows) == 20
    times: dict[str, dict[str, float]] = {"start": {}, "finish": {}}
    for event in Ledger(run).events():
        if event["key"] in rows and event["event"] in times:
            times[event["event"]][event["key"]] = event["time"]
    order = sorted(times["finish"].values())
    # The first trial includes the worker's imports, so it is not counted.
    total_seconds = order[-1] - order[0]
    trial_seconds = sum(
        times["finish"][key] - times["start"][key] for key in rows if times["finish"][key] > order[0]
    )
    overhead = (total_seconds - trial_seconds) / (len(rows) - 1)
    figures.update({"overhead_seconds": overhead})
    assert overhead < 0.3, overhead


_MEMORY = """
import sys, torch
from pathlib import Path
from ddray.data import PixelSpace, Split
from ddray.jobs.plan import resolve
from ddray.runs.ledger import Ledger
from ddray.tuning.payload import pack
from ddray.tuning.trial import run_trial
from ddray.tuning.worker import SearchJob
from tests.benchmarks.conftest import random_dataset
dataset = random_dataset(10, 4500, name="cifar10")
plan = resolve("datadam", dataset, ipc=1, layers=[{"steps": 2, "evaluate": {"epochs": 2, "seeds": 1}}])
assert plan.config.pixel_space == "zca" and plan.config.method.batch_real == 256
space = PixelSpace("zca", (), (), torch.zeros(3072), torch.eye(3072))
train = dataset.train()
payload = pack(dataset, train, "train-val0", Split(train.images[:5000], train.labels[:5000]), space)
run = Path(sys.argv[1]); Ledger(run).open_epoch()
job = SearchJob(str(run), 1, "datadam", 1, 0, plan.config.dump(), (1,), 1.0, 0.0)
run_trial(job, payload, 0, {}, print)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("PEAK", int(peak.split()[1]) / 2**20)
"""


def test_memory_of_a_cifar10_trial(figures: dict[str, Any], tmp_path: Path) -> None:
    """Bar: < 2.5 GiB for a whitened trial at CIFAR-10's size, including its payload."""
    run = tmp_path / "run"
    run.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY, str(run)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-1500:]
    peak = float(done.stdout.rsplit("PEAK", 1)[1])
    figures.update({"peak_gib": peak})
    assert peak < 2.5, peak
