"""`make gpu` without a GPU: limits, lines, the report, the table, the wheels."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reports.gpu import record, table, wheels
from reports.gpu.plan import MINUTES, PARTS, described, parts_called
from reports.gpu.runner import ROOT, NoGpuError, Run, probe

MACHINE = {"device": "a GPU", "torch": "2.11.0", "driver": "580", "date": "2026-11-29T08:00:00+00:00"}
HANGS, FAILS, WORKS = PARTS[:3]
# The three parts: one that hangs with a process of its own, one that fails, one that works.
SCRIPT = f"""
import json, subprocess, sys, time
name, lines = sys.argv[2], sys.argv[1]
LATE = f"import time; time.sleep(1.5); open({{lines + '.late'!r}}, 'w')"
def figure(value):
    measured = dict(value=value, unit="s", std=None, n=1)
    with open(lines, "a") as file:
        print(json.dumps(dict(part=name, figure="seen", value=measured)), file=file)
if name == {HANGS.name!r}:
    figure(1)
    subprocess.Popen([sys.executable, "-c", LATE])
    time.sleep(60)
if name == {FAILS.name!r}:
    sys.exit("ImportError: something is missing")
figure(3)
"""


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """File of the JSON lines."""
    return tmp_path / "gpu.jsonl"


def run_parts(lines: Path, seconds: float = 60) -> list[dict[str, Any]]:
    command = [sys.executable, "-S", "-c", SCRIPT, str(lines)]
    run = Run(command, lines, dict(os.environ), time.monotonic() + seconds)
    for part in (replace(HANGS, seconds=1), FAILS, WORKS):
        run.part(part)
    return record.read(lines)


def test_a_part_that_hangs_is_killed_with_what_it_started_and_the_next_ones_run(lines: Path) -> None:
    begin = time.monotonic()
    rows = run_parts(lines)
    assert time.monotonic() - begin < 15

    report = record.assembled(rows, PARTS[:3], MACHINE)
    hanging, failing, working = (report["parts"][part.name] for part in PARTS[:3])
    assert (hanging["status"], hanging["reason"]) == ("timeout", "killed after 1 s")
    assert hanging["figures"]["seen"]["value"] == 1, "what was measured before stays"
    assert (failing["status"], failing["reason"]) == ("failed", "ImportError: something is missing")
    assert (working["status"], working["figures"]["seen"]["value"]) == ("ok", 3)
    time.sleep(max(0.0, 2.5 - (time.monotonic() - begin)))
    assert not Path(f"{lines}.late").exists(), "a process that the part had started lives on"


def test_without_time_a_part_is_not_begun(lines: Path) -> None:
    rows = run_parts(lines, seconds=0)

    assert {row["status"] for row in rows} == {"not run"}
    assert rows[1]["reason"] == f"0 s were left, it may take {FAILS.seconds}"


def test_the_report_is_whole_wherever_a_kill_cuts_the_lines(lines: Path) -> None:
    value = {"value": 1.5, "unit": "ms", "std": None, "n": 1}
    record.append(lines, part=HANGS.name, figure="one", value=value)
    record.append(lines, part=HANGS.name, status="ok", reason="", seconds=1.0, date="now")
    record.append(lines, part=FAILS.name, figure="two", value=value)
    written = lines.read_bytes()

    for end in range(len(written) + 1):
        lines.write_bytes(written[:end])
        report = record.assembled(record.read(lines), PARTS, MACHINE)
        assert report["parts"].keys() == {part.name for part in PARTS}
        assert all(result["status"] == "ok" or result["reason"] for result in report["parts"].values())
    assert report["parts"][HANGS.name]["status"] == "ok"
    assert report["parts"][FAILS.name]["status"] == "timeout", "its figure is there, its end is not"
    assert report["parts"][WORKS.name]["status"] == "not run"


def processes_of(folder: Path) -> list[str]:
    """Return the processes whose command names a folder."""
    running = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in path.read_bytes():
                running.append(path.parent.name)
    return running


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="Linux ends processes with their parent")
def test_a_killed_run_leaves_its_report_and_no_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "reports.gpu", "--device", "cpu", "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True)
    path = tmp_path / "gpu.json"
    try:
        while not path.is_file():
            assert process.poll() is None, "the run ended first"
            time.sleep(0.05)
        time.sleep(0.5)
    finally:
        process.kill()
        process.communicate(timeout=20)

    end = time.monotonic() + 10
    while processes_of(tmp_path):
        assert time.monotonic() < end, "a part lives on"
        time.sleep(0.1)
    report = json.loads(path.read_text())
    assert {result["status"] for result in report["parts"].values()} == {"not run"}
    assert not report["measured"]


def test_a_figure_that_failed_fails_its_part(lines: Path) -> None:
    record.append(lines, part=HANGS.name, figure="good", value={"value": 1, "unit": "s", "std": None, "n": 1})
    record.append(lines, part=HANGS.name, figure="bad", value={"failed": "InputError: no such option"})
    record.append(lines, part=HANGS.name, status="ok", reason="", seconds=1.0, date="now")

    result = record.assembled(record.read(lines), PARTS, MACHINE)["parts"][HANGS.name]

    assert (result["status"], result["reason"]) == ("failed", "1 of 2: bad: InputError: no such option")


def measured(lines: Path, part_name: str, machine: dict[str, Any]) -> dict[str, Any]:
    lines.unlink(missing_ok=True)
    value = {"value": 2.0, "unit": "ms", "std": 0.25, "n": 5}
    record.append(lines, part=part_name, figure="dm step", value=value)
    record.append(lines, part=part_name, status="ok", reason="", seconds=1.0, date="now")
    return record.assembled(record.read(lines), parts_called(part_name), machine)


def test_a_run_of_some_parts_keeps_the_others_of_the_same_device(lines: Path) -> None:
    earlier = measured(lines, "steps", MACHINE)
    rows: list[dict[str, Any]] = []

    same = record.assembled(rows, parts_called("nas"), MACHINE, earlier)
    other = record.assembled(rows, parts_called("nas"), {**MACHINE, "device": "another"}, earlier)

    assert same["parts"]["steps"]["status"] == "ok"
    assert same["parts"]["nas"]["status"] == "not run"
    assert other["parts"]["steps"]["status"] == "not run"


def test_the_table_has_every_part_and_says_what_did_not_run(lines: Path) -> None:
    text = table.table(measured(lines, "steps", MACHINE))

    assert "a GPU, torch 2.11.0, driver 580, 2026-11-29" in text
    assert "| dm step: 2 ± 0.25 ms (5) | ok |" in text
    assert text.count("not run") == len(PARTS) - 1


def test_the_pages_table_is_that_of_the_stored_report() -> None:
    report = json.loads((ROOT / "reports/gpu.json").read_text(encoding="utf-8"))
    page = (ROOT / "README.md").read_text(encoding="utf-8")

    assert f"{table.BEGIN}\n{table.table(report)}\n{table.END}" in page
    assert report["measured"] or "Nothing has been measured on a GPU yet" in page
    assert not report.get("is_dry_run")


def test_the_plan_fits_its_minutes_and_names_parts() -> None:
    assert sum(part.seconds for part in PARTS) / 60 <= MINUTES - 1, "a minute for the starts"
    assert described(PARTS).splitlines()[-1] == "all: at most 9.5 minutes"
    assert [part.name for part in parts_called("steps, devices")] == ["devices", "steps"]
    with pytest.raises(ValueError, match="no part speed; there are devices"):
        parts_called("speed")


def test_make_prints_the_plan_and_says_that_there_is_no_gpu() -> None:
    before = (ROOT / "reports/gpu.json").read_bytes()
    python = f"PYTHON={sys.executable}"
    # Not as a part of the make that runs these tests, which would name its folders.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    environment["CUDA_VISIBLE_DEVICES"] = ""

    def make(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["make", *args], cwd=ROOT, capture_output=True, text=True, env=environment)

    planned, done = make("-n", "gpu", python), make("gpu", python, "VENV=absent")

    assert "all: at most 9.5 minutes" in planned.stdout
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (0, "", 1), done.stderr
    assert done.stderr.startswith("no GPU here, nothing measured: torch ")
    assert (ROOT / "reports/gpu.json").read_bytes() == before


def test_without_torch_there_is_no_gpu(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")

    with pytest.raises(NoGpuError, match="ImportError: no torch here"):
        probe({**os.environ, "PYTHONPATH": str(tmp_path)})


def test_only_wheels_that_are_missing_or_too_old_are_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheels, "WHEELS", ("pydantic>=2.12", "pyyaml>=99.0", "absent-package>=1.0"))
    for name in ("pydantic-99.0-py3", "PyYAML-99.1-cp312", "absent_package-1.0-py3"):
        with zipfile.ZipFile(tmp_path / f"{name}-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name.split('-')[0]}/__init__.py", "")

    assert wheels.unpack(tmp_path / "site", tmp_path) == ["pyyaml", "absent-package"]
    assert sorted(path.name for path in (tmp_path / "site").iterdir()) == ["PyYAML", "absent_package"]
