"""Bench files: what they may say, what a scale changes, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ddray.errors import InputError
from ddray.tables.options import BenchOptions
from ddray.tables.spec import BenchSpec, read_spec
from tests.tables.benches import spec


@pytest.mark.parametrize(
    ("name", "value"), [("max_concurrent", 2), ("unit_timeout", 5.0), ("address", "auto")]
)
def test_options_of_a_cluster_are_refused_without_one(name: str, value: Any) -> None:
    option = "--" + name.replace("_", "-")
    with pytest.raises(InputError, match=f"{option} must be left out with --executor local.*got {value}"):
        BenchOptions.parse({"executor": "local", name: value}, prefix="--")
    BenchOptions.parse({"executor": "ray", name: value}, prefix="--")


def test_a_short_file_means_the_long_one() -> None:
    short = BenchSpec.parse({"name": "a", "dataset": "digits", "methods": ["dm"], "ipc": 3})
    long = {
        "name": "a",
        "dataset": ["digits"],
        "methods": [{"name": "dm"}],
        "ipc": [3],
        "evaluate": [{"protocol": "hard"}],
    }
    assert short == BenchSpec.parse(long)
    assert BenchSpec.parse(short.dump()) == short


def test_a_sweep_gives_one_labelled_row_per_combination() -> None:
    bench_spec = spec(
        methods=[
            "random",
            {"name": "datadam", "sweep": {"method.p": [1, 4], "method.loss": ["mse", "mae"]}},
        ]
    )
    rows = bench_spec.rows()
    assert [row.row for row in rows] == [
        "random",
        "datadam, p=1, loss=mse",
        "datadam, p=1, loss=mae",
        "datadam, p=4, loss=mse",
        "datadam, p=4, loss=mae",
    ]
    assert rows[2].layers() == [{"method": {"p": 1, "loss": "mae"}}]


def test_presets_of_one_method_are_rows_of_their_own() -> None:
    bench_spec = spec(methods=["datadam", {"name": "datadam", "preset": "repo"}])
    assert [row.row for row in bench_spec.rows()] == ["datadam", "datadam (repo)"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"methods": ["dm", "dm"]}, "labels must differ"),
        ({"metods": ["dm"]}, "did you mean 'methods'"),
        ({"ipc": []}, "must have a size"),
        ({"ipc": 0}, "greater than or equal to 1"),
        ({"methods": []}, "at least 1 item"),
        ({"methods": [{"name": "dm", "dataset": "mnist"}]}, "must be among"),
        ({"evaluate": {"dataset": "mnits"}}, "evaluate dataset must be among"),
        (
            {"methods": [{"name": "dm", "ipc": [1, 2]}, {"name": "dm", "ipc": 2, "steps": 5}]},
            "labels must differ",
        ),
        ({"methods": ["dm", {"name": "dm", "steps": 5}], "limits": {"steps": 3}}, "labels must differ"),
        ({"methods": [{"name": "dm", "dataset": "mnits"}], "limits": {"steps": 3}}, "must be among"),
        ({"evaluate": []}, "at least one protocol"),
        ({"evaluate": {"epochs": 0}}, "evaluate"),
        ({"methods": [{"name": "dm", "stepps": 3}]}, "stepps"),
    ],
)
def test_a_bad_file_is_refused_with_the_rule(change: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        spec(**change)


def test_scales_lower_what_exceeds_them(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "name: a\ndataset: cifar10\nipc: [1, 10, 50]\nseeds: 5\nmethods: [dm]\n"
        "evaluate: {archs: [convnet3, resnet10], epochs: 1000}\n"
        "scales: {cpu: {limits: {steps: 7}, seeds: 2}}\n"
    )
    paper, cpu, smoke = (read_spec(path, scale) for scale in ("paper", "cpu", "smoke"))
    row = paper.rows()[0]
    assert paper.sizes(row) == [("ipc", 1), ("ipc", 10), ("ipc", 50)]
    assert cpu.sizes(row) == [("ipc", 1), ("ipc", 10)]
    assert smoke.sizes(row) == [("ipc", 1)]
    assert (cpu.limits.steps, cpu.limits.epochs, cpu.seeds) == (7, 300, 2)
    assert (smoke.dataset, smoke.within(smoke.evaluate[0]).archs) == (("digits",), ("convnet3",))
    with pytest.raises(InputError, match="--scale must be one of"):
        read_spec(path, "tiny")
    path.write_text(path.read_text().replace("cpu:", "gpu:"))
    with pytest.raises(InputError, match="must be one of cpu, paper, smoke, got 'gpu'"):
        read_spec(path)


def test_only_a_scale_with_other_datasets_may_change_what_rows_name(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "name: a\ndataset: [mnist, cifar10]\nipc: 1\nmethods:\n  - {name: dm, dataset: mnist}\n"
        "evaluate: {dataset: cifar10}\n"
    )
    smoke, cpu = read_spec(path, "smoke"), read_spec(path, "cpu")
    assert smoke.datasets(smoke.rows()[0]) == smoke.datasets(smoke.evaluate[0]) == ["digits"]
    assert (cpu.datasets(cpu.rows()[0]), cpu.datasets(cpu.evaluate[0])) == (["mnist"], ["cifar10"])
    path.write_text(path.read_text().replace("evaluate: {dataset: cifar10}", "evaluate: {dataset: cifar}"))
    with pytest.raises(InputError, match="evaluate dataset must be among"):
        read_spec(path, "cpu")


def test_options_of_content_are_written_into_all_names_of_datasets(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "name: a\ndataset: [mnist, 'cifar10?can_flip=false']\nipc: 1\nimage_size: 64\n"
        "methods:\n  - {name: dm, dataset: mnist}\nevaluate: {dataset: mnist, target: svhn}\n"
        "scales: {cpu: {image_size: 16}}\n"
    )
    paper, cpu, smoke = (read_spec(path, scale) for scale in ("paper", "cpu", "smoke"))
    assert paper.dataset == ("mnist?image_size=64", "cifar10?can_flip=false&image_size=64")
    assert paper.datasets(paper.rows()[0]) == paper.datasets(paper.evaluate[0]) == ["mnist?image_size=64"]
    assert paper.evaluate[0].target == ("svhn?image_size=64",)
    assert (cpu.dataset[0], smoke.dataset) == ("mnist?image_size=16", ("digits?image_size=64",))
    assert read_spec(path, content={"image_size": 8}).dataset[0] == "mnist?image_size=8"
    assert BenchSpec.parse(paper.dump()) == paper
    path.write_text(path.read_text().replace("image_size: 64", "image_size: 0"))
    with pytest.raises(InputError, match=r"image-size.*greater than or equal to 1"):
        read_spec(path)


def test_what_only_the_tables_own_datasets_have_is_left_out_of_a_scale_with_others(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "name: a\ndataset: cifar100\nipc: 1\nlabel_column: coarse_label\ncan_flip: false\nmethods: [dm]\n"
        "scales: {cpu: {dataset: /pictures, clip_seconds: 2}}\n"
    )
    paper, cpu, smoke = (read_spec(path, scale).dataset for scale in ("paper", "cpu", "smoke"))
    assert paper == ("cifar100?can_flip=false&label_column=coarse_label",)
    assert (cpu, smoke) == (("/pictures?can_flip=false&clip_seconds=2.0",), ("digits?can_flip=false",))


def test_a_size_beyond_the_limit_is_cut_where_it_is_the_only_one() -> None:
    bench_spec = spec(ipc=[50], limits={"ipc": 10})
    assert bench_spec.sizes(bench_spec.rows()[0]) == [("ipc", 10)]


def test_skips_name_rows_and_leave_one() -> None:
    with pytest.raises(InputError, match="skip must name rows, got 'rando'; did you mean 'random'"):
        spec(skip=["rando"])
    with pytest.raises(InputError, match="at least one row must be left"):
        spec(skip=["random", "dm"])
    with pytest.raises(InputError, match="at least 1 item"):
        spec(methods=[{"name": "dm", "sweep": {"method.lr_img": []}}])
