"""The end of a search in words, and best.yaml: the winner's settings, which `--config` takes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from ddray.config import flatten, merge, nest, yaml_of
from ddray.drawing.text import percent
from ddray.jobs.plan import Plan
from ddray.jobs.preset import plan_departure, preset_of
from ddray.runs.ledger import Row
from ddray.system.files import write_text
from ddray.tuning.result import TuneResult
from ddray.tuning.search import Search, best_trial, earlier_tests, paper_trial
from ddray.tuning.settings import Settings
from ddray.tuning.study import score_of, status_of

BEST: Final = "best.yaml"
"""File of a search with the winner's settings."""
_OF_MACHINE: Final = ("checkpoint_every", "compile", "memory_budget")
_TEST: Final = "test_accuracy"


def verdict(best: Mapping[str, Any], preset: Mapping[str, Any], trial: int) -> str:
    """Return whether the winner, which is trial number `trial`, is better than the preset on test.

    Both have `test_accuracy_mean` and `test_accuracy_std`, fractions; an empty `preset` failed.
    """
    ours, theirs = (point.get(f"{_TEST}_mean") for point in (best, preset))
    if trial == 0:
        return "no improvement over the preset: it scored best on val itself"
    if ours is None or theirs is None:
        return "not compared with the preset, which has no test accuracy"
    both = f"test {percent(ours)} % against {percent(theirs)} %"
    if ours <= theirs:
        return f"no improvement over the preset: {both}"
    spread = max(filter(None, (point.get(f"{_TEST}_std") for point in (best, preset))), default=0.0)
    within = ", within the standard deviation of the networks" if ours - theirs <= spread else ""
    return f"{100 * (ours - theirs):.2f} points better than the preset: {both}{within}"


def last_settings(row: Row) -> dict[str, Any]:
    """Return a trial's settings; of PB2's, which change them, those at the end."""
    schedule = row.result.get("schedule", [{"params": row.spec["params"]}])
    return dict(schedule[-1]["params"])


def write_best(folder: Path, plan: Plan, settings: Settings, params: Mapping[str, Any], words: str) -> None:
    """Write what the winner changes of the paper's preset, so that `ddray distill --config` repeats it.

    The settings of a protocol that has its own, such as `soft`, are no run's: a comment names them.

    Raises:
        StorageError: the file can't be written.
    """
    config, scoring = settings.configs(params)
    preset = flatten(preset_of(replace(plan, preset="paper")).config.every_value())
    changed = {
        name: value
        for name, value in flatten(config.every_value()).items()
        if name not in _OF_MACHINE and (name not in preset or preset[name] != value)
    }
    nested: dict[str, Any] = merge({"method": {}}, *(nest(name, value) for name, value in changed.items()))
    size = f"--ipc {plan.ipc}" if plan.budget is None else f"--budget {plan.budget}"
    command = f"ddray distill --method {plan.method} --dataset {plan.dataset.name} {size} --config {BEST}"
    sets = "".join(f" --set {name}={value}" for name, value in flatten(dict(scoring or {})).items())
    lines = [words, command]
    lines += [f"ddray evaluate SET --protocol {settings.protocol}{sets}"] if scoring is not None else []
    write_text(folder / BEST, "".join(f"# {line}\n" for line in lines) + yaml_of(nested))


def search_result(
    search: Search,
    protocol: str,
    rows: Sequence[Row],
    finals: Mapping[str, Mapping[str, Any]],
    wall_s: float,
) -> TuneResult:
    """Return the result of a search from its trials' rows and what `run_finals` returned."""
    best, preset = best_trial(rows), paper_trial(rows)
    objective, statuses = best.result["objective"], [status_of(row) for row in rows]
    best_score, preset_score = (score_of(row.result) if row else None for row in (best, preset))
    none = {f"{_TEST}_mean": None, f"{_TEST}_std": None}
    on_test, preset_on_test = finals["best"]["scores"], finals["paper"]["scores"] if preset else none
    return TuneResult.parse(
        {
            "run_dir": str(search.run.folder),
            "objective": objective,
            "protocol": protocol,
            "num_trials": len(rows),
            "num_failed": statuses.count("failed"),
            "num_stopped_early": statuses.count("stopped early"),
            "best": {"config": best.spec["params"], objective: best_score, "trial": best.spec["number"]},
            "paper_point": {objective: preset_score, **preset_on_test},
            "verdict": verdict(on_test, preset_on_test, int(best.spec["number"])),
            **plan_departure(search.plan),
            "artifact": finals["best"]["artifact"],
            **on_test,
            **({"earlier_tests": tests} if (tests := earlier_tests(search.run)) else {}),
            "wall_s": wall_s,
        }
    )
