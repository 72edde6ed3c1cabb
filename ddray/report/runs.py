"""Read run folders for a report: configuration, rows, cells of the table, and the distilled sets."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ddray.artifact.distilled_set import DistilledSet
from ddray.artifact.reading import load
from ddray.config import read_yaml
from ddray.drawing.text import size_of
from ddray.errors import InputError
from ddray.report.scored import SetsOfRun, conditions_of, file_of, score_cells, size_fields
from ddray.runs.folder import environments
from ddray.runs.ledger import Ledger, Row, classes_of
from ddray.runs.scores import read_scored_set
from ddray.system.grouping import grouped
from ddray.tables.along import group_of
from ddray.tables.claims import Verdict
from ddray.tables.table import (
    accuracy_of,
    cells_of,
    drop_scaled_differences,
    failure_of,
    names_of,
    standard_error,
)
from ddray.tables.units import Cell

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SetView:
    """One distilled set of a run."""

    label: str  # its row in the table
    method: str
    dataset: str  # what was distilled
    size: str  # such as `ipc 10`
    seed: int | None  # of the distillation; None if unknown
    path: Path
    losses: tuple[tuple[int, float], ...]  # (step, loss) pairs; empty if none were recorded
    wall_s: float | None  # seconds of the distillation; None if unknown

    @property
    def group(self) -> str:
        """What sets that are drawn together share."""
        return f"{self.dataset}, {self.size}"

    def sort_key(self) -> tuple[str, int, str, int]:
        """Return the key that sets are sorted by: dataset, size, row, seed."""
        digits = "".join(filter(str.isdigit, self.size))
        return self.dataset, int(digits or 0), self.label, self.seed or 0

    def snapshots(self) -> list[tuple[int, SetView]]:
        """Return the sets that were kept along the steps, each with its step; the last is not among them."""
        paths = sorted(self.path.with_name(f"{self.path.stem}-steps").glob("*.pt"))
        return [(int(path.stem), replace(self, path=path)) for path in paths if path.stem.isdecimal()]

    def load(self) -> DistilledSet | None:
        """Return the set, or None if the file is gone or damaged."""
        try:
            return load(self.path)
        except InputError:
            return None


@dataclass(frozen=True)
class Scored:
    """A cell of a bench's table with the rows of its evaluations that are done, by set."""

    cell: Cell
    rows: tuple[Row, ...]

    @property
    def group(self) -> str:
        """What rows that are drawn together share, as in the page's bars."""
        name, optional = names_of(self.cell)
        return group_of({**name, **optional})

    @property
    def network(self) -> str:
        """What was trained, and how: a line's name."""
        cell = self.cell
        return ", ".join(filter(None, (cell.arch, cell.teacher, cell.augment, cell.settings)))

    @property
    def per_set(self) -> list[list[float]]:
        """The accuracies of each set's networks."""
        return [row.result["per_seed"] for row in self.rows]


@dataclass(frozen=True)
class RunView:
    """One run."""

    folder: Path
    command: str  # distill, evaluate, tune, nas or bench
    config: Mapping[str, Any]  # config.yaml
    config_text: str  # the same as text
    environment: Mapping[str, Any]  # environment.json of the first start
    continued: tuple[Mapping[str, Any], ...]  # the environments of later starts
    rows: tuple[Row, ...]  # the ledger's rows, by key
    events: Mapping[str, int]  # number of events of each kind
    hosts: Mapping[str, int]  # number of units that each machine finished
    cells: tuple[Mapping[str, Any], ...]  # the table's cells, as in the command's JSON
    failures: tuple[Mapping[str, Any], ...]  # units that failed: `{"unit", "kind", "key", "reason"}`
    skipped: tuple[str, ...]  # units that could not run because of them
    sets: tuple[SetView, ...]  # distilled sets, one per row, dataset, size and seed
    scored: tuple[Scored, ...]  # a bench's cells with the rows behind them
    claims: tuple[Verdict, ...]  # what became of a bench's claims
    corrupt: tuple[str, ...]  # damaged files that were set aside

    @property
    def title(self) -> str:
        """A readable name of the run."""
        named = self.config.get("name") or " ".join(
            str(self.config[name]) for name in ("method_name", "dataset") if name in self.config
        )
        scaled = "" if self.scale == "paper" else f", scale {self.scale}"
        return f"{self.command} {named}".strip() + scaled

    @property
    def scale(self) -> str:
        """A bench's scale; `paper` for other runs: nothing was cut."""
        return str(self.config.get("scale", "paper"))

    @property
    def trials(self) -> list[Row]:
        """A search's trials, by number."""
        return sorted((row for row in self.rows if row.kind == "trial"), key=lambda row: row.spec["number"])

    @property
    def seeds(self) -> list[int]:
        """Every seed that a row names."""
        return sorted({row.spec["seed"] for row in self.rows if isinstance(row.spec.get("seed"), int)})


def read_run(folder: Path) -> RunView:
    """Read a run, finished or not.

    Raises:
        InputError: the folder is not a run folder.
    """
    config_file, environment_file = folder / "config.yaml", folder / "environment.json"
    if not config_file.is_file() or not environment_file.is_file():
        raise InputError(f"ddray report takes run folders (with config.yaml), got {folder}")
    config = read_yaml(config_file)
    ledger = Ledger(folder)
    rows = tuple(ledger.rows())
    events = ledger.events()
    kinds = Counter(str(event["event"]) for event in events)
    hosts = Counter(str(event["host"]) for event in events if "host" in event)
    cells_file = _read_cells(folder)
    failed = [failure_of(name_of(row), row) for row in rows if row.status == "failed"]
    planned = _planned(folder)
    cells = cells_file.get("cells") or _unfinished_cells(folder, planned, config, rows)
    cells = [*cells, *score_cells(folder, rows, cells)]
    done = {row.key: row for row in rows if row.status == "done"}
    return RunView(
        folder=folder,
        command=str(config.get("command", "run")),
        config=config,
        config_text=config_file.read_text(encoding="utf-8"),
        environment=_read_json(environment_file),
        continued=tuple(_read_json(path) for path in environments(folder)),
        rows=rows,
        events=dict(sorted(kinds.items())),
        hosts=dict(sorted(hosts.items())),
        cells=tuple(cells),
        failures=tuple(cells_file.get("failures") or failed),
        skipped=tuple(cells_file.get("skipped", ())),
        sets=tuple(sorted(_sets(folder, config, rows, cells), key=SetView.sort_key)),
        scored=tuple(Scored(cell, tuple(done[key] for key in cell.keys if key in done)) for cell in planned),
        claims=tuple(_claims(folder)),
        corrupt=tuple(sorted(str(path.relative_to(folder)) for path in folder.rglob("*.corrupt"))),
    )


def _read_cells(folder: Path) -> dict[str, Any]:
    """Return a bench's cells.json; empty for other runs and for an unfinished bench."""
    path = folder / "cells.json"
    try:
        return _read_json(path) if path.is_file() else {}
    except InputError as error:  # the rows hold the same, except a NAS sweep's cells
        log.warning("%s; the table is rebuilt from the ledger's rows", error)
        return {}


def _claims(folder: Path) -> Iterator[Verdict]:
    """Yield the verdicts of a run's claims.json; none for runs without, or if it is damaged."""
    path = folder / "claims.json"
    if not path.is_file():
        return
    try:
        yield from [Verdict.parse(values) for values in _read_json(path)["claims"]]
    except (InputError, KeyError, TypeError, ValueError) as error:
        log.warning("no claims: %s: %s", path, error)


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a run.

    Raises:
        InputError: it is damaged.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} must hold JSON: {error}; run its command again with --resume") from error
    return content


def _read_curve(path: Path) -> tuple[tuple[int, float], ...]:
    """Read a set's losses; empty if the file is missing or damaged."""
    if not path.is_file():
        return ()
    try:
        return tuple((int(step), float(loss)) for step, loss in _read_json(path)["losses"])
    except (InputError, KeyError, TypeError, ValueError) as error:
        log.warning("no curve: %s: %s", path, error)
        return ()


def _planned(folder: Path) -> list[Cell]:
    """Return the cells that a bench planned; none for other runs."""
    path = folder / "planned.json"
    if not path.is_file():
        return []
    try:
        return [Cell.parse(values) for values in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        log.warning("%s is damaged (%s): plots that need it are left out", path, error)
        return []


def _unfinished_cells(
    folder: Path, planned: list[Cell], config: Mapping[str, Any], rows: tuple[Row, ...]
) -> list[dict[str, Any]]:
    """Return the cells of a run without cells.json: an unfinished bench, a search's final scores, scores."""
    if not planned:
        return list(_cells(folder, config, rows))
    cells = cells_of(planned, {row.key: row for row in rows}.get)
    drop_scaled_differences(cells, str(config.get("scale", "paper")))
    return cells


def name_of(row: Row) -> str:
    """Return a readable name of a row's unit."""
    spec = row.spec
    if row.kind == "trial":
        return f"trial {spec['number']}"
    if row.kind == "pool":  # its dataset is a fingerprint
        parts = [spec.get("kind"), spec.get("arch")]
    else:
        parts = [spec.get(name) for name in ("method", "dataset")]
        parts += [size_of(spec), spec.get("arch"), spec.get("proxy")]
    text = " ".join(str(part) for part in parts if part)
    text = f"{text} seed {spec['seed']}" if "seed" in spec else text or row.key[:12]
    return f"{text}, {classes_of(spec)}" if row.kind == "shard" else text


def _cells(folder: Path, config: Mapping[str, Any], rows: tuple[Row, ...]) -> Iterator[dict[str, Any]]:
    """Yield the cells of evaluation rows; the rows of a search do not name its dataset.

    An evaluation in a folder of its own has a row per network, which names the set.
    """
    stage, departure = _scored_set(folder)

    def name(row: Row) -> dict[str, Any]:
        spec, options = row.spec, row.spec.get("options", {})
        on = spec.get("dataset", config.get("dataset", ""))
        conditions = {} if "schedule" in spec else conditions_of(options, spec.get("split", "test"), stage)
        return {
            "method": _searched(row, rows) if config.get("command") == "tune" else spec.get("method"),
            "dataset": on,
            **size_fields(spec),
            "protocol": options.get("protocol", "hard"),
            "arch": row.result["arch"],
            **conditions,
            **({} if spec.get("target", on) == on else {"target": spec["target"]}),
        }

    scored_rows = [row for row in rows if row.kind == "evaluate" and row.status == "done"]
    for group_rows in grouped(scored_rows, lambda row: tuple(name(row).items())).values():
        by_set = grouped(group_rows, lambda row: row.spec.get("set", row.key))
        per_set = [[value for row in each for value in row.result["per_seed"]] for each in by_set.values()]
        yield {
            **name(group_rows[0]),
            **accuracy_of([value for values in per_set for value in values]),
            "num_sets": len(per_set),
            "standard_error": standard_error(per_set),
            **departure,
            "sets": [key for row in group_rows for key in _sets_behind(row, rows)],
        }


def _scored_set(folder: Path) -> tuple[str, dict[str, Any]]:
    """Return which stage of its run's set an evaluation scored, and what that run changed of its preset."""
    note = read_scored_set(folder)
    if not note:
        return "", {}
    run, file = Path(note["run"]), note["artifact"]
    sets = SetsOfRun(run, Ledger(run).rows(), _read_cells(run).get("cells", ()))
    stage = sets.stage_of(file, note["artifact_sha256"])
    return stage, sets.departure(file, stage)


def _sets_behind(row: Row, rows: tuple[Row, ...]) -> list[str]:
    """Return the keys of the sets that an evaluation scored; in a search, set and score share a row."""
    if "schedule" in row.spec:
        return [row.key]
    set_spec = {name: row.spec.get(name) for name in ("method", "dataset", "ipc", "budget", "seed")}
    return [
        one.key
        for one in rows
        if one.kind == "distill" and all(one.spec.get(name) == value for name, value in set_spec.items())
    ]


def _searched(row: Row, rows: tuple[Row, ...]) -> str:
    """Return the label of a search's final score: its winner or the preset."""
    paper = next((one for one in rows if one.kind == "trial" and one.spec["number"] == 0), None)
    is_preset = paper is not None and row.spec["schedule"][-1]["params"] == paper.spec["params"]
    return f"{row.spec['method']}, {'preset' if is_preset else 'searched'}"


def _sets(
    folder: Path, config: Mapping[str, Any], rows: tuple[Row, ...], cells: list[dict[str, Any]]
) -> Iterator[SetView]:
    """Yield the run's distilled sets, once per table row that they belong to."""
    labels: dict[str, dict[str, None]] = {}  # ordered and unique
    for cell in cells:
        for key in cell.get("sets", ()):
            labels.setdefault(key, {})[str(cell["method"])] = None
    for row in rows:
        path = file_of(folder, row.key, row)
        if row.status != "done" or not path.is_file():
            continue
        # `distill --out` may put the set anywhere; its loss curve is in the run folder.
        curve = folder / "distilled.json" if config.get("command") == "distill" else path.with_suffix(".json")
        losses = _read_curve(curve)
        method = row.spec.get("method_name") or row.spec.get("method")
        for label in labels.get(row.key, {str(method): None}):
            yield SetView(
                label=label,
                method=str(method),
                dataset=str(row.spec.get("dataset") or config.get("dataset")),
                size=size_of(row.spec) or size_of(config),
                seed=row.spec.get("seed"),
                path=path,
                losses=losses,
                wall_s=row.wall_s,
            )
