"""Run directories: made atomically, never reused by accident, resumed only with the same configuration.

Two numbers may grow on a resume: the steps of a distillation, and the trials of a search.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from ddray.config import difference, read_yaml, yaml_of
from ddray.errors import InputError, InterruptedRunError
from ddray.runs.environment import environment
from ddray.runs.ledger import Ledger
from ddray.system.files import storage_errors, write_text
from ddray.system.interrupts import SavedInterrupt

log = logging.getLogger(__name__)
_GROWING: Final = {"distill": "steps", "tune": "num_samples"}
# Recorded in config.yaml, and free to change in a resume: shares of a GPU, and shards of a bench's sets,
# change no result.
_SHARES: Final = ("gpus_per_trial", "gpus_per_unit", "gpus_per_worker", "gpus_per_shard", "shards_of_rows")


class Run:
    """One run directory, opened for this process's driver.

    Attributes:
        folder: absolute path of the run directory.
        ledger: its rows and events.
        epoch: the run epoch that this driver opened; workers publish under it.
        resumed: whether the folder already had a run.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, resumed: bool) -> None:
        self.folder, self.resumed, self._settings = folder, resumed, settings
        self.ledger = Ledger(folder)
        self.epoch = self.ledger.open_epoch()

    def write_config(self) -> None:
        """Write this call's settings to config.yaml: the run that it extends is now the larger one."""
        _write_config(self.folder, self._settings)

    def checkpoint(self, key: str) -> Path:
        """Return the path of a unit's checkpoint."""
        return self.folder / "checkpoints" / f"{key}.pt"

    @property
    def reports(self) -> Path:
        """Folder in which workers say what they do at the moment (`ddray.system.progress`)."""
        return self.folder / "progress"

    @contextlib.contextmanager
    def continued(self, what: str) -> Iterator[None]:
        """Turn an interrupt of the block, which is a part of `what`, into one that says how to go on.

        Raises:
            InterruptedRunError: SIGINT or SIGTERM came.
        """
        try:
            yield
        except InterruptedRunError as error:  # of a run within this one
            raise InterruptedRunError(error.event, self.folder) from error
        except KeyboardInterrupt as error:
            where = f" {error}" if isinstance(error, SavedInterrupt) else ""
            raise InterruptedRunError(f"{what} was interrupted{where}", self.folder) from error

    def discard(self) -> None:
        """Remove the folder with everything in it."""
        with storage_errors(self.folder):
            shutil.rmtree(self.folder)


def open_run(
    run_dir: Path | None,
    config: Mapping[str, Any],
    *,
    command: str,
    resume: bool,
    extended: Mapping[str, Any] | None = None,
) -> Run:
    """Make a fresh run directory, or open one to resume.

    Args:
        run_dir: the named folder; None makes `runs/<command>-<number>`.
        config: the resolved configuration, written to config.yaml; a resumed run must have the same.
        command: the command's name.
        resume: continue an existing folder; a missing one starts fresh.
        extended: settings that the folder's config.yaml has instead of this call's; it keeps them until
            `Run.write_config`.

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
            return _resumed(folder, settings, {**settings, **(extended or {})})
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "environment.json", environment())
    _write_config(folder, settings)
    with storage_errors(folder):
        (folder / "ledger").mkdir(exist_ok=True)
        (folder / "checkpoints").mkdir(exist_ok=True)
    return Run(folder, settings, resumed=False)


def read_config(run_dir: Path | None) -> dict[str, Any]:
    """Return the config.yaml of a run folder; empty if there is none."""
    path = None if run_dir is None else run_dir / "config.yaml"
    return read_yaml(path) if path is not None and path.is_file() else {}


def extended_from(config: Mapping[str, Any], name: str, value: int) -> int | None:
    """Return the number `name` of a run's config.yaml if it is less than `value`; else None."""
    before = config.get(name)
    return before if isinstance(before, int) and before < value else None


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


def _resumed(folder: Path, settings: Mapping[str, Any], expected: Mapping[str, Any]) -> Run:
    """Open a run whose config.yaml is as expected; write its environment, and warn of what has changed."""
    before = read_yaml(folder / "config.yaml")
    old, new = ({k: v for k, v in each.items() if k not in _SHARES} for each in (before, expected))
    if changed := difference(old, json.loads(json.dumps(new))):
        name = _GROWING.get(settings["command"], "")
        is_larger = extended_from(before, name, settings.get(name, 0)) is not None
        grow = f" (or name --{name.replace('_', '-')} {settings[name]} to extend it)" if is_larger else ""
        raise InputError(
            f"--resume needs the configuration that {folder} was started with; "
            f"changed: {', '.join(changed)}; use the old values{grow}, or a new --run-dir"
        )
    run = Run(folder, settings, resumed=True)
    latest, now = [folder / "environment.json", *environments(folder)][-1], environment()
    _write_json(folder / f"environment-{run.epoch}.json", now)
    with contextlib.suppress(OSError, ValueError):  # damaged: a report says so
        before = json.loads(latest.read_text("utf-8"))
        names = ("versions", "processor", "devices", "git_commit", "git_dirty")
        old, new = ({name: facts.get(name) for name in names} for facts in (before, now))
        if changed := difference(old, new):
            log.warning("%s is resumed in a different environment: %s", folder, ", ".join(changed))
    return run


def _write_config(folder: Path, settings: Mapping[str, Any]) -> None:
    write_text(folder / "config.yaml", yaml_of(settings))


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
