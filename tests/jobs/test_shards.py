from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ddray.cluster.shards import distill_on
from ddray.distillation.loop import Distillation
from ddray.distillation.method import coupling_by_norm
from ddray.errors import DdrayError, DivergedError, InputError
from ddray.jobs import shard_worker
from ddray.jobs import shards as shards_job
from ddray.jobs.context import make_context
from ddray.jobs.distill import DistillResult, distill
from ddray.jobs.options import DistillOptions, ShardOptions
from ddray.jobs.plan import Plan, resolve
from ddray.jobs.shards import distill_shards
from ddray.runs.ledger import Ledger, Unit
from tests.jobs.elsewhere import Elsewhere

SMALL = {"arch": "convnet2_w8", "compile": "off", "steps": 4, "checkpoint_every": 2}
DM = {"method": {"batch_real": 4}}


def plan_of(digits: Any, name: str = "dm", **settings: Any) -> Plan:
    size = {"budget": 40} if name == "krr_st" else {"ipc": 1}
    return resolve(name, digits, layers=[{**SMALL, **settings}], **size)


def in_shards(plan: Plan, num: int, run_dir: Path, *, more_steps: bool = False, **how: Any) -> DistillResult:
    options = DistillOptions(run_dir=run_dir, device="cpu", **how)
    return distill_on(plan, options, ShardOptions(shards=num, executor="local"), more_steps)


def unsharded(plan: Plan, run_dir: Path) -> DistillResult:
    return distill(plan, device=torch.device("cpu"), run_dir=run_dir)


def test_shards_are_rows_and_their_set_is_the_unsharded_runs(digits: Any, tmp_path: Path) -> None:
    plan = plan_of(digits, **DM)
    whole = unsharded(plan, tmp_path / "whole")

    result = in_shards(plan, 3, tmp_path / "run", out=tmp_path / "out.pt")

    assert Path(result["artifact"]).read_bytes() == Path(whole["artifact"]).read_bytes()
    assert result["artifact"] == str(tmp_path / "out.pt")
    ledger = Ledger(tmp_path / "run")
    rows = sorted(ledger.rows("shard"), key=lambda row: row.spec["classes"])
    assert [row.spec["classes"] for row in rows] == [[0, 3], [3, 6], [6, 10]]
    seconds = [row.result["seconds"] for row in rows]
    assert result["seconds"] == pytest.approx(sum(seconds))
    assert result["peak_memory_bytes"] == max(row.result["peak_memory_bytes"] for row in rows)
    assert result["shards"] == 3
    assert result["final_loss"] == pytest.approx(whole["final_loss"])
    assert result["storage_floats"] == whole["storage_floats"]
    (row,) = ledger.rows("distill")
    (expected,) = Ledger(tmp_path / "whole").rows()
    assert row.key == expected.key
    curves = [json.loads((tmp_path / name / "distilled.json").read_text()) for name in ("run", "whole")]
    assert [point[0] for point in curves[0]["losses"]] == [point[0] for point in curves[1]["losses"]]
    starts = [event["key"] for event in ledger.events() if event["event"] == "start"]
    assert sorted(starts) == sorted(row.key for row in ledger.rows())


def test_a_resumed_run_repeats_no_finished_shard_and_goes_on_in_the_others(
    digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, run = plan_of(digits, **DM), tmp_path / "run"
    whole = unsharded(plan, tmp_path / "whole")
    steps: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(shard_worker, "run_distillation", _interrupted(shard_worker.run_distillation, steps))
        with pytest.raises(DivergedError):
            in_shards(plan, 3, run)
    before = {path.name: path.stat().st_mtime_ns for path in (run / "ledger").glob("*.json")}
    assert len(before) == 1
    assert not (run / "distilled.pt").exists()

    result = in_shards(plan, 3, run, resume=True)

    assert Path(result["artifact"]).read_bytes() == Path(whole["artifact"]).read_bytes()
    after = {path.name: path.stat().st_mtime_ns for path in (run / "ledger").glob("*.json")}
    assert before.items() <= after.items()
    resumed = sorted(row.result["resumed_from_step"] for row in Ledger(run).rows("shard"))
    assert resumed == [0, 0, 2]
    again = in_shards(plan, 3, run, resume=True)
    assert {path.name: path.stat().st_mtime_ns for path in (run / "ledger").glob("*.json")} == after
    assert again["seconds"] == result["seconds"]


def _interrupted(run: Any, calls: list[int]) -> Any:
    """Return a run whose second call stops after two of its steps."""

    def call(distiller: Any, ctx: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) < 2:
            return run(distiller, ctx, **options)
        run(distiller, ctx, **options, until=2)
        raise DivergedError("stopped")

    return call


def test_a_damaged_shard_is_run_again(digits: Any, tmp_path: Path) -> None:
    plan, run = plan_of(digits, **DM), tmp_path / "run"
    first = Path(in_shards(plan, 2, run)["artifact"]).read_bytes()
    damaged = next(iter((run / "shards").glob("*.pt")))
    damaged.write_bytes(b"torn")

    again = in_shards(plan, 2, run, resume=True)

    assert Path(again["artifact"]).read_bytes() == first
    assert (run / "ledger" / f"{damaged.stem}.damaged").is_file()


def test_a_run_is_extended_shard_by_shard(digits: Any, tmp_path: Path, caplog: Any) -> None:
    in_shards(plan_of(digits, **DM), 2, tmp_path / "run")
    longer = plan_of(digits, **{**DM, "steps": 6})

    result = in_shards(longer, 2, tmp_path / "run", resume=True, more_steps=True)

    whole = unsharded(longer, tmp_path / "whole")
    assert Path(result["artifact"]).read_bytes() == Path(whole["artifact"]).read_bytes()
    assert result["resumed_from_step"] == 4
    assert "no checkpoint" not in caplog.text


def test_networks_of_the_pool_are_trained_once_before_the_shards(digits: Any, tmp_path: Path) -> None:
    pool = {"pool": {"num_models": 2, "epochs": 1}, "batch_real": 4}
    result = in_shards(plan_of(digits, "dsdm", method=pool), 2, tmp_path / "run")

    rows = Ledger(tmp_path / "run").rows("shard")
    assert result["seconds_with_pool"] > result["seconds"]
    assert result["seconds_with_pool"] - result["seconds"] == pytest.approx(rows[0].result["pool_s"])


@pytest.mark.parametrize(
    ("method", "num", "settings", "message"),
    [
        ("idm", 2, {}, "idm's are not: its queue of networks"),
        ("dm", 2, {"arch": "convnet2_w8_bn"}, "dm's are not: the batch norm of convnet2_w8_bn"),
        ("krr_st", 2, {}, "krr_st's are not: it learns from all images together"),
        ("dm", 11, {}, r"--shards must be in 1..10 \(the classes of digits\), got 11"),
        ("dm", 2, {"evaluate": {"every": 2}}, "evaluate.every must be left out"),
        ("dm", 2, {"precision": "auto"}, "precision must be"),
    ],
)
def test_what_shards_cannot_give_is_refused_before_anything_is_written(
    method: str, num: int, settings: dict[str, Any], message: str, digits: Any, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        in_shards(plan_of(digits, method, **settings), num, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpus_per_shard": 2.0}, "--cpus-per-shard must be left out without --shards"),
        ({"shards": 2, "executor": "local", "address": "auto"}, "--address must be left out with --executor"),
        ({"shards": 0}, "--shards"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ShardOptions.pick(options)


def test_other_shards_are_another_configuration(digits: Any, tmp_path: Path) -> None:
    plan = plan_of(digits, **DM)
    in_shards(plan, 2, tmp_path / "run")
    with pytest.raises(InputError, match="changed: shards: 2 -> 3"):
        in_shards(plan, 3, tmp_path / "run", resume=True)


@pytest.mark.parametrize("settings", [{"pixel_space": "zca"}, {}])
def test_workers_that_open_the_dataset_themselves_make_the_same_set(
    settings: dict[str, Any], digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, how = plan_of(digits, **DM, **settings), {"val_seed": 3}
    whole = distill(plan, device=torch.device("cpu"), run_dir=tmp_path / "whole", **how)
    monkeypatch.setattr(
        shards_job, "LocalExecutor", type("Other", (), {})
    )  # so that it is none of this process

    result = distill_shards(
        plan,
        DistillOptions(run_dir=tmp_path / "run", device="cpu", **how),
        ShardOptions(shards=3),
        Elsewhere(),
        device="cpu",
    )

    assert Path(result["artifact"]).read_bytes() == Path(whole["artifact"]).read_bytes()


def test_a_worker_with_another_copy_of_the_dataset_ends_the_run(
    digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(digits, **DM)
    fewer = replace(digits, load_train=lambda: digits.train().select(torch.arange(900)))
    monkeypatch.setattr(shard_worker, "open_dataset", lambda name, **_: fewer)
    monkeypatch.setattr(shards_job, "LocalExecutor", type("Other", (), {}))
    options = DistillOptions(run_dir=tmp_path / "run", device="cpu")
    with pytest.raises(InputError, match="must be the same on every node"):
        distill_shards(plan, options, ShardOptions(shards=2), Elsewhere(), device="cpu")


def test_a_shard_whose_losses_are_gone_is_run_again(digits: Any, tmp_path: Path) -> None:
    plan, run = plan_of(digits, **DM), tmp_path / "run"
    first = in_shards(plan, 2, run)
    next(iter((run / "shards").glob("*.json"))).unlink()

    again = in_shards(plan, 2, run, resume=True)

    assert again["final_loss"] == first["final_loss"]
    assert len(list((run / "ledger").glob("*.damaged"))) == 1


def test_rows_of_another_process_end_this_one(digits: Any, tmp_path: Path) -> None:
    plan, run = plan_of(digits, **DM), tmp_path / "run"
    in_shards(plan, 2, run)
    ledger = Ledger(run)
    units = [Unit(kind="shard", spec={"steps": 4, "classes": [0, 1]})]
    with pytest.raises(DdrayError, match="another process has resumed"):
        shard_worker.joined(ledger, units, 0.0, takes_steps=True)


@pytest.mark.parametrize("arch", ["vgg11_tv", "efficientnet_b0_in"])
def test_networks_that_drop_at_random_are_refused(arch: str) -> None:
    reason = coupling_by_norm(arch)
    assert reason is not None
    assert "drops" in reason


def test_what_each_shard_measured_is_averaged(digits: Any) -> None:
    sets = [
        part_of(digits, label, measures) for label, measures in ((0, {"s": 1.0}), (1, {}), (2, {"s": 3.0}))
    ]
    assert shard_worker.join_distillations(sets, takes_steps=True, wall_s=0.0).measures == {"s": 2.0}


def part_of(digits: Any, label: int, measures: dict[str, float]) -> Distillation:
    ctx = make_context(plan_of(digits, **DM), digits.train(), split_name="train", device=torch.device("cpu"))
    distilled = ctx.make_set(torch.zeros(1, *digits.image_shape), torch.tensor([label]))
    return Distillation(distilled, torch.zeros(1), 0, 0.0, None, measures=measures)


@pytest.mark.parametrize(
    ("device", "gpus", "message"),
    [
        ("cuda", None, "--device cuda needs GPUs"),
        ("cpu", 1.0, "--gpus-per-shard must be 0 with --device cpu"),
    ],
)
def test_a_device_that_shards_do_not_get_is_refused(
    device: str, gpus: float | None, message: str, digits: Any, tmp_path: Path
) -> None:
    options = DistillOptions(run_dir=tmp_path / "run", device=device)
    with pytest.raises(InputError, match=message):
        distill_on(plan_of(digits, **DM), options, ShardOptions(shards=2, gpus_per_shard=gpus), False)
    assert not (tmp_path / "run").exists()
