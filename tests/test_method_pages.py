"""docs/methods has an up-to-date page per method."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "methods"


@pytest.fixture(scope="module")
def generator() -> Any:
    spec = importlib.util.spec_from_file_location("docs_regenerate", ROOT / "docs" / "regenerate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_are_those_of_the_sources(generator: Any) -> None:
    generated = generator.pages()
    assert {"README.md", "datadam.md", "random.md"} <= generated.keys()
    committed = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.md")}
    stale = sorted(name for name in {*generated, *committed} if generated.get(name) != committed.get(name))
    assert stale == [], "run: python docs/regenerate.py"


def test_a_page_says_what_a_reader_needs(generator: Any) -> None:
    text = generator.page("datadam")
    for word in ("# datadam", "ICCV 2023", "## Presets", "## Settings", "## Search space", "## Deviations"):
        assert word in text
    assert re.search(r"\| `method\.p` \| `4` \| `1` \|", text)
    assert "| ipc 10 | 54.2 +- 0.8 | datadam, Table 3 |" in text
