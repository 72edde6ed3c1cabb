from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def ddray_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a cache of its own, and no data directory but the one it names."""
    home = tmp_path / "home"
    monkeypatch.setenv("DDRAY_HOME", str(home))
    monkeypatch.delenv("DDRAY_DATA", raising=False)
    return home
