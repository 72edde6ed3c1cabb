"""What a search must know of a method's settings: images learned in turn, spaces and defaults of others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ddray.cluster.tune import _in_turn, _job, check_search
from ddray.errors import InputError
from ddray.jobs.plan import resolve
from ddray.tuning.options import TuneOptions
from ddray.tuning.settings import Settings


def searched(method: str, data: Any, layer: dict[str, Any] | None = None, **options: Any) -> Any:
    plan = resolve(method, data, ipc=2, layers=[layer or {}])
    return check_search(plan, TuneOptions.pick({"num_samples": 4, **options}), {})


@pytest.mark.parametrize(
    ("method", "ipc", "in_turn"),
    [("dwa", 1, False), ("dwa", 2, True), ("g_vbsm", 1, False), ("g_vbsm", 50, True), ("sre2l", 50, False)],
)
def test_a_part_of_the_steps_is_scored_only_where_it_learns_all_images(
    method: str, ipc: int, in_turn: bool, digits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G-VBSM's batches of 100 images: ten classes at ipc 1, two at ipc 50."""
    plan = resolve(method, digits, ipc=ipc, layers=[{"steps": 100}])
    run, options = SimpleNamespace(folder="run", epoch=1), TuneOptions(protocol="soft")

    job = _job(plan, options, Settings.of(plan, "soft"), run, None)  # type: ignore[arg-type]

    assert _in_turn(plan) == in_turn
    assert job.budgets == ((1,) if in_turn else (1, 3, 9))


def test_pb2_changes_no_settings_while_images_are_learned_in_turn(digits: Any) -> None:
    with pytest.raises(InputError, match="pb2 must not be used with dwa, which learns its images in turn"):
        searched("dwa", digits, strategy="pb2")
    assert searched("dwa", digits, strategy="tpe").num_samples == 4


def test_settings_that_a_space_does_not_vary_need_another(digits: Any) -> None:
    kmeans = {"method": {"sampling": "kmeans"}}
    with pytest.raises(InputError, match="--space must be given: with these settings d3hr's own varies"):
        searched("d3hr", digits, kmeans)
    space = {"guidance": {"uniform": [1.0, 9.0]}}
    assert [*searched("d3hr", digits, kmeans, space=space).space] == ["guidance"]
    assert searched("d3hr", digits).space


def test_what_other_defaults_depend_on_is_not_varied(digits: Any) -> None:
    with pytest.raises(InputError, match="can't be base, which other defaults depend on; search once for"):
        searched("esfr", digits, space={"base": {"choice": ["dm", "idm"]}})
    assert searched("esfr", digits, space={"lambda_cc": {"uniform": [0.0, 1.0]}}).space
