"""Run directories: made atomically, never reused by accident, resumed only with the same configuration."""

import contextlib
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
        self.folder, self.resumed = folder, resumed
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
        if _has_run(folder, resume):
            return _resumed(folder, settings)
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "environment.json", environment())
    write_text(folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
    with storage_errors(folder):
        (folder / "ledger").mkdir(exist_ok=True)
        (folder / "checkpoints").mkdir(exist_ok=True)
    return Run(folder, resumed=False)


def _has_run(folder: Path, resume: bool) -> bool:
    """Return whether a named folder has a run to resume; InputError if it is neither new nor a run's."""
    file = next((path for path in (folder, *folder.parents) if path.is_file()), None)
    if file is not None:
        raise InputError(f"--run-dir must be a folder, {file} is a file; name another")
    if folder.exists() and not resume:
        raise InputError(
            f"--run-dir must be a new folder, {folder} exists; add --resume to continue it, or name another"
        )
    if (folder / "config.yaml").exists():
        return True
    names = {path.name for path in folder.glob("*") if not path.name.endswith(".tmp")}
    if not names <= {"epoch", "epoch.lock", "environment.json"}:  # what a crash while it was made leaves
        raise InputError(f"--resume needs a run directory, {folder} has no config.yaml; name another folder")
    return False


def _resumed(folder: Path, settings: Mapping[str, Any]) -> Run:
    """Open a run under its own configuration; write its environment, and warn of what has changed."""
    changed = difference(read_yaml(folder / "config.yaml"), json.loads(json.dumps(settings)))
    if changed:
        raise InputError(
            f"--resume needs the configuration that {folder} was started with; "
            f"changed: {', '.join(changed)}; use the old values, or a new --run-dir"
        )
    run = Run(folder, resumed=True)
    latest, now = [folder / "environment.json", *environments(folder)][-1], environment()
    _write_json(folder / f"environment-{run.epoch}.json", now)
    with contextlib.suppress(OSError, ValueError):  # damaged: a report says so
        before = json.loads(latest.read_text("utf-8"))
        compared = ("versions", "processor", "devices", "git_commit", "git_dirty")
        old, new = ({name: facts.get(name) for name in compared} for facts in (before, now))
        if changed := difference(old, new):
            log.warning("%s is resumed in a different environment: %s", folder, ", ".join(changed))
    return run


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


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
