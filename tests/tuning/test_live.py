from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from rich.console import Console

from ddray.tuning import live as module
from ddray.tuning.live import LiveTable


def drawn(live: LiveTable) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(live._table())
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def report(folder: Path, number: int, done: int) -> None:
    folder.mkdir(exist_ok=True)
    fields = {"title": "dm on digits", "done": done, "total": 90, "note": "loss 0.5, 0.1 s/step"}
    (folder / f"{number}.json").write_text(json.dumps(fields))


def after_30_s(
    total: int, running: Iterable[int], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> LiveTable:
    """A table whose trials `running` began 30 s ago."""
    clock = iter([0.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock, 30.0))
    live = LiveTable(total, 0, folder)
    for number in running:
        live.update(number, {}, "running", {})
    return live


def test_a_running_trial_is_a_row_that_moves_until_it_has_ended(tmp_path: Path) -> None:
    live = LiveTable(4, 0, tmp_path)
    live.update(1, {"lr": 0.5}, "running", {})
    before = drawn(live)
    report(tmp_path, 1, 12)
    during = drawn(live)
    live.update(1, {"lr": 0.5}, "done", {"score": 0.25})
    after = drawn(live)
    assert "running" in before
    assert "lr=0.5" in before
    assert "dm on digits 12/90 loss 0.5, 0.1 s/step" in during
    assert "12/90" not in after
    assert "25.0" in after
    assert "1/4" in after


def test_a_trial_in_shards_shows_the_slowest_of_those_at_work(tmp_path: Path) -> None:
    live = LiveTable(4, 0, tmp_path)
    live.update(1, {}, "running", {})
    for shard, done in ((0, 45), (5, 12)):
        report(tmp_path / "1", shard, done)
    assert "dm on digits 12/90 loss 0.5" in drawn(live)


def test_a_trial_that_is_tried_again_keeps_its_rungs(tmp_path: Path) -> None:
    live = LiveTable(4, 0, tmp_path)
    live.update(1, {}, "running", {"score": 0.125, "rungs": {"1": 0.125}})
    live.update(1, {}, "running", {})
    assert "12.5" in drawn(live)


def test_the_eta_counts_what_running_trials_have_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of four trials are half done after 30 s: that is one trial's work, and three are left."""
    live = after_30_s(4, (1, 2), tmp_path, monkeypatch)
    for number in (1, 2):
        report(tmp_path, number, 45)
    assert "0/4, ETA 0:01:30" in drawn(live)


@pytest.mark.parametrize("status", ["done", "failed", "stopped early"])
def test_a_report_that_a_killed_worker_left_is_not_counted(
    status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three trials one has ended and one is half done after 30 s: as much is left as was done."""
    live = after_30_s(3, (0, 1), tmp_path, monkeypatch)
    report(tmp_path, 0, 80)
    report(tmp_path / "0", 5, 80)
    live.update(0, {}, status, {})
    assert not list(tmp_path.iterdir())

    report(tmp_path, 0, 80)  # written meanwhile
    report(tmp_path, 1, 45)
    report(tmp_path, 7, 80)  # of nobody
    assert "1/3, ETA 0:00:30" in drawn(live)


def test_the_eta_is_never_negative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live = after_30_s(2, (0, 1, 2), tmp_path, monkeypatch)
    for number in (0, 1, 2):
        report(tmp_path, number, 90)
    assert "0/2, ETA 0:00:00" in drawn(live)
