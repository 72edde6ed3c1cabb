"""The bench files that ddray ships."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ddray.evaluation.soft_recipes import recipe_teachers
from ddray.jobs.plan import budget_method, resolve
from ddray.methods import get_method, method_names
from ddray.methods.families.ssl.teacher import SOLO_LEARN, TeacherConfig
from ddray.system.shipped import shipped
from ddray.tables.dry_run import dry_run
from ddray.tables.options import BenchOptions
from ddray.tables.spec import read_spec
from ddray.tables.table import NO_NUMBER
from ddray.testing import random_dataset
from tests.tables.benches import run

ROOT = Path(__file__).resolve().parents[2]


FILES = sorted((ROOT / "configs" / "bench").glob("*.yaml"))


pytestmark = pytest.mark.skipif(not FILES, reason="the wheel ships them")


# Rows of a paper's table that a file does not have, by method.
LEFT_OUT = {
    # Variants, which do not stand beside the originals' numbers: D4M-style, d3s-style, ...
    "d3hr_table1": ["d4m"],
    "d3hr_table4": ["d3s"],
    "d3hr_table5": ["minimax"],
    "d3hr_tablea6": ["hmdc"],
    "d3hr_tablea7": ["teddy_post", "teddy_prior"],
    "datadam_table3": ["biggan", "cgan", "dc_vae", "gmmn"],
    "datadam_table4": ["whole"],
}
# Methods that a file has by both presets.
TWICE = {"datadam_table3": "datadam", "dsdm_table1": "dsdm"}
FIVE, FOUR = recipe_teachers("gvbsm", 32), recipe_teachers("gvbsm", 224)
SEVERAL = "several networks of its own"
# Numbers that are not compared, and cells without a number, by what differs.
DIFFERS = {
    "d3hr_tablea5": {"not stated in the paper: the dataset, the number of images, the network": 7},
    "d3hr_tablea6": {
        "not stated in the paper: the teacher": 9 + 5,
        f"teacher {'+'.join(FIVE)}, theirs {SEVERAL}; not stated in the paper: the teacher": 6,
    },
    "d3hr_tablea7": {f"teacher {'+'.join(FOUR)}, theirs {SEVERAL}": 6},
    "d3hr_tablea9": {"not stated in the paper: the network": 7},
    "d3hr_tablea10": {"not stated in the paper: the network": 7},
    "d3hr_tablea11": {"not stated in the paper: the dataset, the number of images, the network": 4},
    "datadam_table5": {"method.kernel fc3, the preset's fc1": 1},
}
WITHOUT_NUMBER = {
    "boost_ssdd_table1": {"network vit_tiny, theirs convnet3, vgg11, resnet18, alexnet, mobilenet": 4},  # NaN
    "d3hr_table2": {"teacher vgg11_bn, theirs resnet18, mobilenet_v2": 3},  # "-"
    "dsdm_table1": {"ipc 50, theirs ipc 1, ipc 10": 1},  # DC on CIFAR-100, "-"
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("scale", ["smoke", "cpu", "paper"])
def test_a_shipped_file_parses_and_its_graph_is_listed(path: Path, scale: str) -> None:
    result = dry_run(read_spec(path, scale), BenchOptions(scale=scale), run_dir=None)
    assert result["num_units"] > 0
    assert result["cells"]
    for cell in result["cells"]:
        assert ("compared" in cell) != ("differs" in cell)
    if scale == "paper":
        check_comparisons(path.stem, result["cells"])
    else:
        assert not any("compared" in cell for cell in result["cells"]), "it is not a reproduction"


def is_unlike(cell: dict[str, Any]) -> bool:
    """Return whether a cell differs from a published number."""
    return cell.get("differs", [NO_NUMBER]) != [NO_NUMBER]


def check_comparisons(name: str, cells: list[dict[str, Any]]) -> None:
    """Assert that cells stand beside all accuracies of their table, but for what is listed above."""
    if name == "leaderboard":  # of no table: by one recipe, which is not every method's own
        differs = {cell["method"] for cell in cells if is_unlike(cell)}
        generators = {"gmmn", "cgan", "biggan", "dc_vae"}  # of no published protocol
        others = {"datadam (repo)", "dc", "cafe", "m3d", "dsdm", "mtt", "datm", "frepo", "esfr"}
        assert differs == others | generators
        assert {cell["method"] for cell in cells if "compared" in cell} >= {"random", "dm", "dsa", "datadam"}
        return
    if name == "rectified":
        check_rectified(cells)
        return
    paper, _, table = name.rpartition("_table")
    with Path(shipped("reports", "published.csv")).open(encoding="utf-8", newline="") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if (row["paper"], row["table"].lower()) == (paper, f"table {table}")
            and "accuracy" in row["metric"]
            and row["method"] not in LEFT_OUT.get(name, ())
        ]
    rows += [row for row in rows if row["method"] == TWICE.get(name)]
    numbers = [cell.get("compared") or cell.get("published") for cell in cells]
    expected = Counter((row["method"], row["dataset"], row["arch"], float(row["value"])) for row in rows)
    beside = Counter((n["method"], n.get("dataset", ""), n.get("arch", ""), n["value"]) for n in numbers if n)
    assert beside == expected
    reasons = Counter("; ".join(cell["differs"]) for cell in cells if is_unlike(cell))
    assert reasons == Counter({**DIFFERS.get(name, {}), **WITHOUT_NUMBER.get(name, {})})


def check_rectified(cells: list[dict[str, Any]]) -> None:
    """Assert that every set is scored by rd3 and by its own recipe; variants stand beside no number."""
    soft = [cell for cell in cells if cell["protocol"] == "soft"]
    sets: dict[tuple[str, str, int], set[str]] = {}
    for cell in soft:
        place = (cell["method"], cell["dataset"], cell["ipc"])
        sets.setdefault(place, set()).add(cell.get("settings", "own"))
    assert all(settings == {"recipe=rd3", "own"} for settings in sets.values())
    compared = {
        (cell["method"], cell["dataset"], cell["compared"]["value"]) for cell in cells if "compared" in cell
    }
    cifar = {("sre2l (repo)", "cifar10", 53.9), ("dwa", "cifar10", 59.9), ("rded", "cifar10", 63.3)}
    published = {("sre2l (repo)", 21.3), ("dwa", 37.9), ("rded", 42.0)}
    rectified = {("sre2l (repo)", 40.2), ("dwa", 42.5), ("rded", 46.3), ("g_vbsm", 41.5)}
    imagenet = "imagenet?image_size=224"
    assert compared == cifar | {(name, imagenet, value) for name, value in published | rectified}
    assert {cell["method"] for cell in cells if cell["protocol"] == "hard"} == {"random", "minimax", "dit"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_file_runs_at_its_smallest_scale(path: Path, tmp_path: Path) -> None:
    result = run(tmp_path / "run", read_spec(path, "smoke"), scale="smoke")
    assert result["cells"]
    assert result["failures"] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_file_opens_with_command_numbers_and_cost(path: Path) -> None:
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert head[0] == f"# ddray bench configs/bench/{path.name}"
    assert any(line.startswith("# Expected: ") for line in head)
    assert any(line.startswith("# Cost: ") for line in head)


def test_boost_ssdds_tables_count_images_as_the_paper_and_share_a_teacher() -> None:
    """Random and k-means take N images for a budget of N; self-supervised rows ask for one teacher."""
    counted = set()
    for path in FILES:
        if not path.stem.startswith("boost_ssdd"):
            continue
        bench_spec = read_spec(path, "paper")
        teachers = set()
        for row in bench_spec.rows():
            if budget_method(row.name) is None:
                continue
            dataset = random_dataset(shape=(3, 16, 16), name="cifar100")
            plan = resolve(row.name, dataset, budget=50, preset=row.preset, layers=row.layers())
            config = plan.config.method
            teachers.add(config.teacher)
            if row.name in ("random_ssl", "kmeans_ssl"):
                num = get_method(row.name).num_distilled(config, 50, dataset.image_shape, 1000)
                assert num == 50, f"{path.name}: {row.row}"
                counted.add(path.stem)
        assert teachers == {TeacherConfig.parse(SOLO_LEARN)}, path.name
    assert counted == {f"boost_ssdd_table{number}" for number in (1, 2, 6, 7, 8, 9, 10)}


@pytest.mark.parametrize("scale", ["smoke", "cpu", "paper"])
def test_the_leaderboard_scores_every_method_by_one_recipe(scale: str) -> None:
    bench_spec = read_spec(ROOT / "configs" / "bench" / "leaderboard.yaml", scale)
    assert {(one.recipe, one.augment) for one in bench_spec.evaluate} == {("vico", "dsa")}
    hard = [one for one in bench_spec.evaluate if one.protocol == "hard"]
    assert [one.protocol for one in bench_spec.evaluate] == ["hard"] * len(hard) + ["robust"]
    scored = [(name, one.archs) for one in hard for name in bench_spec.datasets(one)]
    # Narrower networks where images are larger, to finish on two cores; one network per dataset.
    narrow = ("convnet3_w64",) if scale == "cpu" else ("auto",)
    archs = {"digits": ("auto",), "mnist": narrow, "cifar10": narrow}
    assert scored == [(name, archs[name]) for name in bench_spec.dataset]
    assert bench_spec.dataset == (("digits",) if scale == "smoke" else ("digits", "mnist", "cifar10"))
    rows = {row.name for row in bench_spec.rows()}
    unlabelled = {"krr_st", "boost_ssdd", "random_ssl", "kmeans_ssl"}
    assert rows == {*method_names()} - unlabelled, "the header says which are left out"
