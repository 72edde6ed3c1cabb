from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from ddray.artifact.reading import load
from ddray.commands.options import to_json
from ddray.config import Result
from ddray.data.loaders import data_info
from ddray.errors import DivergedError, InputError, InterruptedRunError
from ddray.jobs import distill as api
from ddray.jobs.distill import distill
from ddray.jobs.plan import resolve
from ddray.methods.families.ssl import memory as _krr_memory
from ddray.runs.folder import open_run

CPU = torch.device("cpu")
SMALL = {"arch": "convnet2_w8", "compile": "off", "evaluate": {"epochs": 3, "seeds": 2}}


class TestDistill:
    def plan(self, digits: Any, **changes: Any) -> Any:
        layers = {**SMALL, "steps": 6, "checkpoint_every": 2, "method": {"batch_real": 4}, **changes}
        return resolve("dm", digits, ipc=1, layers=[layers])

    def test_a_run_directory_holds_set_picture_row_and_table(self, digits: Any, tmp_path: Path) -> None:
        result = distill(self.plan(digits), device=CPU, run_dir=tmp_path / "run")

        assert set(result.dump()) == {
            *("artifact", "method", "dataset", "ipc", "steps", "resumed_from_step", "wall_s", "precision"),
            *("seconds_per_step", "first_loss", "final_loss", "run_dir", "name", "cut", "overridden"),
            *("seconds", "seconds_with_pool", "peak_memory_bytes", "storage_floats", "size_bytes", "made_of"),
        }
        assert result["made_of"] == {"images": 10 * 256 * 4, "labels": 10 * 8}
        assert result["size_bytes"] == (tmp_path / "run" / "distilled.pt").stat().st_size
        assert result["artifact"] == str(tmp_path / "run" / "distilled.pt")
        assert (result["method"], result["dataset"], result["ipc"], result["steps"]) == ("dm", "digits", 1, 6)
        assert result["name"] == "dm-digits-ipc1-seed0"
        assert result["cut"] == "epochs 3 of 300; steps 6 of 150"
        assert result["overridden"] == ["method.batch_real", "arch"]
        assert json.loads(to_json(result)) == result.dump()
        distilled = load(Path(result["artifact"]))
        assert distilled.meta.config["steps"] == 6
        assert (tmp_path / "run" / "distilled.png").stat().st_size > 0
        run = open_run(
            tmp_path / "run",
            {**self.plan(digits).describe(), "device": "cpu", "split": "train"},
            command="distill",
            resume=True,
        )
        (row,) = run.ledger.rows()
        assert (row.kind, row.status, row.result["final_loss"]) == ("distill", "done", result["final_loss"])
        assert [event["event"] for event in run.ledger.events()] == ["start", "finish"]
        assert len((tmp_path / "run" / "results.csv").read_text().splitlines()) == 2
        assert [path.name for path in run.folder.rglob("*.tmp")] == []

    def test_of_a_whitened_run_the_fit_is_measured_and_the_sets_along_it_share_it(
        self, digits: Any, tmp_path: Path
    ) -> None:
        plan = self.plan(digits, pixel_space="zca", evaluate={"epochs": 3, "seeds": 2, "every": 2})
        first, second = (distill(plan, device=CPU, run_dir=tmp_path / name) for name in "ab")

        assert first["whitening_s"] == second["whitening_s"] > 0  # fitted once, for all runs
        assert first["made_of"]["whitening"] == (256 + 256 * 256) * 4
        assert not list((tmp_path / "a").rglob("whitening-*.pt"))  # it is in the result
        steps = sorted((tmp_path / "a" / "distilled-steps").glob("*.pt"))
        assert [path.name for path in steps] == ["0000002.pt", "0000004.pt"]
        assert all(path.stat().st_size < first["made_of"]["whitening"] for path in steps)
        assert load(steps[0]).zca.keys() == load(Path(first["artifact"])).zca.keys()

    def test_a_signal_is_told_with_the_step_that_is_saved(
        self, digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from ddray.methods import get_method

        method: Any = get_method("dm")
        step = method.step

        def interrupted(self: Any) -> Any:
            if self._engine._step == 2:
                signal.raise_signal(signal.SIGINT)
            return step(self)

        whole = distill(self.plan(digits), device=CPU, run_dir=tmp_path / "whole")
        with monkeypatch.context() as patch:
            patch.setattr(method, "step", interrupted)
            with pytest.raises(
                InterruptedRunError, match="the run was interrupted at step 3 of 6, saved; run"
            ):
                distill(self.plan(digits), device=CPU, run_dir=tmp_path / "cut")

        again = distill(self.plan(digits), device=CPU, run_dir=tmp_path / "cut", resume=True)

        assert again["resumed_from_step"] == 3
        assert Path(again["artifact"]).read_bytes() == Path(whole["artifact"]).read_bytes()

    def test_a_run_cut_off_resumes_to_the_same_bytes(
        self, digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = distill(self.plan(digits), device=CPU, run_dir=tmp_path / "whole")
        from ddray.methods import get_method

        method: Any = get_method("dm")
        with monkeypatch.context() as patch:
            step = method.step
            patch.setattr(method, "step", lambda self: 1 / 0 if self._engine._step == 5 else step(self))
            with pytest.raises(ZeroDivisionError):
                distill(self.plan(digits), device=CPU, run_dir=tmp_path / "cut")
        assert not (tmp_path / "cut" / "distilled.pt").exists()

        again = distill(self.plan(digits), device=CPU, run_dir=tmp_path / "cut", resume=True)

        assert again["resumed_from_step"] == 4
        assert again["final_loss"] == whole["final_loss"]
        assert Path(again["artifact"]).read_bytes() == Path(whole["artifact"]).read_bytes()

    def test_a_failed_run_keeps_the_old_artifact_and_may_be_tried_again(
        self, digits: Any, tmp_path: Path
    ) -> None:
        out = tmp_path / "out.pt"
        out.write_bytes(b"old")
        plan = self.plan(digits, method={"batch_real": 4, "lr_img": 1e30})

        with pytest.raises(DivergedError):
            distill(plan, device=CPU, run_dir=tmp_path / "run", out=out)

        assert out.read_bytes() == b"old"
        run = open_run(
            tmp_path / "run",
            {**plan.describe(), "device": "cpu", "split": "train"},
            command="distill",
            resume=True,
        )
        assert run.ledger.rows() == []
        assert [event["event"] for event in run.ledger.events()] == ["start", "fail"]

    def test_what_can_be_refused_is_refused_before_a_folder_is_made(
        self, digits: Any, tmp_path: Path
    ) -> None:
        plans = [
            resolve("herding", digits, ipc=1, layers=[{"steps": 3}]),
            resolve("dm", digits, ipc=500),
        ]
        for plan in plans:
            with pytest.raises(InputError):
                distill(plan, device=CPU, run_dir=tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_what_a_methods_setup_refuses_leaves_no_folder(
        self, digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_krr_memory, "available_bytes", lambda device: 2**20)
        plan = resolve("krr_st", digits, budget=20, layers=[{"steps": 1}])

        with pytest.raises(InputError, match="krr_st needs about"):
            distill(plan, device=CPU, run_dir=tmp_path / "run")

        assert not (tmp_path / "run").exists()

    def test_the_unit_depends_on_what_decides_the_bytes_alone(self, digits: Any) -> None:
        def key(**changes: Any) -> str:
            return api.distill_unit(self.plan(digits, **changes), "train").key

        assert key() == key(checkpoint_every=5) == key(evaluate={"epochs": 9})
        assert len({key(), key(steps=7), key(method={"lr_img": 2}), key(arch="convnet1_w8")}) == 4
        assert api.distill_unit(self.plan(digits), "train-val0").key != key()


def test_data_info(digits: Any) -> None:
    info = data_info("digits")

    assert info["num_classes"] == 10
    assert (info["num_train"], info["num_test"]) == (len(digits.train()), len(digits.test()))
    assert info["num_train"] + info["num_test"] == 1797
    assert info["image_shape"] == [1, 16, 16]
    assert info["fingerprint"] == digits.fingerprint


def test_an_undefined_number_is_null_in_json() -> None:
    class Values(Result):
        number: float
        values: tuple[Any, ...]
        nested: dict[str, float]
        left_out: int | None = None

    result = Values(
        number=float("nan"), values=(1.5, float("inf"), (None, "nan")), nested={"d": -float("inf")}
    )

    assert json.loads(to_json(result)) == {
        "number": None,
        "values": [1.5, None, [None, "nan"]],
        "nested": {"d": None},
    }
