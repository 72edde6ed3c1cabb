"""reports/cluster.py: what its tables count, and that its measurements run."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def report() -> ModuleType:
    """The script as a module."""
    module_spec = importlib.util.spec_from_file_location("cluster_report", ROOT / "reports" / "cluster.py")
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def test_every_fault_is_a_test(report: ModuleType) -> None:
    test_names = {
        f"{path.stem}.{name}"
        for path in (ROOT / "tests" / "faults").glob("test_*.py")
        for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert report.FAULTS
    assert report.FAULTS.keys() <= test_names


def test_faults_are_counted_and_other_tests_are_not(report: ModuleType) -> None:
    junit = """<testsuites><testsuite>
      <testcase classname="tests.faults.test_bench" name="test_a_killed_driver_resumes[9]"/>
      <testcase classname="tests.faults.test_bench" name="test_a_killed_driver_resumes[15]">
        <failure/></testcase>
      <testcase classname="tests.faults.test_bench.TestWorkers"
        name="test_a_killed_worker_costs_a_retry_and_nothing_else"/>
      <testcase classname="tests.faults.test_trials" name="test_a_finished_search_resumes_without_work"/>
      <testcase classname="tests.faults.test_nas" name="test_killed_driver_resumes[9]"><skipped/></testcase>
    </testsuite></testsuites>"""
    rows = report.fault_rows(junit)
    assert [(row["fault"], row["injected"], row["survived"]) for row in rows] == [
        ("bench: driver killed", 2, 1),
        ("bench: workers killed", 1, 1),
    ]
    assert all(row["lost_work"].startswith("0 finished units") for row in rows)


@pytest.mark.ray
@pytest.mark.usefixtures("no_ray")
def test_scaling_and_simulation_run_small(report: ModuleType, tmp_path: Path) -> None:
    with report.local_ray(num_cpus=2, num_gpus=2):
        plain = report.run_units(tmp_path / "plain", 12, 2)
        crashed = report.run_units(
            tmp_path / "crashed", 12, 2, fails=lambda unit_index: {0: 3, 1: 1}.get(unit_index, 0), gpus=1.0
        )
    assert (plain["units"], plain["failed"], plain["retries"]) == (12, 0, 0)
    assert 0 < plain["units_per_s"] <= 2 / report.UNIT_S * 1.5
    assert (crashed["failed"], crashed["retries"]) == (1, 3)
