"""Modules, functions and test files are short enough to be read at once."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODULE, TEST_FILE, FUNCTION = 400, 500, 60


def num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def longer_than(limit: int, folder: str) -> list[str]:
    sizes = {path.relative_to(ROOT): num_lines(path) for path in (ROOT / folder).rglob("*.py")}
    assert sizes
    return [f"{path}: {size} lines" for path, size in sizes.items() if size > limit]


def test_modules_are_short() -> None:
    assert not longer_than(MODULE, "ddray")


def test_files_of_tests_are_short() -> None:
    assert not longer_than(TEST_FILE, "tests")


def test_functions_are_short() -> None:
    """Commands aside: their signature declares every option."""
    long = []
    for path in (ROOT / "ddray").rglob("*.py"):
        if path.parent.name == "commands":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno > FUNCTION:
                long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not long
