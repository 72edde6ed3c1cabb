"""What commands share: options, checks of paths and options, and the printing of results."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ddray.commands import display
from ddray.errors import InputError

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")
]
Method = Annotated[str, typer.Option("--method", help="Method or baseline, such as datadam, dm, random.")]
DatasetOption = Annotated[
    str, typer.Option("--dataset", help="Dataset name, or a folder (see `ddray data list`).")
]
Ipc = Annotated[
    int | None, typer.Option("--ipc", help="Images per class (self-supervised methods: --budget).")
]
Budget = Annotated[
    int | None, typer.Option("--budget", help="Images of storage, for self-supervised methods.")
]
Preset = Annotated[str, typer.Option("--preset", help="paper: as printed; repo: as in the authors' code.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML that overrides preset and shipped config.")
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="key=value, such as method.lr_img=0.5; repeatable.")
]
Seed = Annotated[int, typer.Option("--seed", help="Every draw is derived from it.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:<n>.")]
RunDir = Annotated[
    Path | None, typer.Option("--run-dir", help="Folder of the run; default runs/<command>-<number>.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --run-dir.")]
DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Where datasets are; default $DDRAY_DATA.")]
Download = Annotated[bool, typer.Option("--download", help="Let torchvision download what is missing.")]
Arch = Annotated[list[str] | None, typer.Option("--arch", help="Network to train; repeatable.")]


def absolute(path: Path | None) -> Path | None:
    """Make a path absolute, since Ray's workers have other working directories."""
    return None if path is None else Path(os.path.abspath(path.expanduser()))


def refuse(options: dict[str, Any], context: str) -> None:
    """Reject options that would be ignored.

    Raises:
        InputError: names the first option that is set.
    """
    for option, value in options.items():
        if value not in (None, []):
            text = ", ".join(map(str, value)) if isinstance(value, list) else value
            raise InputError(f"{option} must be left out {context}, got {text}")


Emit = Callable[[dict[str, Any], Any], None]


@contextlib.contextmanager
def output(as_json: bool) -> Iterator[Emit]:
    """Yield the function that prints a command's result.

    With --json, everything that libraries print on stdout while the command runs goes to stderr, at the level
    of file descriptors, so that stdout has nothing but the JSON object.
    """
    if not as_json:
        yield lambda result, table: display.show(table() if callable(table) else table)
        return
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(2, 1)
    try:

        def emit(result: dict[str, Any], table: Any) -> None:
            from ddray.commands.options import to_json

            sys.stdout.flush()
            os.write(real, (to_json(result) + "\n").encode())

        yield emit
    finally:
        sys.stdout.flush()
        os.dup2(real, 1)
        os.close(real)


def to_json(value: Any) -> str:
    """Return a value as JSON; NaN and infinities become null."""
    return json.dumps(_defined(value), allow_nan=False)


def _defined(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {key: _defined(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_defined(item) for item in value]
    return value
