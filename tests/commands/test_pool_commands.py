from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from ddray.cli import _run
from ddray.errors import InputError
from ddray.jobs import pool_training as pool_api
from ddray.jobs.context import declared_specs, make_context
from ddray.jobs.plan import resolve
from ddray.jobs.pool_training import PoolResult, train_pool, train_teacher
from ddray.methods.families.ssl.budget import teacher_of
from ddray.methods.families.ssl.teacher import SslTrainer
from ddray.pool.files import ENTRY, TENSORS, PoolFiles
from ddray.pool.listing import list_pool, show_entry
from ddray.pool.local import LocalPool
from ddray.pool.spec import features_spec, supervised_specs

CPU = torch.device("cpu")


def trained(dataset: Any, **changes: Any) -> dict[str, Any]:
    settings = {"arch": "convnet1_w8", "recipe": {"epochs": 1}, "seed": 0, "num_models": 1, "device": CPU}
    return train_pool(dataset, **{**settings, **changes})


def test_training_gives_the_keys_that_methods_ask_for(toy: Any, ddray_home: Path) -> None:
    dataset = toy()
    result = trained(dataset, num_models=2, recipe={}, seed=3)

    plan = resolve("herding", dataset, ipc=1, seed=3, layers=[{"arch": "convnet1_w8"}])
    ctx = make_context(plan, dataset.train(), split_name="train", device=CPU)
    (declared,) = declared_specs(plan, ctx)
    specs = supervised_specs(
        dataset, split="train", arch="convnet1_w8", device="cpu", recipe={}, seed=3, num=2
    )
    assert result["keys"] == [spec.key for spec in specs]
    assert result["key"] == result["keys"][0]
    assert declared == features_spec(specs[0])  # it reads that network's features
    assert result["folder"] == str(ddray_home / "pool" / result["key"])
    assert Path(result["folder"], TENSORS).is_file()


def test_the_recipe_is_checked_and_taken(toy: Any) -> None:
    dataset = toy()
    result = trained(dataset, recipe={"epochs": 1, "lr": 1, "augment": "dsa", "schedule": "constant"})
    recipe = show_entry(result["key"])["meta"]["spec"]["recipe"]
    plain = {"momentum": 0.9, "weight_decay": 5e-4, "batch": 256}
    assert recipe == {"epochs": 1, "lr": 1.0, "augment": "dsa", **plain}
    assert trained(dataset, recipe={"epochs": 1, "lr": 1.0, "augment": "dsa"}) == result
    for changes, message in (
        ({"recipe": {"epoch": 1}}, "unknown option 'epoch'; did you mean 'epochs'"),
        ({"recipe": {"epochs": 0}}, "epochs: .*got 0"),
        ({"num_models": 0}, "--num-models must be >= 1, got 0"),
        ({"arch": "convnet9"}, "convnet9"),
    ):
        with pytest.raises(InputError, match=message):
            trained(dataset, **changes)


def test_a_pool_folder_of_ones_own(toy: Any, tmp_path: Path, ddray_home: Path) -> None:
    result = trained(toy(), folder=tmp_path / "own")
    assert result["folder"] == str(tmp_path / "own" / result["key"])
    assert not ddray_home.exists()
    assert list_pool().models == []


def test_the_list_says_what_is_there(toy: Any, ddray_home: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert list_pool().models == []
    keys = sorted(trained(toy(), num_models=2)["keys"])
    folder = ddray_home / "pool" / keys[1]

    models = list_pool().dump()["models"]

    assert [model["key"] for model in models] == keys
    assert models[1] == {
        "key": keys[1],
        "kind": "supervised",
        "dataset": "toy",
        "arch": "convnet1_w8",
        "epochs": 1,
        "times_trained": 1,
        "size_bytes": (folder / ENTRY).stat().st_size + (folder / TENSORS).stat().st_size,
    }
    assert caplog.records == []
    (folder / ENTRY).write_text("{")
    assert [model["key"] for model in list_pool()["models"]] == keys[:1]
    assert keys[1][:12] in caplog.text
    (folder / ENTRY).write_text(json.dumps({"key": keys[1], "spec": {}}))
    assert list_pool()["models"][1]["epochs"] is None


def test_an_entry_set_aside_while_the_list_is_made_is_left_out(
    toy: Any, ddray_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = sorted(trained(toy(), num_models=2)["keys"])
    describe = PoolFiles.describe

    def overtaken(files: PoolFiles, key: str) -> dict[str, Any]:
        description = describe(files, key)
        if key == keys[0]:
            (files.folder / key).rename(files.folder / f"{key}.corrupt-1")
        return description

    monkeypatch.setattr(PoolFiles, "describe", overtaken)
    assert [model["key"] for model in list_pool()["models"]] == keys[1:]


SMALL = {"epochs": 1, "batch": 8, "projector": 8}


@pytest.mark.parametrize("method", ["krr_st", "boost_ssdd"])
def test_a_teacher_is_the_one_that_the_methods_ask_for(method: str, toy: Any, ddray_home: Path) -> None:
    dataset = toy()
    result = train_teacher(dataset, arch="convnet1_w8", recipe=SMALL, seed=0, device=CPU)

    layers = [{"method": {"teacher": {**SMALL, "arch": "convnet1_w8"}}}]
    plan = resolve(method, dataset, budget=20, layers=layers)
    ctx = make_context(plan, dataset.train(), split_name="train", device=CPU, pool=LocalPool(never))
    entry = teacher_of(ctx, plan.config.method.teacher)
    assert entry.meta["key"] == result["key"] == result["keys"][0]
    assert Path(result["folder"], TENSORS).is_file()
    (model,) = list_pool()["models"]
    assert (model["kind"], model["dataset"], model["arch"]) == ("ssl", "toy", "convnet1_w8")
    assert (model["epochs"], model["times_trained"]) == (1, 1)


@pytest.mark.parametrize("method", ["krr_st", "boost_ssdd", "kmeans_ssl"])
def test_a_teacher_of_no_settings_is_that_of_the_methods_defaults(
    method: str, digits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shipped settings for a dataset apply, as they do for the methods."""
    monkeypatch.setattr(SslTrainer, "__call__", lambda self, spec: ({"features": torch.ones(1)}, {}))
    result = train_teacher(digits, arch="auto", recipe={}, seed=0, device=CPU)

    plan = resolve(method, digits, budget=200)
    ctx = make_context(plan, digits.train(), split_name="train", device=CPU, pool=LocalPool(never))
    assert teacher_of(ctx, plan.config.method.teacher).meta["key"] == result["key"]


def never(spec: Any) -> Any:
    raise AssertionError("trained twice")


def test_a_teachers_settings_are_checked(toy: Any, sounds: Any) -> None:
    def teacher(dataset: Any, **changes: Any) -> Any:
        return train_teacher(
            dataset, **{"arch": "auto", "recipe": SMALL, "seed": 0, "device": CPU, **changes}
        )

    for changes, message in (
        ({"recipe": {"epoch": 1}}, "unknown option .*epoch'; did you mean .*epochs"),
        ({"recipe": {"epochs": 0}}, "epochs: .*got 0"),
        ({"arch": "resnet81"}, "did you mean"),
    ):
        with pytest.raises(InputError, match=message):
            teacher(toy(), **changes)
    with pytest.raises(InputError, match="needs 8-bit images"):
        teacher(sounds)


def test_an_entry_is_shown_by_a_prefix(toy: Any, ddray_home: Path) -> None:
    keys = sorted(trained(toy(), num_models=2)["keys"])

    entry = show_entry(keys[0][:10])

    assert (entry["key"], entry["folder"]) == (keys[0], str(ddray_home / "pool" / keys[0]))
    assert entry["meta"]["spec"]["arch"] == "convnet1_w8"
    assert entry["tensors"]["weights.body.convs.0.weight"] == {"dtype": "F32", "shape": [8, 3, 3, 3]}
    assert all(name.startswith("weights.") for name in entry["tensors"])  # features are another entry
    with pytest.raises(InputError, match=r"key must fit one entry of .*, 0 start with 'zz'; there: "):
        show_entry("zz")
    with pytest.raises(InputError, match=f"2 start with ''; there: {keys[0][:12]}, {keys[1][:12]}"):
        show_entry("")
    (ddray_home / "pool" / keys[0] / TENSORS).write_bytes(b"half")
    with pytest.raises(InputError, match=r"must be undamaged: .*4 bytes instead of"):
        show_entry(keys[0])


class TestCommands:
    TRAIN = ("pool", "train", "--kind", "supervised", "--arch", "convnet1_w8", "--epochs", "1")
    EXPERTS = ("pool", "train", "--kind", "trajectory", "--arch", "convnet1_w8", "--epochs", "1")

    def test_train_list_show(self, capfd: pytest.CaptureFixture[str], ddray_home: Path) -> None:
        assert _run([*self.TRAIN, "--num-models", "2", "--device", "cpu", "--json"], False) == 0
        result = json.loads(capfd.readouterr().out)
        assert len(result["keys"]) == 2

        assert _run(["pool", "list", "--json"], False) == 0
        models = json.loads(capfd.readouterr().out)["models"]
        assert sorted(result["keys"]) == [model["key"] for model in models]
        assert {(model["dataset"], model["epochs"]) for model in models} == {("digits", 1)}

        assert _run(["pool", "show", result["key"][:8], "--json"], False) == 0
        assert json.loads(capfd.readouterr().out)["key"] == result["key"]
        for command in (["pool", "list"], ["pool", "show", result["key"]], [*self.TRAIN]):
            assert _run(command, False) == 0
            assert result["key"][:12] in capfd.readouterr().out

    def test_train_list_show_experts(self, capfd: pytest.CaptureFixture[str], ddray_home: Path) -> None:
        command = [*self.EXPERTS, "--num-models", "2", "--device", "cpu", "--set", "pixel_space=zca"]
        assert _run([*command, "--json"], False) == 0
        result = json.loads(capfd.readouterr().out)
        assert _run(["pool", "list", "--json"], False) == 0
        models = json.loads(capfd.readouterr().out)["models"]
        assert sorted(result["keys"]) == [model["key"] for model in models]
        assert {(model["kind"], model["epochs"]) for model in models} == {("trajectory", 1)}
        assert _run(["pool", "show", result["key"][:8], "--json"], False) == 0
        entry = json.loads(capfd.readouterr().out)
        assert entry["tensors"]["snapshots"]["shape"][0] == 2
        assert entry["meta"]["spec"]["transform"] == "zca+dsa"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["pool", "train", "--kind", "supervized"], "--kind must be one of .*did you mean 'supervised'"),
            (
                ["pool", "train", "--kind", "diffusion", "--seed", "1"],
                "--seed must go with --kind supervised or ssl or trajectory, got --kind diff.*; leave it out",
            ),
            (["pool", "train", "--kind", "diffusion", "--arch", "convnet3"], "--arch must go with"),
            (
                ["pool", "train", "--kind", "ssl", "--num-models", "1"],
                "--num-models must go with --kind supervised or trajectory, got --kind ssl",
            ),
            (
                ["pool", "train", "--kind", "ssl", "--num-workers", "2"],
                r"--num-workers must go with --kind supervised or trajectory, got --kind ssl \(.*leave it",
            ),
            (["pool", "train", "--kind", "diffusion", "--num-workers", "2"], "--num-workers must go with"),
            ([*TRAIN, "--num-workers", "0"], "--num-workers: .* greater than or equal to 1, got 0"),
            ([*TRAIN, "--address", "auto"], "--address needs --num-workers N, got auto without it"),
            ([*TRAIN, "--num-workers", "2", "--device", "cpu"], "--device must be left out .*, got cpu"),
            ([*EXPERTS, "--num-models", "0"], "--num-models must be >= 1, got 0"),
            ([*EXPERTS, "--set", "pixel_space=zka"], "pixel_space must be one of .*did you mean 'zca'"),
            ([*EXPERTS, "--set", "momentom=0"], "unknown option 'momentom'"),
            (["pool", "show", "abc"], "0 start with 'abc'; there: none"),
            ([*TRAIN, "--set", "epoch=2"], "unknown option 'epoch'"),
            ([*TRAIN, "--dataset", "digitz"], "did you mean 'digits'"),
        ],
    )
    def test_bad_input_is_one_line(
        self, arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        import re

        assert _run(arguments, False) == 2
        (line,) = capfd.readouterr().err.strip().splitlines()
        assert re.match(f"error: .*{message}", line)

    def test_epochs_and_sets_reach_the_recipe(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        calls: list[dict[str, Any]] = []

        def record(dataset: Any, **settings: Any) -> PoolResult:
            calls.append({"dataset": dataset.name, **settings})
            return PoolResult(key="k", folder="f", keys=["k"])

        monkeypatch.setattr(pool_api, "train_pool", record)
        sets = ["--set", "epochs=7", "--set", "lr=1e-1", "--seed", "4", "--out", "own"]
        assert _run(["pool", "train", "--kind", "supervised", *sets], False) == 0
        assert "next:" not in capsys.readouterr().out, "`pool show` does not look there"
        assert _run([*self.TRAIN, *sets], False) == 0
        assert _run(list(self.TRAIN), False) == 0
        assert capsys.readouterr().out.endswith("next: ddray pool show k\n")
        assert calls[0]["recipe"] == {"epochs": 7, "lr": 0.1}
        assert (calls[0]["seed"], calls[0]["num_models"], calls[0]["arch"]) == (4, 1, "auto")
        assert calls[0]["folder"] == Path.cwd() / "own"
        assert (calls[1]["recipe"]["epochs"], calls[1]["arch"]) == (1, "convnet1_w8")

    def test_train_a_teacher(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[dict[str, Any]] = []

        def record(dataset: Any, **settings: Any) -> PoolResult:
            calls.append({"dataset": dataset.name, **settings})
            return PoolResult(key="k", folder="f", keys=["k"])

        monkeypatch.setattr(pool_api, "train_teacher", record)
        command = ["pool", "train", "--kind", "ssl", "--device", "cpu"]
        assert _run([*command], False) == 0
        options = ["--epochs", "3", "--set", "batch=9", "--seed", "2", "--arch", "resnet10", "--out", "own"]
        assert _run([*command, *options], False) == 0
        rest = {"dataset": "digits", "device": CPU}
        assert calls == [
            {**rest, "arch": "auto", "recipe": {}, "seed": 0, "folder": None},
            {
                **rest,
                "arch": "resnet10",
                "recipe": {"batch": 9, "epochs": 3},
                "seed": 2,
                "folder": Path.cwd() / "own",
            },
        ]


def test_a_damaged_entry_is_said_on_stderr_at_the_next_use(
    toy: Any, ddray_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = trained(toy())
    (ddray_home / "pool" / result["key"] / TENSORS).write_bytes(b"half")
    with caplog.at_level(logging.WARNING):
        trained(toy())
    assert result["key"][:12] in caplog.text
    assert [model["times_trained"] for model in list_pool()["models"]] == [2]
