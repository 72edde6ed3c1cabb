"""The spaces: descriptions, sizes without building, lookup by name and sampling by cost."""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from ddray.config import read_yaml
from ddray.errors import InputError
from ddray.nets import arch_names, build_net, num_params
from ddray.nets.names import parse_arch
from ddray.nets.nasbench201 import BENCHMARK, EDGES, OPS, Skeleton, cell_net_size, parse_arch_str, to_arch_str
from ddray.ranking import nasbench201, space_names
from ddray.ranking.convnet720 import ConvNet720, convnet_size
from ddray.ranking.nasbench201 import NasBench201, read_table
from ddray.ranking.options import NasOptions
from ddray.ranking.spaces import NasSpace, get_space, parse_indices, resolve_config, sample
from ddray.ranking.truth import read_truth
from ddray.system import registry
from ddray.system.shipped import shipped

RGB = (3, 32, 32)


@pytest.fixture(scope="module")
def convnets() -> NasSpace:
    return get_space("convnet720")


@pytest.fixture(scope="module")
def cells() -> NasBench201:
    space = get_space("nasbench201")
    assert isinstance(space, NasBench201)
    return space


def test_convnet720_is_the_documented_grid(convnets: NasSpace) -> None:
    assert len(convnets) == 720
    grid = product(
        (1, 2, 3, 4),
        (32, 64, 128, 256),
        ("sigmoid", "relu", "leakyrelu"),
        ("none", "batch", "layer", "instance", "group"),
        ("none", "max", "avg"),
    )
    names = ("depth", "width", "activation", "norm", "pooling")
    described = [convnets.describe(index) for index in range(720)]
    for index, (arch, point) in enumerate(zip(described, grid, strict=True)):
        assert tuple(arch[name] for name in names) == point
        assert convnets.choices(index) == dict(zip(names, point, strict=True))
        assert (arch["index"], arch["name"]) == (index, convnets.arch_name(index))
        parsed = parse_arch(arch["name"])
        assert (parsed.depth, parsed.width, parsed.activation, parsed.norm, parsed.pooling) == point
        assert arch["params_m"] > 0
        assert arch["flops_m"] > 0
    assert len({arch["name"] for arch in described}) == 720
    json.dumps(described, allow_nan=False)


def test_convnet720_counts_what_is_built(convnets: NasSpace) -> None:
    for index in range(720):  # every combination of choices, at the size that describe uses
        net = convnets.build(index, RGB, 10, seed=0, device="meta")
        assert convnets.describe(index)["params_m"] == num_params(net) / 1e6
        assert net.arch == convnets.arch_name(index)
    checked = 0
    for shape, stride in (((3, 16, 16), 11), ((1, 28, 28), 13), ((1, 16, 16), 17), ((3, 17, 30), 19)):
        for index in range(0, 720, stride):
            arch = parse_arch(convnets.arch_name(index))
            net = build_net(arch.name, shape, 7, seed=0, device="meta")
            params, flops = convnet_size(arch, shape, 7)
            assert params == num_params(net)
            assert flops == counted_flops(net, shape)
            assert convnets.cost(index, shape, 7) == flops / 1e6
            checked += 1
    assert checked > 190


def counted_flops(net: torch.nn.Module, shape: tuple[int, int, int]) -> int:
    """Multiply-adds of convolutions and linear layers for one image, plus bias additions."""
    flops = []
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(
                lambda module, _, output: flops.append((module.weight[0].numel() + 1) * output[0].numel())
            )
    net(torch.zeros(1, *shape, device="meta"))
    assert flops
    return sum(flops)


def test_convnet3_has_the_published_size(convnets: NasSpace) -> None:
    arch = next(a for a in map(convnets.describe, range(720)) if a["name"] == "convnet3")
    assert arch["params_m"] == 0.320010
    block = (27 + 1) * 128 * 1024 + (9 * 128 + 1) * 128 * (256 + 64)
    assert arch["flops_m"] == (block + 2049 * 10) / 1e6


def test_convnet720_refuses_images_too_small_for_its_depth(convnets: NasSpace) -> None:
    with pytest.raises(InputError, match="sides must be at least 16 px, got 8x8"):
        convnets.cost(719, (3, 8, 8), 10)
    assert convnets.cost(0, (3, 8, 8), 10) > 0


def test_all_cells_are_described_quickly(cells: NasBench201) -> None:
    began = time.perf_counter()
    archs = [cells.describe(index) for index in range(len(cells))]
    assert time.perf_counter() - began < 10
    assert len(archs) == 15625
    flops = [arch["flops_m"] for arch in archs]
    assert (min(flops), max(flops)) == (7.78305, 220.11969)
    assert archs[1]["flops_m"] == 113.95137
    assert archs[9930]["params_m"] == 1.288506
    json.dumps(archs, allow_nan=False)


# From https://github.com/D-X-Y/NATS-Bench/issues/36: the 12-epoch records give the first figure, the
# 200-epoch records the second.
WRONG_RECORDS = {15474: (0.802426, 0.559386), 7268: (0.344346, 0.372346), 15033: (0.316346, 0.559386)}


@pytest.mark.parametrize(
    ("column", "shape", "num_classes"),
    [
        ("params_m_cifar10", RGB, 10),
        ("params_m_cifar100", RGB, 100),
        ("params_m_imagenet16", (3, 16, 16), 120),
    ],
)
def test_cells_have_the_benchmarks_parameters(
    cells: NasBench201, column: str, shape: tuple[int, int, int], num_classes: int
) -> None:
    """Except for records with a sibling's parameters: same unique_str, one convolution apart."""
    table = read_table()
    ours = [cell_net_size(parse_arch_str(text), shape, num_classes)[0] / 1e6 for text in table["arch_str"]]
    recorded = table[column].tolist()
    wrong = [index for index in range(15625) if abs(ours[index] - recorded[index]) >= 1e-6]
    siblings: dict[str, set[float]] = {}
    for unique, size in zip(table["unique_str"], ours, strict=True):
        siblings.setdefault(unique, set()).add(size)
    assert len(wrong) == 150
    assert set(WRONG_RECORDS) <= set(wrong)
    one_conv = [5e-6 * sum((kernel * c) ** 2 + 2 * c for c in (16, 32, 64)) for kernel in (1, 3)]
    for index in wrong:
        assert recorded[index] in siblings[table["unique_str"][index]]
        assert min(abs(abs(ours[index] - recorded[index]) - size) for size in one_conv) < 1e-6
    if num_classes == 10:
        for index, (right, written) in WRONG_RECORDS.items():
            assert (cells.describe(index)["params_m"], recorded[index]) == (right, written)


def test_arch_strs_go_both_ways_and_every_cell_is_there_once(cells: NasBench201) -> None:
    texts = [cells.choices(index)["arch_str"] for index in range(len(cells))]
    assert texts == read_table()["arch_str"].tolist()
    ops = [parse_arch_str(text) for text in texts]
    assert [to_arch_str(cell_ops) for cell_ops in ops] == texts
    assert set(ops) == set(product(OPS, repeat=6))
    for index in range(0, len(cells), 97):
        assert cells.index_of(texts[index]) == index
        permuted = (*ops[index][1:], ops[index][0])
        same = permuted == ops[index]
        assert (cells.index_of(to_arch_str(permuted)) == index) is same


def test_canonical_cells_are_the_first_of_their_kind(cells: NasBench201) -> None:
    archs = [cells.describe(index) for index in range(len(cells))]
    assert len({arch["unique_str"] for arch in archs}) == 6466
    firsts = [arch for arch in archs if arch["canonical"] == arch["index"]]
    assert len(firsts) == 6466
    for arch in archs:
        assert arch["canonical"] <= arch["index"]
        assert archs[arch["canonical"]]["unique_str"] == arch["unique_str"]
    # The benchmark trained duplicates separately: their accuracies differ by noise only.
    accuracy = read_table()["cifar10_test_200_mean"]
    pairs = [(a["index"], a["canonical"]) for a in archs if a["canonical"] != a["index"]]
    gaps = sorted(abs(accuracy[i] - accuracy[j]) for i, j in pairs)
    assert gaps[len(gaps) // 2] < 0.5


def test_the_table_is_the_benchmarks() -> None:
    table = read_table()
    assert table["index"].tolist() == list(range(15625))
    best = table["cifar10_test_200_mean"].idxmax()
    assert (best, table["cifar10_test_200_mean"][best]) == (6111, 94.3733)
    assert table["cifar10_valid_200_mean"].max() == 91.6067
    assert table["cifar10_test_200_mean"][9930] == 94.3633
    assert (table["cifar10_test_200_mean"] == 10.0).sum() == 341
    assert read_table() is table


@pytest.fixture
def fresh_caches() -> Iterator[None]:
    """Clear the caches before and after the test."""
    for cached in (nasbench201.read_table, nasbench201._space_file):
        cached.cache_clear()
    yield
    for cached in (nasbench201.read_table, nasbench201._space_file):
        cached.cache_clear()


@pytest.mark.usefixtures("fresh_caches")
def test_another_table_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shipped("search_spaces", "nas")
    (tmp_path / "nasbench201.yaml").write_bytes((folder / "nasbench201.yaml").read_bytes())
    monkeypatch.setattr(nasbench201, "shipped", lambda *parts: tmp_path / parts[-1])
    with pytest.raises(InputError, match=r"table must be readable.*nasbench201_accuracies\.csv\.gz"):
        read_table()
    content = gzip.decompress((folder / "nasbench201_accuracies.csv.gz").read_bytes())
    changed = tmp_path / "nasbench201_accuracies.csv.gz"
    changed.write_bytes(gzip.compress(content.replace(b"94.3733", b"94.3734", 1)))
    with pytest.raises(InputError, match=r"table must have sha256 747609fc.*got") as caught:
        read_table()
    assert hashlib.sha256(changed.read_bytes()).hexdigest() in str(caught.value)


def test_the_space_file_agrees_with_the_code() -> None:
    space_file = read_yaml(shipped("search_spaces", "nas", "nasbench201.yaml"))
    assert tuple(space_file["ops"]) == OPS
    assert tuple(map(tuple, space_file["edges"])) == EDGES
    assert Skeleton(**space_file["benchmark"]) == BENCHMARK
    assert Skeleton(**space_file["proxy"]) == Skeleton(16, 1, cell_affine=False)


def test_nasbench201_builds_the_network_it_was_asked_for(cells: NasBench201) -> None:
    assert cells.skeleton == Skeleton(16, 1, cell_affine=False)
    net = cells.build(17, (1, 16, 16), 10, seed=3)
    assert net.arch == "nasbench201_17_c16_n1_noaffine"
    ops = parse_arch_str(cells.choices(17)["arch_str"])
    params, flops = cell_net_size(ops, (1, 16, 16), 10, cells.skeleton)
    assert num_params(net) == params
    assert cells.cost(17, (1, 16, 16), 10) == flops / 1e6
    assert cells.arch_name(17) == cells.describe(17)["name"] == "nasbench201_17"
    benchmark_space = get_space("nasbench201", channels=16, num_cells=5, cell_affine=True)
    assert num_params(benchmark_space.build(9930, RGB, 10, seed=0)) == 1_288_506
    mixed = get_space("nasbench201", channels=4, mixture="softmax").build(0, RGB, 10, seed=0)
    assert mixed.arch == "nasbench201_0_c4_n1_noaffine_softmax"
    # The skeleton that is trained does not affect the description.
    assert benchmark_space.describe(5) == cells.describe(5)


def test_building_is_deterministic_in_the_seed(convnets: NasSpace, cells: NasBench201) -> None:
    for space in (convnets, cells):
        first, again, other = (space.build(3, (1, 16, 16), 4, seed=seed).state_dict() for seed in (1, 1, 2))
        assert first
        assert all(torch.equal(weight, again[name]) for name, weight in first.items())
        assert not all(torch.equal(weight, other[name]) for name, weight in first.items())


def test_names_of_cells_are_no_names_of_networks(cells: NasBench201) -> None:
    assert not any(cells.arch_name(0).startswith(name) for name in arch_names())


def test_a_sample_has_one_architecture_of_each_cost_stratum(convnets: NasSpace, cells: NasBench201) -> None:
    for space, num in ((convnets, 72), (convnets, 7), (convnets, 1), (cells, 100)):
        indices = sample(space, num, seed=0, image_shape=(1, 16, 16), num_classes=10)
        assert indices == sorted(set(indices))
        assert len(indices) == num
        ranked = sorted(range(len(space)), key=lambda i: (space.cost(i, (1, 16, 16), 10), i))
        positions = sorted(ranked.index(index) for index in indices)
        size, larger = divmod(len(space), num)
        begin = 0
        for stratum, position in enumerate(positions):
            end = begin + size + (stratum < larger)
            assert begin <= position < end
            begin = end
        assert indices == sample(space, num, seed=0, image_shape=(1, 16, 16), num_classes=10)
        if num > 1:
            assert indices != sample(space, num, seed=1, image_shape=(1, 16, 16), num_classes=10)


def test_a_sample_of_all_is_all(convnets: NasSpace) -> None:
    assert sample(convnets, 720, seed=3, image_shape=RGB, num_classes=10) == list(range(720))


@pytest.mark.parametrize("num", [0, -1, 721])
def test_a_sample_must_fit_the_space(convnets: NasSpace, num: int) -> None:
    with pytest.raises(InputError, match=rf"--sample must be in 1\.\.720 for convnet720, got {num}"):
        sample(convnets, num, seed=0, image_shape=RGB, num_classes=10)


def test_indices_are_parsed(convnets: NasSpace, cells: NasBench201) -> None:
    assert parse_indices("all", convnets) == list(range(720))
    assert parse_indices("7", convnets) == [7]
    assert parse_indices("5, 1,719", convnets) == [5, 1, 719]
    assert parse_indices("15624", cells) == [15624]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be all, or indices such as 1,5,7, got ''"),
        ("1,,2", "must be all, or indices"),
        ("1-3", "must be all, or indices"),
        ("-1", "must be all, or indices"),
        ("1.0", "must be all, or indices"),
        ("²", "must be all, or indices"),
        ("every", "must be all, or indices"),
        ("3,720", r"indices of convnet720 must be in 0\.\.719, got 720"),
        ("3,4,3", "indices of convnet720 must differ, got '3,4,3'"),
    ],
)
def test_bad_indices_are_refused(convnets: NasSpace, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_indices(text, convnets)
    assert "\n" not in str(caught.value)


def test_unknown_spaces_options_and_indices_are_refused(convnets: NasSpace, cells: NasBench201) -> None:
    with pytest.raises(InputError, match="--space must be one of convnet720, nasbench201, got 'convnet721'"):
        get_space("convnet721")
    with pytest.raises(InputError, match="channels, mixture must be left out for --space convnet720"):
        get_space("convnet720", channels=16, mixture="softmax")
    with pytest.raises(InputError, match="num_cells of a cell network must be at least 1, got 0"):
        get_space("nasbench201", num_cells=0)
    with pytest.raises(InputError, match="mixture must be one of"):
        get_space("nasbench201", mixture="max")
    for space in (convnets, cells):
        for index in (-1, len(space)):
            for method in (space.choices, space.arch_name, space.describe):
                with pytest.raises(InputError, match=rf"indices of {space.name} must be in .* got {index}"):
                    method(index)
    with pytest.raises(InputError, match="arch_str must have the form"):
        cells.index_of("|none~0|")


def test_a_grid_is_independent_of_its_caller(convnets: NasSpace) -> None:
    convnets.choices(0)["depth"] = 9
    assert convnets.choices(0) == ConvNet720().choices(0)


OFFERED = '''
"""Two ConvNets."""

from typing import Final

from ddray.ranking.convnet720 import ConvNet720
from ddray.ranking.spaces import SpaceDefinition


class Two(ConvNet720):
    name = "two"

    def __len__(self) -> int:
        return 2


SPACE: Final = SpaceDefinition(Two, recipe={"epochs": 3}, whole_epochs=2)
'''


def test_a_package_offers_a_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "two_of_theirs.py").write_text(OFFERED)
    monkeypatch.syspath_prepend(tmp_path)
    offered = importlib.metadata.EntryPoint("two", "two_of_theirs", "ddray.spaces")
    monkeypatch.setattr(registry, "entry_points", lambda group: [offered] if group == offered.group else [])

    assert space_names() == ["convnet720", "nasbench201", "two"]
    assert len(get_space("two")) == 2
    config = resolve_config(NasOptions(space="two"))
    assert (config.recipe.epochs, config.whole_recipe().epochs) == (3, 2)
    with pytest.raises(InputError, match="--truth table needs --space nasbench201, got --space two"):
        read_truth(NasOptions(space="two", truth="table"), get_space("two"), [0])


@pytest.mark.parametrize(
    ("options", "numerics", "dumped"),
    [
        ({}, "tf32", {"precision": "fp32"}),
        ({"precision": "tf32"}, "tf32", {"precision": "fp32"}),
        ({"precision": "fp32"}, "fp32", {"precision": "fp32", "tf32": False}),
        ({"precision": "bf16"}, "bf16", {"precision": "bf16"}),
        ({"precision": "auto", "deterministic": True}, "auto", {"precision": "auto", "deterministic": True}),
    ],
)
def test_precision_is_of_both_recipes_and_changes_no_key_at_its_default(
    options: dict[str, Any], numerics: str, dumped: dict[str, Any]
) -> None:
    config = resolve_config(NasOptions(**options))
    for recipe in (config.recipe, config.truth_recipe):
        assert recipe.numerics == numerics
        values = recipe.dump()
        assert {
            name: values[name] for name in ("precision", "tf32", "deterministic") if name in values
        } == dumped
