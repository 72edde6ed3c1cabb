"""The bench files that ddray ships."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddray.jobs.plan import budget_method, resolve
from ddray.methods import get_method, method_names
from ddray.methods.families.ssl.teacher import SOLO_LEARN, TeacherConfig
from ddray.tables.dry_run import dry_run
from ddray.tables.options import BenchOptions
from ddray.tables.spec import read_spec
from ddray.testing import random_dataset
from tests.tables.benches import run

ROOT = Path(__file__).resolve().parents[2]


FILES = sorted((ROOT / "configs" / "bench").glob("*.yaml"))


pytestmark = pytest.mark.skipif(not FILES, reason="the wheel ships them")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("scale", ["smoke", "cpu", "paper"])
def test_a_shipped_file_parses_and_its_graph_is_listed(path: Path, scale: str) -> None:
    result = dry_run(read_spec(path, scale), BenchOptions(scale=scale), run_dir=None)
    assert result["num_units"] > 0


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
