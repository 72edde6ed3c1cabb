"""Every option comes from a config; help, version, completion; results as JSON and as tables."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import typer
from pydantic import Field

import ddray
from ddray.cli import app, main
from ddray.commands.options import _PANELS, command
from ddray.commands.options import _completion as completion
from ddray.config import AbsolutePath, Config, Names, Result, named
from ddray.jobs.options import PlanOptions

REPOSITORY = Path(__file__).resolve().parents[2]
FIXED = {"--help", "--json"}


def commands(group: Any = None, name: str = "ddray") -> Iterator[tuple[str, Any]]:
    """Yield (command line, click command) of every command."""
    group = group or typer.main.get_command(app)
    for child, one in group.commands.items():
        if hasattr(one, "commands"):
            yield from commands(one, f"{name} {child}")
        else:
            yield f"{name} {child}", one


EVERY = dict(commands())


def ran(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_all_commands_are_there() -> None:
    names = {line.removeprefix("ddray ") for line in EVERY}
    assert names >= {
        "distill",
        "evaluate",
        "tune",
        "nas",
        "bench",
        "report",
        "export",
        "doctor",
        "pool train",
    }


@pytest.mark.parametrize("line", EVERY)
def test_every_option_is_in_a_panel_and_has_help(line: str) -> None:
    options = [parameter for parameter in EVERY[line].params if parameter.name != "help"]
    assert options
    for parameter in options:
        assert parameter.help, parameter.name
        if parameter.param_type_name == "option":
            assert parameter.rich_help_panel in (*_PANELS, "Output"), parameter.name


@pytest.mark.parametrize("line", EVERY)
def test_every_help_has_an_example_that_parses(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(ran(capsys, *line.split()[1:], "--help").split())
    example = re.search(rf"Example: ({line}.*)", EVERY[line].help)
    assert example
    assert "Example:" in text
    words = example[1].removeprefix(line).split()
    EVERY[line].make_context("ddray", words)
    ours = [word for word in words if (REPOSITORY / Path(word).parts[0]).is_dir()]
    assert [word for word in ours if not (REPOSITORY / word).is_file()] == []


def test_an_example_is_of_a_file_in_the_repository() -> None:
    assert "configs/bench/leaderboard.yaml" in EVERY["ddray bench"].help


class Settings(Config):
    """Settings of a test command."""

    size: int = Field(default=3, ge=1)
    """How large."""
    mode: Literal["fast", "slow"] = "fast"
    """fast or slow."""
    names: Names = named("name", "names")
    """A name; repeatable."""
    folder: AbsolutePath | None = None
    """A folder."""


def test_options_are_made_from_a_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    @command(Settings, example="run --size 3")
    def run(emit: Any, **options: Any) -> None:
        """Run."""
        seen.append(options)

    test_app = typer.Typer()
    test_app.command()(run)
    call = typer.main.get_command(test_app)
    call.main([], standalone_mode=False)
    call.main(["--size", "3", "--name", "a", "--name", "b", "--folder", "x"], standalone_mode=False)
    assert seen[0] == {}, "only what the user has set: None and the default can mean different things"
    assert seen[1] == {"size": 3, "names": ["a", "b"], "folder": Path("x")}
    monkeypatch.chdir(tmp_path)
    parsed = Settings.pick(seen[1])
    assert (parsed.names, parsed.folder) == (("a", "b"), tmp_path / "x")
    assert Settings.pick({"name": "a"}).names == ("a",)


def test_names_are_completed() -> None:
    def complete(config: type[Config], name: str, incomplete: str) -> list[str]:
        complete_option = completion(name, config.model_fields[name])
        assert complete_option is not None
        return complete_option(incomplete)

    assert complete(Settings, "mode", "f") == ["fast"]
    assert {"datadam", "dm", "dsdm"} <= set(complete(PlanOptions, "method", "d"))
    assert complete(PlanOptions, "dataset", "cifar") == ["cifar10", "cifar100"]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert ran(capsys, "--version") == f"ddray {ddray.__version__}\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "_ddray_completion"),
        ("ddray tune --num", "--num-samples"),
        ("ddray distill --method data", "datadam"),
    ],
)
def test_the_shell_completes(words: str, expected: str) -> None:
    variables = {"_DDRAY_COMPLETE": "source_bash"}
    if words:
        last = str(len(words.split()) - 1)
        variables = {"_DDRAY_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": last}
    done = subprocess.run(
        [sys.executable, "-c", "from ddray.cli import main; main()"],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert expected in done.stdout, done.stderr


class TestResult:
    class Score(Result):
        """A result with a value that is measured only sometimes."""

        name: str
        accuracy: float | None = None

    def test_what_was_not_measured_is_absent(self) -> None:
        assert self.Score(name="a").dump() == {"name": "a"}
        assert self.Score(name="a", accuracy=None).dump() == {"name": "a", "accuracy": None}

    def test_it_can_be_indexed(self) -> None:
        score = self.Score(name="a")
        assert score["name"] == "a"
        assert "accuracy" not in score
        with pytest.raises(KeyError):
            score["accuracy"]
