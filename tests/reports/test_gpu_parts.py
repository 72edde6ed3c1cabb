"""Every part of `make gpu` in a dry run, and what they import."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch

from ddray.methods import REGISTRY
from reports.gpu import wheels
from reports.gpu.child import part_function
from reports.gpu.lab import Lab, attempts, covered, figure
from reports.gpu.plan import PARTS, Part
from reports.gpu.runner import ROOT

LAB = Lab(torch.device("cpu"), is_tiny=True)
# What a machine with torch and the wheels lacks.
ABSENT = {
    *("ray", "optuna", "pandas", "plotly", "tensorboardX", "matplotlib", "sklearn", "scipy", "pyarrow"),
    *("typer", "rich", "pytest"),
}
BARE = f"""
import sys
from pathlib import Path

class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {ABSENT!r} else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import torch
torch.set_num_threads(1)
from reports.gpu import correctness, steps, wheels
from reports.gpu.lab import Lab
wheels.FOLDER = Path(sys.argv[1])
lab = Lab(torch.device("cpu"), is_tiny=True)
assert lab.digits().fingerprint == sys.argv[2]
correctness.REGISTRY.builtin_names = lambda: ["dm", "dsdm", "kmeans"]
for name, value in (*correctness.devices(lab), *steps.generative(lab)):
    print(name, value)
"""


class Threads:
    """What `multiprocessing.get_context` returns, with threads: a process would import torch."""

    Process, Event = threading.Thread, threading.Event


@pytest.mark.parametrize(
    "part", [part for part in PARTS if part.name != "generative"], ids=lambda part: part.name
)
def test_a_part_measures_figures(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REGISTRY, "builtin_names", lambda: ["datadam", "idm", "random"])
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: Threads)

    figures = dict(part_function(part.name)(LAB))

    failed = {name: value["failed"] for name, value in figures.items() if "failed" in value}
    assert not failed
    for name, value in figures.items():
        assert value.keys() >= {"value", "unit", "std", "n"}, name
    assert any(name.startswith(part.headline) for name in figures), "the README's table has some"


def test_a_bare_machine_needs_only_torch_and_the_wheels(tmp_path: Path) -> None:
    wheels.write_digits(tmp_path / wheels.DIGITS)
    command = [sys.executable, "-c", BARE, str(tmp_path), LAB.digits().fingerprint]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)

    assert done.returncode == 0, done.stderr[-2000:]
    rows = dict(line.split(" {", 1) for line in done.stdout.splitlines())
    assert [name for name, text in rows.items() if "not_run" in text] == ["kmeans"], "it needs scikit-learn"
    assert not [row for row in rows.items() if "failed" in row[1]]
    assert rows.keys() >= {"dm", "dsdm", "krr_st step", "boost_ssdd step", "d3hr step"}


def test_a_case_that_fails_is_a_figure_and_the_next_one_follows() -> None:
    def raises(error: Exception) -> dict[str, dict[str, object]]:
        raise error

    cases = {
        "bad": partial(raises, ValueError("no\nway")),
        "bare": partial(raises, ModuleNotFoundError("No module named 'x'", name="x")),
        "ours": partial(raises, ModuleNotFoundError("No module named 'ddray.y'", name="ddray.y")),
        "good": lambda: {"": figure(1, "s"), "twice": figure(2, "s")},
    }

    figures = dict(attempts(cases))

    assert figures["bad"] == {"failed": "ValueError: no way"}
    assert figures["bare"] == {"not_run": "No module named 'x'"}
    assert figures["ours"] == {"failed": "No module named 'ddray.y'"}
    assert (figures["good"]["value"], figures["good twice"]["value"]) == (1, 2)


@pytest.mark.parametrize(
    ("spans", "length"), [([], 0), ([(0, 2), (1, 3), (1, 2)], 3), ([(0, 1), (4, 6), (4, 5)], 3)]
)
def test_busy_time_counts_overlapping_kernels_once(spans: list[tuple[float, float]], length: float) -> None:
    assert covered(spans) == length
