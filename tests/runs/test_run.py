from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from ddray.config import read_yaml
from ddray.errors import InputError, InterruptedRunError
from ddray.runs.folder import _numbered, extended_from, open_run, read_config
from ddray.system.interrupts import SavedInterrupt

CONFIG = {"steps": 3, "lr": 1e-05, "method": {"layers": (1, 2), "init": None}, "name": "digits"}


def test_a_fresh_run_describes_itself(tmp_path: Path) -> None:
    run = open_run(tmp_path / "a" / "run", CONFIG, command="distill", resume=False)

    assert not run.resumed
    assert run.epoch == 1
    assert run.folder == tmp_path / "a" / "run"
    assert run.checkpoint("key") == run.folder / "checkpoints" / "key.pt"
    plain = json.loads(json.dumps(CONFIG))
    assert read_yaml(run.folder / "config.yaml") == {"command": "distill", **plain}
    environment = json.loads((run.folder / "environment.json").read_text())
    assert {"versions", "processor", "git_commit", "command", "date", "devices"} <= environment.keys()
    assert environment["versions"]["torch"]
    assert sorted(path.name for path in run.folder.iterdir()) == [
        *("checkpoints", "config.yaml", "environment.json", "epoch", "epoch.lock", "ledger")
    ]


def test_without_a_name_folders_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "distill-0007").mkdir(parents=True)
    (tmp_path / "runs" / "distill-best").mkdir()

    folders = [
        open_run(None, CONFIG, command=command, resume=False).folder
        for command in ("distill", "distill", "tune")
    ]

    assert folders == [tmp_path / "runs" / name for name in ("distill-0008", "distill-0009", "tune-0001")]


def test_many_at_once_get_a_folder_each(tmp_path: Path) -> None:
    folders: list[Path] = []
    gate = threading.Barrier(8)

    def make() -> None:
        gate.wait()
        folders.extend(_numbered(tmp_path, "tune") for _ in range(10))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(set(folders)) == len(folders) == 80


def test_a_relative_name_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = open_run(Path("here"), CONFIG, command="tune", resume=False)
    monkeypatch.chdir("/")

    assert run.folder == tmp_path / "here"
    assert run.checkpoint("k").is_absolute()


def test_an_existing_folder_is_refused_untouched(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")

    for resume, message in ((False, "must be a new folder"), (True, r"has no config\.yaml")):
        with pytest.raises(InputError, match=message):
            open_run(folder, CONFIG, command="distill", resume=resume)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_an_empty_folder_is_refused_like_any_other_but_may_be_resumed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()

    with pytest.raises(InputError, match="add --resume"):
        open_run(tmp_path / "run", CONFIG, command="distill", resume=False)
    assert not open_run(tmp_path / "run", CONFIG, command="distill", resume=True).resumed


def test_a_file_is_no_run_directory(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")

    for resume in (False, True):
        with pytest.raises(InputError, match=r"--run-dir must be a folder, .* is a file"):
            open_run(tmp_path / "run", CONFIG, command="distill", resume=resume)


def test_resume_continues_the_same_configuration_in_a_new_epoch(tmp_path: Path) -> None:
    first = open_run(tmp_path / "run", CONFIG, command="distill", resume=False)
    before = (first.folder / "config.yaml").read_bytes()

    again = open_run(tmp_path / "run", CONFIG, command="distill", resume=True)

    assert again.resumed
    assert (first.epoch, again.epoch) == (1, 2)
    assert (first.folder / "config.yaml").read_bytes() == before


def test_resume_of_a_missing_folder_starts_fresh(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", CONFIG, command="distill", resume=True)

    assert not run.resumed
    assert run.epoch == 1


def test_resume_after_a_crash_while_the_folder_was_being_made_starts_fresh(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "environment.json").write_text("{}")
    (folder / ".config.yaml.abc123.tmp").write_text("steps:")

    run = open_run(folder, CONFIG, command="distill", resume=True)

    assert not run.resumed
    assert read_yaml(folder / "config.yaml")["steps"] == 3


@pytest.mark.parametrize(
    ("change", "command", "diff"),
    [
        ({"steps": 2}, "distill", "steps: 3 -> 2"),
        ({"method": {"layers": (1, 3), "init": None}}, "distill", r"method\.layers: \[1, 2\] -> \[1, 3\]"),
        ({"more": 1}, "distill", "more: None -> 1"),
        ({}, "tune", "command: 'distill' -> 'tune'"),
    ],
)
def test_resume_with_another_configuration_is_refused_with_the_difference(
    change: dict[str, object], command: str, diff: str, tmp_path: Path
) -> None:
    run = open_run(tmp_path / "run", CONFIG, command="distill", resume=False)

    with pytest.raises(InputError, match=f"changed: {diff}; use the old values, or a new --run-dir"):
        open_run(tmp_path / "run", {**CONFIG, **change}, command=command, resume=True)
    assert run.ledger.open_epoch() == 2  # the refused one opened none


def test_an_extended_run_keeps_its_configuration_until_the_new_one_is_written(tmp_path: Path) -> None:
    open_run(tmp_path / "run", CONFIG, command="distill", resume=False)
    longer = {**CONFIG, "steps": 4}
    assert extended_from(read_config(tmp_path / "run"), "steps", 4) == 3
    with pytest.raises(InputError, match=r"use the old values \(or name --steps 4 to extend it\), or a new"):
        open_run(tmp_path / "run", longer, command="distill", resume=True)

    run = open_run(tmp_path / "run", longer, command="distill", resume=True, extended={"steps": 3})

    assert read_config(tmp_path / "run")["steps"] == 3
    run.write_config()
    assert read_config(tmp_path / "run")["steps"] == 4
    assert open_run(tmp_path / "run", longer, command="distill", resume=True).resumed
    assert [extended_from(config, "steps", 4) for config in ({}, {"steps": 4}, {"steps": "a"})] == [None] * 3
    assert read_config(None) == read_config(tmp_path / "none") == {}


def test_resume_needs_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(InputError, match="--resume needs --run-dir"):
        open_run(None, CONFIG, command="distill", resume=True)
    assert list(tmp_path.glob("runs*")) == []


def test_a_place_that_cannot_hold_a_folder_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(InputError, match=r"--run-dir must be a folder, .*/file is a file"):
        open_run(tmp_path / "file" / "run", CONFIG, command="distill", resume=False)


@pytest.mark.parametrize(
    ("error", "event"),
    [
        (KeyboardInterrupt(), "the bench was interrupted"),
        (SavedInterrupt("at step 3 of 9, saved"), "the bench was interrupted at step 3 of 9, saved"),
        (InterruptedRunError("the sweep was interrupted", Path("nas/x")), "the sweep was interrupted"),
    ],
)
def test_an_interrupt_says_how_the_run_goes_on(error: BaseException, event: str, tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", CONFIG, command="bench", resume=False)

    with pytest.raises(InterruptedRunError) as caught, run.continued("the bench"):
        raise error

    assert str(caught.value) == f"{event}; run again with --run-dir {run.folder} --resume to finish it"
