"""Modules, functions and test files are short enough to be read at once."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODULE, TEST_FILE, FUNCTION, PARAMETERS = 400, 500, 50, 8


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
    """At most 50 lines and 8 parameters, `self` and `**options` aside."""
    long = []
    for path in (ROOT / "ddray").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            names = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            num_parameters = len([name for name in names if name not in ("self", "cls")])
            if node.end_lineno - node.lineno >= FUNCTION or num_parameters > PARAMETERS:
                long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not long
