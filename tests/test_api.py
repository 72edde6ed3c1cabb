"""ddray as a library: `import ddray`, sets as torch datasets, pictures and parquet; the pages' examples."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import ddray
from ddray.artifact.distilled_set import DistilledSet
from ddray.artifact.export import export_folder, export_parquet, pictures
from ddray.artifact.reading import load
from ddray.cluster.doctor import DoctorResult
from ddray.commands.export import ExportResult
from ddray.commands.methods import MethodList, MethodPage
from ddray.config import Result
from ddray.data import open_dataset
from ddray.data.loaders import DatasetInfo, DatasetList
from ddray.errors import InputError
from ddray.evaluation.options import EvaluateResult
from ddray.jobs.distill import DistillResult
from ddray.jobs.pool_training import PoolResult
from ddray.pool.listing import PoolEntryInfo, PoolList
from ddray.ranking.result import ArchList, NasResult
from ddray.report.page import ReportResult
from ddray.tables.result import BenchResult, ClaimsResult
from ddray.tuning.result import TuneResult
from tests.test_docs import blocks

SMALL = {"steps": 2, "arch": "convnet1_w8", "compile": "off", "method.batch_real": 4}


def python(code: str, folder: Path) -> str:
    """Run code in a new interpreter; return its stdout."""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r})\n{code}"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def distilled() -> DistilledSet:
    return ddray.distill("dm", ipc=2, settings=SMALL)


class TestDistill:
    def test_it_returns_the_set_of_the_command(self, distilled: DistilledSet, tmp_path: Path) -> None:
        with_run_dir = ddray.distill(
            "dm", open_dataset("digits"), ipc=2, settings=SMALL, run_dir=tmp_path / "run"
        )
        assert torch.equal(with_run_dir.images, distilled.images)
        assert with_run_dir.meta.config == distilled.meta.config
        assert (tmp_path / "run" / "distilled.pt").is_file()
        again = ddray.distill("dm", ipc=2, settings=SMALL, run_dir=tmp_path / "run")
        assert torch.equal(again.images, distilled.images)

    def test_nothing_is_left_behind_without_a_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        before = set(tmp_path.iterdir())
        ddray.distill("random")
        assert {path for path in tmp_path.iterdir() if path.name != "home"} == before - {tmp_path / "home"}

    def test_bad_names_are_refused(self) -> None:
        with pytest.raises(InputError, match="did you mean 'datadam'"):
            ddray.distill("datdam")
        with pytest.raises(InputError, match="lr_img"):
            ddray.distill("dm", settings={"method.lr_imag": 1})

    def test_a_budget_and_a_data_folder_are_taken(self, distilled: DistilledSet, tmp_path: Path) -> None:
        ssl_set = ddray.distill(
            "random_ssl",
            budget=25,
            settings={"method.teacher.epochs": 1, "method.teacher.arch": "convnet2_w8"},
        )
        assert ssl_set.meta.storage_floats <= 25 * 256
        export_parquet(distilled, tmp_path / "data" / "mnist" / "train-0.parquet")
        with pytest.raises(InputError, match="takes --ipc K"):
            ddray.distill("random", ipc=1, budget=3)
        with pytest.raises(InputError, match="mnist"):
            ddray.distill("random", "mnist", data_dir=tmp_path / "nothing")

    def test_evaluate_takes_what_the_command_takes(self, distilled: DistilledSet) -> None:
        options: dict[str, Any] = {"archs": ["convnet1_w8"], "seeds": 1, "epochs": 1}
        hard = ddray.evaluate(distilled, augment="none", train_limit=10, split="val", **options)
        assert (hard["split"], hard["results"][0]["num_images"]) == ("val", 10)
        soft = ddray.evaluate(
            distilled, protocol="soft", teachers=["convnet1_w8"], sets=["teacher.epochs=20"], **options
        )
        assert soft["teacher"]["arch"] == "convnet1_w8"
        with pytest.raises(InputError, match="did you mean 'augment'"):
            ddray.evaluate(distilled, augmnt="none")

    def test_evaluate_takes_an_open_dataset_and_single_names(self, distilled: DistilledSet) -> None:
        options = {"seeds": 1, "epochs": 1}
        result = ddray.evaluate(distilled, archs=["convnet1_w8"], **options)
        opened = ddray.evaluate(distilled, archs="convnet1_w8", dataset=open_dataset("digits"), **options)
        assert opened["results"][0]["per_seed"] == result["results"][0]["per_seed"]
        assert ddray.evaluate(distilled, archs="convnet1_w8", seeds=1, sets="epochs=1")["results"]
        for name, value in (("pixel_space", "normalised"), ("dataset", Path("digits-not-there"))):
            with pytest.raises(InputError, match=r"normalized|or a folder"):
                ddray.evaluate(distilled, archs="convnet1_w8", **{name: value})

    def test_evaluate_takes_a_set_or_its_file(self, distilled: DistilledSet, tmp_path: Path) -> None:
        distilled.save(tmp_path / "a.pt")
        options: dict[str, Any] = {"archs": ["convnet1_w8"], "seeds": 1, "epochs": 1}
        first, second = (
            ddray.evaluate(distilled, **options),
            ddray.evaluate(tmp_path / "a.pt", **options),
        )
        assert first["results"][0]["per_seed"] == second["results"][0]["per_seed"]

    def test_no_module_bears_the_name_of_a_function(self, tmp_path: Path) -> None:
        code = (
            "import importlib, pkgutil, types, ddray\n"
            "for module in pkgutil.walk_packages(ddray.__path__, 'ddray.'):\n"
            "    if not module.name.endswith('__main__'): importlib.import_module(module.name)\n"
            "print([name for name in ddray.__all__ if isinstance(getattr(ddray, name), types.ModuleType)])"
        )
        assert python(code, tmp_path) == "[]\n"

    def test_importing_ddray_loads_no_torch(self, tmp_path: Path) -> None:
        assert python("import ddray; print('torch' in sys.modules, ddray.__version__)", tmp_path).startswith(
            "False"
        )
        assert {"bench", "distill", "evaluate", "export", "load", "nas", "tune"} <= set(dir(ddray))
        with pytest.raises(AttributeError, match="no attribute 'distil'"):
            ddray.distil  # noqa: B018


class TestRuns:
    def test_a_set_is_written_without_a_run_folder(
        self, distilled: DistilledSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        same = ddray.distill("dm", ipc=2, settings=SMALL, out="sets/dm.pt")
        assert torch.equal(same.images, distilled.images)
        assert not (tmp_path / "runs").exists()
        assert load(tmp_path / "sets" / "dm.pt").meta == same.meta
        val = ddray.distill("random", ipc=1, val_seed=3)
        assert val.meta.split == "train-val3"
        assert ddray.distill("random", ipc=1, val_seed=3, val_images=300).meta.split == "train-val3-300"
        run = ddray.distill("random", ipc=1, val_seed=3, val_images=300, run_dir=tmp_path / "run")
        assert run.meta.split == "train-val3-300"

    def test_nas_takes_sets_in_memory(self, distilled: DistilledSet, tmp_path: Path) -> None:
        options: dict[str, Any] = {"sample": 3, "epochs": 1, "executor": "local", "gpus_per_worker": 0}
        truth = tmp_path / "truth.csv"
        truth.write_text("index,accuracy\n" + "".join(f"{index},0.5\n" for index in range(720)))
        result = ddray.nas([distilled], truth=str(truth), run_dir=tmp_path / "run", **options)
        assert [proxy.proxy for proxy in result.proxies] == ["dm.pt"]
        frame = result.to_pandas()
        assert (len(frame), set(frame["proxy"])) == (3, {"dm.pt"})
        scores = tmp_path / "scores.csv"
        scores.write_text("index,score\n0,0.1\n1,0.2\n2,0.3\n")
        ranked = ddray.nas(scores=scores, truth=str(truth))
        assert ranked.dump().keys() == {"space", "num_archs", "truth", "proxies"}
        assert ranked.truth == {"source": str(truth), "column": "accuracy"}
        assert len(ranked.to_pandas()) == 1
        with pytest.raises(InputError, match="must be one of local, ray, got 'lokal'; did you mean 'local'"):
            ddray.nas(distilled, executor="lokal")
        with pytest.raises(InputError, match="needs --proxy FILE"):
            ddray.nas()

    def test_bench_takes_a_mapping(self, tmp_path: Path) -> None:
        table = {
            "name": "small",
            "dataset": "digits",
            "ipc": 1,
            "methods": ["random", "kcenter"],
            "set": {"arch": "convnet1_w8", "compile": "off"},
            "evaluate": {"epochs": 1, "seeds": 1},
        }
        result = ddray.bench(table, executor="local", run_dir=tmp_path / "run")
        frame = result.to_pandas()
        assert list(frame["method"]) == ["random", "kcenter"]
        assert [cell.accuracy_mean for cell in result.cells] == list(frame["accuracy_mean"])
        assert "name" not in result.dump()
        with pytest.raises(InputError, match="did you mean 'kcenter'"):
            ddray.bench({**table, "methods": ["kcentr"]}, executor="local")

    @pytest.mark.ray
    @pytest.mark.usefixtures("ray_here")
    def test_tune_takes_a_space_and_gives_a_row_per_trial(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        result = ddray.tune(
            "dm",
            dataset=open_dataset("digits"),
            ipc=1,
            num_samples=2,
            max_concurrent=1,
            strategy="random",
            final_sets=1,
            space={"lr_img": {"loguniform": [0.1, 10.0]}},
            settings={**SMALL, "evaluate.epochs": 2, "evaluate.seeds": 1, "evaluate.val_seeds": 1},
        )
        frame = result.to_pandas()
        assert list(frame.columns) == ["trial", "lr_img", "val_accuracy", "status", "wall_s"]
        assert list(frame["trial"]) == [0, 1]
        assert frame["val_accuracy"].max() == result.best.val_accuracy
        assert Path(result.run_dir).parent == tmp_path / "runs"
        with pytest.raises(InputError, match="did you mean 'num_samples'"):
            ddray.tune("dm", num_sample=2)

    def test_help_lists_the_options(self) -> None:
        parameters = inspect.signature(ddray.tune).parameters
        assert parameters["num_samples"].default == 16
        assert "gpus_per_trial: GPUs per trial" in str(ddray.tune.__doc__)


RESULTS: dict[str, type[Result]] = {
    "distill": DistillResult,
    "evaluate": EvaluateResult,
    "tune": TuneResult,
    "nas": NasResult,
    "nas --describe": ArchList,
    "bench": BenchResult,
    "claims": ClaimsResult,
    "report": ReportResult,
    "export": ExportResult,
    "methods": MethodList,
    "methods NAME": MethodPage,
    "pool train": PoolResult,
    "pool list": PoolList,
    "pool show": PoolEntryInfo,
    "data info": DatasetInfo,
    "data list": DatasetList,
    "doctor": DoctorResult,
}


@pytest.mark.parametrize("name", RESULTS)
def test_the_keys_of_a_result_are_documented(name: str) -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    (text,) = re.findall(rf"^\| `{name}` \| (.*) \|$", page, re.M)
    keys = [key for key, field in RESULTS[name].model_fields.items() if not field.exclude]
    assert keys
    assert [key for key in keys if not re.search(rf"\b{key}\b", text)] == []


class TestExport:
    def test_a_torch_dataset_holds_the_decoded_set(self, distilled: DistilledSet) -> None:
        torch_dataset = distilled.to_torch_dataset()
        assert len(torch_dataset) == 20
        images, labels = torch_dataset[:]
        assert torch.equal(images, distilled.images)
        assert torch.equal(labels, distilled.labels)
        images.zero_()
        assert float(distilled.images.abs().sum()) > 0, "the set shares no memory with the dataset"

    def test_a_folder_is_a_dataset_again(self, distilled: DistilledSet, tmp_path: Path) -> None:
        export_folder(distilled, tmp_path / "out")
        opened = open_dataset(str(tmp_path / "out"))
        assert opened.num_classes == 10
        split = opened.train()
        assert len(split) + len(opened.test()) == 20
        expected = pictures(distilled)
        for index, label in enumerate(distilled.labels.tolist()):
            (path,) = (tmp_path / "out").glob(f"{label}_*/{index:05d}.png")
            pixels = torch.frombuffer(bytearray(Image.open(path).tobytes()), dtype=torch.uint8)
            assert torch.equal(pixels.view(1, 16, 16), expected[index])
        assert json.loads((tmp_path / "out" / "meta.json").read_text())["method"] == "dm"
        with pytest.raises(InputError, match="must be new"):
            export_folder(distilled, tmp_path / "out")

    def test_real_images_come_back_as_they_were(self, tmp_path: Path, digits: Any) -> None:
        distilled = ddray.distill("random", ipc=1)
        real = digits.train().images.flatten(1)
        for picture in pictures(distilled).flatten(1):
            assert bool((real == picture).all(1).any())

    def test_parquet_keeps_values_labels_and_meta(self, distilled: DistilledSet, tmp_path: Path) -> None:
        path = tmp_path / "data" / "train-00000.parquet"
        export_parquet(distilled, path)
        table = pq.read_table(path)
        values = torch.tensor(table["tensor"].to_pylist()).view(distilled.images.shape)
        assert torch.equal(values, distilled.images)
        assert table["label"].to_pylist() == distilled.labels.tolist()
        assert json.loads(table.schema.metadata[b"ddray"]) == json.loads(json.dumps(distilled.meta.dump()))
        opened = open_dataset(str(tmp_path / "data"))
        assert opened.class_names == distilled.meta.class_names
        assert len(opened.train()) + len(opened.test()) == 20
        before = path.read_bytes()
        with pytest.raises(InputError, match="must be new"):
            export_parquet(distilled, path)
        assert path.read_bytes() == before

    def test_whitened_sets_are_shown_de_whitened_and_clamping_is_said(
        self, toy: Any, planned: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        _, ctx, method = planned("random", toy(), pixel_space="zca")
        method.setup(ctx)
        whitened = method.snapshot()
        raw = whitened.space().decode(whitened.images)
        assert (pictures(whitened).float() / 255 - raw.clamp(0, 1)).abs().max() <= 0.5 / 255 + 1e-6
        wild = DistilledSet(whitened.images * 9, whitened.labels, whitened.meta, whitened.zca)
        caplog.clear()
        pictures(wild)
        assert "are clamped" in caplog.text

    def test_sets_without_labels_have_targets(self, tmp_path: Path, distilled: DistilledSet) -> None:
        targets = torch.arange(40.0).view(20, 2)
        counted = {"storage_floats": distilled.images.numel() + targets.numel()}
        none = torch.zeros(0, dtype=torch.int64)
        ssl_set = DistilledSet(
            distilled.images, none, distilled.meta.model_copy(update=counted), targets=targets
        )
        ssl_set.validate()
        images, second = ssl_set.to_torch_dataset()[3]
        assert torch.equal(images, distilled.images[3])
        assert second.tolist() == [6.0, 7.0]
        export_folder(ssl_set, tmp_path / "out")
        assert len(list((tmp_path / "out" / "unlabelled").glob("*.png"))) == 20
        export_parquet(ssl_set, tmp_path / "a.parquet")
        table = pq.read_table(tmp_path / "a.parquet")
        assert table["target"].to_pylist() == targets.tolist()
        assert "label" not in table.column_names

    def test_spectrograms_have_no_pictures(self, distilled: DistilledSet) -> None:
        meta = distilled.meta.model_copy(update={"mean": (-6.0,)})
        with pytest.raises(InputError, match="log-spectrograms"):
            pictures(DistilledSet(distilled.images, distilled.labels, meta))

    def test_the_form_follows_the_name(self, distilled: DistilledSet, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="form must be one of ddranking, folder, parquet"):
            ddray.export(distilled, tmp_path / "x", form="csv")  # type: ignore[arg-type]
        distilled.save(tmp_path / "a.pt")
        assert ddray.export(tmp_path / "a.pt", tmp_path / "a.parquet").is_file()
        assert ddray.export(distilled, tmp_path / "b").is_dir()
        assert ddray.export(distilled, tmp_path / "c", form="folder").is_dir()
        assert load(tmp_path / "a.pt").meta == ddray.load(tmp_path / "a.pt").meta


@pytest.mark.slow
@pytest.mark.ray
def test_the_pages_runs(tmp_path: Path) -> None:
    (block,) = blocks("docs/python.md", "library", "python")
    assert "kcenter" in python(block, tmp_path)


def test_the_readmes_example_runs(tmp_path: Path) -> None:
    for block in blocks("README.md", None, "python"):
        out = python(block, tmp_path)
        assert out.startswith("datadam: ")
        assert "torch.Size([5, 1, 16, 16])" in out
    assert (tmp_path / "digits.parquet").is_file()
    assert len(list((tmp_path / "digits-pictures").glob("*/*.png"))) == 10
