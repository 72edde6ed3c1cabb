from __future__ import annotations

import importlib.util
import logging
import math
import pickle
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddray.errors import InputError
from ddray.ranking.figures_of_merit import figures_of_merit
from ddray.ranking.nasbench201 import api_truth, read_table, table_truth
from ddray.ranking.options import NasOptions
from ddray.ranking.spaces import get_space
from ddray.ranking.truth import csv_truth, read_scores, read_truth, with_column

CELLS = [9930, 6111, 5, 15624]
SEEDS = (777, 888, 999)


class TestTable:
    def test_accuracies_are_fractions_in_the_order_asked_for(self) -> None:
        truth = table_truth([9930, 6111])

        assert truth.values == pytest.approx([0.943633, 0.943733])
        assert truth.test is not None
        assert truth.test == pytest.approx(truth.values)
        assert truth.source == "table:cifar10_test_200_mean"

    def test_another_column_keeps_its_own_datasets_test(self) -> None:
        truth = table_truth([1, 0], "cifar100_valid_12")

        assert truth.values == pytest.approx([0.5780, 0.3184])
        assert truth.test == pytest.approx([0.5826, 0.3126])

    @pytest.mark.parametrize(
        ("column", "word"),
        [
            ("cifar10_test_200_meen", "did you mean 'cifar10_test_200_mean'"),
            ("params_m_cifar10", "must be one of"),
        ],
    )
    def test_a_column_must_be_of_accuracies(self, column: str, word: str) -> None:
        with pytest.raises(InputError, match=word):
            table_truth([0], column)

    def test_it_is_of_nasbench201_and_its_cells(self) -> None:
        with pytest.raises(InputError, match="got --space convnet720"):
            read_truth(NasOptions(truth="table"), get_space("convnet720"), [0])
        with pytest.raises(InputError, match=r"0\.\.15624 for nasbench201, got 15625"):
            table_truth([0, 15625])

    def test_validation_accuracy_ranks_as_known(self) -> None:
        indices = range(15625)
        scores = table_truth(indices, "cifar10_valid_200_mean").values

        result = figures_of_merit(
            scores, table_truth(indices).values, storage_images=0, wall_s=0.0, num_bootstrap=100
        )

        assert result["spearman"] == pytest.approx(0.984, abs=0.002)
        assert result["best_truth_accuracy"] == pytest.approx(0.943733, abs=1e-6)
        low, high = result["spearman_ci95"]
        assert low <= result["spearman"] <= high


class TestColumn:
    """What a ranking is compared with is of its own dataset, or named."""

    @pytest.mark.parametrize(
        ("dataset", "column"),
        [
            ("cifar10", "cifar10_test_200_mean"),
            ("cifar100?image_size=32", "cifar100_test_200_mean"),
            (None, "cifar10_test_200_mean"),
        ],
    )
    @pytest.mark.parametrize("truth", ["table", "api:some.pth"])
    def test_it_is_the_datasets(self, truth: str, dataset: str | None, column: str) -> None:
        options = with_column(NasOptions(space="nasbench201", truth=truth), dataset)
        assert options.truth_column == column

    def test_of_another_dataset_it_must_be_named(self) -> None:
        with pytest.raises(InputError, match=r"got digits; it has cifar10, cifar100, .*--truth-column cifar"):
            with_column(NasOptions(space="nasbench201", truth="table"), "digits")
        named = NasOptions(space="nasbench201", truth="table", truth_column="cifar10_valid_12")
        assert with_column(named, "digits") == named

    @pytest.mark.parametrize("options", [{"truth": "some.csv", "space": "nasbench201"}, {"truth": "whole"}])
    def test_other_truths_have_none(self, options: dict[str, Any]) -> None:
        assert with_column(NasOptions(**options), "digits").truth_column is None

    def test_what_it_is_of_is_said(self) -> None:
        assert table_truth([0], "cifar10_valid_200_s888").facts == {
            **{"column": "cifar10_valid_200_s888", "dataset": "cifar10", "split": "valid"},
            **{"epochs": 200, "seeds": "888"},
        }
        assert table_truth([0]).facts["seeds"] == "all"


class TestCsv:
    def write(self, folder: Path, text: str) -> Path:
        path = folder / "truth.csv"
        path.write_text(text)
        return path

    def test_fractions_in_the_order_asked_for(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, "index,accuracy\n7,0.25\n2,0.5\n1,1\n")

        truth = csv_truth(path, [2, 7])

        assert list(truth.values) == [0.5, 0.25]
        assert truth.test is None
        assert truth.source == "csv:truth.csv:accuracy"

    def test_percent_is_read_as_such_whichever_rows_are_asked_for(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = self.write(tmp_path, "arch,index,val_accuracy,test_accuracy\na,0,0.5,\nb,1,80,79\n")

        with caplog.at_level(logging.INFO):
            truth = csv_truth(path, [0])

        assert list(truth.values) == [0.005]
        assert truth.test is None  # unknown for all requested architectures
        assert list(csv_truth(path, [1]).test or []) == [0.79]
        assert "up to 80 are read as percent" in caplog.text

    def test_a_named_column_and_excels_mark(self, tmp_path: Path) -> None:
        path = tmp_path / "truth.csv"
        path.write_bytes("\ufeffindex, accuracy, top5\r\n0, 0.5, 0.9\r\n".encode())

        assert list(csv_truth(path, [0], "top5").values) == [0.9]
        assert list(csv_truth(path, [0]).values) == [0.5]

    @pytest.mark.parametrize(
        ("text", "word"),
        [
            ("index,accuracy\n0,0.5\n", "2 are missing, the first is 1"),
            ("index,accuracy\n0,0.5\n0,0.6\n", "line 3: every index must appear once, 0 appears again"),
            ("index,accuracy\n0,high\n", "line 2: accuracy must be a finite number, got 'high'"),
            ("index,accuracy\n0,nan\n", "accuracy must be a finite number, got 'nan'"),
            ("index,accuracy\n0,\n", "accuracy must be a finite number, got ''"),
            ("index,accuracy\n0.5,0.5\n", "line 2: index must be a whole number"),
            ("index,accuracy\n-1,0.5\n", "index must be a whole number >= 0, got '-1'"),
            ("index,accuracy\n0,100.5\n", r"fractions in \[0, 1\] or percent in \[0, 100\], got 100.5"),
            ("index,accuracy\n0,-0.5\n", "got -0.5"),
            ("index,accuracy\n0,0.5,0.7\n", "line 2: a line must have 2 values"),
            ("index,accuracy\n0\n", "line 2: a line must have 2 values"),
            ("index,top1\n0,0.5\n", "accuracy or val_accuracy, got index, top1; name it with --truth-column"),
            ("arch,accuracy\n0,0.5\n", "one column index"),
            ("index,accuracy,accuracy\n0,1,1\n", "no duplicate names"),
            ("index,accuracy\n", "at least one architecture"),
            ("", "got nothing"),
        ],
    )
    def test_bad_files_are_told_in_one_line(self, tmp_path: Path, text: str, word: str) -> None:
        with pytest.raises(InputError, match=word) as caught:
            csv_truth(self.write(tmp_path, text), [0, 1, 2])
        assert "truth.csv" in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_bad_paths_columns_and_bytes(self, tmp_path: Path) -> None:
        with pytest.raises(
            InputError, match=r"whole, table, api:FILE or a CSV file, .*nofile.csv does not exist"
        ):
            csv_truth(tmp_path / "nofile.csv", [0])
        with pytest.raises(InputError, match="is a folder"):
            csv_truth(tmp_path, [0])
        path = self.write(tmp_path, "index,accuracy\n0,0.5\n")
        with pytest.raises(InputError, match="did you mean 'accuracy'"):
            csv_truth(path, [0], "acuracy")
        path.write_bytes(b"\x1f\x8b\xff\x00index")
        with pytest.raises(InputError, match="readable CSV file in UTF-8"):
            csv_truth(path, [0])


class TestScores:
    def test_they_come_by_ascending_index_with_failures_as_nan(self, tmp_path: Path) -> None:
        path = tmp_path / "scores.csv"
        path.write_text("index,arch,score\n30,c,-2.5\n4,a,1e3\n7,b,\n")

        indices, scores = read_scores(path)

        assert indices == [4, 7, 30]
        assert scores[0] == 1000
        assert scores[2] == -2.5
        assert math.isnan(scores[1])

    @pytest.mark.parametrize(
        ("text", "word"),
        [
            ("index,score\n1,2\n1,3\n", "1 appears again"),
            ("index,score\n1,inf\n", "score must be a finite number, got 'inf'"),
            ("index,accuracy\n1,2\n", "must have columns index,score, got index, accuracy"),
        ],
    )
    def test_bad_files_are_told(self, tmp_path: Path, text: str, word: str) -> None:
        path = tmp_path / "scores.csv"
        path.write_text(text)
        with pytest.raises(InputError, match=word):
            read_scores(path)

    def test_a_missing_file_is_told(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"none.csv does not exist"):
            read_scores(tmp_path / "none.csv")


def trial(structure: str, seed: int, evaluated: dict[str, float]) -> dict[str, Any]:
    """One training in the format of the benchmark's file: earlier epochs have lower accuracies."""
    epochs = 4  # 12 or 200 in the original
    curve = OrderedDict((epoch, 40.0 + epoch / epochs) for epoch in range(epochs))
    record: dict[str, Any] = {
        "name": "infer.tiny",
        "net_state_dict": None,
        "train_acc1es": curve,
        "train_acc5es": curve,
        "train_losses": curve,
        "train_times": curve,
        "arch_config": {"channel": 16, "num_cells": 5, "arch_str": structure, "class_num": 10},
        "params": np.float64(1.288506),
        "flop": 188.4,
        "seed": seed,
        "epochs": epochs,
        "latency": [0.01, 0.02],
        "eval_names": list(evaluated),
        "eval_acc1es": {},
        "eval_losses": {},
        "eval_times": {},
    }
    for name, accuracy in evaluated.items():
        for epoch in range(epochs):
            record["eval_acc1es"][f"{name}@{epoch}"] = accuracy if epoch == epochs - 1 else 10.0
            record["eval_losses"][f"{name}@{epoch}"] = 1.0
            record["eval_times"][f"{name}@{epoch}"] = 0.5
    return record


def results(row: Any, epochs: int) -> dict[str, Any]:
    """All trainings of a cell for `epochs` epochs, with the table's accuracies."""
    mean = "_mean" if epochs == 200 else ""
    trials: dict[tuple[str, int], dict[str, Any]] = {}

    def add(dataset: str, seed: int, evaluated: dict[str, float]) -> None:
        trials[dataset, seed] = trial(row.arch_str, seed, evaluated)

    for seed_index, seed in enumerate(SEEDS if epochs == 200 else SEEDS[:1]):
        shift = (
            (-0.3, 0.1, 0.2)[seed_index] if epochs == 200 else 0.0
        )  # sums to zero: the means remain the table's
        accuracy = row[f"cifar10_valid_200_s{seed}"] if epochs == 200 else row["cifar10_valid_12"]
        if not math.isnan(accuracy):
            add("cifar10-valid", seed, {"x-valid": accuracy, "ori-test": 1.0})
        add("cifar10", seed, {"ori-test": row[f"cifar10_test_{epochs}{mean}"] + shift})
        for dataset, name in (("cifar100", "cifar100"), ("imagenet16", "ImageNet16-120")):
            valid = f"{dataset}_valid_{epochs}" + ("_mean_derived" if epochs == 200 else "")
            accuracy = row[f"{dataset}_valtest_200_s{seed}"] if epochs == 200 else 2.0
            tested = row[f"{dataset}_test_{epochs}{mean}"] + shift
            add(name, seed, {"x-valid": row[valid] + shift, "x-test": tested, "ori-test": accuracy})
    names = sorted({dataset for dataset, _ in trials})
    return {
        "arch_index": 0,
        "arch_str": row.arch_str,
        "all_results": trials,
        "dataset_seed": {name: sorted(s for d, s in trials if d == name) for name in names},
        "clear_net_done": True,
    }


def benchmark_file(path: Path, *, legacy: bool = True) -> Path:
    """A file in the original format, with four cells in a different order than the table's."""
    cells = read_table().loc[CELLS]
    content = {
        "meta_archs": list(cells.arch_str),
        "total_archs": len(cells),
        "arch2infos": {
            position: {"less": results(row, 12), "full": results(row, 200)}
            for position, (_, row) in enumerate(cells.iterrows())
        },
        "evaluated_indexes": set(range(len(cells))),
    }
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    if legacy:  # the original was written by torch 1 with NumPy 1
        path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
        assert b"numpy.core.multiarray" in path.read_bytes()
    return path


has_package = pytest.mark.skipif(
    importlib.util.find_spec("nas_201_api") is None, reason="needs the package nas-bench-201"
)


class TestApi:
    @has_package
    @pytest.mark.parametrize("legacy", [True, False])
    def test_the_default_is_the_mean_cifar10_test_accuracy(self, tmp_path: Path, legacy: bool) -> None:
        path = benchmark_file(tmp_path / "nb201.pth", legacy=legacy)

        truth = api_truth([6111, 9930, 5], None, path)

        assert truth.values == pytest.approx(table_truth([6111, 9930, 5]).values)
        assert truth.test == pytest.approx(truth.values)
        assert truth.source == "api:nb201.pth:cifar10_test_200_mean"

    @has_package
    def test_every_column_is_the_tables(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = benchmark_file(tmp_path / "nb201.pth")
        columns = [name for name in read_table().columns if "_12" in name or "_200" in name]
        columns = [name for name in columns if not name.startswith("train_seconds")]
        assert len(columns) == 23

        for column in columns:
            actual = api_truth(CELLS, column, path)
            expected = table_truth(CELLS, column)
            # The table rounds means over seeds.
            np.testing.assert_allclose(actual.values, expected.values, atol=2e-5, err_msg=column)
            np.testing.assert_allclose(actual.test, expected.test, atol=2e-5, err_msg=column)
        assert capsys.readouterr().out == ""  # the package prints by default, but stdout is for --json only

    @has_package
    def test_what_the_file_lacks_is_told(self, tmp_path: Path) -> None:
        path = benchmark_file(tmp_path / "nb201.pth")
        structure = read_table().arch_str[17]

        with pytest.raises(InputError) as caught:
            api_truth([9930, 17], None, path)

        assert f"1 are missing, the first is {structure}" in str(caught.value)
        content = torch.load(path, weights_only=False)
        del content["arch2infos"][0]["full"]
        torch.save(content, path)
        with pytest.raises(InputError, match=r"nas-bench-201 cannot read .* \(KeyError"):
            api_truth([9930], None, path)

    @has_package
    def test_a_dataset_or_seed_that_was_not_trained_is_nan_and_none_at_all_is_an_error(
        self, tmp_path: Path
    ) -> None:
        path = benchmark_file(tmp_path / "nb201.pth")
        content = torch.load(path, weights_only=False)
        first = content["arch2infos"][0]["full"]
        first["dataset_seed"]["cifar10-valid"] = [777]
        del first["dataset_seed"]["cifar10"]
        torch.save(content, path)

        truth = api_truth(CELLS[:2], "cifar10_valid_200_s888", path)

        assert list(np.isnan(truth.values)) == [True, False]
        assert truth.test is not None
        assert list(np.isnan(truth.test)) == [True, False]
        with pytest.raises(InputError, match="has no cifar10_test_200_mean for these 1 cells"):
            api_truth(CELLS[:1], None, path)

    def test_the_missing_package_is_told_with_the_fix(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "nas_201_api", None)
        path = benchmark_file(tmp_path / "nb201.pth")

        with pytest.raises(InputError, match="pip install nas-bench-201"):
            api_truth([0], None, path)
        with pytest.raises(InputError, match=r"nothing.pth does not exist"):
            api_truth([0], None, tmp_path / "nothing.pth")

    def test_nothing_but_plain_values_is_loaded(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "nas_201_api", sys)  # never reached
        path = tmp_path / "nb201.pth"
        mark = tmp_path / "ran"

        class Trap:
            def __reduce__(self) -> Any:
                return Path.touch, (mark,)

        torch.save({"meta_archs": Trap()}, path)
        with pytest.raises(InputError, match="objects that could run code"):
            api_truth([0], None, path)
        path.write_bytes(pickle.dumps(Trap()))
        with pytest.raises(InputError, match="undamaged file"):
            api_truth([0], None, path)
        assert not mark.exists()

        path.write_bytes(benchmark_file(path).read_bytes()[:1000])
        with pytest.raises(InputError, match="undamaged file"):
            api_truth([0], None, path)
        torch.save({"images": torch.zeros(1)}, path)
        with pytest.raises(InputError, match="a dict with meta_archs, arch2infos, evaluated_indexes"):
            api_truth([0], None, path)
        with pytest.raises(InputError, match="did you mean 'cifar10_test_200_mean'"):
            api_truth([0], "cifar10_test_200_meen", path)
