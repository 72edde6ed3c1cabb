"""What `ddray evaluate` measured: scores.jsonl of the set's run, and set.json of a run of its own."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ddray.errors import StorageError
from ddray.system.files import append_line, file_sha256, home, read_json_lines, write_text

log = logging.getLogger(__name__)
_FILE: Final = "scores.jsonl"
_KEYS: Final = {
    "artifact",
    "artifact_sha256",
    "method",
    "dataset",
    "ipc",
    "protocol",
    "split",
    "options",
    "results",
}
_SCORED_SET: Final = "set.json"
_DEPTH: Final = 3  # a set lies in its run's folder, or up to two folders below


def append_score(folder: Path, score: Mapping[str, Any]) -> None:
    """Append an evaluation to the record of the run in `folder`; lines of several processes don't mix.

    A score has the keys `artifact` (the set's file name), `artifact_sha256`, `method`, `dataset`, `ipc`,
    `budget` (None for a set of a size per class), `protocol`, `split`, `recipe` (of protocol `soft`, else
    None), `options` (those that are not at their default), `results` (as `ddray evaluate --json` has them),
    `command` (the words that were typed) and `time` (ISO 8601, UTC).

    Raises:
        StorageError: the line can't be written.
    """
    append_line(folder / _FILE, json.dumps(dict(score)))


def read_scores(folder: Path) -> list[dict[str, Any]]:
    """Return the evaluations on record for the run in `folder`, in order; a torn line is left out.

    So is one that is no score. OSError if the file can't be read.
    """
    lines = read_json_lines(folder / _FILE)
    scores = [line for line in lines if _is_score(line)]
    if len(scores) < len(lines):
        log.warning("%s has %d lines that are no scores: left out", folder / _FILE, len(lines) - len(scores))
    return scores


def _is_score(line: object) -> bool:
    if not isinstance(line, dict) or not line.keys() >= _KEYS:
        return False
    return all(isinstance(one, dict) and {"arch", "per_seed"} <= one.keys() for one in line["results"])


def note_scored_set(evaluation: Path, set_file: Path, folder: Path) -> None:
    """Note in an evaluation's own run folder which set it scored, and the run in `folder` that wrote it."""
    try:
        note = {"run": str(folder), "artifact": set_file.name, "artifact_sha256": file_sha256(set_file)}
        write_text(evaluation / _SCORED_SET, json.dumps(note))
    except (StorageError, OSError) as error:  # costs no result
        log.warning("the page of %s will not say what its set's run cut: %s", evaluation, error)


def read_scored_set(evaluation: Path) -> dict[str, str]:
    """Return an evaluation's note of its set: `run`, `artifact` and `artifact_sha256`; empty without one."""
    try:
        note: dict[str, str] = json.loads((evaluation / _SCORED_SET).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # of no run, of an older version, or damaged
        return {}
    return note


def remember_run(artifact: Path, folder: Path) -> None:
    """Note which run wrote a set outside its folder (`--out`): `run_of` finds it by the file's content."""
    try:
        write_text(_note(file_sha256(artifact)), str(folder))
    except StorageError as error:  # costs no set
        log.warning("evaluations of %s will not be in its run's record: %s", artifact, error)


def run_of(artifact: Path, sha256: str) -> Path | None:
    """Return the folder of the run that wrote a set's file; None if it lies in none and none has noted it."""
    note = _note(sha256)
    noted = [Path(note.read_text(encoding="utf-8"))] if note.is_file() else []
    folders = (*artifact.absolute().parents[:_DEPTH], *noted)
    return next((folder for folder in folders if _is_run(folder)), None)


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and (folder / "ledger").is_dir()


def _note(sha256: str) -> Path:
    return home() / "sets" / sha256
