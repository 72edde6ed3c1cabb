"""`--resume --steps MORE`: a run is continued to the bytes of one long run, or refused with the reason."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddray.config import read_yaml
from ddray.errors import DivergedError, InputError
from ddray.jobs import context
from ddray.jobs import distill as job
from ddray.jobs.distill import DistillResult, distill, distill_unit
from ddray.jobs.plan import Plan, resolve
from ddray.methods import get_method
from ddray.runs.folder import Run
from ddray.runs.ledger import Ledger

SMALL = {"arch": "convnet2_w8", "compile": "off", "checkpoint_every": 2, "method": {"batch_real": 4}}
CPU = torch.device("cpu")
Straight = Callable[[int], Path]


def plan_of(digits: Any, steps: int, method: str = "dm", **changes: Any) -> Plan:
    return resolve(method, digits, ipc=1, layers=[{**SMALL, "steps": steps, **changes}])


def run(digits: Any, folder: Path, steps: int, **options: Any) -> DistillResult:
    return distill(
        plan_of(digits, steps), device=CPU, run_dir=folder, resume=True, more_steps=True, **options
    )


@pytest.fixture(scope="module")
def straight(digits: Any, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """Makes the folder of a run of so many steps without a break, once."""
    parent = tmp_path_factory.mktemp("straight")

    def make(steps: int) -> Path:
        folder = parent / str(steps)
        if not folder.exists():
            run(digits, folder, steps)
        return folder

    return make


def assert_same(folder: Path, whole: Path, steps: int) -> None:
    """What a continued run leaves says its number of steps everywhere, and is what one long run leaves."""
    for name in ("distilled.pt", "distilled.json", "distilled.png"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    before, after = (read_yaml(path / "config.yaml") for path in (whole, folder))
    assert after == before
    assert after["steps"] == steps
    assert json.loads((folder / "distilled.json").read_text())["losses"][-1][0] == steps
    (row,) = Ledger(folder).rows()
    assert (row.spec["steps"], row.result["steps"]) == (steps, steps)
    with (folder / "results.csv").open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert (line["steps"], line["spec.steps"], line["key"]) == (str(steps), str(steps), row.key)
    assert [path.stem for path in (folder / "checkpoints").glob("*.pt")] == [row.key]


def test_two_extensions_in_a_row_give_the_bytes_of_one_long_run(
    digits: Any, tmp_path: Path, straight: Straight
) -> None:
    results = [run(digits, tmp_path / "run", steps) for steps in (3, 5, 9)]

    assert [(result.steps, result.resumed_from_step) for result in results] == [(3, 0), (5, 3), (9, 5)]
    assert_same(tmp_path / "run", straight(9), 9)
    assert len(list((tmp_path / "run" / "ledger").glob("*.extended"))) == 2


@pytest.mark.parametrize("at_step", [5, 8])
def test_an_extension_that_is_killed_goes_on_where_it_was(
    digits: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    straight: Straight,
    at_step: int,
) -> None:
    run(digits, tmp_path / "run", 3)
    method: Any = get_method("dm")
    with monkeypatch.context() as patch:
        step = method.step
        patch.setattr(method, "step", lambda self: 1 / 0 if self._engine._step == at_step else step(self))
        with pytest.raises(ZeroDivisionError):
            run(digits, tmp_path / "run", 9)

    again = run(digits, tmp_path / "run", 9)

    assert again.resumed_from_step == at_step // 2 * 2
    assert_same(tmp_path / "run", straight(9), 9)


def test_an_unfinished_run_is_extended_too(
    digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, straight: Straight
) -> None:
    method: Any = get_method("dm")
    with monkeypatch.context() as patch:
        step = method.step
        patch.setattr(method, "step", lambda self: 1 / 0 if self._engine._step == 3 else step(self))
        with pytest.raises(ZeroDivisionError):
            run(digits, tmp_path / "run", 5)

    assert run(digits, tmp_path / "run", 9).resumed_from_step == 2
    assert_same(tmp_path / "run", straight(9), 9)


class Killed(BaseException):
    """Ends the process, as far as a test can."""


@pytest.mark.parametrize("last", [5, 9])
@pytest.mark.parametrize("where", ["withdraw", "write_config"])
@pytest.mark.parametrize("is_late", [False, True])
def test_a_kill_while_the_folder_changes_hands_harms_nothing(
    digits: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    straight: Straight,
    last: int,
    where: str,
    is_late: bool,
) -> None:
    """Afterwards the run can be extended, or resumed as what config.yaml says it is."""
    run(digits, tmp_path / "run", 5)
    owner: Any = {"withdraw": Ledger, "write_config": Run}[where]
    original = getattr(owner, where)

    def killed(*arguments: Any) -> None:
        if is_late:
            original(*arguments)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(owner, where, killed)
        with pytest.raises(Killed):
            run(digits, tmp_path / "run", 9)
    if last == 5 and read_yaml(tmp_path / "run" / "config.yaml")["steps"] == 9:
        with pytest.raises(InputError, match="changed: steps: 9 -> 5"):
            run(digits, tmp_path / "run", 5)
        return

    result = run(digits, tmp_path / "run", last)

    assert result.steps == last
    assert (tmp_path / "run" / "distilled.pt").read_bytes() == (straight(last) / "distilled.pt").read_bytes()
    assert len(Ledger(tmp_path / "run").rows()) == 1


def test_without_its_last_checkpoint_a_run_is_repeated_with_a_warning(
    digits: Any, tmp_path: Path, straight: Straight, caplog: pytest.LogCaptureFixture
) -> None:
    run(digits, tmp_path / "run", 3)
    shutil.rmtree(tmp_path / "run" / "checkpoints")

    assert run(digits, tmp_path / "run", 9).resumed_from_step == 0
    assert [
        record.message for record in caplog.records if "the first 3 steps are run again" in record.message
    ]
    assert_same(tmp_path / "run", straight(9), 9)


def test_initial_images_are_extended_whatever_the_schedule(digits: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"device": CPU, "resume": True, "more_steps": True}
    first, whole = (
        distill(plan_of(digits, steps, "cafe"), run_dir=tmp_path / name, **options)
        for steps, name in ((0, "run"), (2, "whole"))
    )
    assert first.steps == 0

    distill(plan_of(digits, 2, "cafe"), run_dir=tmp_path / "run", **options)

    assert (tmp_path / "run" / "distilled.pt").read_bytes() == Path(whole.artifact).read_bytes()


def test_a_schedule_over_the_steps_is_refused_before_anything_changes(digits: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    distill(plan_of(digits, 2, "cafe"), device=CPU, run_dir=folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    with pytest.raises(InputError, match=r"--steps 4 can\'t continue a run of 2, cafe .* 60, 80 and 90 %"):
        distill(plan_of(digits, 4, "cafe"), device=CPU, run_dir=folder, resume=True, more_steps=True)

    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_run_that_only_its_length_would_compile_is_refused(
    digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "wants_compile", lambda choice, *, num_steps, **_: num_steps > 5)
    run(digits, tmp_path / "run", 3)
    run(digits, tmp_path / "run", 5)

    with pytest.raises(InputError, match="compiles a run of 9 from its first step"):
        run(digits, tmp_path / "run", 9)


def test_a_method_that_compiles_nothing_is_extended(digits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "wants_compile", lambda choice, *, num_steps, **_: num_steps > 5)
    compiles = {
        name: context.check_plan(resolve(name, digits, ipc=1, layers=[{"arch": "convnet2_w8", "steps": 9}]))
        for name in ("dm", "dsdm", "dc", "dd", "kip", "frepo", "mtt")
    }
    assert [name for name, does in compiles.items() if does] == ["dm", "dsdm"]
    context.check_longer(plan_of(digits, 3, "dc"), plan_of(digits, 9, "dc"))


@pytest.mark.parametrize(
    ("steps", "more_steps", "message"),
    [
        (4, True, r"changed: steps: 5 -> 4; use the old values, or a new --run-dir"),
        (9, False, r"changed: steps: 5 -> 9; use the old values \(or name --steps 9 to extend it\)"),
    ],
)
def test_only_more_steps_asked_for_by_name_extend_a_run(
    digits: Any, tmp_path: Path, steps: int, more_steps: bool, message: str
) -> None:
    run(digits, tmp_path / "run", 5)

    with pytest.raises(InputError, match=message):
        distill(
            plan_of(digits, steps), device=CPU, run_dir=tmp_path / "run", resume=True, more_steps=more_steps
        )


def test_other_settings_stay_those_of_the_run(digits: Any, tmp_path: Path) -> None:
    run(digits, tmp_path / "run", 3)
    plan = plan_of(digits, 5, arch="convnet1_w8")

    with pytest.raises(InputError, match="changed: arch: 'convnet2_w8' -> 'convnet1_w8'; use"):
        distill(plan, device=CPU, run_dir=tmp_path / "run", resume=True, more_steps=True)


def test_an_extension_that_diverges_keeps_the_shorter_set(
    digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(digits, tmp_path / "run", 3)
    before = (tmp_path / "run" / "distilled.pt").read_bytes()

    def diverge(*arguments: Any, **options: Any) -> None:
        raise DivergedError("the loss must stay finite")

    with monkeypatch.context() as patch:
        patch.setattr(job, "run_distillation", diverge)
        with pytest.raises(DivergedError):
            run(digits, tmp_path / "run", 9)

    assert (tmp_path / "run" / "distilled.pt").read_bytes() == before
    assert run(digits, tmp_path / "run", 9).resumed_from_step == 3


def test_the_command_extends_by_its_option_alone(tmp_path: Path, run_command: Any) -> None:
    folder = tmp_path / "run"
    base = ["distill", "--method", "dm", "--dataset", "digits", "--ipc", "1", "--run-dir", str(folder)]
    base += ["--set", "arch=convnet2_w8", "--set", "method.batch_real=4"]
    run_command(*base, "--set", "steps=2")

    out = run_command(*base, "--steps", "4", "--resume")

    assert (out["steps"], out["resumed_from_step"]) == (4, 2)


def test_python_extends_by_steps_or_settings(tmp_path: Path) -> None:
    import ddray

    settings = {"arch": "convnet2_w8", "method.batch_real": 4}
    options: dict[str, Any] = {"run_dir": tmp_path / "run"}
    for steps in (2, 3):
        distilled = ddray.distill("dm", settings=settings, steps=steps, **options)
        assert distilled.meta.config["steps"] == steps

    distilled = ddray.distill("dm", settings={**settings, "steps": 4}, **options)

    assert distilled.meta.config["steps"] == 4
    with pytest.raises(InputError, match="or name --steps"):
        ddray.distill("dm", settings=settings, **options)


def test_the_unit_of_a_longer_run_is_another_one(digits: Any) -> None:
    assert len({distill_unit(plan_of(digits, steps), "train").key for steps in (3, 5)}) == 2
