"""Blocks of pages after `<!-- test -->` run as printed; links lead somewhere; data.md names tests."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddray.cli import _run
from ddray.tuning.space import method_space

ROOT = Path(__file__).resolve().parents[1]
TEST_NAME = re.compile(r"`(tests/[\w/]+\.py)::([\w:]+)`")
RUN = ("README.md", "docs/evaluation.md", "docs/nas.md")
"""Pages with commands that run in the default suite, each after those before it in one folder."""
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "reports").glob("*.md")],
    key=lambda path: path.relative_to(ROOT).as_posix(),
)
BLOCK = re.compile(r"^<!-- test(?:: (?P<tag>[a-z]+))? -->\n```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S)


def blocks(page: str, tag: str | None, kind: str) -> list[str]:
    """Return the tagged blocks of a page, at least one."""
    text = (ROOT / page).read_text(encoding="utf-8")
    texts = [m["text"] for m in BLOCK.finditer(text) if m["tag"] == tag and m["kind"] == kind]
    assert texts, f"{page} has no {kind} block after <!-- test{': ' + tag if tag else ''} -->"
    return texts


@pytest.fixture
def run_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_here: None) -> Callable[[str], None]:
    """Runs the commands of a block in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(text: str) -> None:
        for line in text.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "ddray"
            assert _run(arguments, False) == 0, line

    return run


@pytest.mark.ray
def test_readme_blocks_run(tmp_path: Path, run_block: Callable[[str], None]) -> None:
    for page in RUN:
        for block in blocks(page, None, "bash"):
            run_block(block)
    assert (tmp_path / "runs/first/distilled.pt").is_file()
    assert (tmp_path / "runs/first/distilled.png").is_file()
    assert (tmp_path / "runs/nas/scatter.png").is_file()


@pytest.mark.slow
@pytest.mark.ray
def test_readme_slow_blocks_run(tmp_path: Path, run_block: Callable[[str], None]) -> None:
    for block in blocks("README.md", "slow", "bash"):
        run_block(block)
    for name in ("results.csv", "report.html", "distilled.pt", "distilled.png"):
        assert (tmp_path / "runs/search" / name).is_file(), name


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder where CONTRIBUTING's package is installed as pip does it: modules, and dist-info."""
    (source,) = blocks("CONTRIBUTING.md", "method", "python")
    (contract,) = blocks("CONTRIBUTING.md", "contract", "python")
    (entry,) = blocks("CONTRIBUTING.md", "entry", "toml")
    (group,) = tomllib.loads(entry)["project"]["entry-points"].items()
    info, package = (tmp_path / "site" / name for name in ("my_package-1.0.dist-info", "my_package"))
    for folder in (info, package):
        folder.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my_package\nVersion: 1.0\n")
    lines = [f"{name} = {module}" for name, module in group[1].items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{group[0]}]", *lines]))
    (package / "__init__.py").write_text('"""A third-party package."""\n')
    (package / "centroids.py").write_text(source)
    (package / "test_centroids.py").write_text(contract)
    return tmp_path / "site"


def run_python(*arguments: str, site: Path) -> subprocess.CompletedProcess[str]:
    """Run this interpreter with the folder on its path."""
    folders = os.pathsep.join(filter(None, [str(site), str(ROOT), os.environ.get("PYTHONPATH")]))
    command, environment = [sys.executable, *arguments], {**os.environ, "PYTHONPATH": folders}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=site, check=False)


def test_contributing_method_runs_by_its_entry_point(installed: Path, tmp_path: Path) -> None:
    options = ("--method", "centroids", "--dataset", "digits", "--ipc", "1")
    done = run_python("-m", "ddray", "distill", *options, "--json", site=installed)
    assert done.returncode == 0, done.stderr[-1500:]
    assert (json.loads(done.stdout)["method"], json.loads(done.stdout)["steps"]) == ("centroids", 100)


def test_contributing_method_keeps_the_contract(installed: Path) -> None:
    options = ("-q", "-W", "error", "-p", "no:cacheprovider")
    done = run_python("-m", "pytest", *options, "my_package", site=installed)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed, 1 skipped" in done.stdout, "it has no lr_img"


@pytest.fixture
def centroids(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """CONTRIBUTING's module."""
    monkeypatch.syspath_prepend(installed)
    for imported in ("my_package", "my_package.centroids"):  # other pages' tests have a package of that name
        monkeypatch.delitem(sys.modules, imported, raising=False)
    return importlib.import_module("my_package.centroids")


def test_contributing_method_moves_to_the_mean(centroids: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 3, 5, 4, generator=generator, dtype=torch.float64)
    centers, counts = torch.zeros(3, 1, 4, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
    for batch in (first, second):
        centers, counts, _ = centroids.move(centers, counts, batch)
    torch.testing.assert_close(centers[:, 0], torch.cat([first, second], dim=1).mean(1))
    assert counts.tolist() == [[10.0]] * 3


def test_contributing_space_is_searched(centroids: Any) -> None:
    space, source = method_space("centroids", centroids.CentroidsConfig)
    assert source == "CentroidsConfig.search_space"
    assert space["decay"].ends() == [0.5, 1.0]


def test_contributing_file_passes_ruff(installed: Path) -> None:
    command = [sys.executable, "-m", "ruff"]
    target = str(installed / "my_package" / "centroids.py")
    for arguments in (
        ["check", "--config", str(ROOT / "pyproject.toml")],
        ["format", "--check", "--config", str(ROOT / "pyproject.toml")],
    ):
        done = subprocess.run([*command, *arguments, target], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def defined_names(path: Path) -> set[str]:
    """Return a module's functions and classes, and what is in its classes as `Class::function`."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    scopes = [("", body), *((f"{node.name}::", node.body) for node in body if isinstance(node, ast.ClassDef))]
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {prefix + node.name for prefix, nodes in scopes for node in nodes if isinstance(node, kinds)}


def test_every_line_on_data_names_tests_that_exist() -> None:
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    tables = [table.splitlines() for table in re.findall(r"(?:^\|.*\n)+", text, re.M)]
    lines = [line for head, _, *rows in tables if head.endswith("| test |") for line in rows]
    assert len(lines) > 100
    assert not [line for line in lines if not TEST_NAME.search(line)]
    names = set(TEST_NAME.findall(text))
    assert len(names) == len(set(re.findall(r"tests/[^ `]+::[^ `]+", text))), "each is read whole"
    defined = {file: defined_names(ROOT / file) for file in {file for file, _ in names}}
    assert not sorted(f"{file}::{name}" for file, name in names if name not in defined[file])


def prose(page: Path) -> str:
    """Return a page's text without code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Return the names of a page's headings, as links have them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def leads_nowhere(page: Path, link: str) -> bool:
    """Return whether a page or heading that a link names is not there."""
    target, _, anchor = link.partition("#")
    path = page.parent / target if target else page
    return not path.is_file() or bool(anchor and anchor not in anchors(path))


def test_links_lead_somewhere() -> None:
    links = [
        (page, link)
        for page in PAGES
        for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(page)))
        if "://" not in link
    ]
    assert len(links) > 200
    assert not [f"{page.name}: {link}" for page, link in links if leads_nowhere(page, link)]


def test_every_page_is_in_the_sites_navigation() -> None:
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {page.relative_to(ROOT).as_posix() for page in PAGES}
    method_pages = {page for page in pages if re.fullmatch(r"docs/methods/(?!README).*", page)}
    assert len(method_pages) > 30
    assert set(re.findall(r"[\w/]+\.md$", site, re.M)) == pages - method_pages


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(re.findall(r"\S*\w\S*", text)) <= 1400, "details belong into docs/"
