"""The driver is killed during a search: every trial runs once, nothing finished is run again."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.faults.processes import DDRAY, count, finish, stamps, start, wait_for
from tests.faults.search import arguments, trials

pytestmark = pytest.mark.ray


@pytest.mark.parametrize(
    "signal_number",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),  # in test_nas it runs by default
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("ray_here")
def test_killed_driver_resumes(tmp_path: Path, signal_number: signal.Signals, run_command: Any) -> None:
    run = tmp_path / "run"
    victim = start([*DDRAY, *arguments(run)])
    wait_for(lambda: len(list((run / "ledger").glob("*.json"))) >= 1, victim)
    victim.send_signal(signal_number)
    _, errors = victim.communicate(timeout=120)
    if signal_number != signal.SIGKILL:
        assert victim.returncode == 1
        last = errors.strip().splitlines()[-1]
        assert last.startswith("error:")
        assert "--resume" in last
        assert "Traceback" not in errors
    before = stamps(run)
    assert 1 <= len(before) < 4, "too late: the search was over"
    out = run_command(*arguments(run), "--resume")
    rows = trials(run)
    assert [int(row.spec["number"]) for row in rows] == [0, 1, 2, 3]
    assert out["num_trials"] == 4
    assert out["num_failed"] == 0
    after = stamps(run)
    assert before.items() <= after.items()
    assert all(count(run, "start", key) == 1 for key in before)


def test_memory_and_foreign_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that needs more memory than there is fails after its retries; the others finish.

    The method comes from a user's package, found through its entry point.
    """
    package = tmp_path / "site"
    info = package / "greedy-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: greedy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ddray.methods]\ngreedy = greedy\n")
    (package / "greedy.py").write_text(
        "import torch\n"
        "from ddray.config import Config\n"
        "from ddray.methods.toolkit import initial_images, selection_method\n"
        "class GreedyConfig(Config):\n"
        "    gigabytes: float = 0.0\n"
        "def choose(ctx, config):\n"
        "    block = torch.ones(int(config.gigabytes * 2**28))\n"
        "    return initial_images(ctx, 'random')\n"
        "METHOD = selection_method(GreedyConfig, choose)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(package))
    space = tmp_path / "space.yaml"
    space.write_text("gigabytes: {choice: [0.0, 1.0e+8]}\n")
    run = tmp_path / "run"
    options = ("--method", "greedy", "--ipc", "1", "--strategy", "grid", "--space", str(space))
    quick = ("--set", "evaluate.epochs=2", "--set", "evaluate.seeds=1", "--set", "arch=convnet2_w8")
    out = finish([*DDRAY, "tune", *options, *quick, "--final-sets", "1", "--run-dir", str(run), "--json"])
    rows = trials(run)
    assert [row.status for row in rows] == ["done", "failed"]
    assert "memory" in str(rows[1].error)
    assert count(run, "retry", rows[1].key) == 5, "three processes, each a second time with half the budget"
    assert out["best"]["config"] == {"gigabytes": 0.0}


def test_full_disk_names_the_path_and_leaves_a_resumable_run(tmp_path: Path, run_command: Any) -> None:
    """A file-size limit makes writing the checkpoint really fail."""
    run, out = tmp_path / "run", tmp_path / "out.pt"
    base = [
        *("distill", "--method", "datadam", "--ipc", "1", "--steps", "4", "--set", "checkpoint_every=2"),
        *("--set", "method.batch_real=4", "--run-dir", str(run), "--out", str(out)),
    ]
    limited = ["bash", "-c", f"ulimit -f 8; trap '' XFSZ; exec {' '.join([*DDRAY, *base])}"]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1, done.stderr[-1500:]
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error:")
    assert str(run / "checkpoints") in last
    assert "Traceback" not in done.stderr
    assert not out.exists()
    assert not list(run.rglob("*.tmp"))
    run_command(*base, "--resume")
    assert out.exists()
