"""Names say what a thing is: twelve words that stand for everything are bound nowhere."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
VAGUE = {
    *("held", "found", "own", "known", "chosen", "wanted"),
    *("made", "more", "given", "kept", "shown", "asked"),
}
FOLDERS = ("ddray", "tests", "reports", "docs")


def bound_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield every name that a module binds, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname, node.lineno
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name, node.lineno


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_name_stands_for_everything(folder: str) -> None:
    modules = sorted((ROOT / folder).rglob("*.py"))
    assert modules

    vague = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in modules
        for name, line in bound_names(ast.parse(path.read_text(encoding="utf-8")))
        if name in VAGUE
    ]

    assert not vague


def test_a_vague_name_is_seen_wherever_it_is_bound() -> None:
    text = "def asked(held): known = [own for own in held]\nimport os as found\nfor made, x in (): pass"

    assert {name for name, _ in bound_names(ast.parse(text))} & VAGUE == {
        *("asked", "held", "known", "own", "found", "made")
    }


def test_documents_refer_to_files_that_a_clone_has() -> None:
    absent = [f"{word.upper()}.md" for word in ("ray", "methods", "house", "design")]
    texts = [
        path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md")
    ]
    assert len(texts) > 200

    assert not [
        str(path.relative_to(ROOT)) for path in texts if any(name in path.read_text() for name in absent)
    ]
