from __future__ import annotations

import errno
import io
import json
import logging
import time
from pathlib import Path

import pytest
from rich.console import Console

from ddray.system import progress as module
from ddray.system.progress import Row, phase, progress, read_reports, report_of, reported_to


def drawn() -> list[str]:
    """Return the lines that are on the screen now."""
    console = Console(file=io.StringIO(), width=120)
    console.print(module._board._table())
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return [line.rstrip() for line in lines if line.strip()]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_is_drawn", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")


def row_at(times: list[float], monkeypatch: pytest.MonkeyPatch, **fields: object) -> Row:
    clock = iter(times)
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    return Row("dm", 90, **fields)  # type: ignore[arg-type]


def test_without_a_terminal_it_logs_how_many_of_how_many_there_are_by_now(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_LOG_EVERY_S", 0.0)
    caplog.set_level(logging.INFO)
    with progress("bench", 2) as show:
        show(1, "first")
        show(2, "second", total=3)
        show(3, "third")
    with progress("units", 0) as show:
        show(1, "of an unknown number")
    assert caplog.messages == [
        *("bench: 1 of 2 first, ETA 0:00:00", "bench: 2 of 3 second, ETA 0:00:00", "bench: 3 of 3 third"),
        "units: 1 of an unknown number",
    ]


def test_a_row_has_one_eta_at_the_pace_of_late(monkeypatch: pytest.MonkeyPatch) -> None:
    row = row_at([0.0, 2.0, 30.0, 30.0, 31.0], monkeypatch, unit="step", done=10)
    row(11, "loss 1")
    row(30, "loss 0.5")
    assert row.left_s() == pytest.approx(28 / 19 * 60)
    assert row.details() == "loss 0.5, 1.47 s/step, ETA 0:01:27"
    assert row.counted() == "30/90"


def test_the_first_piece_which_may_have_compiled_does_not_count_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = row_at([0.0, 40.0, 42.0, 42.0], monkeypatch)
    row(1, "")
    row(2, "")
    assert row.left_s() == pytest.approx(88 * 2)


def test_the_eta_follows_the_work_where_pieces_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    row = row_at([0.0, 10.0, 10.0], monkeypatch)
    row(80, "", work=0.25)
    assert row.left_s() == pytest.approx(30)


def test_a_piece_that_takes_longer_than_the_others_leaves_the_eta_of_those_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = row_at([0.0, 10.0, 500.0], monkeypatch)
    row(10, "")
    assert row.left_s() == pytest.approx(79)


def test_before_the_first_piece_and_after_the_last_there_is_no_eta(monkeypatch: pytest.MonkeyPatch) -> None:
    row = row_at([0.0, 5.0], monkeypatch)
    before = row.details()
    row(90, "done")
    assert (before, row.details()) == ("", "done")


@pytest.mark.usefixtures("terminal")
def test_on_a_terminal_the_bar_takes_a_new_total(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("bench", 2) as show:
        show(1, "first")
        show(2, "second", total=3)
    assert "2/3" in capsys.readouterr().err


@pytest.mark.usefixtures("terminal")
def test_work_inside_work_is_a_row_below_it_once_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    with progress("bench", 3) as outer, progress("training convnet3", 20) as inner:
        outer(1, "")
        inner(7, "loss 2")
        soon = drawn()
        monkeypatch.setattr(module, "_PATIENCE_S", 0.0)
        later = drawn()
    assert len(soon) == 1
    assert "1/3" in soon[0]
    assert later[0].startswith("bench")
    assert later[1].startswith("  training convnet3")
    assert "7/20" in later[1]
    assert module._board._live is None


@pytest.mark.usefixtures("terminal")
def test_a_phase_is_announced_and_has_a_row_while_it_lasts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(module, "_PATIENCE_S", 0.0)
    phase("starting Ray")
    with phase("whitening cifar10"):
        (line,) = drawn()
    assert caplog.messages == ["starting Ray", "whitening cifar10"]
    assert "whitening cifar10" in line
    assert drawn() == []


@pytest.mark.usefixtures("terminal")
def test_what_workers_report_are_rows_until_they_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REPORT_EVERY_S", 0.0)
    folder = tmp_path / "progress"
    with progress("bench", 2, watch=folder):
        path = report_of("key")
        with reported_to(path), progress("dm on digits", 90) as show:
            show(12, "loss 0.5")
            with progress("inside it", 4) as inner:
                inner(1, "")
            lines = drawn()
        assert path is not None
        assert not path.exists()
        after = drawn()
    assert "dm on digits" in lines[1]
    assert "12/90" in lines[1]
    assert "loss 0.5" in lines[1]
    assert len(after) == 1
    assert not folder.exists()
    assert report_of("key") is None


def test_a_report_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    fields = {"title": "dm", "done": 3, "total": 9, "note": "loss 1"}
    (tmp_path / "1.json").write_text(json.dumps(fields))
    (tmp_path / "2.json").write_text('{"title": "d')
    reports = read_reports(tmp_path)
    assert {key: row.counted() for key, row in reports.items()} == {"1": "3/9"}


def test_a_report_that_can_not_be_removed_fails_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network file systems refuse to remove a file that another node has open, among others."""

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EBUSY, "busy", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    with reported_to(tmp_path / "1.json"), progress("dm", 9) as show:
        show(1, "")
    monkeypatch.undo()
    assert (tmp_path / "1.json").is_file()


def test_a_worker_reports_now_and_then(tmp_path: Path) -> None:
    with reported_to(tmp_path / "1.json"), progress("dm", 10**6) as show:
        begin = time.perf_counter()
        for step in range(20_000):
            show(step, "")
        seconds = time.perf_counter() - begin
        (row,) = read_reports(tmp_path).values()
    assert row.done == 0  # the first, and none since
    assert seconds < 2


def test_in_a_notebook_rich_draws_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not module._in_notebook()
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(module, "_in_notebook", lambda: True)
    monkeypatch.setattr("rich.get_console", lambda: console)
    with progress("search", 2) as show:
        show(2, "second")
    assert "2/2" in console.file.getvalue()  # type: ignore[attr-defined]
