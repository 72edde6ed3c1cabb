"""`ddray bench` on Ray: units over long-lived actors, as many as the current nodes can hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ddray.cluster import nas
from ddray.cluster.runtime import check_capacity, ray_runtime, sigterm_as_sigint
from ddray.errors import InputError
from ddray.runs.outcome import Outcome
from ddray.tables.options import BenchOptions
from ddray.tables.result import BenchResult
from ddray.tables.run import prepare, run_bench, run_local
from ddray.tables.spec import BenchSpec
from ddray.tables.units import BenchUnit
from ddray.tables.worker import BenchJob, run_unit


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
        if options.executor == "local":
            return run_bench(prepared, run_local, run_dir=run_dir, resume=resume)
        return run_bench(
            prepared, RayExecutor(options), run_dir=run_dir, resume=resume, execute_nas=nas.RayExecutor
        )


class RayExecutor:
    """Runs units on the workers of a Ray cluster; Ray starts with the first unit.

    Args:
        options: resources per unit, and the cluster's address.
    """

    def __init__(self, options: BenchOptions) -> None:
        self._options = options

    def __call__(
        self, job: BenchJob, units: Sequence[BenchUnit], after: Callable[[Outcome], list[BenchUnit]]
    ) -> Iterator[Outcome]:
        """Start `works` in order, then what `after` adds."""
        options = self._options
        with ray_runtime(options.address):
            from ddray.cluster.fanout import Task, fan_out

            check_capacity(options.cpus_per_unit, options.gpus_per_unit, per="unit")

            def tasks(new_works: Sequence[BenchUnit]) -> list[Task]:
                return [Task(unit.key, run_unit, (job, unit)) for unit in new_works]

            def follow(outcome: Outcome) -> list[Task]:
                return tasks(after(outcome))

            yield from fan_out(
                tasks(units),
                num_workers=self._num_workers,
                cpus=options.cpus_per_unit,
                gpus=options.gpus_per_unit,
                timeout_s=options.unit_timeout,
                follow=follow,
            )

    def _num_workers(self) -> int:
        """Return how many units fit now; nodes may have died or joined since the last check."""
        options = self._options
        try:
            fits = check_capacity(options.cpus_per_unit, options.gpus_per_unit, per="unit")
        except InputError:  # no node fits a unit any more: units wait for a new one
            fits = 1
        return min(fits, options.max_concurrent or fits)
