"""Ctrl-C on a terminal: the bar has moved, the step is saved, and the command that is printed continues."""

from __future__ import annotations

import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddray.errors import InterruptedRunError


def terminal(words: list[str], interrupt_at: str, seconds: float = 120) -> tuple[str, int]:
    """Run a command on a pseudo-terminal, SIGINT when a text is seen; return what it showed and its exit."""
    main, other = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "ddray", *words],
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "200"},
        stdin=other,
        stdout=other,
        stderr=other,
        start_new_session=True,
    )
    os.close(other)
    text, sent, end = "", False, time.monotonic() + seconds
    while time.monotonic() < end:
        if select.select([main], [], [], 0.2)[0]:
            try:
                text += os.read(main, 65536).decode(errors="replace")
            except OSError:  # it has ended
                break
        if not sent and re.search(interrupt_at, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)):
            process.send_signal(signal.SIGINT)
            sent = True
    code = process.wait(timeout=60)
    os.close(main)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text), code


def test_the_bar_moves_and_ctrl_c_saves_the_step(
    tmp_path: Path, run_command: Callable[..., dict[str, Any]]
) -> None:
    small = ["--set", "arch=convnet2_w8", "--set", "compile=off", "--set", "method.batch_real=8"]
    words = ["distill", "--method", "dm", "--ipc", "1", "--steps", "900", *small]
    words += ["--run-dir", str(tmp_path / "run 1")]

    text, code = terminal(words, r"dm on digits.*\b[1-9]\d*/900 .*loss .* s/step, ETA")

    assert code == 1
    said = " ".join(text.split())
    match = re.search(
        r"error: the run was interrupted at step (\d+) of 900, saved; continue with: (.*)$", said
    )
    assert match is not None, text[-800:]
    command = shlex.split(match[2])
    assert command == ["ddray", *words, "--resume"]
    result = run_command(*command[1:])
    assert result["resumed_from_step"] == int(match[1]) > 0
    assert result["steps"] == 900


@pytest.mark.parametrize(
    ("words", "folder", "expected"),
    [
        (["distill", "--ipc", "1"], Path("runs/a b"), "ddray distill --ipc 1 --run-dir 'runs/a b' --resume"),
        (
            ["bench", "b.yaml", "--run-dir=x", "--resume"],
            Path("x"),
            "ddray bench b.yaml --run-dir=x --resume",
        ),
        (["pool", "train"], None, "ddray pool train"),
    ],
)
def test_what_was_typed_is_what_continues(words: list[str], folder: Path | None, expected: str) -> None:
    error = InterruptedRunError("the run was interrupted", folder)
    assert error.with_command(words) == f"the run was interrupted; continue with: {expected}"
