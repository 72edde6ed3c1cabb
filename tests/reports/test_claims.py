"""reports/claims: a part is recorded once, and the page has every comparison."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reports import claims
from reports.scale.lab import Lab

CLAIM = {
    **{"say": "DM beats random images", "better": "dm", "worse": "random", "dataset": "digits"},
    **{"size": "ipc 1", "protocol": "hard", "arch": "convnet3", "verdict": "holds", "effect": 0.2},
    **{"ci95": [0.1, 0.3], "p": 0.01, "p_unadjusted": 0.005, "n": 5, "networks": 3, "accuracy": [0.9, 0.7]},
    **{"budget": {"dm": "steps 10 of 150", "random": "preset"}, "device_hours": 0.5},
    **{"paper": "datadam", "where": "Table 3"},
}
CELL = {
    **{"method": "dm", "protocol": "hard", "n": 15, "num_sets": 5, "sets": []},
    **{"accuracy_mean": 0.9, "accuracy_std": 0.01},
    "along": [{"step": 10, "accuracy_mean": 0.85}, {"step": 20, "accuracy_mean": 0.9}],
}
ENVIRONMENT = {
    **{"processor": "CPU", "cpu_count": 2, "devices": [], "versions": {"torch": "2"}},
    **{"git_commit": "0123456789abcdef", "date": "2026-11-30T00:00:00", "command": "ddray claims"},
}


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of each `ddray claims`, which leaves a folder."""
    calls: list[tuple[Any, ...]] = []

    def run(lab: Lab, *arguments: Any) -> Any:
        calls.append(arguments)
        folder = Path(arguments[arguments.index("--run-dir") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
        (folder / "cells.json").write_text(json.dumps({"cells": [CELL]}))
        return SimpleNamespace(out={"claims": [CLAIM], "num_failed": 0})

    monkeypatch.setattr(claims, "ddray", run)
    return calls


def test_a_part_is_continued_and_recorded_once(tmp_path: Path, commands: list[tuple[Any, ...]]) -> None:
    lab = Lab(tmp_path, tmp_path / "claims.json", 1, is_tiny=False)
    for part in ("d3hr", "digits", "d3hr"):
        claims.measure(lab, part)
    assert [("--resume" in arguments) for arguments in commands] == [False, False, True]
    record = claims.read(lab.lines)
    assert [claim["part"] for claim in record["claims"]] == ["digits", "d3hr"]
    assert record["parts"]["digits"]["command"] == "OMP_NUM_THREADS=1 ddray claims configs/claims/digits.yaml"
    assert "command" not in record["parts"]["digits"]["environment"]

    text = "\n".join(claims.page(record))
    assert "| Methods on digits, ipc 1 | 1 | 0 | 0 |" in text
    assert "| Methods on CIFAR-10, ipc 1 | not measured |  |  |" in text
    assert "| DM beats random images | holds | +20.0 [+10.0, +30.0] | 0.01 | 5 x 3 | dm over random |" in text
    assert "| dm: steps 10 of 150 | datadam Table 3 |" in text
    assert "| dm | 90.0 \u00b1 1.0 | 5 x 3 | 85.0 (10), 90.0 (20) | - | - |" in text
    assert "commit 0123456789ab, 2026-11-30" in text


def test_every_file_is_a_part() -> None:
    assert sorted(claims.TITLES) == sorted(path.stem for path in claims._FILES.glob("*.yaml"))


def test_the_stored_page_is_the_records() -> None:
    record = claims.read(claims.RECORD)
    page = claims.RECORD.with_suffix(".md").read_text(encoding="utf-8")
    assert page == "\n".join(claims.page(record))
    for claim in record["claims"]:
        assert (claim["verdict"] == "undecided") == (claim["p"] is None or claim["p"] >= 0.05)
        assert claim["part"] in record["parts"]
