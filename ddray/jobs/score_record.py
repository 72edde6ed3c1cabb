"""What `ddray evaluate` measured of a run's set, noted in the run's record."""

import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from ddray.artifact.distilled_set import DistilledSet, Meta, name_of_file
from ddray.errors import StorageError
from ddray.evaluation.options import EvaluateOptions, EvaluateResult
from ddray.runs.scores import append_score, read_scores, run_of
from ddray.system.files import file_sha256

log = logging.getLogger(__name__)
_ELSEWHERE: Final = ("data_dir", "download", "dataset", "protocol", "split")
"""Options that are keys of a score, or say where data is."""
_IDENTITY: Final = ("artifact_sha256", "dataset", "protocol", "split", "options")


def record_score(
    path: Path, sets: Sequence[DistilledSet], dataset: str, options: EvaluateOptions, result: EvaluateResult
) -> EvaluateResult:
    """Append an evaluation of a set's file to the record of the run that wrote it.

    Return the result with the names of the set and of that run's folder. An evaluation that is on record
    already, to the last network, is not noted again; a set of no run is not noted, and a record that can't be
    read or written costs no result.
    """
    result = result.model_copy(update={"name": name_of_file(path, sets[0].meta)})
    try:
        sha256 = file_sha256(path) if path.is_file() else ""
        if not sha256 or (folder := run_of(path, sha256)) is None:
            return result
        score = _score(sets[0].meta, dataset, options, result)
        score = {"artifact": path.name, "artifact_sha256": sha256, **score}
        if _identity(score) not in map(_identity, read_scores(folder)):
            append_score(folder, score)
    except (StorageError, OSError) as error:
        log.warning("the result is not in the run's record: %s", error)
        return result
    return result.model_copy(update={"recorded_in": str(folder)})


def _score(meta: Meta, dataset: str, options: EvaluateOptions, result: EvaluateResult) -> dict[str, Any]:
    """Return a score (`append_score`) without its artifact."""
    return {
        "method": meta.method,
        "dataset": dataset,
        "ipc": options.ipc or meta.ipc,
        "budget": meta.budget,
        "protocol": result.protocol,
        "split": result.split,
        "recipe": result.dump().get("recipe"),
        "options": options.model_dump(mode="json", exclude_defaults=True, exclude=set(_ELSEWHERE)),
        "results": result.dump()["results"],
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _identity(score: Mapping[str, Any]) -> list[Any]:
    """Return what two scores share if one repeats the other."""
    return [[score.get(name) for name in _IDENTITY], [one["per_seed"] for one in score["results"]]]
