from __future__ import annotations

import json
import logging
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from ddray.artifact.export import export_set
from ddray.artifact.reading import load
from ddray.commands.options import to_json
from ddray.data import carve_val, open_dataset
from ddray.errors import InputError
from ddray.evaluation.hard import Hard
from ddray.evaluation.options import EvaluateOptions
from ddray.evaluation.protocol import EvalResult
from ddray.jobs import score as scoring
from ddray.jobs.distill import distill
from ddray.jobs.plan import resolve
from ddray.jobs.score import evaluate

CPU = torch.device("cpu")
SMALL = {"arch": "convnet2_w8", "compile": "off", "evaluate": {"epochs": 3, "seeds": 2}}


@pytest.fixture
def random_set(digits: Any, tmp_path: Path) -> Path:
    plan = resolve("random", digits, ipc=1, seed=3, layers=[SMALL])
    distill(plan, device=CPU, run_dir=tmp_path / "random", out=tmp_path / "set.pt")
    return tmp_path / "set.pt"


def quick(**options: Any) -> EvaluateOptions:
    return EvaluateOptions(**{"seeds": 2, "epochs": 3, **options})


class TestEvaluate:
    def test_the_answer_has_every_arch_with_its_seeds(self, random_set: Path) -> None:
        answer = evaluate(random_set, quick(archs=("convnet1_w8", "auto_bn"), epochs=1), device=CPU)

        assert answer.dump().keys() == {"protocol", "split", "results"}
        assert (answer["protocol"], answer["split"]) == ("hard", "test")
        assert [result["arch"] for result in answer["results"]] == ["convnet1_w8", "convnet3_bn"]
        for result in answer["results"]:
            assert result.dump().keys() == {
                *("arch", "accuracy_mean", "accuracy_std", "per_seed", "num_images", "wall_s", "precision"),
                *("balanced_accuracy_mean", "balanced_accuracy_std", "per_class"),
            }
            assert len(result["per_seed"]) == 2
            assert all(0 <= value <= 1 for value in result["per_seed"])
            assert result["num_images"] == 10
        assert json.loads(to_json(answer)) == answer.dump()

    def test_the_artifacts_own_settings_are_the_default(self, random_set: Path) -> None:
        (result,) = evaluate(random_set, EvaluateOptions(), device=CPU)["results"]

        assert result["arch"] == "convnet2_w8"
        assert len(result["per_seed"]) == 2  # evaluate.seeds
        assert result["per_seed"] == evaluate(random_set, quick(), device=CPU)["results"][0]["per_seed"]

    def test_val_is_what_a_search_with_the_artifacts_seed_kept_back(
        self, random_set: Path, monkeypatch: pytest.MonkeyPatch, digits: Any
    ) -> None:
        seen: list[Any] = []

        def spy(evaluator: Any, train: Any, ctx: Any, **options: Any) -> list[Any]:
            seen.append(ctx.split)
            return []

        monkeypatch.setattr(scoring, "evaluate_archs", spy)
        evaluate(random_set, quick(split="val"), device=CPU)
        evaluate(random_set, quick(), device=CPU)

        assert torch.equal(seen[0].images, carve_val(digits.train(), seed=3)[1].images)
        assert torch.equal(seen[1].images, digits.test().images)

    @pytest.mark.parametrize("is_open", [True, False])
    def test_whether_images_are_mirrored_is_settable(
        self, is_open: bool, random_set: Path, monkeypatch: pytest.MonkeyPatch, digits: Any
    ) -> None:
        """Also of a dataset that is already open, which no other option can change."""
        seen: list[Any] = []
        monkeypatch.setattr(
            scoring, "evaluate_archs", lambda evaluator, train, ctx, **kwargs: seen.append(ctx) or []
        )
        dataset = digits if is_open else None
        for can_flip in (None, True):
            evaluate(random_set, quick(can_flip=can_flip), device=CPU, dataset=dataset)

        assert [ctx.dataset.can_flip for ctx in seen] == [False, True]
        assert [ctx.dataset.name for ctx in seen] == ["digits", "digits?can_flip=true"]
        if is_open:
            with pytest.raises(InputError, match="image_size must be set where a dataset is opened, got 8"):
                evaluate(random_set, quick(image_size=8), device=CPU, dataset=dataset)

    @pytest.mark.parametrize("augment", ["none", "dsa", "dsa_idc", "autoaugment", "randaugment", "crop_flip"])
    def test_every_augmentation_runs(self, augment: Any, random_set: Path) -> None:
        (result,) = evaluate(random_set, quick(augment=augment, seeds=1), device=CPU)["results"]

        assert 0 <= result["accuracy_mean"] <= 1
        assert result["accuracy_std"] is None

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"protocol": "soft-ish"},
                "protocol must be one of continual, distribution, hard, kernel, linear, robust, soft, steps",
            ),
            ({"split": "train"}, "split must be one of test, val, got 'train'"),
            ({"archs": ("convnet33",)}, "convnet33"),
            ({"seeds": 0}, r"evaluate\.seeds: .*got 0"),
            ({"epochs": 0}, r"evaluate\.epochs: .*got 0"),
            ({"augment": "mixup"}, "--augment must be one of .*got 'mixup'"),
            ({"dataset": "cifar11"}, "did you mean 'cifar10'"),
        ],
    )
    def test_bad_options_are_refused(self, options: Any, message: str, random_set: Path) -> None:
        with pytest.raises(InputError, match=message):
            evaluate(random_set, quick(**options), device=CPU)

    def foreign(self, folder: Path, digits: Any) -> Path:
        images = digits.train().images[:10].float() / 255
        torch.save({"data": [[images, torch.arange(10)]]}, folder / "res_x.pt")
        return folder / "res_x.pt"

    def test_a_foreign_file_needs_a_dataset(self, tmp_path: Path, digits: Any) -> None:
        path = self.foreign(tmp_path, digits)

        with pytest.raises(InputError, match=r"res_x\.pt does not say which dataset.*--dataset NAME"):
            evaluate(path, quick(), device=CPU)
        (result,) = evaluate(path, quick(dataset="digits", archs=("convnet1_w8",)), device=CPU)["results"]
        assert result["num_images"] == 10

    @pytest.mark.parametrize("kind", ["normalized", "raw", "zca"])
    def test_a_foreign_files_pixels_are_in_the_space_that_is_said(
        self, kind: Any, tmp_path: Path, digits: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spaces: list[Any] = []
        monkeypatch.setattr(
            scoring, "evaluate_archs", lambda evaluator, train, ctx, **kwargs: spaces.append(ctx.space) or []
        )
        path = self.foreign(tmp_path, digits)
        evaluate(path, quick(dataset="digits", pixel_space=kind, archs=("convnet1_w8",)), device=CPU)

        assert [space.kind for space in spaces] == [kind]
        if kind == "zca":
            assert spaces[0].zca_matrix.shape == (256, 256)

    def other(self, folder: Path, *, colour: bool) -> str:
        """An image folder with other classes, of digits' shape unless coloured."""
        from PIL import Image

        for label in "ab":
            (folder / "data" / label).mkdir(parents=True)
            for number in range(4):
                value = (9 * number, 40 * number, 1 + number) if colour else 40 * number
                picture = Image.new("RGB" if colour else "L", (16, 16), value)
                picture.save(folder / "data" / label / f"{number}.png")
        return str(folder / "data")

    @pytest.mark.parametrize("colour", [True, False])
    def test_another_dataset_is_refused(self, colour: bool, random_set: Path, tmp_path: Path) -> None:
        name = self.other(tmp_path, colour=colour)
        same_shape = open_dataset(name).image_shape == (1, 16, 16)

        with pytest.raises(InputError, match="evaluate it on the dataset it was distilled from") as caught:
            evaluate(random_set, quick(dataset=name), device=CPU)
        assert ("has 10 classes of digits" in str(caught.value)) == same_shape

    @pytest.mark.parametrize("can_flip", [None, True])
    def test_another_copy_of_the_dataset_is_said(
        self, can_flip: bool | None, random_set: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        import dataclasses

        distilled = load(random_set)
        old = distilled.meta.model_copy(update={"fingerprint": "0" * 64})
        dataclasses.replace(distilled, meta=old).save(random_set)

        with caplog.at_level(logging.WARNING):
            evaluate(random_set, quick(seeds=1, epochs=1, can_flip=can_flip), device=CPU)
        assert "another copy of digits" in caplog.text


class TestForeignSets:
    """What other projects' files are scored as; how they are read is in tests/artifact/foreign."""

    @pytest.fixture
    def trained_on(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """Every (set, context, seed) that a network would be trained on."""
        calls: list[Any] = []

        def evaluate_one(self: Any, train_set: Any, ctx: Any, *, arch: str, seed: int) -> EvalResult:
            calls.append((train_set, ctx, seed, self.recipe))
            return EvalResult(arch, seed, 0.5 + 0.1 * len(calls), len(train_set.images), 0.0)

        monkeypatch.setattr(Hard, "evaluate", evaluate_one)
        return calls

    def runs(self, folder: Path, num_runs: int) -> Path:
        data = [[torch.full((10, 1, 16, 16), float(run)), torch.arange(10)] for run in range(num_runs)]
        torch.save({"data": data, "accs_all_exps": {"ConvNet": [0.1] * num_runs}}, folder / "res_DM.pt")
        return folder / "res_DM.pt"

    def test_all_runs_are_scored_with_networks_of_their_own(
        self, tmp_path: Path, trained_on: list[Any]
    ) -> None:
        path = self.runs(tmp_path, 3)

        answer = evaluate(path, quick(dataset="digits", archs=("convnet1_w8",), seed=5), device=CPU)

        assert [float(train_set.images[0, 0, 0, 0]) for train_set, *_ in trained_on] == [0, 0, 1, 1, 2, 2]
        assert [seed for _, _, seed, _ in trained_on] == [5, 6, 7, 8, 9, 10]
        (result,) = answer["results"]
        assert result["per_seed"] == pytest.approx([0.6, 0.7, 0.8, 0.9, 1.0, 1.1])
        assert result["accuracy_mean"] == pytest.approx(0.85)
        assert result["accuracy_std"] == pytest.approx(statistics.stdev(result["per_seed"]))
        assert answer["num_sets"] == 3

    def test_one_run_is_scored_alone(self, tmp_path: Path, trained_on: list[Any]) -> None:
        answer = evaluate(self.runs(tmp_path, 3), quick(dataset="digits", index=1), device=CPU)

        assert {float(train_set.images[0, 0, 0, 0]) for train_set, *_ in trained_on} == {1.0}
        assert "num_sets" not in answer

    def pair(self, folder: Path) -> Path:
        torch.save(torch.randn(10, 1, 16, 16), folder / "images_best.pt")
        torch.save(torch.eye(10) * 4, folder / "labels_best.pt")
        torch.save(torch.tensor(0.03), folder / "lr_best.pt")
        return folder / "images_best.pt"

    def test_the_files_rate_is_the_default(self, tmp_path: Path, trained_on: list[Any]) -> None:
        path = self.pair(tmp_path)

        evaluate(path, quick(dataset="digits", seeds=1), device=CPU)
        evaluate(path, quick(dataset="digits", seeds=1, sets=("lr=0.5",)), device=CPU)
        evaluate(path, quick(dataset="digits", seeds=1, recipe="vico"), device=CPU)

        assert [recipe.lr for *_, recipe in trained_on] == [pytest.approx(0.03), 0.5, 0.01]
        assert torch.equal(trained_on[0][0].supervision, (torch.eye(10) * 4).softmax(1))

    @pytest.mark.parametrize(
        "protocol", ["hard", "continual", "linear", pytest.param("robust", marks=pytest.mark.slow)]
    )
    def test_every_protocol_takes_soft_labels(self, protocol: str, tmp_path: Path) -> None:
        options = {"protocol": protocol, "archs": ("convnet1_w8",), "seeds": 1, "epochs": 1}
        sets = ("probe.steps=2",) if protocol == "linear" else ()

        answer = evaluate(self.pair(tmp_path), quick(dataset="digits", sets=sets, **options), device=CPU)

        assert 0 <= answer["results"][0]["accuracy_mean"] <= 1

    def test_representations_are_scored_by_the_linear_protocol_alone(self, tmp_path: Path) -> None:
        torch.save(torch.rand(12, 1, 16, 16).requires_grad_(True), tmp_path / "x_syn.pt")
        torch.save(torch.randn(12, 32), tmp_path / "y_syn.pt")
        options = quick(dataset="digits", archs=("convnet1_w8_bn",), seeds=1, epochs=1)

        with pytest.raises(InputError, match="holds targets, not labels: --protocol must be linear"):
            evaluate(tmp_path, options, device=CPU)
        linear = options.model_copy(update={"protocol": "linear", "sets": ("probe.steps=2",)})
        (result,) = evaluate(tmp_path, linear, device=CPU)["results"]
        assert result["num_images"] == 12

    @pytest.mark.parametrize("train_limit", [None, 4])
    def test_soft_labels_stay_with_their_images(
        self, train_limit: int | None, tmp_path: Path, trained_on: list[Any]
    ) -> None:
        path = self.pair(tmp_path)

        evaluate(path, quick(dataset="digits", seeds=1, train_limit=train_limit), device=CPU)

        train_set = trained_on[0][0]
        assert train_set.soft_labels.argmax(1).tolist() == train_set.labels.tolist()
        images = torch.load(path, weights_only=True)
        assert torch.equal(train_set.images, images[train_set.labels])

    def test_another_datasets_numbers_normalise_both(
        self, tmp_path: Path, trained_on: list[Any], digits: Any
    ) -> None:
        path = self.runs(tmp_path, 1)

        evaluate(path, quick(dataset="digits", pixel_space="normalized:mnist"), device=CPU)

        train_set, ctx, *_ = trained_on[0]
        assert torch.equal(train_set.images, torch.zeros(10, 1, 16, 16))
        assert (ctx.space.kind, ctx.space.mean, ctx.space.std) == ("normalized", (0.1307,), (0.3081,))
        with pytest.raises(InputError, match="a dataset with 1 channels, got cifar10 with 3"):
            evaluate(path, quick(dataset="digits", pixel_space="normalized:cifar10"), device=CPU)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"pixel_space": "rgb"}, "--pixel-space must be one of normalized, normalized:NAME, raw, zca"),
            ({"pixel_space": "zca:mnist"}, "--pixel-space must be one of"),
            ({"pixel_space": "normalized:digits"}, "normalized:NAME must be one of .*cifar10.*got 'digits'"),
            ({"index": -1}, r"--index must be >= 0 \(the first set is 0\), got -1"),
            ({"index": 3}, r"--index must be in 0\.\.2"),
            ({"index": 3, "pixel_space": "zca"}, r"--index must be in 0\.\.2"),
        ],
    )
    def test_bad_options_are_refused(
        self, options: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = self.runs(tmp_path, 3)
        monkeypatch.setattr(scoring, "pixel_space", None)  # nothing is fitted before

        with pytest.raises(InputError, match=message):
            evaluate(path, quick(dataset="digits", **options), device=CPU)

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"index": 0}, "--index"), ({"factor": 2}, "--factor"), ({"pixel_space": "zca"}, "--pixel-space")],
    )
    def test_options_of_foreign_files_are_refused_for_ours(
        self, options: Any, message: str, random_set: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(scoring, "pixel_space", None)  # nothing is fitted before
        with pytest.raises(InputError, match=f"{message} must be left out for ddray's own files"):
            evaluate(random_set, quick(dataset="digits", **options), device=CPU)

    @pytest.mark.parametrize("name", ["pictures", "set.parquet"])
    def test_exported_pictures_name_their_dataset(self, name: str, random_set: Path, tmp_path: Path) -> None:
        export_set(load(random_set), tmp_path / name)

        answer = evaluate(tmp_path / name, EvaluateOptions(), device=CPU)

        (result,) = answer["results"]
        assert (result["arch"], result["num_images"], len(result["per_seed"])) == ("convnet2_w8", 10, 2)
