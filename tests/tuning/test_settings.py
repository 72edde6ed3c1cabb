"""What a search may vary: names, values, and the protocol that scores."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ddray.cluster.pb2 import check_space
from ddray.config import read_yaml
from ddray.data import SplitName, carve_val
from ddray.data.pixels import pixel_space
from ddray.distillation.loop import run_distillation
from ddray.errors import InputError
from ddray.evaluation.protocol import EvalContext, RealImages, evaluate_archs
from ddray.evaluation.soft import Soft, SoftConfig
from ddray.evaluation.teachers import get_teachers
from ddray.jobs.context import make_distiller
from ddray.jobs.options import PlanOptions
from ddray.jobs.plan import Plan, plan_of, resolve
from ddray.system.shipped import shipped
from ddray.training.recipe import TeacherRecipe
from ddray.tuning.options import TuneOptions
from ddray.tuning.payload import Payload, pack
from ddray.tuning.settings import Settings, method_protocol, protocol_for_sets, with_protocol
from ddray.tuning.space import conditions, read_space
from ddray.tuning.trial import trial_unit
from ddray.tuning.worker import SearchJob, SearchWorker

PAPERS = sorted(shipped("search_spaces", "papers").glob("*.yaml"))


@pytest.fixture
def plan(digits: Any) -> Plan:
    return resolve("dsdm", digits, ipc=1, layers=[{"steps": 4, "arch": "convnet2_w8"}])


class TestNames:
    def test_a_name_without_a_section_is_the_methods_then_the_runs(self, plan: Plan) -> None:
        settings = Settings.of(plan, "hard")
        params = {"lr_img": 0.25, "pool.epochs": 5, "evaluate.lr": 0.5, "arch": "convnet3", "steps": 2}

        config, scoring = settings.configs(params)

        assert scoring is None
        assert (config.method.lr_img, config.method.pool.epochs) == (0.25, 5)
        assert (config.evaluate.lr, config.arch, config.steps) == (0.5, "convnet3", 2)
        assert config.method.pool.num_models == plan.config.method.pool.num_models
        assert settings.values(params, params) == params
        assert settings.values(["evaluate.lr"]) == {"evaluate.lr": 0.01}

    def test_a_soft_searchs_evaluate_is_the_protocols(self, plan: Plan) -> None:
        settings = Settings(plan.method, plan.config.dump(), "soft", {"teacher": {"epochs": 2}})

        config, scoring = settings.configs({"evaluate.lr": 0.5, "evaluate.teacher.lr": 0.1})

        assert scoring == {"lr": 0.5, "teacher": {"epochs": 2, "lr": 0.1}}
        assert config == plan.config
        evaluate = settings.dump({"evaluate.lr": 0.5})["evaluate"]
        assert (evaluate["lr"], evaluate["seeds"], evaluate["teacher"]["epochs"]) == (0.5, 5, 2)

    @pytest.mark.parametrize(
        ("name", "protocol", "hint"),
        [
            ("evaluate.lrr", "hard", "evaluate.lr"),
            ("pool.epoch", "hard", "pool.epochs"),
            ("method.lr_img", "hard", "lr_img"),
            ("step", "hard", "steps"),
            ("evaluate.momentun", "hard", "evaluate.momentum"),
            ("evaluate.temprature", "soft", "evaluate.temperature"),
        ],
    )
    def test_an_unknown_name_is_refused_with_the_nearest(
        self, plan: Plan, name: str, protocol: str, hint: str
    ) -> None:
        with pytest.raises(InputError, match=rf"here must be one of .* got '{name}'; did you mean '{hint}'"):
            Settings.of(plan, protocol).check_name(name, "here")

    def test_a_value_is_checked_where_it_stands(self, plan: Plan) -> None:
        for protocol, params, message in (
            ("hard", {"evaluate.lr": -1}, "evaluate.lr: must be a number > 0, or learned, got -1 (in here)"),
            (
                "soft",
                {"evaluate.min_scale": 2},
                "evaluate.min_scale: input should be less than or equal to 1",
            ),
            ("hard", {"pool.epochs": 0}, "method.pool.epochs: input should be greater than or equal to 1"),
            ("hard", {"steps": -1}, "steps: input should be greater than or equal to 0"),
        ):
            with pytest.raises(InputError, match=re.escape(message)):
                Settings.of(plan, protocol).configs(params, "here")

    @pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.name)
    def test_a_papers_space_names_settings_of_its_method(self, path: Path, toy: Any) -> None:
        plan = resolve(path.stem, toy((9,) * 10, (3, 32, 32), name="cifar10"), ipc=1)
        settings = Settings.of(plan, method_protocol(path.stem))
        space = read_space(path)

        assert space
        for name, value_range in space.items():
            settings.check_name(name, str(path))
            for value in value_range.probes():
                settings.configs({**conditions(space, name), name: value})


class TestProtocol:
    def test_it_is_the_methods_own_by_default_and_a_resumed_search_keeps_its(self) -> None:
        for method, expected, of_sets in (
            ("dm", "hard", "hard"),
            ("rded", "soft", "hard"),
            ("sre2l", "soft", "hard"),
            ("d3hr", "soft", "hard"),
            ("krr_st", "linear", "linear"),
            ("kmeans_ssl", "linear", "linear"),
        ):
            assert (method_protocol(method), protocol_for_sets(method)) == (expected, of_sets)
            assert with_protocol(TuneOptions(), method, {}).protocol == expected
            assert with_protocol(TuneOptions(), method, {"command": "tune"}).protocol == of_sets  # of 0.1.0
        before = {"protocol": "soft", "teachers": ["convnet3"]}
        again = with_protocol(TuneOptions(), "dm", before)
        assert (again.protocol, again.teachers) == ("soft", ("convnet3",))

    @pytest.mark.parametrize(
        ("method", "options", "message"),
        [
            ("dm", {"protocol": "sotf"}, "protocol must be one of .*'sotf'; did you mean 'soft'"),
            ("dm", {"teacher": ["convnet3"]}, "--teacher must be left out, or used with --protocol soft"),
            ("krr_st", {"protocol": "soft"}, "--protocol must be linear for krr_st, whose sets hold targets"),
        ],
    )
    def test_what_does_not_go_together_is_refused(
        self, method: str, options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(InputError, match=message):
            with_protocol(TuneOptions.pick(options), method, {})

    def test_the_users_evaluate_is_the_protocols_and_val_seeds_the_searchs(self, digits: Any) -> None:
        options = PlanOptions.pick({"method": "datadam", "ipc": 1, "set": ["evaluate.teacher.epochs=2"]})
        settings = {"evaluate.val_seeds": 1, "evaluate.epochs": 7}

        plan = plan_of(options, digits, settings, "soft")

        assert plan.scoring == {"teacher": {"epochs": 2}, "epochs": 7}
        assert plan.config.evaluate.val_seeds == 1
        assert plan.config.evaluate.epochs == resolve("datadam", digits, ipc=1).config.evaluate.epochs
        with pytest.raises(InputError, match=r"unknown option 'evaluate\.teacher'"):
            plan_of(options, digits, settings, "hard")

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ({"uniform": [0.0, 0.9], "step": 0.1}, "takes no step, momentum has one"),
            ({"uniform": [0.0, 0.9], "when": {"init": "noise"}}, "takes no when, momentum has one"),
        ],
    )
    def test_pb2_refuses_ranges_that_it_can_not_take(self, entry: dict[str, Any], message: str) -> None:
        space = read_space({"init": {"choice": ["random", "noise"]}, "momentum": entry})
        with pytest.raises(InputError, match=message):
            check_space(space, {"momentum": 0.5}, 4)
        with pytest.raises(InputError, match=r"needs a evaluate\.lr .* got None"):
            check_space(read_space({"evaluate.lr": {"loguniform": [0.1, 1]}}), {"evaluate.lr": None}, 4)


TEACHER = "convnet2_w8_bn"
SOFT = {"epochs": 3, "seeds": 3, "teacher": {"epochs": 8, "lr": 0.1}}


@pytest.fixture
def searched(digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[SearchJob, Payload]:
    monkeypatch.setenv("DDRAY_HOME", str(tmp_path / "home"))
    layers = [{"steps": 2, "arch": "convnet2_w8", "method": {"batch_real": 4}, "evaluate": {"val_seeds": 2}}]
    plan = resolve("dm", digits, ipc=1, layers=layers)
    train, val = carve_val(digits.train(), seed=0)
    space = pixel_space("normalized", digits, train)
    payload = pack(digits, train, str(SplitName(0)), val, space)
    job = SearchJob(
        str(tmp_path), 1, "dm", 1, 0, plan.config.dump(), (1,), 1.0, 0.0,
        protocol="soft", scoring=SOFT, teachers=(TEACHER,),
    )  # fmt: skip
    return job, payload


def test_val_is_scored_by_the_protocol_with_what_was_drawn(
    searched: tuple[SearchJob, Payload], digits: Any
) -> None:
    """Against the protocol called by hand: the teacher has not seen val, and val alone is scored."""
    job, payload = searched
    worker, params = SearchWorker(job, payload), {"evaluate.lr": 0.02, "pixel_space": "raw"}
    plan = worker.plan(params)
    distilled = run_distillation(make_distiller(plan), worker.context(plan)).distilled

    value = worker.val_score(plan, distilled)

    assert distilled.space().kind == "raw"
    assert distilled.meta.config["evaluate"] == job.config["evaluate"], "the set keeps its own recipe"
    train, val = carve_val(digits.train(), seed=0)
    ctx = EvalContext(digits, val, distilled.space(), worker.device)
    real = RealImages(train, "train-val0", worker.pool())
    recipe = TeacherRecipe(epochs=8, lr=0.1)
    teachers = get_teachers(real.pool, [TEACHER], recipe, ctx, split_name="train-val0")
    soft = Soft(SoftConfig(epochs=3, lr=0.02, teacher=recipe), teachers)
    (expected,) = evaluate_archs(soft, distilled.decode(), ctx, archs=("convnet2_w8",), num_seeds=2)
    assert value == expected["accuracy_mean"]
    assert len(worker.score(plan, distilled)["per_seed"]) == 3


def test_a_trials_row_names_protocol_and_the_whole_configuration(
    searched: tuple[SearchJob, Payload],
) -> None:
    job, _ = searched
    unit = trial_unit(job, 3, {"evaluate.lr": 0.02}, "abc")

    assert unit.spec["options"] == {"protocol": "soft", "teachers": [TEACHER]}
    evaluate = unit.spec["config"]["evaluate"]
    assert (evaluate["lr"], evaluate["teacher"]["epochs"], evaluate["epochs"]) == (0.02, 8, 3)
    assert unit.spec["params"] == {"evaluate.lr": 0.02}


def test_a_search_of_release_0_1_0_has_the_same_units(digits: Any) -> None:
    stored = Path(__file__).parents[1] / "stored" / "tune"
    config = read_yaml(stored / "config.yaml")
    run = {name: config[name] for name in ("steps", "checkpoint_every", "compile", "arch", "pixel_space")}
    run |= {name: config[name] for name in ("evaluate", "method")}
    job = SearchJob("", 1, "dm", 1, 0, run, (1,), 1.0, 0.0)

    rows = [json.loads(path.read_text()) for path in (stored / "ledger").glob("*.json")]
    trials = [row for row in rows if row["kind"] == "trial"]

    assert len(trials) == 3
    for row in trials:
        unit = trial_unit(job, row["spec"]["number"], row["spec"]["params"], config["fingerprint"])
        assert unit.key == row["key"]
