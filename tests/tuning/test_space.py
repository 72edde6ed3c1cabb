from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis
import optuna
import pytest
from hypothesis import strategies as st

from ddray.errors import InputError
from ddray.tuning.space import Range, conditions, drawn, grid, read_space, sample, suggest

json_values = (
    st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.lists(st.integers(), max_size=3)
)
finite = st.floats(-1e6, 1e6)
positive = st.floats(1e-12, 1e12)


@st.composite
def ranges(draw: Any) -> Range:
    kind = draw(st.sampled_from(["loguniform", "uniform", "randint", "choice"]))
    if kind == "choice":
        return Range(kind, choices=tuple(draw(st.lists(json_values, min_size=1, max_size=4, unique_by=repr))))
    strategy = {"loguniform": positive, "uniform": finite, "randint": st.integers(-1000, 1000)}[kind]
    low, high = sorted(draw(st.tuples(strategy, strategy).filter(lambda pair: pair[0] != pair[1])))
    if kind != "loguniform" and draw(st.booleans()):
        step = draw(st.integers(1, 9) if kind == "randint" else st.sampled_from([0.1, 0.25, 3.0]))
        low = math.floor(low) if kind == "randint" else round(low, 3)
        high = low + draw(st.integers(1, 100)) * step  # as in a file, not of 17 digits
        return read_space({"a": {kind: [low, round(high, 3)], "step": step}})["a"]
    return Range(kind, low, high)


def test_names_may_begin_with_method_which_trials_leave_out() -> None:
    rates = {"uniform": [0.0, 1.0]}
    short = read_space({"init": {"choice": ["real", "noise"]}, "p": {**rates, "when": {"init": "real"}}})
    full = {"method.init": {"choice": ["real", "noise"]}, "p": {**rates, "when": {"method.init": "real"}}}

    assert read_space(full) == short
    with pytest.raises(InputError, match=r"the space: p must be there once, got method\.p too: keep one"):
        read_space({"p": rates, "method.p": rates})


@hypothesis.given(
    value_range=ranges(), other=ranges(), seed=st.integers(0, 2**62), trial_number=st.integers(0, 10**6)
)
def test_a_sample_is_a_pure_function_of_seed_and_number_and_lies_in_range(
    value_range: Range, other: Range, seed: int, trial_number: int
) -> None:
    point = sample({"a": value_range, "b": other}, seed, trial_number)

    assert point == sample({"b": other, "a": value_range}, seed, trial_number)
    assert point["a"] == sample({"a": value_range}, seed, trial_number)["a"]
    assert value_range.contains(point["a"])
    assert other.contains(point["b"])
    if value_range.kind == "randint":
        assert isinstance(point["a"], int)


@hypothesis.given(value_range=ranges(), seed=st.integers(0, 2**62))
def test_optuna_holds_a_sample_and_gives_it_back(value_range: Range, seed: int) -> None:
    value = sample({"a": value_range}, seed, 0)["a"]
    distribution = value_range.distribution()
    encoded = value_range.to_optuna(value)

    assert distribution._contains(distribution.to_internal_repr(encoded))
    back = value_range.from_optuna(distribution.to_external_repr(distribution.to_internal_repr(encoded)))
    assert back == value
    assert type(back) is type(value)


def test_optuna_holds_a_mapping_in_any_order_of_its_keys() -> None:
    value_range = Range("choice", choices=({"seed": 0, "epochs": 1}, {"seed": 1, "epochs": 1}))

    encoded = value_range.to_optuna({"epochs": 1, "seed": 1})

    assert encoded in value_range.distribution().choices
    assert value_range.from_optuna(encoded) == {"seed": 1, "epochs": 1}


def test_draws_near_the_ends_stay_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    for low, high in ((0.01, 10.0), (1e-4, 1.0), (0.1, 0.3), (1e-3, 0.7)):
        for u in (0.0, 1 - 2**-53):
            monkeypatch.setattr(
                torch, "rand", lambda *args, u=u, **kwargs: torch.tensor(u, dtype=torch.float64)
            )
            for kind in ("loguniform", "uniform"):
                value_range = Range(kind, low, high)  # type: ignore[arg-type]
                value = value_range.sample(torch.Generator())
                assert value_range.contains(value)
                assert value == pytest.approx(low if u == 0 else high)
            assert Range("randint", 2, 5).sample(torch.Generator()) == (2 if u == 0 else 5)
            assert Range("choice", choices=("a", "b")).sample(torch.Generator()) == ("a" if u == 0 else "b")


def test_draws_follow_their_distribution() -> None:
    space = {
        "log": Range("loguniform", 1e-4, 1.0),
        "flat": Range("uniform", -1.0, 3.0),
        "whole": Range("randint", 1, 4),
        "pick": Range("choice", choices=("a", "b")),
    }
    drawn = [sample(space, 0, trial_number) for trial_number in range(2000)]

    below = sum(point["log"] < 1e-2 for point in drawn) / 2000  # half of the decades
    assert below == pytest.approx(0.5, abs=0.04)
    assert math.fsum(point["flat"] for point in drawn) / 2000 == pytest.approx(1.0, abs=0.1)
    whole = Counter(point["whole"] for point in drawn)
    assert sorted(whole) == [1, 2, 3, 4]
    assert min(whole.values()) > 430
    assert Counter(point["pick"] for point in drawn)["a"] == pytest.approx(1000, abs=80)


choices = st.dictionaries(
    st.sampled_from("abc"), st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True), max_size=3
)


@hypothesis.given(choices=choices, data=st.data())
def test_a_grid_is_every_point_once_with_the_papers_first(choices: dict[str, list[int]], data: Any) -> None:
    space = {name: Range("choice", choices=tuple(values)) for name, values in choices.items()}
    paper = {name: data.draw(st.integers(0, 5)) for name in space}

    points = grid(space, paper)

    every = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    assert points[0] == paper
    assert len(points) == len(every) + (paper not in every)
    assert points[1:] == [point for point in every if point != paper]


def test_a_grid_needs_choices() -> None:
    with pytest.raises(InputError, match="strategy grid needs choices, lr is a uniform"):
        grid({"lr": Range("uniform", 0, 1)}, {"lr": 0.5})


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(
        "lr: {loguniform: [1e-3, 10]}\nmomentum: {uniform: [0, 0.9]}\nwidth: {randint: [1, 8]}\n"
        "layers: {choice: [[1], [1, 2], null]}\np: {choice: [1.0, 2.0]}\n"
    )

    assert read_space(path) == {
        "lr": Range("loguniform", 0.001, 10.0),
        "momentum": Range("uniform", 0.0, 0.9),
        "width": Range("randint", 1, 8),
        "layers": Range("choice", choices=([1], [1, 2], None)),
        "p": Range("choice", choices=(1.0, 2.0)),
    }
    assert [value_range.ends() for value_range in read_space(path).values()] == [
        [0.001, 10.0],
        [0.0, 0.9],
        [1, 8],
        [[1], [1, 2], None],
        [1.0, 2.0],
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 3", "lr must be {kind"),
        ("lr: {}", "lr must be {kind"),
        ("lr: {uniform: [0, 1], choice: [1]}", "lr must be {kind"),
        ("lr: {unifrom: [0, 1]}", "lr: range must be one of .* got 'unifrom'; did you mean 'uniform'"),
        ("lr: {1: [0, 1]}", "lr: range must be one of .* got 1"),
        ("lr: {uniform: 3}", "lr: uniform takes a list"),
        ("lr: {uniform: []}", "lr: uniform takes a list"),
        ("lr: {uniform: [0, 1, 2]}", r"lr: uniform takes finite \[low, high\]"),
        ("lr: {uniform: [1, 1]}", "low < high"),
        ("lr: {uniform: [2, 1]}", "low < high"),
        ("lr: {uniform: [a, b]}", "low < high"),
        ("lr: {uniform: [false, true]}", "low < high"),
        ("lr: {uniform: [.nan, 1]}", "low < high"),
        ("lr: {uniform: [0, .inf]}", "finite"),
        ("lr: {loguniform: [0, 1]}", "loguniform takes low > 0"),
        ("lr: {loguniform: [-1, 1]}", "loguniform takes low > 0"),
        ("lr: {randint: [0, 1.5]}", "randint takes whole numbers"),
        ("lr: {choice: []}", "choice takes a list"),
        ("lr: {choice: [1, 2, 1]}", "choices must differ"),
        ("lr: {choice: [!!timestamp 2020-01-01]}", "a choice must be a JSON value, got .*quote it"),
        ("[1]", "must hold a mapping"),
        ("lr: {", "must be YAML"),
    ],
)
def test_a_bad_file_is_refused_with_path_and_name(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(text)

    with pytest.raises(InputError, match=message) as caught:
        read_space(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


CONDITIONAL = {
    "momentum": {"uniform": [0.0, 0.9], "step": 0.1, "when": {"init": "noise"}},
    "decay": {"loguniform": [0.1, 1.0], "when": {"momentum": 0.3, "norm": True}},
    "init": {"choice": ["random", "noise"]},
    "norm": {"choice": [True, False]},
}


class TestSteps:
    def test_values_are_decimals_and_the_last_is_the_high_end(self) -> None:
        space = read_space({"a": {"uniform": [0, 0.95], "step": 0.1}, "b": {"randint": [1, 10], "step": 4}})

        assert space["a"].values() == [index / 10 for index in range(10)]
        assert (space["a"].ends(), space["a"].probes()) == ([0.0, 0.9], [0.0, 0.9, 0.1])
        assert space["b"].values() == [1, 5, 9]
        assert {type(value) for value in space["b"].values()} == {int}

    def test_a_step_may_be_the_whole_width(self) -> None:
        """As floats, -.9 - -1 is less than .1."""
        assert read_space({"a": {"uniform": [-1.0, -0.9], "step": 0.1}})["a"].values() == [-1.0, -0.9]

    def test_each_value_is_drawn_equally_often(self) -> None:
        space = read_space({"a": {"uniform": [0.0, 0.4], "step": 0.1}})
        counts = Counter(sample(space, 0, trial_number)["a"] for trial_number in range(2000))

        assert sorted(counts) == [0.0, 0.1, 0.2, 0.3, 0.4]
        assert min(counts.values()) > 330  # 400 +- 18

    def test_only_its_multiples_lie_in_it(self) -> None:
        value_range = Range("uniform", 0.0, 0.9, step=0.1)

        assert value_range.contains(0.1 + 0.2)
        assert value_range.from_optuna(0.1 + 0.2) == 0.3
        assert not value_range.contains(0.25)
        assert not value_range.contains(1.0)


class TestConditions:
    def test_a_setting_is_drawn_only_under_its_condition_and_always_with_the_same_value(self) -> None:
        space = read_space(CONDITIONAL)
        free = read_space(
            {name: {k: v for k, v in r.items() if k != "when"} for name, r in CONDITIONAL.items()}
        )

        assert [*space].index("decay") > [*space].index("momentum") > [*space].index("init")
        points = [sample(space, 0, number) for number in range(200)]
        for number, point in enumerate(points):
            every = sample(free, 0, number)
            names = {"init", "norm"}
            names |= {"momentum"} if every["init"] == "noise" else set()
            names |= (
                {"decay"} if "momentum" in names and every["momentum"] == 0.3 and every["norm"] else set()
            )
            assert point == {name: every[name] for name in names}
        assert {len(point) for point in points} == {2, 3, 4}
        assert conditions(space, "decay") == {"init": "noise", "momentum": 0.3, "norm": True}

    def test_optuna_draws_in_that_order(self) -> None:
        space = read_space(CONDITIONAL)
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
        trials = [study.ask() for _ in range(40)]

        points = [suggest(space, trial) for trial in trials]

        assert {"momentum" in point for point in points} == {True, False}
        for point, trial in zip(points, trials, strict=True):
            assert point == drawn(space, {**dict.fromkeys(space), **point})
            assert {*trial.params} == {*point}
            assert all(space[name].contains(value) for name, value in point.items())

    def test_a_grid_has_each_point_once(self) -> None:
        space = read_space(
            {"a": {"choice": [1, 2]}, "b": {"uniform": [0.0, 0.2], "step": 0.1, "when": {"a": 2}}}
        )

        assert grid(space, {"a": 1}) == [{"a": 1}, *({"a": 2, "b": value} for value in (0.0, 0.1, 0.2))]

    def test_what_a_run_folder_says_is_the_same_space(self) -> None:
        space = read_space(CONDITIONAL)

        described = {name: value_range.describe() for name, value_range in space.items()}

        assert read_space(described) == space
        assert read_space({"lr": {"loguniform": [0.1, 1.0]}})["lr"].describe() == {"loguniform": [0.1, 1.0]}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a: {uniform: [0, 1], step: 0}", "a: step must be a number in"),
            ("a: {uniform: [0, 1], step: 2}", r"high - low = 1\], got 2"),
            ("a: {randint: [0, 9], step: 0.5}", "a: step must be a whole number"),
            (
                "a: {loguniform: [1, 9], step: 1}",
                "a: step goes with uniform and randint, not with loguniform",
            ),
            ("a: {choice: [1, 9], step: 1}", "not with choice"),
            ("a: {uniform: [0, 1], when: b}", "a: when takes a mapping of names to values, got 'b'"),
            ("a: {step: 1}", "a must be {kind"),
            (
                "a: {uniform: [0, 1], when: {inti: noise}}\ninit: {choice: [noise]}",
                "a: when must be one of init, got 'inti'; did you mean 'init'",
            ),
            (
                "a: {uniform: [0, 1], when: {init: nose}}\ninit: {choice: [noise]}",
                "a: when: init must lie in .*noise.*, got 'nose'",
            ),
            (
                "a: {uniform: [0, 1], when: {b: 0.5}}\nb: {uniform: [0, 1]}",
                "a: when takes settings with choices or a step, b is a uniform",
            ),
            (
                "a: {choice: [1], when: {b: 1}}\nb: {choice: [1], when: {a: 1}}",
                "a must not depend on itself, got when: a -> b -> a",
            ),
        ],
    )
    def test_what_can_not_be_is_refused_by_name(self, text: str, message: str, tmp_path: Path) -> None:
        path = tmp_path / "space.yaml"
        path.write_text(text)

        with pytest.raises(InputError, match=message) as caught:
            read_space(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("value", ["0.5", None, [0.5], math.nan, math.inf])
def test_a_range_holds_only_numbers_between_its_ends(value: Any) -> None:
    assert not Range("uniform", 0.0, 1.0).contains(value)


@pytest.mark.parametrize("name", [1, 0.5, True, None])
def test_a_name_that_is_no_text_is_refused(name: Any) -> None:
    rule = rf"^the space: a name must be a setting's, such as lr_img, got {name}; "
    with pytest.raises(InputError, match=rule):
        read_space({name: {"choice": [1, 2]}})
