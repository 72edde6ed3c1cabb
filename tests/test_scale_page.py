"""docs/scale.md has the tables that docs/scale.py computes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module")
def page() -> Any:
    spec = importlib.util.spec_from_file_location("docs_scale", DOCS / "scale.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["docs_scale"] = module
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_code(page: Any) -> None:
    text = (DOCS / "scale.md").read_text(encoding="utf-8")
    rows = page.shard_rows(64)
    assert len(rows) == len(page.SHARDS)
    assert page.table(rows[0], rows[1:]).replace("|---" * 9 + "|\n", "") in text, "run: python docs/scale.py"


@pytest.mark.slow
def test_all_tables_are_those_of_the_code(page: Any) -> None:
    text = (DOCS / "scale.md").read_text(encoding="utf-8")
    assert text.count("<!-- computed: ") == 2
    assert page.written(text) == text, "run: python docs/scale.py"


def test_more_shards_take_less_each(page: Any) -> None:
    one, eight, many = (page.shard(64, num) for num in (1, 8, 64))
    assert one.images == page.IMAGES * 3 * 64**2
    assert eight.images == 125 * 1300 * 3 * 64**2  # the largest classes, together
    assert one.images / 8 < eight.images < 1.02 * one.images / 8
    assert one.learned == 8 * eight.learned > many.learned
    assert one.step >= eight.step >= many.step
    assert page.PROCESS < many.ram < eight.ram < one.ram
    assert many.device < eight.device < one.device < page.GPU_BYTES
