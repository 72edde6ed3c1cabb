"""A package imports only what stands below it, and Ray is imported in ddray/cluster only (pyproject.toml)."""

from __future__ import annotations

import logging.config
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).resolve().parents[1]


def test_every_import_contract_holds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    # It would switch off every logger that is there, for all tests that follow.
    monkeypatch.setattr(logging.config, "dictConfig", lambda config: None)

    status = lint_imports(config_filename="pyproject.toml", no_cache=True, no_logo=True)

    assert status == 0, capsys.readouterr().out
