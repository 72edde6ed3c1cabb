"""The graph of units that a bench file stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ddray.data import open_dataset
from ddray.errors import InputError
from ddray.evaluation.options import overrides
from ddray.jobs.pool_needs import predict_pool_specs
from ddray.ranking.sweep import NasOptions
from ddray.tables.dry_run import _facts
from ddray.tables.graph import build_graph
from ddray.tables.nas_table import sweep_options
from tests.tables.benches import LOCAL, TINY, nas_of, run, spec


def test_units_are_the_product_of_the_axes() -> None:
    graph = build_graph(spec(ipc=[1, 2]), open_dataset)
    assert (len(graph.distil), len(graph.evaluate), len(graph.cells)) == (
        2 * 2 * 2,
        2 * 2 * 2 * 2,
        2 * 2 * 2,
    )
    assert [len(cell.keys) for cell in graph.cells] == [2] * 8
    amounts = [unit.amount for unit in graph.distil.values()]
    assert amounts == sorted(amounts, reverse=True)
    for unit in graph.evaluate.values():
        (key,) = unit.identity.inputs
        distil_spec = graph.distil[key].identity.spec
        assert {k: unit.identity.spec[k] for k in ("method", "dataset", "ipc", "seed")} == {
            k: distil_spec[k] for k in ("method", "dataset", "ipc", "seed")
        }


def test_a_cells_settings_are_as_people_type_them() -> None:
    options = {"protocol": "soft", "teacher": ["convnet1_w8"], "epochs": 2}
    evaluation = {**options, "options": {"sets": ["teacher.epochs=3", "lr=0.1"]}}
    graph = build_graph(spec(evaluate=evaluation), open_dataset)
    assert {cell.settings for cell in graph.cells} == {"epochs=2, teacher.epochs=3, lr=0.1"}


def test_a_set_is_shared_by_evaluations_and_rows_that_score_more_networks() -> None:
    rows = ["random", {"name": "random", "label": "b", "set": {"evaluate.seeds": 7}}]
    scored = [{"seeds": 1, "augment": augment} for augment in ("dsa", "none")] + [{"epochs": 1}]
    graph = build_graph(spec(methods=rows, seeds=1, evaluate=scored), open_dataset)
    assert len(graph.distil) == 1
    assert [unit.options.get("augment") for unit in graph.evaluate.values()] == [
        "dsa",
        "none",
        None,
        None,
    ]
    assert [unit.options["seeds"] for unit in graph.evaluate.values()] == [1, 1, 5, 7]
    other = [rows[0], {"name": "random", "label": "b", "set": {"evaluate.lr": 0.5}}]
    assert len(build_graph(spec(methods=other, seeds=1), open_dataset).distil) == 2


def test_an_evaluation_may_be_of_some_datasets_only() -> None:
    bench_spec = spec(
        dataset=["digits", "mnist"],
        evaluate=[{"epochs": 1}, {"protocol": "robust", "dataset": "mnist", "epochs": 1}],
    )
    by_name = {
        name: [one.protocol for one in bench_spec.evaluate if name in bench_spec.datasets(one)]
        for name in bench_spec.dataset
    }
    assert by_name == {"digits": ["hard"], "mnist": ["hard", "robust"]}


def test_a_budget_is_a_size_of_its_own() -> None:
    rows = ["random_ssl", {"name": "random", "ipc": 1}]
    bench_spec = spec(methods=rows, budget=20, ipc=[], set={}, evaluate={"protocol": "linear", "epochs": 1})
    graph = build_graph(bench_spec, open_dataset)
    sizes = {plan.method: (plan.ipc, plan.budget) for plan in graph.plans.values()}
    assert sizes == {"random_ssl": (2, 20), "random": (1, None)}
    assert [cell.size for cell in graph.cells] == [("budget", 20), ("ipc", 1)]
    specs = {unit.method: unit.identity.spec for unit in graph.distil.values()}
    assert (specs["random_ssl"]["budget"], specs["random"]["ipc"]) == (20, 1)
    pool_specs = {plan.method: predict_pool_specs(plan) for plan in graph.plans.values() if plan.seed == 0}
    assert [one.kind for one in pool_specs["random_ssl"] or ()] == ["ssl"]
    with pytest.raises(InputError, match=r"^row random: random takes --ipc K"):
        build_graph(spec(methods=["random"], budget=20, ipc=[]), open_dataset)


def test_a_scale_bounds_the_teachers_of_soft_labels() -> None:
    def sets(limit: int | None, **options: Any) -> Any:
        soft = {"protocol": "soft", "teacher": "convnet1_w8", "options": options}
        bench_spec = spec(evaluate=soft, limits={"teacher_epochs": limit})
        return next(iter(build_graph(bench_spec, open_dataset).evaluate.values())).options.get("sets")

    assert sets(None) is None
    assert sets(5) == ["teacher.epochs=5"]
    assert sets(5, sets=["teacher.epochs=3"]) == ["teacher.epochs=3"]
    assert sets(5, sets=["teacher.epochs=9", "teacher.lr=.1"])[-1] == "teacher.epochs=5"
    assert sets(60) is None, "its own are 50"


def test_a_scale_bounds_a_methods_own_steps() -> None:
    rows = [{"name": "d3hr", "set": {"method.num_inference_steps": 20}}]
    bench_spec = spec(methods=rows, set={}, seeds=1, limits={"steps": 2})
    (plan,) = build_graph(bench_spec, open_dataset).plans.values()
    assert plan.config.method.num_inference_steps == 2
    (plan,) = build_graph(spec(methods=rows, set={}, seeds=1), open_dataset).plans.values()
    assert plan.config.method.num_inference_steps == 20
    linear = {"protocol": "linear", "archs": ["convnet1_w8"]}
    bench_spec = spec(methods=["boost_ssdd"], set={}, seeds=1, evaluate=linear, limits={"steps": 2})
    (plan, *_) = build_graph(bench_spec, open_dataset).plans.values()
    assert plan.config.method.inner_steps_max == 2


def test_a_scale_bounds_what_an_evaluation_asks_for() -> None:
    robust = {"protocol": "robust", "options": {"sets": "epochs=400", "full_epochs": 400}}
    bench_spec = spec(evaluate=robust, seeds=1, methods=["random"], limits={"epochs": 2})
    (score, *_) = build_graph(bench_spec, open_dataset).evaluate.values()
    assert (score.options["sets"], score.options["full_epochs"]) == (["epochs=400", "epochs=2"], 2)


def test_what_the_kernel_protocol_has_no_use_for_is_left_out(tmp_path: Path) -> None:
    """What the table does not name is not passed on; what it names is refused."""
    scored: dict[str, Any] = {"protocol": "kernel", "options": {"sets": ["kernel=fc1"]}}
    changes: dict[str, Any] = {"methods": ["random"], "seeds": 1, "limits": {"epochs": 7, "networks": 1}}
    result = run(tmp_path / "run", spec(evaluate=scored, **changes))
    (cell,) = result["cells"]
    assert (cell["n"], cell["arch"], result["num_failed"]) == (1, "convnet1_w8", 0)
    for name, value in {"archs": "convnet3", "epochs": 3, "seeds": 1, "augment": "none"}.items():
        with pytest.raises(InputError, match=f"--{name[:4]}.* must be left out with --protocol kernel"):
            build_graph(spec(evaluate={**scored, name: value}, **changes), open_dataset)


def test_a_scale_bounds_a_ranking() -> None:
    limits = {"epochs": 3, "networks": 2, "sample": 4}

    def bounded(**nas_settings: Any) -> NasOptions:
        bench_spec = spec(evaluate=nas_of(**nas_settings), limits=limits)
        (sweep_spec,) = build_graph(bench_spec, open_dataset).sweeps
        return sweep_options(sweep_spec, bench_spec, LOCAL)

    options = bounded(seeds=5)
    assert (options.epochs, options.truth_epochs, options.seeds, options.sample) == (3, 3, 2, 4)
    options = bounded(epochs=2, sample=3)
    assert (options.epochs, options.truth_epochs, options.seeds, options.sample) == (2, None, 1, 3)
    assert bounded(max_mflops=1).sample is None, "fewer may be left than the limit"


def test_sets_of_other_classes_are_not_scored() -> None:
    facts = {name: _facts(name, None) for name in ("digits", "mnist")}
    for one in facts.values():
        one.__dict__["fingerprint"] = "unread"
    with pytest.raises(InputError, match="must have the classes and images of digits"):
        build_graph(spec(evaluate={"target": ["mnist"]}), facts.__getitem__)
    linear = {"protocol": "linear", "target": ["mnist"], "archs": ["convnet1_w8"]}
    assert build_graph(spec(methods=["random_ssl"], set={}, evaluate=linear), facts.__getitem__).cells


def test_folders_are_absolute_wherever_a_bench_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    bench_spec = spec(dataset=["digits", "images"], evaluate={"target": ["images"]})
    assert bench_spec.dataset == ("digits", str(tmp_path / "images"))
    assert bench_spec.evaluate[0].target == (str(tmp_path / "images"),)


def test_units_that_differ_have_titles_that_differ() -> None:
    evaluations = [
        {"protocol": "soft", "teacher": ["convnet1_w8", "convnet1_w8_bn"], "archs": ["convnet1_w8"]},
        *({"augment": augment, "archs": ["convnet1_w8"]} for augment in ("none", "dsa")),
        {"epochs": 3, "archs": ["convnet1_w8"]},
    ]
    graph = build_graph(spec(evaluate=evaluations, seeds=1, methods=["random"]), open_dataset)
    titles = [unit.title for unit in graph.units()]
    assert len(set(titles)) == len(titles) == 1 + 5


def test_the_networks_of_a_seed_are_the_same_for_every_row() -> None:
    graph = build_graph(spec(), open_dataset)
    seeds = {(unit.identity.spec["seed"], unit.options["seed"]) for unit in graph.evaluate.values()}
    assert len(seeds) == 2


def test_limits_lower_settings_and_leave_smaller_ones() -> None:
    limits = {"steps": 1, "epochs": 1, "networks": 1, "batch_real": 3}
    graph = build_graph(spec(limits=limits), open_dataset)
    for plan in graph.plans.values():
        assert plan.config.steps == (1 if plan.method == "dm" else 0)
        assert getattr(plan.config.method, "batch_real", 3) == 3
    assert {unit.options["seeds"] for unit in graph.evaluate.values()} == {1}


def test_a_methods_own_trainings_are_within_the_limits() -> None:
    bench_spec = spec(methods=["kcenter", "rded", "d3hr"], seeds=1, ipc=[1], limits={"epochs": 2})
    epochs = {
        unit.method: unit.config["method"] for unit in build_graph(bench_spec, open_dataset).distil.values()
    }
    assert epochs["kcenter"]["feature_epochs"] == 2 == epochs["rded"]["teacher_epochs"]
    generator = epochs["d3hr"]["generator"]
    assert (generator["epochs"], generator["vae_epochs"]) == (2, 2)


def test_experts_are_within_the_limits() -> None:
    """Epochs are lowered together with what must fit them."""
    limits = {"epochs": 2, "networks": 1}
    bench_spec = spec(methods=["mtt", "datm"], seeds=1, ipc=[1], limits=limits)
    for unit in build_graph(bench_spec, open_dataset).distil.values():
        experts = unit.config["method"]["experts"]
        assert (experts["num_models"], experts["epochs"]) == (1, 2)
        assert unit.config["method"]["max_start"] == 1


def test_a_recipe_is_the_same_for_every_row_and_within_the_limits(tmp_path: Path) -> None:
    scored: dict[str, Any] = {"recipe": "vico", "augment": "dsa", "seeds": 1}
    for evaluation in (scored, {"options": {"recipe": "vico"}, "augment": "dsa", "seeds": 1}):
        bench_spec = spec(methods=["random", "dsdm"], seeds=1, evaluate=evaluation, limits={"epochs": 7})
        units = build_graph(bench_spec, open_dataset).evaluate.values()
        assert {unit.options["recipe"] for unit in units} == {"vico"}
        assert {unit.options["epochs"] for unit in units} == {7}
    paper = build_graph(spec(methods=["random", "dsdm"], seeds=1, evaluate=scored), open_dataset)
    assert all("epochs" not in unit.options for unit in paper.evaluate.values()), "the recipe's own"
    result = run(tmp_path / "run", spec(methods=["random"], seeds=1, evaluate={**scored, "epochs": 1}))
    assert result["num_failed"] == 0


@pytest.mark.parametrize("name", ["epochs", "evaluate.epochs"])
def test_epochs_that_an_evaluation_sets_are_within_the_limits(name: str) -> None:
    evaluation = {"options": {"sets": [f"{name}=900"]}, "seeds": 1}
    bench_spec = spec(methods=["random"], seeds=1, ipc=[1], evaluate=evaluation, limits={"epochs": 7})
    (unit,) = build_graph(bench_spec, open_dataset).evaluate.values()
    assert overrides(unit.options["sets"])["epochs"] == 7


@pytest.mark.parametrize(
    ("evaluation", "limit", "epochs"),
    [
        ({"protocol": "distribution"}, 300, None),
        ({"protocol": "distribution"}, 7, 7),
        ({"protocol": "soft"}, 300, 300),  # D3HR's recipe has 400 at 8 px
        ({"protocol": "soft"}, 900, None),
        ({"protocol": "soft", "options": {"sets": ["epochs=10"]}}, 300, None),
        ({"protocol": "soft", "options": {"sets": ["recipe=rded"]}}, 300, None),
        ({"recipe": "table5"}, 3000, None),
        ({"recipe": "table5"}, 1999, 1999),
        ({"recipe": "idc"}, 2000, None),
        ({"recipe": "idc"}, 1000, 1000),
        ({"recipe": "minimax"}, 2500, 2500),  # 3,000 at ipc 1
        ({"recipe": "minimax"}, 3000, None),
        ({"protocol": "soft", "recipe": "rd3"}, 390, 390),
        ({"protocol": "soft", "recipe": "rd3"}, 400, None),
        ({"epochs": 20}, 300, 20),
    ],
)
def test_a_limit_never_raises_the_epochs(evaluation: dict[str, Any], limit: int, epochs: int | None) -> None:
    changes: dict[str, Any] = {"methods": ["random"], "seeds": 1, "limits": {"epochs": limit}}
    (unit,) = build_graph(spec(evaluate=evaluation, **changes), open_dataset).evaluate.values()
    assert unit.options.get("epochs") == epochs


def test_rows_whose_images_are_mirrored_are_sets_of_their_own() -> None:
    """`can_flip` is a setting of the table, a row or a sweep; sets are scored as they were distilled."""
    rows = [
        {"name": "random", "label": "table's"},
        {"name": "random", "label": "row's", "set": ["can_flip=false"]},
        {"name": "random", "sweep": {"can_flip": [True, False]}},
    ]
    settings = {**TINY["set"], "can_flip": True}
    evaluation = [{"archs": "convnet1_w8", "seeds": 1}, nas_of(space="convnet720")]
    graph = build_graph(spec(methods=rows, seeds=1, set=settings, evaluate=evaluation), open_dataset)

    names = ["digits?can_flip=true", "digits?can_flip=false"]
    assert [(cell.method, cell.dataset) for cell in graph.cells] == [
        *(("table's", names[0]), ("row's", names[1])),
        *(("random, can_flip=True", names[0]), ("random, can_flip=False", names[1])),
    ]
    assert all(cell.target == cell.dataset for cell in graph.cells)
    assert {unit.dataset for unit in graph.distil.values()} == set(names)
    assert [(sweep.dataset, len(sweep.cells)) for sweep in graph.sweeps] == [(name, 2) for name in names]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"evaluate": {"recipe": "vicco"}}, "did you mean 'vico'"),
        ({"evaluate": {"recipe": "vico", "protocol": "soft"}}, "evaluate.recipe of soft must be one of"),
        ({"methods": ["datdam"]}, "did you mean 'datadam'"),
        ({"evaluate": {"protocol": "soft_ish"}}, "evaluate.protocol must be one of"),
        ({"methods": [{"name": "random", "steps": 3}]}, "steps must be 0"),
        ({"ipc": 10_000}, "ipc must be in"),
        ({"methods": [{"name": "datadam", "set": {"method.layers": [9]}}]}, "within 1..1"),
        ({"evaluate": {"archs": ["convnet9"]}}, "arch must be one of"),
        ({"evaluate": {"options": {"train_limits": 5}}}, "did you mean 'train_limit'"),
        ({"evaluate": {"options": {"pixel_space": "raw"}}}, "evaluate.options must be one of"),
        (
            {"evaluate": {"options": {"image_size": 64}}},
            "evaluate.options.image_size must be left out, got 64",
        ),
        ({"evaluate": {"options": {"can_flip": False}}}, r"options.can_flip must.*got False.*\?can_flip="),
        (
            {"evaluate": {"options": {"ipc": 5}}},
            "must be left out for random, whose sets hold their images",
        ),
        ({"evaluate": nas_of(baselines="erly-stopping")}, "did you mean 'early-stopping'"),
        ({"evaluate": nas_of(baselines=["random", "random"])}, "must name each once, got random 2 times"),
        ({"evaluate": nas_of(baselines="dm")}, "a method that selects images, got dm"),
        (
            {"evaluate": {"options": {"sets": "epochs=many"}}, "limits": {"epochs": 2}},
            "evaluate.epochs: input should be a valid integer",
        ),
        ({"evaluate": nas_of(compat="dcbench")}, "needs --space nasbench201"),
        ({"methods": ["random_ssl"], "set": {}}, "must be linear for random_ssl"),
        ({"evaluate": {"teacher": "resnet18"}}, "--teacher must be left out"),
        ({"evaluate": {"protocol": "soft", "teacher": "resnet99"}}, "did you mean 'resnet18'"),
        ({"evaluate": {"augment": "foo"}}, "--augment must be one of"),
        (
            {"evaluate": {"protocol": "steps"}},
            "needs a set with a schedule, .* got one of method random without",
        ),
        (
            {"evaluate": {"options": {"sets": ["seeds=1"]}}},
            "sets must not have seeds=...; use evaluate.seeds",
        ),
        (
            {"evaluate": {"protocol": "kernel", "recipe": "idc"}},
            "--recipe must be left out with --protocol kernel",
        ),
        (
            {"evaluate": {"protocol": "distribution"}, "set": {**TINY["set"], "evaluate.seeds": 1}},
            "set.evaluate.seeds is not taken by distribution, .* under evaluate.seeds",
        ),
        ({"evaluate": {"options": {"train_limit": -3}}}, "--train-limit must be >= 1, got -3"),
        ({"evaluate": {"options": {"sets": ["epchs=3"]}}}, "did you mean 'epochs'"),
        ({"evaluate": {"protocol": "soft", "options": {"sets": ["teacher.epchs=3"]}}}, "'epochs'"),
    ],
)
def test_what_cannot_run_is_refused_before_a_folder_is_made(
    change: dict[str, Any], word: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=word):
        run(tmp_path / "run", spec(**change))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("protocol", "recipe", "edition"),
    [("soft", None, 1), ("soft", "rded", None), ("hard", None, None), ("hard", "table5", 1)],
)
def test_what_an_earlier_edition_of_a_recipe_scored_is_scored_anew(
    protocol: str, recipe: str | None, edition: int | None
) -> None:
    evaluate = {"protocol": protocol, "archs": "convnet1_w8", "epochs": 1}
    graph = build_graph(
        spec(evaluate=evaluate | ({} if recipe is None else {"recipe": recipe})), open_dataset
    )
    assert {unit.identity.spec.get("edition") for unit in graph.evaluate.values()} == {edition}
