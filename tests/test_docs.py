"""The commands in README and CONTRIBUTING work: blocks after `<!-- test -->` are run as they are printed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ddray.methods
from ddray.artifact.distilled_set import DistilledSet
from ddray.cli import _run
from ddray.data import open_dataset
from ddray.distillation.loop import run_distillation
from ddray.jobs import plan
from ddray.jobs.context import make_context, make_distiller
from ddray.system import registry
from ddray.tuning.space import read_space

ROOT = Path(__file__).resolve().parents[1]
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
    for block in blocks("README.md", None, "bash"):
        run_block(block)
    assert (tmp_path / "runs/first/distilled.pt").is_file()
    assert (tmp_path / "runs/first/distilled.png").is_file()


@pytest.mark.slow
@pytest.mark.ray
def test_readme_slow_blocks_run(tmp_path: Path, run_block: Callable[[str], None]) -> None:
    for block in blocks("README.md", "slow", "bash"):
        run_block(block)
    for name in ("results.csv", "report.html", "distilled.pt", "distilled.png"):
        assert (tmp_path / "runs/search" / name).is_file(), name


@pytest.fixture
def centroids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CONTRIBUTING's method, offered by another package; returns its space file."""
    package = tmp_path / "contributed"
    package.mkdir()
    (package / "__init__.py").write_text('"""A third-party package."""\n')
    (source,) = blocks("CONTRIBUTING.md", "method", "python")
    (package / "centroids.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    offered = importlib.metadata.EntryPoint("centroids", "contributed.centroids", "ddray.methods")
    monkeypatch.setattr(registry, "entry_points", lambda group: [offered] if group == offered.group else [])
    (space,) = blocks("CONTRIBUTING.md", "space", "yaml")
    path = tmp_path / "centroids.yaml"
    path.write_text(space)
    return path


def distil(ipc: int, *, checkpoint: Path | None = None, until: int | None = None) -> DistilledSet:
    opened = open_dataset("digits")
    resolved = plan.resolve("centroids", opened, ipc=ipc, layers=[{"steps": 2}])
    ctx = make_context(resolved, opened.train(), split_name="train", device=torch.device("cpu"))
    result = run_distillation(
        make_distiller(resolved), ctx, checkpoint=checkpoint, checkpoint_every=1, until=until
    )
    return result.distilled


def test_contributing_method_runs_and_resumes(centroids: Path, tmp_path: Path) -> None:
    whole = distil(2)
    assert whole.labels.bincount().tolist() == [2] * 10
    distil(2, checkpoint=tmp_path / "checkpoint.pt", until=1)
    resumed = distil(2, checkpoint=tmp_path / "checkpoint.pt")
    assert torch.equal(resumed.images, whole.images)


def test_an_installed_package_offers_a_method_to_the_command(tmp_path: Path) -> None:
    """Installed as pip does: a dist-info with an entry point, and a module."""
    site = tmp_path / "site"
    info = site / "contributed-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: contributed\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ddray.methods]\ncentroids = centroids_of_theirs\n")
    (source,) = blocks("CONTRIBUTING.md", "method", "python")
    (site / "centroids_of_theirs.py").write_text(source)
    folders = os.pathsep.join(filter(None, [str(site), str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "ddray", "distill", "--method", "centroids", "--dataset", "digits"),
            *("--ipc", "1", "--steps", "2", "--run-dir", str(tmp_path / "run"), "--json"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": folders},
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-1500:]
    assert json.loads(done.stdout)["method"] == "centroids"
    assert (tmp_path / "run" / "distilled.pt").is_file()


def test_contributing_method_moves_to_the_mean(centroids: Path) -> None:
    from contributed.centroids import move

    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 3, 5, 4, generator=generator, dtype=torch.float64)
    centers, counts = torch.zeros(3, 1, 4, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
    for batch in (first, second):
        centers, counts, _ = move(centers, counts, batch)
    torch.testing.assert_close(centers[:, 0], torch.cat([first, second], dim=1).mean(1))
    assert counts.tolist() == [[10.0]] * 3


def test_contributing_space_names_fields(centroids: Path) -> None:
    space = read_space(centroids)
    assert space
    fields = ddray.methods.get_method("centroids").config_type.model_fields
    assert space.keys() <= fields.keys()


def test_contributing_file_passes_ruff(centroids: Path, tmp_path: Path) -> None:
    ruff = pytest.importorskip("ruff", reason="ruff is in the dev extra")
    command = [sys.executable, "-m", ruff.__name__]
    target = str(tmp_path / "contributed/centroids.py")
    for arguments in (
        ["check", "--config", str(ROOT / "pyproject.toml")],
        ["format", "--check", "--config", str(ROOT / "pyproject.toml")],
    ):
        done = subprocess.run([*command, *arguments, target], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
