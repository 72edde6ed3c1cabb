"""`ddray evaluate --max-concurrent 2` against one network after another, a thread each."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

import ddray
from ddray.jobs.distill import distill
from ddray.jobs.plan import resolve
from ddray.runs.ledger import Ledger

pytestmark = [pytest.mark.benchmark, pytest.mark.slow, pytest.mark.ray]  # two minutes
NUM_NETWORKS, EPOCHS = 4, 300


def test_two_networks_at_a_time(digits: Any, tmp_path: Path, ray_here: None, figures: dict[str, Any]) -> None:
    """Bar: >= 1.7x on 2 cores, the start of the workers included (Ray itself is running); equal numbers."""
    plan = resolve("random", digits, ipc=10, layers=[{"arch": "convnet3", "compile": "off"}])
    distill(plan, device=torch.device("cpu"), run_dir=tmp_path / "random", out=tmp_path / "set.pt")
    options: dict[str, Any] = {"seeds": NUM_NETWORKS, "epochs": EPOCHS, "device": "cpu"}
    torch.set_num_threads(1)

    def seconds(**how: Any) -> tuple[float, list[float]]:
        begin = time.perf_counter()
        result = ddray.evaluate(tmp_path / "set.pt", **options, **how)
        return time.perf_counter() - begin, result.results[0].per_seed

    one_by_one_s, expected = seconds()
    parallel_s, per_seed = seconds(max_concurrent=2, run_dir=tmp_path / "scores")

    rows = Ledger(tmp_path / "scores").rows("evaluate")
    ratio = one_by_one_s / parallel_s
    longest = max(row.wall_s for row in rows)
    figures.update(
        {"ratio": ratio, "one_by_one_s": one_by_one_s, "parallel_s": parallel_s, "network_s": longest}
    )
    assert per_seed == expected
    assert ratio >= 1.7, (one_by_one_s, parallel_s)
