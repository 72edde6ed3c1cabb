"""`ddray bench`, on Ray or in this process."""

from pathlib import Path

from ddray.cluster.executor import bench_executor
from ddray.cluster.runtime import sigterm_as_sigint
from ddray.tables.options import BenchOptions
from ddray.tables.result import BenchResult
from ddray.tables.run import prepare, run_bench
from ddray.tables.spec import BenchSpec


def bench(spec: BenchSpec, options: BenchOptions, *, run_dir: Path | None, resume: bool) -> BenchResult:
    """Run a bench, or resume one.

    Args:
        spec: the table.
        options: scale, resources, executor.
        run_dir: the run's folder; None creates a numbered one.
        resume: continue the run in that folder.

    Raises:
        InputError: the table, an option or the folder is bad.
        DdrayError: no cell was scored.
    """
    prepared = prepare(spec, options)
    with sigterm_as_sigint():
        return run_bench(prepared, bench_executor(options), run_dir=run_dir, resume=resume)
