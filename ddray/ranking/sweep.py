"""`ddray nas`: train architectures on proxies, rank them by val, and compare with the true ranking.

Architectures are trained on nine tenths of train (or on a proxy of it) and ranked on the held-out tenth;
test is used for the last column of the table only.
"""

import logging
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from ddray.data import Dataset, Split, SplitName, carve_val
from ddray.errors import InputError, InterruptedRunError, StorageError, one_line
from ddray.ranking.options import NasConfig as NasConfig
from ddray.ranking.options import NasOptions as NasOptions
from ddray.ranking.proxies import Proxy
from ddray.ranking.recipe import NasRecipe
from ddray.ranking.spaces import NasSpace, get_space, sample
from ddray.ranking.spaces import resolve_config as resolve_config
from ddray.ranking.worker import CODE_VERSION, NasTask, SweepData, SweepJob, real_set, run_task, truth_ledger
from ddray.runs.executor import Executor, Task
from ddray.runs.folder import Run, open_run
from ddray.runs.ledger import Ledger, Row, Unit
from ddray.seeding import derive_seed
from ddray.system.progress import progress

log = logging.getLogger(__name__)

# Fixed cost of a step (kernel launches, augmentation) in the unit of `NasSpace.cost`: million multiply-adds.
_STEP_COST: Final = 50.0
_LEAST_PATIENCE_S: Final = 7200.0
# Million multiply-adds per second: at most a tenth of what a core or a GPU reaches on small networks.
_SLOWEST: Final = {"cpu": 1000.0, "cuda": 50_000.0}


@dataclass(frozen=True)
class Sweep:
    """A resolved sweep.

    Attributes:
        options: the options of the command.
        config: how architectures are trained.
        dataset: the real data.
        train: nine tenths of train.
        val: the held-out tenth to rank by.
        proxies: the sets that architectures are trained on, besides the whole set for the truth.
        indices: the architectures.
        device: device type of the workers.
        with_test: whether truth is also scored on test, for the table's last column; False in a search.
        can_grow: whether the sweep may be resumed with other proxies.
    """

    options: NasOptions
    config: NasConfig
    dataset: Dataset
    train: Split
    val: Split
    proxies: tuple[Proxy, ...]
    indices: tuple[int, ...]
    device: str
    with_test: bool = True
    can_grow: bool = False

    @cached_property
    def test(self) -> Split | None:
        """Test, if a trained truth is to be scored on it; None too if it can't be read."""
        if not self.with_test or self.options.truth != "whole":
            return None
        try:
            return self.dataset.test()
        except InputError as error:
            log.warning("no test column: %s", error)
            return None

    def space(self, mixture: str | None = None) -> NasSpace:
        """Return the space of architectures, as a proxy trains them."""
        return get_space(**self.space_options(mixture))

    def space_options(self, mixture: str | None = None) -> dict[str, Any]:
        """Return name and options for `get_space`."""
        options = {"name": self.options.space, **self.config.space_options()}
        return options if mixture is None else {**options, "mixture": mixture}

    def describe(self) -> dict[str, Any]:
        """Return plain values that determine the results (config.yaml)."""
        options = self.options
        return {
            "space": options.space,
            "indices": list(self.indices),
            "seeds": options.seeds,
            "seed": options.seed,
            "dataset": self.dataset.name,
            "fingerprint": self.dataset.fingerprint,
            "truth": options.truth,
            "truth_seeds": options.truth_seeds,
            "truth_column": options.truth_column,
            **({} if self.can_grow else {"proxies": {proxy.name: proxy.key for proxy in self.proxies}}),
            "device": self.device,
            # Release 0.1.0 wrote this for every space; without it, its runs could not be resumed.
            "cells": {"channels": 16, "num_cells": 1, "cell_affine": False},
            **self.config.dump(),
        }

    def tasks(self, *, fused: bool) -> list[NasTask]:
        """Return all tasks, longest first: the proxies' and, for truth `whole`, the truth's.

        Args:
            fused: put the seeds of one architecture into one task (a GPU may train them as one network).
        """
        all_tasks = []
        spaces = {proxy.mixture: self.space(proxy.mixture) for proxy in self.proxies} | {None: self.space()}
        for index in self.indices:
            for proxy in self.proxies:
                seeds = [derive_seed(self.options.seed, "nas", n) % 2**31 for n in range(self.options.seeds)]
                all_tasks += self._tasks_of(index, proxy, seeds, spaces[proxy.mixture], fused)
            if self.options.truth == "whole":
                seeds = [
                    derive_seed(self.options.seed, "truth", n) % 2**31
                    for n in range(self.options.truth_seeds)
                ]
                all_tasks += self._tasks_of(index, None, seeds, spaces[None], fused)
        # Equal costs keep their order: the same sweep starts its tasks in the same order everywhere.
        return sorted(all_tasks, key=lambda task: -task.cost)

    def _tasks_of(
        self, index: int, proxy: Proxy | None, seeds: Sequence[int], space: NasSpace, fused: bool
    ) -> list[NasTask]:
        recipe = self.config.truth_recipe if proxy is None else self.config.recipe
        num_images = len(self.train) if proxy is None else proxy.num_images
        num_steps = None if proxy is None else proxy.num_steps
        steps = num_steps or recipe.num_steps(num_images)
        cost = space.cost(index, self.dataset.image_shape, self.dataset.num_classes)
        work = steps * (_STEP_COST + 3 * cost * min(recipe.batch, num_images))
        name = space.arch_name(index)
        units = [self._unit(index, name, proxy, seed, recipe) for seed in seeds]
        groups = [tuple(units)] if fused else [(unit,) for unit in units]
        return [
            NasTask(
                units=group,
                index=index,
                set_name="whole" if proxy is None else proxy.set_name,
                seeds=tuple(int(unit.spec["seed"]) for unit in group),
                recipe=recipe.dump(),
                num_steps=num_steps,
                space=self.space_options(None if proxy is None else proxy.mixture),
                shuffle=proxy is None or proxy.shuffle,
                cost=work * len(group),
            )
            for group in groups
        ]

    def _unit(self, index: int, arch: str, proxy: Proxy | None, seed: int, recipe: NasRecipe) -> Unit:
        spec = {
            "space": self.options.space,
            "cells": self.config.space_options() or None,
            "index": index,
            "arch": arch,
            "seed": seed,
            "recipe": recipe.dump(),
            "fingerprint": self.dataset.fingerprint,
            "split": str(SplitName(self.options.seed)),
            "device": self.device,
        }
        if proxy is None:
            # `test` is part of the key: other runs reuse this row, and some of them need its test score.
            unit_spec = {**spec, "test": self.test is not None}
            return Unit(kind="truth", spec=unit_spec, code_version=CODE_VERSION)
        unit_spec = {**spec, "proxy": proxy.name, "proxy_key": proxy.key, **proxy.variant()}
        return Unit(kind="nas", spec=unit_spec, code_version=CODE_VERSION)

    def data(self, tasks: Sequence[NasTask]) -> SweepData:
        """Return the arrays that these tasks need."""
        set_names = {task.set_name for task in tasks}
        sets = {proxy.set_name: proxy.data for proxy in self.proxies if proxy.set_name in set_names}
        if "whole" in set_names:
            sets["whole"] = real_set(self.train, self.dataset)
        test = None
        if self.test is not None and any(task.units[0].kind == "truth" for task in tasks):
            test = (self.test.images.numpy(), self.test.labels.numpy())
        val = (self.val.images.numpy(), self.val.labels.numpy())
        return SweepData(sets, val, test, self.dataset.num_classes, self.dataset.can_flip)


def patience(options: NasOptions, tasks: Sequence[NasTask]) -> float:
    """Return the seconds after which a task counts as hung.

    A task with several seeds may take as long as its units together. The default is two hours, or what the
    longest task takes on a very slow device: training on the whole set may take days on one core.
    """
    if options.unit_timeout is not None:
        return options.unit_timeout * max(len(task.units) for task in tasks)
    slowest = _SLOWEST["cuda" if options.gpus_per_worker > 0 else "cpu"]
    return max(_LEAST_PATIENCE_S, max(task.cost for task in tasks) / slowest)


def split_for(dataset: Dataset, seed: int) -> tuple[Split, Split]:
    """Return (nine tenths of train, the held-out tenth to rank by)."""
    return carve_val(dataset.train(), seed=seed)


def choose_architectures(options: NasOptions, config: NasConfig, dataset: Dataset) -> tuple[int, ...]:
    """Return the indices of the architectures to train.

    Raises:
        InputError: an unknown space, or a sample larger than it.
    """
    space = get_space(options.space, **config.space_options())
    drawn = sample(
        space,
        options.sample,
        seed=options.seed,
        image_shape=dataset.image_shape,
        num_classes=dataset.num_classes,
        max_mflops=options.max_mflops,
    )
    return tuple(drawn)


def run_sweep(
    sweep: Sweep, executor: Executor, *, run_dir: Path | None, resume: bool
) -> tuple[Run, list[Row]]:
    """Run the missing units of a sweep; return its run and all its rows.

    Raises:
        InputError: the folder can't be used.
        StorageError: a row can't be written.
    """
    run = open_run(run_dir, sweep.describe(), command="nas", resume=resume)
    tasks = sweep.tasks(fused=sweep.device == "cuda")
    _take_known_truth(run, tasks)
    done = {row.key for row in run.ledger.rows()}
    missing = [remaining for task in tasks if (remaining := _without(task, done)) is not None]
    if missing:
        _run_missing(sweep, executor, run, missing, num_units=sum(len(task.units) for task in tasks))
    keys = {unit.key for task in tasks for unit in task.units}
    return run, [row for row in run.ledger.rows() if row.key in keys]


def _without(task: NasTask, done: set[str]) -> NasTask | None:
    """Return the task without its finished units; None if nothing is left."""
    left = [(unit, seed) for unit, seed in zip(task.units, task.seeds, strict=True) if unit.key not in done]
    if not left:
        return None
    units, seeds = zip(*left, strict=True)
    return replace(task, units=units, seeds=seeds, cost=task.cost * len(units) / len(task.units))


def _take_known_truth(run: Run, tasks: Sequence[NasTask]) -> None:
    """Copy truth that other runs have trained into this run's ledger."""
    units = [unit for task in tasks for unit in task.units if unit.kind == "truth"]
    if not units:
        return
    shared = truth_ledger()
    for unit in units:
        if run.ledger.row(unit.key) is None and (row := _known_truth(shared, unit)) is not None:
            run.ledger.publish(unit, row.model_copy(update={"epoch": 0}), epoch=run.epoch)


def _known_truth(shared: Ledger, unit: Unit) -> Row | None:
    """Return a unit's row, or that of its twin with a test score, without the score."""
    row = shared.row(unit.key)
    if row is not None or unit.spec["test"]:
        return row
    twin = shared.row(unit.model_copy(update={"spec": {**unit.spec, "test": True}}).key)
    if twin is None:
        return None
    result = {name: value for name, value in twin.result.items() if name != "test_accuracy"}
    return twin.model_copy(update={"key": unit.key, "spec": unit.spec, "result": result})


def _run_missing(
    sweep: Sweep, executor: Executor, run: Run, tasks: Sequence[NasTask], *, num_units: int
) -> None:
    options = sweep.options
    # Not the run's name: a folder that was deleted and made again has the same one.
    job = SweepJob(str(run.folder), run.epoch, secrets.token_hex(8), options.gpus_per_worker)
    by_key = {task.key: task for task in tasks}
    total = sum(task.cost for task in tasks)
    num_missing = sum(len(task.units) for task in tasks)
    done_cost, done_units, begin = 0.0, num_units - num_missing, time.monotonic()

    def on_start(key: str, attempt: int) -> None:
        for unit in by_key[key].units:
            run.ledger.event("start" if attempt == 1 else "retry", unit.key, run.epoch)

    with (
        _continued_by_resume(run),
        progress(f"{options.space} on {sweep.dataset.name}", num_units, start=done_units) as show,
        executor.workers() as workers,
    ):
        data = workers.share(sweep.data(tasks))
        calls = [Task(task.key, run_task, (job, data, task), task.units[0].spec["arch"]) for task in tasks]
        for outcome in workers.run(calls, timeout_s=patience(options, tasks), on_start=on_start):
            task = by_key[outcome.key]
            if isinstance(outcome.error, StorageError | InputError):
                raise outcome.error
            if outcome.error is not None:
                _mark_failed(run, task, outcome.error, outcome.attempts)
            done_cost += task.cost
            done_units += len(task.units)
            left = (time.monotonic() - begin) * (total - done_cost) / done_cost
            show(done_units, f"about {left / 60:.0f} min left, weighted by cost")


@contextmanager
def _continued_by_resume(run: Run) -> Iterator[None]:
    """Turn an interrupt into an error that says how to resume."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise InterruptedRunError(
            f"the sweep was interrupted; run again with --run-dir {run.folder} --resume to finish it"
        ) from error


def _mark_failed(run: Run, task: NasTask, error: Exception, attempts: int) -> None:
    """Publish failed rows for a task that is out of attempts; the sweep goes on."""
    reason = one_line(error, 300)
    for unit in task.units:
        log.warning("%s failed %d times: %s", unit.spec["arch"], attempts, reason)
        row = Row.failed(unit, reason, result={"attempts": attempts})
        run.ledger.publish(unit, row, epoch=run.epoch)
