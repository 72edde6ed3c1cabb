"""The errors that ddray raises on purpose, and the did-you-mean hint they share."""

import difflib
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path


class DdrayError(Exception):
    """Base of ddray's own errors; the message is one line that states rule, value and fix."""

    exit_code = 1  # process exit status of the command line when this error ends a command


class InputError(DdrayError):
    """Bad input of any kind: an option, a config value, a file (exit 2)."""

    exit_code = 2


class DivergedError(DdrayError):
    """A loss or an image became NaN or infinite; final for the trial it happened in."""


class StorageError(DdrayError):
    """A file could not be written (full disk, no permission); the message names the path."""


class DeviceError(DdrayError):
    """A process can't go on computing on its GPU; another process may."""


class DeviceMemoryError(DeviceError):
    """A device's memory did not suffice; the message has the figures."""


class DeviceMissingError(DeviceError):
    """A process was assigned a GPU that it can't use; another node may have one that works."""


class InterruptedRunError(DdrayError):
    """SIGINT or SIGTERM ended work that the same call continues; with --resume where it has a run folder.

    Attributes:
        event: what happened.
        folder: the run's; None: what was done lies where the call finds it.
    """

    def __init__(self, event: str, folder: Path | None = None) -> None:
        where = "the same command" if folder is None else f"--run-dir {folder} --resume"
        super().__init__(f"{event}; run again with {where} to finish it")
        self.event, self.folder = event, folder

    def with_command(self, words: Sequence[str]) -> str:
        """Return the message for people who typed `words`: it names the command that goes on."""
        further: list[str] = []
        if self.folder is not None:
            is_named = any(word.partition("=")[0] == "--run-dir" for word in words)
            further += [] if is_named else ["--run-dir", str(self.folder)]
            further += [] if "--resume" in words else ["--resume"]
        return f"{self.event}; continue with: {shlex.join(['ddray', *words, *further])}"


def one_line(error: object, length: int | None = None) -> str:
    """Return an error's text on one line, cut to a length; the error's class where it has no text."""
    return " ".join(str(error).split())[:length] or type(error).__name__


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the choice nearest to `name`, or "" when none is near.

    Dotted choices that end in the name, as `evaluate.epochs` in `epochs`, are nearest: all of them are named.
    """
    listed = list(choices)
    near = [one for one in listed if one.endswith(f".{name}")]
    near = near or difflib.get_close_matches(name.lower(), listed, n=1, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def unknown(option: str, name: str, choices: Iterable[str]) -> InputError:
    """Return the error for a name that is not among `choices`: it lists them and suggests the nearest."""
    listed = sorted(choices)
    return InputError(
        f"{option} must be one of {', '.join(listed)}, got {name!r}{did_you_mean(name, listed)}"
    )
