"""The built wheel holds configs and search spaces, and works from another folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by calling the backend: no network, nothing written into the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel, without its dependencies."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    done = subprocess.run(
        [*command, "--target", str(target), str(wheel)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return target


def run(installed: Path, folder: Path, *arguments: str) -> str:
    """Run this Python in another folder with the installed wheel first on its path."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "DDRAY_HOME": str(folder / "home")}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_holds_every_shipped_yaml(wheel: Path) -> None:
    shipped = [
        path.relative_to(ROOT).as_posix()
        for top in ("configs", "search_spaces")
        for path in (ROOT / top).rglob("*.yaml")
    ]
    assert "configs/datadam/digits.yaml" in shipped
    assert "search_spaces/hpo/datadam.yaml" in shipped
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert not {f"ddray/_shipped/{name}" for name in shipped} - names
        assert "ddray/py.typed" in names, "the package says that it is typed"
        for name in shipped:
            assert archive.read(f"ddray/_shipped/{name}") == (ROOT / name).read_bytes(), name


def test_wheel_holds_every_module_and_template(wheel: Path) -> None:
    ours = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "ddray").rglob("*")
        if path.suffix in (".py", ".html") and "__pycache__" not in path.parts
    }
    assert ours
    with zipfile.ZipFile(wheel) as archive:
        assert not ours - set(archive.namelist())


def test_installed_wheel_distils_from_another_folder(installed: Path, tmp_path: Path) -> None:
    where = run(installed, tmp_path, "-c", "import ddray; print(ddray.__file__)")
    assert Path(where.strip()).is_relative_to(installed)
    options = ["--dataset", "digits", "--ipc", "1", "--steps", "2", "--device", "cpu", "--json"]
    stdout = run(installed, tmp_path, "-m", "ddray", "distill", "--method", "datadam", *options)
    result = json.loads(stdout)
    assert result["steps"] == 2
    assert Path(result["artifact"]).is_relative_to(tmp_path)
    import yaml

    config = yaml.safe_load((Path(result["run_dir"]) / "config.yaml").read_text())
    shipped = yaml.safe_load((ROOT / "configs/datadam/digits.yaml").read_text())
    assert config["method"]["batch_real"] == shipped["method"]["batch_real"]
    assert config["evaluate"]["epochs"] == shipped["evaluate"]["epochs"]
    environment = json.loads((Path(result["run_dir"]) / "environment.json").read_text())
    assert environment["git_commit"] is None, "an installed wheel is not a checkout"


def test_installed_wheel_finds_search_spaces(installed: Path, tmp_path: Path) -> None:
    code = (
        "from ddray.system.shipped import shipped\n"
        "print(shipped('search_spaces', 'hpo', 'datadam.yaml').is_file())"
    )
    assert run(installed, tmp_path, "-c", code).strip() == "True"
