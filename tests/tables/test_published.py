"""The papers' numbers beside the cells of a table."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from ddray.data.reference import DatasetRef
from ddray.evaluation.published import conditions_of, read_numbers
from ddray.tables.likeness import likeness
from ddray.tables.published import compare, find
from ddray.tables.spec import PublishedSource, read_spec
from ddray.tables.table import standard_error
from tests.tables.benches import table_cell

ROOT = Path(__file__).resolve().parents[2]


def value(**changes: Any) -> float | None:
    number = find(read_numbers(), table_cell(**changes))
    return None if number is None else number.value


def test_all_numbers_are_read() -> None:
    numbers = read_numbers()
    assert len(numbers) == 1122
    assert len({(number.paper, number.table) for number in numbers}) == 50


def test_numbers_that_were_not_read_in_their_paper_name_their_source() -> None:
    papers = {number.paper for number in read_numbers() if conditions_of(number).source}
    optimised = {"mtt", "ftd", "tesla", "datm", "kip", "frepo", "dd"}
    assert papers == optimised | {"rd3", "dwa", "cda", "g_vbsm", "minimax", "d4m"}
    cited = [number for number in read_numbers() if number.table == "as cited"]
    assert len(cited) == 75
    assert all("second-hand" in str(conditions_of(number).source) for number in cited)
    assert value(name="mtt") == 46.3
    assert value(name="dd", dataset="mnist", target="mnist", arch="lenet") is None, "fixed initialisation"


def test_cells_find_their_numbers() -> None:
    assert value() == 32.0
    assert value(name="mmd_pixel", size=("ipc", 50)) == 50.9
    assert value(size=("ipc", 2)) is None
    assert value(dataset="digits", target="digits") is None
    assert value(name="dm", arch="densenet_idc", size=("ipc", 50)) == 57.4
    assert value(name="dm", arch="resnet10_idc", size=("ipc", 50)) == 58.6
    for another in ("densenet121", "densenet_cifar", "resnet10", "resnet18_vico"):
        assert value(name="dm", arch=another, size=("ipc", 50)) is None
    source = PublishedSource(paper="dsdm", table="Table 1")
    assert value(name="dm", size=("ipc", 10), source=source) == 48.9
    assert value(source=source) is None, "DataDAM is not in that table"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cifar10?can_flip=false", 32.0),
        ("cifar10?image_size=32", 32.0),
        ("cifar10?image_size=64", None),
        ("cifar10?can_flip=false&label_column=coarse_label", None),
    ],
)
def test_options_that_change_images_or_labels_leave_no_published_number(
    name: str, expected: float | None
) -> None:
    size = DatasetRef.parse(name).image_size
    cell = table_cell(dataset=name, target=name, image_size=size or 32)
    compared = likeness(read_numbers(), cell).compared
    assert (None if compared is None else compared.value) == expected


def test_boost_counts_images_and_supervised_sets_count_as_their_images() -> None:
    fields = {"dataset": "cifar100", "target": "cifar10", "num_classes": 100, "protocol": "linear"}
    source = PublishedSource(paper="boost_ssdd", table="Table 1")
    assert value(name="boost_ssdd", size=("budget", 100), source=source, **fields) == 76.83
    assert value(name="dm", size=("ipc", 1), source=source, arch="vgg11", **fields) == 28.37
    assert value(name="kmeans_ssl", size=("budget", 100), arch="mobilenet_v2", **fields) == 33.53


def test_settings_and_teachers_tell_ablations_and_students_apart() -> None:
    fields = {
        "name": "d3hr",
        "dataset": "imagenet",
        "target": "imagenet",
        "num_classes": 1000,
        "size": ("ipc", 10),
    }
    table = PublishedSource(paper="d3hr", table="Table 2")
    soft = {"protocol": "soft", "source": table}
    assert value(**fields, **soft, teacher="vgg11_tv", arch="mobilenet_v2") == 37.8
    assert value(**fields, **soft, teacher="mobilenet_v2", arch="vgg11_tv") == 24.8
    source = PublishedSource(paper="d3hr", table="Table 3", setting="L_mu only")
    assert value(**fields, protocol="soft", arch="resnet18", source=source) == 42.6
    stated = PublishedSource(paper="d3hr", table="Table A10", setting="m=1e5; arch not stated")
    assert value(name="d3hr", size=("ipc", 10), arch="resnet18", protocol="soft", source=stated) == 40.4


def test_differences_are_in_standard_errors_of_both() -> None:
    number = find(read_numbers(), table_cell())
    assert number is not None
    comparison = compare(number, 0.35, 0.004)
    assert comparison["accuracy_mean"] == pytest.approx(0.32)
    assert comparison["difference"] == pytest.approx(0.03)
    assert comparison["difference_se"] == pytest.approx(0.03 / math.sqrt(0.004**2 + 0.012**2))
    assert compare(number, 0.35, None)["difference_se"] is None
    printed = number.model_copy(update={"std": None})
    without_std = compare(printed, 0.35, 0.004)
    assert (without_std["difference_se"], without_std["difference"]) == (None, pytest.approx(0.03)), (
        "it is not exact"
    )


def test_without_a_table_only_numbers_of_the_same_protocol_are_taken() -> None:
    fields = {"name": "d3hr", "size": ("ipc", 10), "arch": "resnet18"}
    assert value(**fields, protocol="soft", teacher="resnet18") == 41.3
    assert value(**fields, protocol="soft") == 41.3, "the protocol's own teacher"
    assert value(**fields, protocol="soft", teacher="vgg11_tv") is None
    assert value(**fields) is None, "hard labels are in Table 5 alone, of ImageNet"
    for name in ("rded", "sre2l"):
        assert value(name=name, size=("ipc", 10), arch="resnet18") is None
        assert value(name=name, size=("ipc", 10), arch="resnet18", protocol="soft") is not None
    plain = {"name": "dm", "size": ("ipc", 10)}
    assert [value(**plain, protocol=one) for one in ("hard", "robust")] == [48.9, 48.9]
    assert [value(**plain, protocol=one) for one in ("soft", "continual")] == [None, None]


@pytest.mark.parametrize(
    ("arch", "expected"), [("convnet3_bn", (57.3, 69.3, 54.6)), ("convnet3", (55.2, 66.8, 52.1))]
)
def test_the_two_convnets_of_table_a6_are_told_apart_by_their_norm(
    arch: str, expected: tuple[float, float, float]
) -> None:
    source = PublishedSource(paper="d3hr", table="Table A6")
    fields: dict[str, Any] = {"name": "d3hr", "source": source, "arch": arch, "protocol": "soft"}
    big = {"dataset": "cifar100", "target": "cifar100", "num_classes": 100}
    actual = [value(size=("ipc", 10), **fields), value(size=("ipc", 50), **fields)]
    assert (*actual, value(size=("ipc", 50), **fields, **big)) == expected


@pytest.mark.parametrize("figure", [1, 4, 5, 6, 12, 13])
def test_ablations_are_not_compared_with_the_methods_own_number(figure: int) -> None:
    bench_spec = read_spec(ROOT / "configs" / "bench" / f"datadam_fig{figure}.yaml")
    assert value(size=("ipc", 10)) == 54.2
    assert value(size=("ipc", 10), source=bench_spec.published) is None


def test_the_standard_error_is_over_sets() -> None:
    assert standard_error([[0.5, 0.7], [0.8, 1.0]]) == pytest.approx(statistics.stdev([0.6, 0.9]) / 2**0.5)
    assert standard_error([[0.5, 0.7, 0.9]]) == pytest.approx(0.2 / 3**0.5)
    assert standard_error([[0.5]]) is None
