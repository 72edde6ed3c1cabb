"""The user's own points: read, checked against the space, numbered."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ddray.errors import InputError
from ddray.jobs.plan import Plan, resolve
from ddray.tuning.options import TuneOptions
from ddray.tuning.settings import Settings
from ddray.tuning.space import read_space
from ddray.tuning.start_points import number_start_points, read_start_points

SPACE = read_space(
    {
        "lr_img": {"loguniform": [0.01, 10.0]},
        "p": {"randint": [1, 4]},
        "layers": {"choice": [[1], [1, 2]]},
    }
)


@pytest.fixture
def plan(digits: Any) -> Plan:
    method = {"p": 3.0, "layers": [1]}
    return resolve("datadam", digits, ipc=1, layers=[{"steps": 4, "method": method}])


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "point.yaml"
    path.write_text(text)
    return path


class TestRead:
    def test_names_that_are_left_out_keep_the_presets_values(self, plan: Plan, tmp_path: Path) -> None:
        points = read_start_points(
            [written(tmp_path, "lr_img: 5e-1\n"), {"layers": [1, 2]}], plan, Settings.of(plan, "hard"), SPACE
        )

        assert points == [
            {"lr_img": 0.5, "p": 3.0, "layers": [1]},
            {"lr_img": plan.config.method.lr_img, "p": 3.0, "layers": [1, 2]},
        ]

    def test_names_may_begin_with_method(self, plan: Plan) -> None:
        settings = Settings.of(plan, "hard")

        assert read_start_points([{"method.lr_img": 0.5}], plan, settings, SPACE) == [
            {"lr_img": 0.5, "p": 3.0, "layers": [1]}
        ]
        with pytest.raises(InputError, match=r"lr_img must be there once, got method\.lr_img too"):
            read_start_points([{"method.lr_img": 0.5, "lr_img": 0.5}], plan, settings, SPACE)

    @pytest.mark.parametrize("source", [{1: 2}, {"method": {1: 2}}, {"lr_img": 0.5, 1: 2}])
    def test_a_name_that_is_no_text_is_refused(self, plan: Plan, source: Any) -> None:
        with pytest.raises(InputError, match=r"a start point: .*name must be a setting's, .* got 1; write"):
            read_start_points([source], plan, Settings.of(plan, "hard"), SPACE)

    def test_a_runs_settings_are_taken_as_far_as_they_are_in_the_space(
        self, plan: Plan, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A best.yaml: whatever is as in this search anyway is no contradiction."""
        path = written(tmp_path, "steps: 9\nmethod: {lr_img: 2, p: 2.0, momentum: 0.5}\n")

        assert read_start_points([path], plan, Settings.of(plan, "hard"), SPACE) == [
            {"lr_img": 2.0, "p": 2, "layers": [1]}
        ]
        assert "not used, as the space does not name it: steps" in caplog.text

    def test_settings_outside_the_method_are_named_with_dots_or_taken_from_a_run(
        self, plan: Plan, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        space = read_space(
            {
                "evaluate.lr": {"choice": [0.01, 0.02]},
                "init": {"choice": ["random", "noise"]},
                "momentum": {"uniform": [0.0, 0.9], "step": 0.1, "when": {"init": "noise"}},
            }
        )
        settings = Settings.of(plan, "hard")
        run = written(tmp_path, "seed: 3\nevaluate: {lr: 0.02}\nmethod: {init: noise, momentum: 0.3}\n")

        points = read_start_points([{"evaluate.lr": 0.02, "momentum": 0.5}, run], plan, settings, space)

        assert points == [
            {"evaluate.lr": 0.02, "init": "random"},  # the preset's momentum is .5
            {"evaluate.lr": 0.02, "init": "noise", "momentum": 0.3},
        ]
        assert "not used, as the space does not name it: seed" in caplog.text
        for point, message in (
            ({"momentum": 0.3}, 'momentum is drawn only when {"init": "noise"}, got 0.3'),
            ({"init": "noise", "momentum": 0.33}, "in steps of 0.1, got 0.33"),
            ({"evaluate.momentum": 0.5}, "a name must be one of evaluate.lr, init, momentum"),
        ):
            with pytest.raises(InputError, match=re.escape(message)):
                read_start_points([point], plan, settings, space)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("lr_img: 50", "lr_img must lie in the space, loguniform [0.01, 10.0], got 50.0; widen the"),
            ("p: 2.5", "p must lie in the space, randint [1, 4], got 2.5"),
            ("layers: [2]", "layers must lie in the space, choice [[1], [1, 2]], got [2]"),
            (
                "lr_im: 1",
                "a name must be one of layers, lr_img, p, got 'lr_im'; did you mean 'lr_img'",
            ),
            ("loss_scale: 2.0", "a name must be one of layers, lr_img, p, got 'loss_scale'"),
            ("lr_img: -1", "lr_img: input should be greater than 0, got -1"),
            ("layers: [9]", "method.layers must be within 1..3"),
            ("lr_img: 1\nlr_img: 2", "the key 'lr_img' is there twice"),
            ("- 1", "must hold a mapping"),
        ],
    )
    def test_what_the_space_does_not_hold_is_refused_with_the_rule(
        self, plan: Plan, tmp_path: Path, text: str, message: str
    ) -> None:
        with pytest.raises(InputError, match=re.escape(message)):
            read_start_points([written(tmp_path, text)], plan, Settings.of(plan, "hard"), SPACE)

    def test_options_take_files_mappings_or_one_of_them(self) -> None:
        assert TuneOptions.pick({"start_point": [Path("/a.yaml")]}).start_points == (Path("/a.yaml"),)
        assert TuneOptions.pick({"start_points": {"lr_img": 1}}).start_points == ({"lr_img": 1},)
        assert TuneOptions().start_points == ()


class TestNumber:
    A, B, C, PAPER = ({"lr": value} for value in (0.1, 0.2, 0.3, 1.0))

    def test_they_follow_the_presets_point(self) -> None:
        assert number_start_points([self.A, self.B], self.PAPER, {}, range(1, 4)) == {1: self.A, 2: self.B}
        assert number_start_points([], self.PAPER, {}, range(1, 1)) == {}

    def test_a_point_is_run_once(self, caplog: pytest.LogCaptureFixture) -> None:
        points = [self.A, self.PAPER, self.A]

        assert number_start_points(points, self.PAPER, {}, range(1, 4)) == {1: self.A}
        assert caplog.text.count("is among the search's points already") == 2

    def test_a_resumed_search_keeps_its_points_and_takes_new_ones_only_into_new_trials(self) -> None:
        earlier = {1: self.A, 2: self.B}

        for points in ([], [self.B], [self.A, self.B]):
            assert number_start_points(points, self.PAPER, earlier, range(4, 4)) == earlier
        extended = number_start_points([self.A, self.C], self.PAPER, earlier, range(4, 6))
        assert extended == {**earlier, 4: self.C}
        with pytest.raises(InputError, match="--num-samples must be >= 5 for 1 new start points"):
            number_start_points([self.C], self.PAPER, earlier, range(4, 4))

    def test_there_must_be_a_trial_for_each(self) -> None:
        with pytest.raises(InputError, match=r"--num-samples must be >= 4 for 3 new start points .* got 2"):
            number_start_points([self.A, self.B, self.C], self.PAPER, {}, range(1, 2))
