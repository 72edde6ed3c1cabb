"""Files are short enough to be read at once."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEST_FILE = 500


def num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def longer_than(limit: int, folder: str) -> list[str]:
    sizes = {path.relative_to(ROOT): num_lines(path) for path in (ROOT / folder).rglob("*.py")}
    assert sizes
    return [f"{path}: {size} lines" for path, size in sizes.items() if size > limit]


def test_files_of_tests_are_short() -> None:
    assert not longer_than(TEST_FILE, "tests")
