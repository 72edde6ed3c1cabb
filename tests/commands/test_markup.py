"""Names are printed as they are: rich takes [v2] for a style, [/v2] for its end, and :smile: for an emoji."""

from __future__ import annotations

import ast
import io
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.text import Text

from ddray.cli import _run
from ddray.commands.display import table_of
from ddray.system.progress import plain_console, progress
from ddray.tuning.live import LiveTable
from tests.commands.test_options import EVERY

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("[v2] :smile: a", "[/v2]b", "[bold]c[/]")


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    code = _run([str(argument) for argument in arguments], debug=True)
    output = capsys.readouterr()
    assert code == 0, output.err
    return output.out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("wide")
def test_commands_print_paths_and_names_as_they_are(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dataset folder, its classes, run folders, sets, tables and pages, all named so."""
    from PIL import Image

    top = tmp_path / name
    for split in ("train", "test"):
        for label in range(2):
            folder = top / "data" / split / f"{label} {name.replace('/', '')}"
            folder.mkdir(parents=True)
            for index in range(4):
                colour = (80 * index, 200 * label, 30 + index)
                Image.new("RGB", (16, 16), colour).save(folder / f"{index}.png")
    data, run = top / "data", top / "run"
    small = ("--set", "arch=convnet2_w8", "--set", "evaluate.epochs=1", "--set", "evaluate.seeds=1")
    assert f" {data} " in printed(capsys, "data", "info", data)
    base = ("distill", "--method", "random", "--dataset", data, "--ipc", 1, *small, "--run-dir", run)
    text = printed(capsys, *base)
    assert f" {run / 'distilled.pt'} " in text
    assert f" {data} " in text
    assert f" {run} " in printed(capsys, *base, "--resume")
    copied = top / f"set {name.replace('/', '')}.pt"
    shutil.copy(run / "distilled.pt", copied)
    assert copied.stem in printed(
        capsys, "evaluate", copied, "--seeds", 1, "--epochs", 1, "--arch", "convnet2_w8"
    )
    assert f" {top / 'out'} " in printed(capsys, "export", copied, top / "out")
    assert f" {top / 'page.html'} " in printed(capsys, "report", run, "--out", top / "page.html", "--no-tsne")
    bench = top / "bench.yaml"
    bench.write_text(
        f"name: '{name}'\ndataset: '{data}'\nipc: 1\nseeds: 1\nmethods: [random]\n"
        "evaluate: {protocol: hard, seeds: 1, epochs: 1, archs: [convnet2_w8]}\n"
    )
    assert name in printed(capsys, "bench", bench, "--dry-run")
    text = printed(capsys, "bench", bench, "--executor", "local", "--run-dir", top / "bench")
    assert f" {top / 'bench' / 'table.csv'} " in text
    assert name in text


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("wide")
def test_progress_and_live_tables_show_them_too(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress(f"dm on {name}", 2) as show:
        show(1, f"note {name}")
    live = LiveTable(2, 0, tmp_path)
    with live.display():
        live.update(0, {"init": name}, "done", {"score": 0.5})
    for text in (f"dm on {name}", f"note {name}", f"init={name}"):
        assert text in Text.from_ansi(terminal.getvalue()).plain


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("wide")
def test_titles_headers_and_errors_show_them_too(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plain_console().print(table_of(name, {name: name}))
    assert capsys.readouterr().out.count(name) == 3
    for arguments in (["data", "info", name], ["evaluate", str(tmp_path / name)], ["distill", f"--x{name}"]):
        assert _run(arguments, debug=False) == 2
        assert name in capsys.readouterr().err


def test_no_other_console_is_made() -> None:
    """`plain_console` is the one rule, for bars too."""
    allowed = ROOT / "ddray" / "system" / "progress.py"
    consoles = []
    for path in (ROOT / "ddray").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                if node.func.id == "Console" and path != allowed:
                    consoles.append(path)
            elif isinstance(node, ast.ImportFrom) and node.module == "rich":
                assert {alias.name for alias in node.names} <= {"box", "get_console"}, path
    assert not consoles


@pytest.mark.parametrize("line", EVERY)
def test_no_help_has_what_rich_would_take_for_a_style(line: str) -> None:
    command: Any = EVERY[line]
    texts = [command.help or "", *(getattr(parameter, "help", None) or "" for parameter in command.params)]

    assert [Text.from_markup(text).plain for text in texts] == texts
