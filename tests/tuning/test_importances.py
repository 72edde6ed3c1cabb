"""Importances come from enough complete trials, with their spread."""

from __future__ import annotations

from typing import Any

import pytest

from ddray.runs.ledger import Row
from ddray.tuning.importances import importance_plot, importances
from ddray.tuning.space import read_space, sample
from ddray.tuning.study import study_of

SPACE = read_space({"lr": {"uniform": [0.0, 1.0]}, "idle": {"uniform": [0.0, 1.0]}})


def study(num: int, *, stopped: int = 0) -> Any:
    rows = []
    for number in range(num + stopped):
        params = sample(SPACE, 0, number)
        result = {"number": number, "val_accuracy": params["lr"], "stopped_early": number >= num, "rungs": {}}
        spec = {"number": number, "params": params}
        rows.append(Row(key=f"{number}", kind="trial", spec=spec, status="done", result=result, wall_s=1.0))
    return study_of(SPACE, rows)


def test_what_moves_the_score_comes_first_with_a_spread() -> None:
    by_name = importances(study(20))

    assert list(by_name) == ["lr", "idle"]
    assert by_name["lr"].mean > 0.8
    assert sum(one.mean for one in by_name.values()) == pytest.approx(1.0)
    assert all(one.std > 0 for one in by_name.values())
    assert by_name == importances(study(20))


@pytest.mark.parametrize(("num", "stopped"), [(9, 0), (3, 20), (0, 0)])
def test_too_few_complete_trials_have_none(num: int, stopped: int) -> None:
    with pytest.raises(ValueError, match=f"at least 10 complete trials; this search has {num}"):
        importances(study(num, stopped=stopped))


def test_the_plot_shows_the_spread_and_the_number_of_trials() -> None:
    figure = importance_plot(study(12, stopped=2))

    (bars,) = figure.data
    assert list(bars.y) == ["idle", "lr"]
    assert all(value > 0 for value in bars.error_x.array)
    text = figure.layout.xaxis.title.text.replace("<br>", " ")
    assert "over 5 seeds of fANOVA, 12 complete trials" in text
    assert text.endswith("Trials that were stopped early don't count.")
