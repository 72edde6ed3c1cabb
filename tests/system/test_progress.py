from __future__ import annotations

import io
import logging
import sys

import pytest
from rich.console import Console

from ddray.system import progress as module
from ddray.system.progress import progress


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
        *("bench: 1 of 2 first", "bench: 2 of 3 second", "bench: 3 of 3 third"),
        "units: 1 of an unknown number",
    ]


def test_on_a_terminal_the_bar_takes_a_new_total(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with progress("bench", 2) as show:
        show(1, "first")
        show(2, "second", total=3)
    assert "2/3" in capsys.readouterr().err


def test_in_a_notebook_rich_draws_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not module._in_notebook()
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(module, "_in_notebook", lambda: True)
    monkeypatch.setattr("rich.get_console", lambda: console)
    with progress("search", 2) as show:
        show(2, "second")
    assert "2/2" in console.file.getvalue()  # type: ignore[attr-defined]
