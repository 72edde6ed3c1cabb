from __future__ import annotations

import logging
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from ddray.errors import StorageError
from ddray.runs.scores import append_score, read_scores, remember_run, run_of
from ddray.system.files import file_sha256

PROCESSES = 4
_NAMES = ("artifact", "artifact_sha256", "method", "dataset", "ipc", "protocol", "split", "options")
SCORE: dict[str, Any] = {
    **dict.fromkeys(_NAMES),
    "results": [{"arch": "convnet3", "per_seed": [0.5]}],
}


def run_folder(folder: Path) -> Path:
    (folder / "ledger").mkdir(parents=True)
    (folder / "config.yaml").write_text("command: distill\n")
    return folder


def write_many(folder: str, process: int, gate: Any) -> None:
    gate.wait()
    for index in range(20):
        append_score(
            Path(folder), {**SCORE, "process": process, "index": index, "filler": "x" * (301 * index)}
        )


def test_scores_are_read_in_the_order_they_came(tmp_path: Path) -> None:
    assert read_scores(tmp_path) == []
    scores = [{**SCORE, "artifact": "distilled.pt"}, {**SCORE, "artifact": "é\n.pt"}]
    for score in scores:
        append_score(tmp_path, score)

    assert read_scores(tmp_path) == scores
    assert len((tmp_path / "scores.jsonl").read_text("utf-8").splitlines()) == 2


def test_scores_of_several_processes_do_not_mix(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    gate = context.Barrier(PROCESSES)
    writers = [
        context.Process(target=write_many, args=(str(tmp_path), index, gate)) for index in range(PROCESSES)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)

    pairs = [(score["process"], score["index"]) for score in read_scores(tmp_path)]
    assert sorted(pairs) == [(process, index) for process in range(PROCESSES) for index in range(20)]


def test_a_line_that_is_no_score_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    append_score(tmp_path, {**SCORE, "number": 1})
    for line in ({"number": 2}, {**SCORE, "results": [{}]}, {**SCORE, "results": "none"}):
        append_score(tmp_path, line)

    with caplog.at_level(logging.WARNING):
        assert [score["number"] for score in read_scores(tmp_path)] == [1]
    assert "has 3 lines that are no scores" in caplog.text


def test_a_torn_score_is_left_out_and_swallows_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    append_score(tmp_path, {**SCORE, "number": 1})
    with (tmp_path / "scores.jsonl").open("ab") as file:
        file.write(b'{"number": 2, "resu')
    append_score(tmp_path, {**SCORE, "number": 3})

    with caplog.at_level(logging.WARNING):
        assert [score["number"] for score in read_scores(tmp_path)] == [1, 3]
    assert "scores.jsonl has a torn line" in caplog.text


def test_a_folder_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"could not write .*scores\.jsonl"):
        append_score(tmp_path / "gone", {})


def test_a_sets_run_is_the_folder_it_lies_in(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")

    assert run_of(run / "distilled.pt", "0") == run
    assert run_of(run / "artifacts" / "ab.pt", "0") == run
    assert run_of(tmp_path / "set.pt", "0") is None
    assert run_of(tmp_path / "a" / "b" / "set.pt", "0") is None


def test_a_set_outside_is_recognised_by_its_content(tmp_path: Path) -> None:
    run, artifact = run_folder(tmp_path / "run"), tmp_path / "set.pt"
    artifact.write_bytes(b"pictures")
    remember_run(artifact, run)
    moved = artifact.rename(tmp_path / "moved.pt")

    assert run_of(moved, file_sha256(moved)) == run
    moved.write_bytes(b"others")
    assert run_of(moved, file_sha256(moved)) is None


def test_a_run_that_is_gone_is_none(tmp_path: Path) -> None:
    run, artifact = run_folder(tmp_path / "run"), tmp_path / "set.pt"
    artifact.write_bytes(b"pictures")
    remember_run(artifact, run)
    run.rename(tmp_path / "elsewhere")

    assert run_of(artifact, file_sha256(artifact)) is None
