from __future__ import annotations

from pathlib import Path

import pytest

from ddray.report.page import write_page
from ddray.runs.executor import LocalExecutor
from ddray.tables.options import BenchOptions
from ddray.tables.run import prepare, run_bench
from ddray.tables.spec import BenchSpec
from tests.report.pages import SPEC


@pytest.fixture(scope="session")
def bench_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bench with two rows that worked and one that diverged."""
    temporary = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDRAY_HOME", str(temporary / "home"))
        prepared = prepare(BenchSpec.parse(SPEC), BenchOptions(executor="local"))
        run_bench(prepared, LocalExecutor(), run_dir=temporary / "run")
    return temporary / "run"


@pytest.fixture(scope="session")
def page(bench_folder: Path) -> str:
    write_page([bench_folder], bench_folder / "report.html")
    return (bench_folder / "report.html").read_text()
