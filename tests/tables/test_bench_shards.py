"""Sets of a bench that are distilled in shards of classes: units of their own, joined to the same file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ddray.config import read_yaml
from ddray.errors import DdrayError, InputError, InterruptedRunError
from ddray.jobs import shard_worker
from ddray.methods import get_method
from ddray.report.page import write_page
from ddray.runs.costs import History
from ddray.runs.executor import LocalExecutor
from ddray.runs.ledger import Ledger, Row
from ddray.system.files import home
from ddray.tables import worker
from ddray.tables.cost import estimate_of, summarise
from ddray.tables.dry_run import dry_run
from ddray.tables.run import prepare
from ddray.tables.spec import BenchSpec, read_spec
from ddray.tables.units import shards_of
from tests.tables.benches import LOCAL, TINY, repeatable, run, spec, starts

DM = {"name": "dm", "steps": 2, "set": {"method.batch_real": 4}}
SMALL = {"evaluate": {"epochs": 1, "seeds": 1}, "seeds": 1}


def table(**changes: Any) -> BenchSpec:
    return spec(**{**SMALL, "methods": [DM], **changes})


def digests(folder: Path) -> dict[str, str]:
    return {row.key: row.result["sha256"] for row in Ledger(folder).rows("distill")}


def shard_rows(folder: Path) -> list[Row]:
    return sorted(Ledger(folder).rows("shard"), key=lambda row: row.spec["classes"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without shards."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDRAY_HOME", str(folder / "home"))
        run(folder / "run", table(methods=["random", DM]))
    return folder / "run"


def test_a_set_of_shards_is_the_file_of_the_run_without(whole: Path, tmp_path: Path) -> None:
    result = run(tmp_path / "run", table(methods=["random", DM], shards=3))

    assert (result["num_failed"], result["skipped"]) == (0, [])
    assert digests(tmp_path / "run") == digests(whole)
    assert (tmp_path / "run" / "table.csv").read_bytes() == (whole / "table.csv").read_bytes()
    rows = [row for row in shard_rows(tmp_path / "run") if row.spec["method"] == "dm"]
    assert [row.spec["classes"] for row in rows] == [[0, 3], [3, 6], [6, 10]]
    assert all(row.result["seconds"] > 0 and row.result["peak_memory_bytes"] > 0 for row in rows)
    (joined,) = [row for row in Ledger(tmp_path / "run").rows("distill") if row.spec["method"] == "dm"]
    assert joined.result["seconds"] == pytest.approx(sum(row.result["seconds"] for row in rows))
    assert joined.result["shards"] == 3
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    titles = {event.get("title") for event in Ledger(tmp_path / "run").events()}
    assert "dm digits ipc 1 seed 0, classes 6..9" in titles
    write_page([tmp_path / "run"], tmp_path / "page.html", planes=False)
    text = (tmp_path / "page.html").read_text()
    assert "<td>shard</td><td>6</td>" in text
    assert "dm digits ipc 1 seed 0, classes 6..9" in text


def test_a_row_has_its_own_number_and_config_says_so_only_of_shards(whole: Path, tmp_path: Path) -> None:
    config = read_yaml(whole / "config.yaml")
    assert "shards" not in str(config)
    rows = ["random", {**DM, "shards": 2}]
    run(tmp_path / "run", table(methods=rows))
    assert {row.spec["method"] for row in shard_rows(tmp_path / "run")} == {"dm"}
    in_shards = read_yaml(tmp_path / "run" / "config.yaml")
    assert in_shards.pop("shards_of_rows") == {"random": 1, "dm": 2}
    assert in_shards == config
    assert digests(tmp_path / "run") == digests(whole)


def test_a_resumed_run_repeats_no_finished_shard(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, sharded = tmp_path / "run", table(shards=3)
    real, calls = worker.publish, []

    def publish(*args: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(worker, "publish", publish)
        with pytest.raises(InterruptedRunError, match="the bench was interrupted; run again with"):
            run(folder, sharded)
    before = {row.key for row in shard_rows(folder)}
    assert len(before) == 2
    run(folder, sharded, resume=True)
    assert all(starts(folder)[key] == 1 for key in before)
    assert digests(folder).items() <= digests(whole).items()

    # Without its row the set is joined again; no shard runs, and another number of shards is no change.
    ((key, digest),) = digests(folder).items()
    Ledger(folder).withdraw(key, "lost")
    shards = [row.key for row in shard_rows(folder)]
    events = len(Ledger(folder).events())
    run(folder, sharded, resume=True)
    assert {event["key"] for event in Ledger(folder).events()[events:]}.isdisjoint(shards)
    assert digests(folder) == {key: digest}
    Ledger(folder).withdraw(key, "lost")
    run(folder, table(shards=2), resume=True)
    assert digests(folder) == {key: digest}
    assert len(shard_rows(folder)) == 3 + 2


def test_a_damaged_shard_is_distilled_again_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "run"
    run(folder, table(shards=3))
    expected = digests(folder)
    damaged, *others = shard_rows(folder)
    (folder / damaged.result["artifact"]).write_bytes(b"torn")
    Ledger(folder).withdraw(*expected, "lost")

    result = run(folder, table(shards=3), resume=True)

    assert digests(folder) == expected
    assert (result["num_failed"], result["skipped"]) == (0, [])
    assert starts(folder)[damaged.key] == 2
    assert [starts(folder)[row.key] for row in others] == [1, 1]
    assert "is missing or damaged; it is distilled again" in caplog.text


def test_a_shard_that_never_stays_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "has_shard", lambda ledger, unit: unit.spec["classes"][0] > 0)
    with pytest.raises(DdrayError, match=r"distilled 3 times.*folder must be one that all nodes share"):
        run(tmp_path / "run", table(shards=2))


def test_a_diverged_shard_leaves_its_set_out_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench_spec = table(methods=["random", {**DM, "set": {"method.lr_img": 1e30, "method.batch_real": 4}}])
    sharded = bench_spec.model_copy(update={"shards": 2})
    result = run(tmp_path / "run", sharded)
    assert [cell["method"] for cell in result["cells"]] == ["random"]
    assert [failure["kind"] for failure in result["failures"]] == ["shard", "shard"]
    assert "lower lr_img" in result["failures"][0]["reason"]
    assert [title.partition(",")[0] for title in result["skipped"]] == ["dm digits ipc 1 seed 0"] * 2
    again = run(tmp_path / "run", sharded, resume=True, retry_failed=True)
    assert again["failures"] == result["failures"], "what diverged would diverge again"
    assert repeatable(again) == repeatable(result)


def test_a_crashed_shard_can_be_tried_again_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, bench_spec = tmp_path / "run", table(methods=["random", DM], shards=2)
    real = get_method("dm").step
    calls: list[int] = []

    def step(self: Any) -> Any:
        calls.append(1)
        return real(self) if len(calls) <= 2 else 1 / 0

    with monkeypatch.context() as patch:
        patch.setattr(get_method("dm"), "step", step)
        result = run(folder, bench_spec)
    (failure,) = result["failures"]
    assert failure["reason"] == "failed 3 times; last: ZeroDivisionError: division by zero"
    assert run(folder, bench_spec, resume=True)["failures"] == [failure]
    mended = run(folder, bench_spec, resume=True, retry_failed=True)
    assert (mended["num_failed"], mended["skipped"]) == (0, [])
    assert sorted(starts(folder)[row.key] for row in shard_rows(folder)) == [1, 1, 1, 2]


def test_networks_of_the_pool_are_trained_once_before_the_shards(tmp_path: Path) -> None:
    changes = {"methods": ["kcenter"], "set": {**TINY["set"], "method.feature_epochs": 1}}
    run(tmp_path / "run", table(**changes, shards=2))
    ledger = Ledger(tmp_path / "run")
    (network,) = ledger.rows("pool")
    (row,) = ledger.rows("distill")
    assert row.result["pool"] == [network.spec["pool_key"]]
    assert [shard.result["pool"] for shard in shard_rows(tmp_path / "run")] == [row.result["pool"]] * 2
    run(tmp_path / "whole", table(**changes))
    assert digests(tmp_path / "run") == digests(tmp_path / "whole")


def test_a_network_that_is_gone_when_a_shard_starts_is_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"methods": ["kcenter"], "set": {**TINY["set"], "method.feature_epochs": 1}, "shards": 2}
    real, gone = worker._TASKS["shard"], []

    def distil(*arguments: Any) -> Any:
        if not gone:
            gone.append((home() / "pool").rename(home() / "elsewhere"))
        return real(*arguments)

    monkeypatch.setitem(worker._TASKS, "shard", distil)
    result = run(tmp_path / "run", table(**changes))
    assert (result["num_failed"], result["skipped"], len(gone)) == (0, [], 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["dm", "dc"], "shards": 2}, "row dc: shards needs independent classes, dc's are not: "),
        (
            {"methods": [DM], "shards": 11},
            r"row dm: shards must be in 1..10 \(the classes of digits\), got 11",
        ),
        (
            {"set": {**TINY["set"], "evaluate.every": 1}, "shards": 2},
            "row dm: evaluate.every must be left out",
        ),
        ({"methods": [{**DM, "shards": 2}], "set": {"precision": "auto"}}, "row dm: precision must be"),
    ],
)
def test_shards_that_would_change_a_set_are_refused(changes: dict[str, Any], message: str) -> None:
    for refuse in (lambda one: prepare(one, LOCAL), lambda one: dry_run(one, LOCAL, run_dir=None)):
        with pytest.raises(InputError, match=f"{message}.*; shards: 1 in the row switches them off"):
            refuse(table(**changes))


def test_a_row_is_taken_out_of_the_tables_shards() -> None:
    rows = [DM, {"name": "dc", "steps": 1, "shards": 1}, {"name": "whole"}]
    graph = prepare(table(methods=rows, shards=2), LOCAL).graph
    assert {unit.method: unit.shards for unit in graph.distil.values()} == {"dm": 2, "dc": 1}
    with pytest.raises(InputError, match="preset, steps and shards must be left out"):
        prepare(table(methods=[{"name": "whole", "shards": 2}]), LOCAL)
    with pytest.raises(InputError, match="shards"):
        table(shards=0)


def test_a_scale_with_another_dataset_has_a_shard_per_class_at_most() -> None:
    file = {"name": "a", "dataset": "cifar100", "methods": ["dm"], "ipc": 1, "shards": 64}
    assert read_spec(file, "smoke").num_shards(read_spec(file, "smoke").rows()[0], 10) == 10
    assert read_spec(file, "paper").num_shards(read_spec(file, "paper").rows()[0], 10) == 64


def test_a_dry_run_counts_shards_and_estimates_them_from_their_like(tmp_path: Path) -> None:
    sharded = table(shards=3)
    (unit,) = prepare(sharded, LOCAL).graph.distil.values()
    assert dry_run(sharded, LOCAL, run_dir=None)["num_without_estimate"] == 3 + 1 + 1
    run(tmp_path / "whole", table())
    (row,) = Ledger(tmp_path / "whole").rows("distill")
    result = dry_run(sharded, LOCAL, run_dir=tmp_path / "none")
    lines = {line["unit"]: line for line in result["units"]}
    shards = [line for line in result["units"] if line["kind"] == "shard"]
    assert lines["dm digits ipc 1 seed 0"]["needs"] == [line["unit"] for line in shards]
    assert lines["dm digits ipc 1 seed 0"]["estimate_s"] == 0.0
    assert sum(line["estimate_s"] for line in shards) == pytest.approx(row.wall_s), "of the set without"
    assert (result["num_missing"], result["num_without_estimate"]) == (3 + 1 + 1, 0)
    groups = {(group["kind"], group["unit"]): group for group in summarise(result["units"])}
    assert groups["shard", "dm digits ipc 1, shards"]["units"] == 3
    assert groups["distill", "dm digits ipc 1"]["needs"] == ["dm digits ipc 1, shards"]

    run(tmp_path / "run", sharded)
    first, *_ = shard_rows(tmp_path / "run")
    estimate = estimate_of(History("cpu"), shards_of(unit, 10)[2])
    peaks = [row.result["peak_memory_bytes"] for row in shard_rows(tmp_path / "run")]
    assert (estimate.units, estimate.peak_memory_bytes) == (3, max(peaks))
    for gone in (*Ledger(tmp_path / "run").rows("distill"), first):
        Ledger(tmp_path / "run").withdraw(gone.key, "lost")
    again = dry_run(sharded, LOCAL, run_dir=tmp_path / "run")
    status = [line["status"] for line in again["units"] if line["kind"] == "shard"]
    assert status == ["missing", "done", "done"]


def test_what_all_shards_need_is_shared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared: list[Any] = []
    monkeypatch.setattr(LocalExecutor, "share", lambda self, value: shared.append(value) or value)
    run(tmp_path / "run", table(set={**TINY["set"], "pixel_space": "zca"}, shards=3))
    (prepared,) = shared
    assert isinstance(prepared, shard_worker.Prepared)
    assert set(prepared.zca) == {"zca_mean", "zca_matrix"}
    run(tmp_path / "whole", table(set={**TINY["set"], "pixel_space": "zca"}))
    assert digests(tmp_path / "run") == digests(tmp_path / "whole")
