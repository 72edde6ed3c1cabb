"""`ddray evaluate`: its protocols and options on whole files, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from scipy.io import wavfile

from ddray.artifact.distilled_set import DistilledSet, TrainSet
from ddray.artifact.reading import load
from ddray.cli import main
from ddray.commands.options import to_json
from ddray.data import carve_val, open_dataset
from ddray.drawing.images import grid
from ddray.errors import InputError
from ddray.evaluation import hard, robust
from ddray.evaluation.options import EvaluateOptions, evaluation_config
from ddray.jobs import score as scoring
from ddray.jobs.distill import distill
from ddray.jobs.plan import resolve
from ddray.jobs.score import evaluate
from ddray.training.recipe import RECIPES

CPU = torch.device("cpu")
SMALL = {"arch": "convnet2_w8", "compile": "off", "evaluate": {"epochs": 3, "seeds": 2}}
PARTS = ("accuracy_full", "accuracy_random", "accuracy_plain", "accuracy_random_plain")
ARCHS = (
    "convnet3",
    "resnet10",
    "densenet121",
    "densenet_cifar",
    "vgg11",
    "alexnet",
    "mobilenet_v2",
    "vit_tiny",
)


@pytest.fixture
def random_set(digits: Any, tmp_path: Path) -> Path:
    plan = resolve("random", digits, ipc=2, seed=3, layers=[SMALL])
    distill(plan, device=CPU, run_dir=tmp_path / "random", out=tmp_path / "set.pt")
    return tmp_path / "set.pt"


def quick(**options: Any) -> EvaluateOptions:
    return EvaluateOptions(**{"seeds": 2, "epochs": 2, **options})


def with_evaluate(path: Path, **settings: Any) -> DistilledSet:
    """Return the set at `path` with other evaluation settings in its configuration."""
    distilled = load(path)
    config = {**distilled.meta.config, "evaluate": settings}
    return dataclasses.replace(distilled, meta=distilled.meta.model_copy(update={"config": config}))


class TestSettings:
    idc: ClassVar[dict[str, Any]] = {**RECIPES["idc"], "epochs": 40, "seeds": 1, "val_seeds": 1}

    def test_a_recipe_replaces_the_artifacts_and_options_win_over_it(self, random_set: Path) -> None:
        distilled = load(random_set)
        config = evaluation_config(distilled, EvaluateOptions(recipe="idc", epochs=7))
        assert {name: getattr(config, name) for name in RECIPES["idc"]} == {**RECIPES["idc"], "epochs": 7}
        assert config.seeds == 2
        idc_set = with_evaluate(random_set, **self.idc)
        back = evaluation_config(idc_set, EvaluateOptions(recipe="vico"))
        assert {name: getattr(back, name) for name in RECIPES["vico"]} == RECIPES["vico"]

    def test_the_artifacts_own_recipe_is_the_default(self, random_set: Path) -> None:
        settings = evaluation_config(with_evaluate(random_set, **self.idc), EvaluateOptions()).every_value()
        assert {name: settings[name] for name in self.idc} == self.idc

    @pytest.mark.parametrize("augment", ["dsa", "none", "autoaugment"])
    def test_another_augmentation_drops_strategy_and_cutmix(self, augment: Any, random_set: Path) -> None:
        idc_set = with_evaluate(random_set, **self.idc)
        config = evaluation_config(idc_set, EvaluateOptions(augment=augment))
        assert (config.augment, config.strategy, config.cutmix) == (augment, None, 0.0)
        same = evaluation_config(idc_set, EvaluateOptions(augment="dsa_idc"))
        assert (same.strategy, same.cutmix) == (self.idc["strategy"], 0.5)

    @pytest.mark.parametrize(("warmup", "epochs"), [(0, 300), (500, 1000)])
    def test_fewer_epochs_without_augmentation_leave_a_warm_up_whole(
        self, warmup: int, epochs: int, random_set: Path
    ) -> None:
        settings = {"epochs": 1000, "schedule": "cosine", "warmup": warmup}
        config = evaluation_config(with_evaluate(random_set, **settings), EvaluateOptions(augment="none"))
        assert config.epochs == epochs

    def test_an_unknown_recipe_is_refused(self, random_set: Path) -> None:
        with pytest.raises(InputError, match="recipe must be one of idc, minimax, table5, vico, got 'icd'"):
            evaluate(random_set, quick(recipe="icd"), device=CPU)

    def test_the_idc_recipe_runs(self, random_set: Path) -> None:
        (result,) = evaluate(random_set, quick(recipe="idc"), device=CPU)["results"]
        assert result["per_seed"] != evaluate(random_set, quick(), device=CPU)["results"][0]["per_seed"]


class TestTrainingSet:
    def test_it_is_trained_on_what_the_set_decodes_to(
        self, random_set: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[int] = []
        fit = hard.fit_all
        monkeypatch.setattr(
            hard,
            "fit_all",
            lambda train_set, *args, **kwargs: (
                seen.append(len(train_set.images)) or fit(train_set, *args, **kwargs)
            ),
        )
        decode = DistilledSet.decode

        def four_each(self: DistilledSet) -> TrainSet:
            whole = decode(self)
            return TrainSet(whole.images.repeat_interleave(4, 0), whole.labels.repeat_interleave(4))

        monkeypatch.setattr(DistilledSet, "decode", four_each)
        (result,) = evaluate(random_set, quick(), device=CPU)["results"]
        assert result["num_images"] == 80
        assert seen == [80, 80]

    @pytest.mark.parametrize(("limit", "num"), [(1, 1), (13, 13), (20, 20), (500, 20)])
    def test_a_limit(self, limit: int, num: int, random_set: Path) -> None:
        (result,) = evaluate(random_set, quick(train_limit=limit), device=CPU)["results"]
        assert result["num_images"] == num

    def test_a_limited_set_is_stratified_and_the_same_for_all_networks(
        self, random_set: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sets: list[TrainSet] = []
        monkeypatch.setattr(
            scoring,
            "evaluate_archs",
            lambda _, train_set, *args, **kwargs: sets.append(train_set) or [],
        )
        for seed in (0, 0, 1):
            evaluate(random_set, quick(train_limit=10, seed=seed), device=CPU)
        assert [sorted(one.labels.tolist()) for one in sets] == [list(range(10))] * 3
        assert torch.equal(sets[0].images, sets[1].images)
        assert not torch.equal(sets[0].images, sets[2].images)


@pytest.mark.parametrize("arch", ARCHS)
def test_other_architectures_train_on_it_also_with_a_last_batch_of_one(
    arch: str, digits: Any, tmp_path: Path
) -> None:
    plan = resolve("random", digits, ipc=1, layers=[{**SMALL, "evaluate": {"batch": 8}}])
    distill(plan, device=CPU, run_dir=tmp_path / "run", out=tmp_path / "set.pt")
    options = quick(archs=(arch,), seeds=1, epochs=1, train_limit=9)
    (result,) = evaluate(tmp_path / "set.pt", options, device=CPU)["results"]
    assert (result["arch"], result["num_images"]) == (arch, 9)
    assert 0 <= result["accuracy_mean"] <= 1


class TestRobust:
    def test_the_answer_holds_scores_and_components(self, random_set: Path, ddray_home: Path) -> None:
        archs = ("convnet1_w8", "convnet2_w8")
        answer = evaluate(random_set, quick(protocol="robust", archs=archs, full_epochs=1), device=CPU)

        assert answer.dump().keys() == {"protocol", "split", "full_epochs", "random_per_class", "results"}
        assert (answer["full_epochs"], answer["random_per_class"]) == (1, 2)
        assert [result["arch"] for result in answer["results"]] == list(archs)
        for result in answer["results"]:
            assert 0 <= result["lrs"] <= 1
            assert 0 <= result["ars"] <= 1
            assert result["accuracy_mean"] - result["accuracy_random"] == pytest.approx(result["ior"])
            assert result["accuracy_full"] - result["accuracy_mean"] == pytest.approx(result["hlr"])
            assert all(0 <= result[name] <= 1 for name in PARTS)
        assert json.loads(to_json(answer)) == answer.dump()
        ledger_rows = list((ddray_home / "truth" / "ledger").glob("*.json"))
        assert len(ledger_rows) == 2  # one per architecture, not per seed
        evaluate(random_set, quick(protocol="robust", archs=archs, full_epochs=1), device=CPU)
        assert list((ddray_home / "truth" / "ledger").glob("*.json")) == ledger_rows

    def test_val_never_sees_its_own_images_in_training(
        self, random_set: Path, digits: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        arguments: list[Any] = []
        original = robust.Robust
        monkeypatch.setattr(
            robust, "Robust", lambda *args, **kwargs: arguments.append(kwargs) or original(*args, **kwargs)
        )
        evaluate(random_set, quick(protocol="robust", seeds=1, full_epochs=1, split="val"), device=CPU)

        real, _ = carve_val(digits.train(), seed=3)
        assert torch.equal(arguments[0]["real"].images, real.images)
        assert arguments[0]["split_name"] == "train-val3"

    def test_random_images_take_the_sets_storage(self, random_set: Path) -> None:
        distilled = load(random_set)
        for floats, expected in ((20 * 256, 2), (10 * 256, 1), (5, 1), (45 * 256, 4)):
            meta = distilled.meta.model_copy(update={"storage_floats": floats})
            assert robust.images_at_storage(dataclasses.replace(distilled, meta=meta)) == expected


class TestContinual:
    def test_the_answer_holds_an_accuracy_per_task(self, random_set: Path) -> None:
        answer = evaluate(random_set, quick(protocol="continual"), device=CPU)
        (result,) = answer["results"]

        assert answer.dump().keys() == {"protocol", "split", "results"}
        assert len(result["per_step"]) == len(result["per_step_std"]) == 5
        assert result["per_step"][-1] == pytest.approx(result["accuracy_mean"])
        assert result["incremental_accuracy"] == pytest.approx(sum(result["per_step"]) / 5)
        assert result["num_images"] == 20
        assert json.loads(to_json(answer)) == answer.dump()

    def test_ten_tasks(self, random_set: Path) -> None:
        (result,) = evaluate(random_set, quick(protocol="continual", num_tasks=10, seeds=1), device=CPU)[
            "results"
        ]
        assert len(result["per_step"]) == 10
        assert result["per_step"][0] == 1.0  # one class

    def test_a_limit_that_leaves_no_image_of_a_class_is_refused(self, random_set: Path) -> None:
        with pytest.raises(InputError, match="a memory must hold images of every class"):
            evaluate(random_set, quick(protocol="continual", train_limit=8), device=CPU)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--protocol", "hrad"],
            "protocol must be one of continual, distribution, hard, kernel, linear, robust, soft, steps, "
            "got 'hrad'",
        ),
        (["--num-tasks", "5"], "--num-tasks must be left out, or used with --protocol continual"),
        (
            ["--protocol", "robust", "--num-tasks", "5"],
            "--num-tasks must be left out, or used with --protocol continual",
        ),
        (["--full-epochs", "5"], "--full-epochs must be left out, or used with --protocol robust"),
        (["--protocol", "robust", "--full-epochs", "0"], "--full-epochs must be >= 1, got 0"),
        (["--protocol", "robust", "--train-limit", "5"], "--train-limit must be left out with"),
        (["--train-limit", "0"], "--train-limit must be >= 1, got 0"),
        (["--protocol", "continual", "--num-tasks", "11"], "--num-tasks must be in 2..10"),
        (["--protocol", "continual", "--num-tasks", "1"], "--num-tasks must be in 2..10"),
        (["--recipe", "icd"], "recipe must be one of idc, minimax, table5, vico"),
        (["--recipe", "table5", "--protocol", "robust"], "recipe must be one of idc, minimax, vico"),
    ],
)
def test_bad_options_are_one_line_and_exit_2(
    arguments: list[str], message: str, random_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", str(random_set), "--seeds", "1", "--epochs", "1", "--device", "cpu", *arguments])

    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert message in line


def test_debug_shows_the_traceback_and_changes_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", str(tmp_path / "none.pt"), "--debug"])

    assert stopped.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert any(line.startswith("Traceback") for line in said)
    assert said[-1].startswith("error: ")


def test_sigterm_ends_with_one_line(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = "distill --method dm --ipc 1 --steps 1000000 --set checkpoint_every=1 --set arch=convnet1_w8"
    child = subprocess.Popen(
        [sys.executable, "-m", "ddray", *command.split(), "--run-dir", str(run)],
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 120
    while not list(run.glob("checkpoints/*.pt")) and time.monotonic() < until:
        time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=60)

    assert child.returncode == 1
    last = said.splitlines()[-1]
    assert re.fullmatch(
        r"error: the run was interrupted at step [\d,]+ of 1,000,000, saved; continue .*", last
    )
    assert last.endswith(f"; continue with: ddray {command} --run-dir {run} --resume")


@pytest.mark.parametrize("protocol", ["robust", "continual"])
def test_people_get_tables(protocol: str, random_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", str(random_set), "--seeds", "1", "--epochs", "1", "--protocol", protocol])

    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert ("LRS" in out) == (protocol == "robust")
    assert ("task 5" in out) == (protocol == "continual")


class TestSpeech:
    @pytest.fixture
    def clips(self, tmp_path: Path) -> str:
        """Two words of sixteen clips: a low and a high tone with noise."""
        noise = np.random.default_rng(0)
        for name, hertz in (("low", 300), ("high", 2000)):
            folder = tmp_path / "words" / name
            folder.mkdir(parents=True)
            for clip_index in range(16):
                wave = np.sin(2 * np.pi * hertz * np.arange(8000) / 8000) + noise.normal(0, 0.1, 8000)
                wavfile.write(folder / f"{clip_index:02}.wav", 8000, (wave * 9000).astype(np.int16))
        return str(tmp_path / "words")

    def distilled(self, clips: str, tmp_path: Path) -> Path:
        dataset = open_dataset(clips)
        plan = resolve("random", dataset, ipc=3, layers=[{"compile": "off", "evaluate": {"recipe": "idc"}}])
        assert plan.arch == "convnet4"
        distill(plan, device=CPU, run_dir=tmp_path / "run", out=tmp_path / "set.pt")
        return tmp_path / "set.pt"

    def test_spectrograms_are_scored_without_augmentation(
        self, clips: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = self.distilled(clips, tmp_path)
        calls: list[Any] = []
        train = hard.train_together

        def spy(nets: Any, images: Any, labels: Any, recipe: Any, **options: Any) -> float:
            calls.append((options["augment"], recipe.cutmix, recipe.schedule, recipe.batch))
            return train(nets, images, labels, recipe, **options)

        monkeypatch.setattr(hard, "train_together", spy)
        options = quick(seeds=1, epochs=12, archs=("convnet4_w16",))
        (result,) = evaluate(path, options, device=CPU)["results"]
        assert calls == [(None, 0.0, "multistep", 64)]
        assert result["accuracy_mean"] == 1.0

    def test_their_picture_is_no_black_square(self, clips: str, tmp_path: Path) -> None:
        picture = grid(load(self.distilled(clips, tmp_path)))[0]
        assert 0.2 < float(picture.mean()) < 0.8
        assert float(((picture > 0.05) & (picture < 0.95)).float().mean()) > 0.7

    def test_asking_for_one_is_refused(self, clips: str, tmp_path: Path) -> None:
        path = self.distilled(clips, tmp_path)
        with pytest.raises(InputError, match=r"--augment must be none for spectrograms .*words.*, got dsa"):
            evaluate(path, quick(augment="dsa"), device=CPU)
        options = quick(augment="none", seeds=1, epochs=1, archs=("convnet4_w8",))
        assert evaluate(path, options, device=CPU)["results"]

    def test_robust_trains_twice_where_nothing_is_augmented(
        self, clips: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from ddray.evaluation import robust

        path, calls = self.distilled(clips, tmp_path), []
        fit = robust.fit

        def spy(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("name") != "whole set":
                calls.append(1)
            return fit(*args, **kwargs)

        monkeypatch.setattr(robust, "fit", spy)
        options = quick(protocol="robust", seeds=1, epochs=2, archs=("convnet4_w8",))
        (result,) = evaluate(path, options, device=CPU)["results"]
        assert len(calls) == 2
        assert result["accuracy_plain"] == result["accuracy_mean"]
