from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from ddray.artifact.reading import load
from ddray.commands.options import to_json
from ddray.data import carve_val, open_dataset
from ddray.errors import InputError
from ddray.evaluation.options import EvaluateOptions
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
                *("arch", "accuracy_mean", "accuracy_std", "per_seed", "num_images", "wall_s")
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

    @pytest.mark.parametrize("augment", ["none", "dsa", "dsa_idc", "autoaugment", "randaugment"])
    def test_every_augmentation_runs(self, augment: Any, random_set: Path) -> None:
        (result,) = evaluate(random_set, quick(augment=augment, seeds=1), device=CPU)["results"]

        assert 0 <= result["accuracy_mean"] <= 1
        assert result["accuracy_std"] is None

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"protocol": "soft-ish"}, "protocol must be one of continual, hard, linear, robust, soft"),
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
                mode = "RGB" if colour else "L"
                picture = Image.new(mode, (16, 16), 40 * number if mode == "L" else (9, 40 * number, 1))
                picture.save(folder / "data" / label / f"{number}.png")
        return str(folder / "data")

    @pytest.mark.parametrize("colour", [True, False])
    def test_another_dataset_is_refused(self, colour: bool, random_set: Path, tmp_path: Path) -> None:
        name = self.other(tmp_path, colour=colour)
        same_shape = open_dataset(name).image_shape == (1, 16, 16)

        with pytest.raises(InputError, match="evaluate it on the dataset it was distilled from") as caught:
            evaluate(random_set, quick(dataset=name), device=CPU)
        assert ("has 10 classes of digits" in str(caught.value)) == same_shape

    def test_another_copy_of_the_dataset_is_said(
        self, random_set: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        import dataclasses

        distilled = load(random_set)
        old = distilled.meta.model_copy(update={"fingerprint": "0" * 64})
        dataclasses.replace(distilled, meta=old).save(random_set)

        with caplog.at_level(logging.WARNING):
            evaluate(random_set, quick(seeds=1, epochs=1), device=CPU)
        assert "another copy of digits" in caplog.text
