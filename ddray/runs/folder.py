"""Run directories: made atomically, never reused by accident, resumed only with the same configuration."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ddray.config import difference, read_yaml
from ddray.errors import InputError
from ddray.runs.environment import environment
from ddray.runs.ledger import Ledger
from ddray.system.files import storage_errors, write_text

log = logging.getLogger(__name__)


class Run:
    """One run directory, opened for this process's driver.

    Attributes:
        folder: absolute path of the run directory.
        ledger: its rows and events.
        epoch: the run epoch that this driver opened; workers publish under it.
        resumed: whether the folder already had a run.
    """

    def __init__(self, folder: Path, *, resumed: bool) -> None:
        self.folder = folder
        self.resumed = resumed
        self.ledger = Ledger(folder)
        self.epoch = self.ledger.open_epoch()

    def checkpoint(self, key: str) -> Path:
        """Return the path of a unit's checkpoint."""
        return self.folder / "checkpoints" / f"{key}.pt"

    def discard(self) -> None:
        """Remove the folder with everything in it."""
        with storage_errors(self.folder):
            shutil.rmtree(self.folder)


def open_run(run_dir: Path | None, config: Mapping[str, Any], *, command: str, resume: bool) -> Run:
    """Make a fresh run directory, or open one to resume.

    Args:
        run_dir: the named folder; None makes `runs/<command>-<number>`.
        config: the resolved configuration, written to config.yaml; a resumed run must have the same.
        command: the command's name.
        resume: continue an existing folder; a missing one starts fresh.

    Raises:
        InputError: the folder exists and `resume` is off, or its configuration differs (with the diff).
        StorageError: the folder can't be made.
    """
    settings = {"command": command, **config}
    if run_dir is None:
        if resume:
            raise InputError("--resume needs --run-dir: the folder of the run to continue")
        folder = _numbered(Path("runs").absolute(), command)
    else:
        folder = run_dir.absolute()
        config_file = folder / "config.yaml"
        file = next((path for path in (folder, *folder.parents) if path.is_file()), None)
        if file is not None:
            raise InputError(f"--run-dir must be a folder, {file} is a file; name another")
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        occupied = any(not name.endswith(".tmp") for name in names)
        if folder.exists() and not resume:
            raise InputError(
                f"--run-dir must be a new folder, {folder} exists; "
                "add --resume to continue it, or name another"
            )
        if occupied and config_file.exists():
            _check_same(read_yaml(config_file), settings, folder)
            run = Run(folder, resumed=True)
            _note_environment(run)
            return run
        if not {name for name in names if not name.endswith(".tmp")} <= {
            "epoch",
            "epoch.lock",
            "environment.json",
        }:
            raise InputError(
                f"--resume needs a run directory, {folder} has no config.yaml; name another folder"
            )
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "environment.json", json.dumps(environment(), indent=2) + "\n")
    write_text(folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
    with storage_errors(folder):
        (folder / "ledger").mkdir(exist_ok=True)
        (folder / "checkpoints").mkdir(exist_ok=True)
    return Run(folder, resumed=False)


def _note_environment(run: Run) -> None:
    """Write a resumed run's environment, and warn of what has changed."""
    files = environments(run.folder)
    now = environment()
    write_text(run.folder / f"environment-{run.epoch}.json", json.dumps(now, indent=2) + "\n")
    try:
        before = json.loads((files[-1] if files else run.folder / "environment.json").read_text("utf-8"))
    except (OSError, ValueError):  # damaged: a report says so
        return
    compared = ("versions", "processor", "devices", "git_commit", "git_dirty")
    old, new = (
        {name: environment_facts.get(name) for name in compared} for environment_facts in (before, now)
    )
    changed = difference(old, new)
    if changed:
        log.warning("%s is resumed in a different environment: %s", run.folder, ", ".join(changed))


def environments(folder: Path) -> list[Path]:
    """Return the environment files of a run's resumes, in order; the first start's is not among them."""
    by_epoch = {path.stem.removeprefix("environment-"): path for path in folder.glob("environment-*.json")}
    return [by_epoch[epoch] for epoch in sorted(filter(str.isdecimal, by_epoch), key=int)]


def _numbered(parent: Path, command: str) -> Path:
    """Make the next free `<parent>/<command>-<number>`; mkdir is atomic, so two processes get two folders."""
    with storage_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        suffixes = [path.name.removeprefix(f"{command}-") for path in parent.glob(f"{command}-*")]
        index = 1 + max((int(text) for text in suffixes if text.isdigit()), default=0)
        while True:
            folder = parent / f"{command}-{index:04d}"
            try:
                folder.mkdir()
            except FileExistsError:
                index += 1
            else:
                return folder


def _check_same(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path) -> None:
    """Refuse to resume under another configuration."""
    plain = json.loads(json.dumps(new))
    changed = difference(old, plain)
    if changed:
        raise InputError(
            f"--resume needs the configuration that {folder} was started with; "
            f"changed: {', '.join(changed)}; use the old values, or a new --run-dir"
        )
