"""The cluster examples parse; `ddray` commands in docs and examples use existing options."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from ddray.cli import app

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "configs/cluster"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted(path for path in CLUSTER.iterdir() if path.is_file())
HEADED = sorted(path for path in (ROOT / "configs").glob("*/*.yaml") if path.parent != CLUSTER)
NOT_YET: set[str] = set()


def joined(text: str) -> str:
    """Join lines continued with a backslash."""
    return re.sub(r"\\\n\s*", " ", text)


def commands_of_markdown(text: str) -> Iterator[str]:
    """Yield the `ddray ...` commands in shell blocks and in inline code."""
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
    for kind, block in fence.findall(text):
        if kind in ("bash", "console"):
            for line in joined(block).splitlines():
                line = line.removeprefix("$ ")
                if line.startswith("ddray "):
                    yield line
    for code in re.findall(r"`(ddray [^`]+)`", fence.sub("", text)):
        yield " ".join(code.split())


def strings(value: Any) -> Iterator[str]:
    """Yield every string of a YAML document."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def commands_of_example(path: Path) -> Iterator[str]:
    """Yield the `ddray ...` commands of a script or YAML file, including its header."""
    text = path.read_text(encoding="utf-8")
    header = [line.removeprefix("#") for line in text.splitlines() if line.startswith("#")]
    for line in header:
        yield from re.findall(r'"(ddray [^"]+)"', line)
    if path.suffix == ".yaml":
        bodies = [string for document in yaml.safe_load_all(text) for string in strings(document)]
    else:
        bodies = [line.strip() for line in joined(text).splitlines() if not line.startswith("#")]
    for body in bodies:
        match = re.search(r"(?:^|-- )\s*(ddray .*)", body)
        if match:
            yield match[1]


def check(command: str) -> None:
    """Parse a command line as Typer would, without running it."""
    words = [word for word in shlex.split(command, comments=True)[1:] if word != "$@"]
    typer_command = typer.main.get_command(app)
    assert words
    if words[0] in NOT_YET:
        assert words[0] not in typer_command.commands, (
            f"`ddray {words[0]}` is there now: say so in the README"
        )
        return
    if words[0].startswith("--"):  # an option of ddray itself
        assert words[0] in {name for option in typer_command.params for name in option.opts}
        return
    while hasattr(typer_command, "commands"):
        assert words, f"{command}: a group without a command"
        assert words[0] in typer_command.commands, f"{command}: no command {words[0]!r}"
        typer_command = typer_command.commands[words.pop(0)]
    if not words:
        return
    # Shell variables stay unexpanded; options and literal values are checked.
    typer_command.make_context("ddray", words)


SHOWN = [
    *((path, command) for path in PAGES for command in commands_of_markdown(path.read_text("utf-8"))),
    *((path, command) for path in EXAMPLES for command in commands_of_example(path)),
    *((path, path.read_text("utf-8").splitlines()[0].removeprefix("# ")) for path in HEADED),
]


def test_commands_are_found() -> None:
    names = {path.name for path, _ in SHOWN}
    expected = {
        "README.md",
        "CONTRIBUTING.md",
        "cluster.md",
        *(path.name for path in EXAMPLES),
        "digits.yaml",
    }
    assert expected <= names, expected - names
    assert {"distill", "evaluate", "tune", "data", "doctor"} <= {command.split()[1] for _, command in SHOWN}


@pytest.mark.parametrize(
    ("path", "command"), SHOWN, ids=[f"{path.name}:{command[6:50]}" for path, command in SHOWN]
)
def test_shown_command_has_options_that_exist(path: Path, command: str) -> None:
    assert command.startswith("ddray "), f"{path}: {command}"
    check(command)


@pytest.mark.parametrize(
    "command", ["ddray tune --method dm --no-such 1", "ddray foo", "ddray tune --ipc x --method dm"]
)
def test_a_wrong_command_is_found(command: str) -> None:
    with pytest.raises(Exception, match=r"(?i)no such|no command|valid"):
        check(command)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_opens_with_what_run_and_edit(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    head = [line for line in lines[:14] if line.startswith("#") and not line.startswith(("#!", "#SBATCH"))]
    assert [line.split(":")[0] for line in head if re.match(r"# \w+:", line)] == ["# What", "# Run", "# Edit"]


@pytest.mark.parametrize("path", sorted(CLUSTER.glob("*.sh")), ids=lambda path: path.name)
def test_script_parses(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "\nset -euo pipefail\n" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_yaml_parses(path: Path) -> None:
    documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    assert documents
    assert all(isinstance(document, dict) for document in documents)


def test_ray_cluster_fits_rays_own_schema() -> None:
    import jsonschema
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    document = yaml.safe_load((CLUSTER / "ray_cluster.yaml").read_text(encoding="utf-8"))
    jsonschema.validate(document, schema)
    assert document["max_workers"] == len(document["provider"]["worker_ips"])


def test_rayjob_shares_one_folder_and_names_the_installed_ray() -> None:
    document = yaml.safe_load((CLUSTER / "kuberay_rayjob.yaml").read_text(encoding="utf-8"))
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", "RayJob")
    cluster = document["spec"]["rayClusterSpec"]
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned
    assert cluster["rayVersion"] == pinned[1]
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert len(pods) > 1
    images = set()
    for pod in pods:
        spec = pod["template"]["spec"]
        (container,) = spec["containers"]
        images.add(container["image"])
        assert "/shared" in [mount["mountPath"] for mount in container["volumeMounts"]]
        assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in spec["volumes"]}
        values = {entry["name"]: entry["value"] for entry in container["env"]}
        assert values["DDRAY_HOME"].startswith("/shared/")
    assert len(images) == 1
    assert "--run-dir /shared/" in document["spec"]["entrypoint"]


def test_constraints_name_versions_only() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert {"torch==2.15.0", "torchvision==0.29.2"} <= set(pins)
    for line in pins:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), line
        assert not line.lower().startswith(("nvidia", "cuda", "triton", "ddray")), line
