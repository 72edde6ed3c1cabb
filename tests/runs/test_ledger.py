from __future__ import annotations

import json
import logging
import multiprocessing
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddray.errors import StorageError
from ddray.runs.ledger import Ledger, Row, Unit, canonical_json
from ddray.system import files

PROCESSES = 4


def unit(number: int = 0) -> Unit:
    return Unit(kind="trial", spec={"number": number, "lr": 0.1}, inputs=("a",))


def row(of: Unit, value: Any = 1, status: Any = "done") -> Row:
    return Row(key=of.key, kind=of.kind, spec=of.spec, status=status, result={"value": value}, wall_s=0.5)


def compete(folder: str, me: int, gate: Any) -> None:
    """Publish the same units as every other process, and events of any length."""
    ledger = Ledger(Path(folder))
    gate.wait()
    won = []
    for number in range(15):
        if ledger.publish(unit(number), row(unit(number), me), epoch=1):
            won.append(number)
        ledger.event("start", f"{me}-{number}", 1, filler="x" * (97 * number))
    (Path(folder) / f"won-{me}.json").write_text(json.dumps(won))


def test_of_many_processes_the_first_writer_wins_and_events_do_not_mix(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.open_epoch() == 1
    context = multiprocessing.get_context("spawn")
    gate = context.Barrier(PROCESSES)
    workers = [context.Process(target=compete, args=(str(tmp_path), me, gate)) for me in range(PROCESSES)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * PROCESSES

    winners = {
        number: me
        for me in range(PROCESSES)
        for number in json.loads((tmp_path / f"won-{me}.json").read_text())
    }
    rows = {row.spec["number"]: row.result["value"] for row in ledger.rows()}
    assert rows == winners
    assert sorted(rows) == list(range(15))
    assert sorted(path.suffix for path in ledger.folder.iterdir()) == [".json"] * 15
    events = ledger.events()
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert len(events) == len(lines) == 15 * PROCESSES + 15
    assert sorted(event["key"] for event in events if event["event"] == "finish") == sorted(
        unit(number).key for number in range(15)
    )


def test_a_key_depends_on_everything_and_on_nothing_else() -> None:
    base = {"kind": "trial", "spec": {"a": 1, "b": [1, 2]}, "inputs": ("x",), "code_version": 1}
    changes: list[dict[str, Any]] = [
        {"kind": "pool"},
        {"spec": {"a": 2, "b": [1, 2]}},
        {"spec": {"a": 1, "b": [2, 1]}},
        {"inputs": ()},
        {"code_version": 2},
    ]
    keys = [Unit.parse({**base, **change}).key for change in changes]

    assert len({Unit.parse(base).key, *keys}) == len(changes) + 1
    assert Unit.parse({**base, "spec": {"b": [1, 2], "a": 1}}).key == Unit.parse(base).key


def test_a_key_is_the_same_in_another_process() -> None:
    code = (
        "from ddray.runs.ledger import Unit;"
        "print(Unit(kind='trial', spec={'number': 3, 'lr': 0.1}, inputs=('a',)).key)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "9"}
    )

    assert done.stdout.strip() == unit(3).key


def test_the_key_of_a_unit_stays_what_it_was() -> None:
    """Rows of older runs are found by it: a change here orphans every run directory."""
    assert canonical_json({"b": 1, "a": [0.1, "ü"]}) == '{"a":[0.1,"\\u00fc"],"b":1}'
    assert unit().key == "4d7458412311ab3e0e9e238831e9e0d703932f0049f76378170c857f8a009d97"


@given(st.dictionaries(st.text(max_size=3), st.floats(allow_nan=False, allow_infinity=False) | st.text()))
def test_canonical_json_loses_nothing_and_knows_no_order(value: dict[str, Any]) -> None:
    text = canonical_json(value)

    assert json.loads(text) == value
    assert canonical_json(dict(reversed(value.items()))) == text


def test_nan_has_no_canonical_form() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"a": float("nan")})


def test_publish_and_read_back(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    epoch = ledger.open_epoch()

    assert ledger.row(unit().key) is None
    assert ledger.publish(unit(), row(unit(), {"nested": [1, None]}), epoch=epoch)
    assert not ledger.publish(unit(), row(unit(), "other"), epoch=epoch)
    assert ledger.publish(unit(1), row(unit(1), status="failed"), epoch=epoch)

    published = ledger.row(unit().key)
    assert published is not None
    assert published.result == {"value": {"nested": [1, None]}}
    assert published.epoch == epoch == 1
    assert [event["event"] for event in ledger.events()] == ["finish", "fail"]
    assert [event["key"] for event in ledger.events()] == [unit().key, unit(1).key]


def test_a_row_of_another_unit_is_refused(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    with pytest.raises(ValueError, match="row key must be the unit's"):
        ledger.publish(unit(), row(unit(1)), epoch=ledger.open_epoch())
    assert ledger.rows() == []


def test_a_row_of_a_stale_epoch_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = Ledger(tmp_path)
    epoch = old.open_epoch()
    new = Ledger(tmp_path)
    assert new.open_epoch() == epoch + 1

    assert not old.publish(unit(), row(unit()), epoch=epoch)

    assert "refused" in caplog.text
    assert new.row(unit().key) is None
    assert new.events() == []
    assert new.publish(unit(), row(unit()), epoch=epoch + 1)


@pytest.mark.parametrize(
    "content",
    [b"", b'{"key": "', b"\xff\xfe\x00garbage", b"[]", b"{}", b"null"],
    ids=["empty", "half", "binary", "list", "no fields", "null"],
)
def test_a_torn_row_is_set_aside_said_and_recomputed(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger(tmp_path)
    epoch = ledger.open_epoch()
    ledger.publish(unit(), row(unit()), epoch=epoch)
    path = ledger.folder / f"{unit().key}.json"
    path.write_bytes(content)

    assert ledger.row(unit().key) is None

    assert "is torn" in caplog.text
    assert path.with_suffix(".corrupt").read_bytes() == content
    assert ledger.rows() == []
    assert ledger.publish(unit(), row(unit(), "again"), epoch=epoch)
    assert [row.result["value"] for row in ledger.rows()] == ["again"]


def test_a_row_under_another_units_name_is_set_aside(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.publish(unit(), row(unit()), epoch=ledger.open_epoch())
    (ledger.folder / f"{unit().key}.json").rename(ledger.folder / f"{unit(1).key}.json")

    assert ledger.rows() == []
    assert (ledger.folder / f"{unit(1).key}.corrupt").exists()


def test_rows_can_be_asked_for_by_kind(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    epoch = ledger.open_epoch()
    other = Unit(kind="pool", spec={})
    for pending in (unit(0), unit(1), other):
        ledger.publish(pending, row(pending), epoch=epoch)

    assert [row.kind for row in ledger.rows("pool")] == ["pool"]
    assert [row.key for row in ledger.rows()] == sorted([unit(0).key, unit(1).key, other.key])
    assert ledger.rows("nas") == []


def test_begin_notes_a_start_then_retries_and_a_new_epoch_starts_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    epoch = ledger.open_epoch()

    assert [ledger.begin(unit(), epoch=epoch, host="a") for _ in range(3)] == [0, 1, 2]
    assert ledger.begin(unit(1), epoch=epoch) == 0
    assert ledger.begin(unit(), epoch=ledger.open_epoch()) == 0

    events = [(event["event"], event["key"], event["epoch"]) for event in ledger.events()]
    key, other = unit().key, unit(1).key
    assert events == [
        ("start", key, 1),
        ("retry", key, 1),
        ("retry", key, 1),
        ("start", other, 1),
        ("start", key, 2),
    ]
    assert ledger.events()[0]["host"] == "a"


@pytest.mark.parametrize("torn", [b'{"event": "st', b"\xff\xfe"])
def test_a_torn_last_event_is_left_out(torn: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger(tmp_path)
    ledger.begin(unit(), epoch=1)
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(torn)

    with caplog.at_level(logging.WARNING):
        assert [event["event"] for event in ledger.events()] == ["start"]
    assert "torn line" in caplog.text


def test_a_torn_event_does_not_swallow_the_next(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.begin(unit(), epoch=1, title='a "quoted" {"event": "start"} title')
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b'{"event": "start", "key": "ab')
    epoch = ledger.open_epoch()
    ledger.publish(unit(), row(unit()), epoch=epoch)
    ledger.begin(unit(1), epoch=epoch)

    assert [event["event"] for event in ledger.events()] == ["start", "finish", "start"]
    assert ledger.events()[1]["key"] == unit().key
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b"\n")
    assert len(ledger.events()) == 3, "a blank line is no event"


def test_what_a_row_names_is_put_in_place_only_if_the_row_is_published(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    epoch = ledger.open_epoch()
    placed: list[str] = []

    assert ledger.publish(unit(), row(unit()), epoch=epoch, move_artifact=lambda: placed.append("first"))
    assert not ledger.publish(unit(), row(unit()), epoch=epoch, move_artifact=lambda: placed.append("second"))
    ledger.open_epoch()
    assert not ledger.publish(
        unit(1), row(unit(1)), epoch=epoch, move_artifact=lambda: placed.append("stale")
    )

    assert placed == ["first"]


def test_an_event_that_does_not_fit_on_the_disk_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel writes what still fits and returns how much that was."""
    monkeypatch.setattr(files.os, "write", lambda handle, line: len(line) - 1)

    with pytest.raises(StorageError, match=r"events\.jsonl: No space left on device"):
        Ledger(tmp_path).event("start", "k", 1)
