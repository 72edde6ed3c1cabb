"""`ddray nas`: train architectures on proxies, rank them by val, and compare with the true ranking.

Architectures are trained on train without val (or on a proxy of it) and ranked on val, a tenth of train or
`--val-images`. Test is used after the ranking, to report how good the architectures are that it names: the
table's last column, and each proxy's `top1_test_accuracy`.
"""

import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from ddray.data import Dataset, Split, SplitName
from ddray.data.packed import shared
from ddray.errors import InputError, StorageError, one_line
from ddray.ranking.options import NasConfig as NasConfig
from ddray.ranking.options import NasOptions as NasOptions
from ddray.ranking.proxies import Proxy, whole_proxy
from ddray.ranking.spaces import NasSpace, get_space, sample
from ddray.ranking.spaces import resolve_config as resolve_config
from ddray.ranking.worker import CODE_VERSION, NasTask, SweepData, SweepJob, run_task, truth_ledger
from ddray.runs.executor import Executor, Task
from ddray.runs.folder import Run, open_run
from ddray.runs.ledger import Kind, Row, Unit
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
        train: train without val.
        val: the held-out images of train to rank by.
        proxies: the sets that architectures are trained on, besides the whole set for the truth.
        indices: the architectures.
        device: device type of the workers.
        with_test: whether truth is also scored on test, to be reported; False in a search.
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
            **({} if options.val_images is None else {"val_images": options.val_images}),
            "dataset": self.dataset.name,
            "fingerprint": self.dataset.fingerprint,
            "truth": options.truth,
            "truth_seeds": options.truth_seeds,
            "truth_column": options.truth_column,
            **({} if self.can_grow else {"proxies": {proxy.name: proxy.data.key for proxy in self.proxies}}),
            "device": self.device,
            **({"gpus_per_worker": options.gpus} if options.gpus else {}),
            # Release 0.1.0 wrote this for every space; without it, its runs could not be resumed.
            "cells": {"channels": 16, "num_cells": 1, "cell_affine": False},
            **self.config.dump(),
        }

    def tasks(self, *, fused: bool) -> list[NasTask]:
        """Return all tasks, longest first: the proxies' and, for truth `whole`, the truth's.

        Args:
            fused: put the seeds of one architecture into one task (a GPU may train them as one network).
        """
        trained: list[tuple[Kind, Proxy]] = [("nas", proxy) for proxy in self.proxies]
        if self.options.truth == "whole":
            trained.append(("truth", self._whole))
        spaces = {mixture: self.space(mixture) for mixture in {proxy.mixture for _, proxy in trained}}
        all_tasks = []
        for index in self.indices:
            for kind, proxy in trained:
                all_tasks += self._tasks_of(kind, index, proxy, spaces[proxy.mixture], fused)
        # Equal costs keep their order: the same sweep starts its tasks in the same order everywhere.
        return sorted(all_tasks, key=lambda task: -task.cost)

    @cached_property
    def _whole(self) -> Proxy:
        return whole_proxy(self.train, self.dataset)

    def _tasks_of(self, kind: Kind, index: int, proxy: Proxy, space: NasSpace, fused: bool) -> list[NasTask]:
        options, config = self.options, self.config
        recipe, num_seeds = config.recipe, options.seeds
        if kind == "truth":
            recipe, num_seeds = config.truth_recipe, options.truth_seeds
        spec = {
            "space": options.space,
            "cells": config.space_options() or None,
            "index": index,
            "arch": space.arch_name(index),
            "recipe": recipe.dump(),
            "fingerprint": self.dataset.fingerprint,
            **self.dataset.overrides,
            "split": str(split_of(options)),
            "device": self.device,
        }
        if kind == "truth":
            # `test` is part of the key: other runs reuse this row, and some of them need its test score.
            spec["test"] = self.test is not None
        else:
            spec |= {"proxy": proxy.name, "proxy_key": proxy.data.key, **proxy.variant()}
        seeds = [derive_seed(options.seed, kind, n) % 2**31 for n in range(num_seeds)]
        units = [Unit(kind=kind, spec={**spec, "seed": seed}, code_version=CODE_VERSION) for seed in seeds]
        steps = proxy.num_steps or recipe.num_steps(proxy.num_images)
        mflops = space.cost(index, self.dataset.image_shape, self.dataset.num_classes)
        work = steps * (_STEP_COST + 3 * mflops * min(recipe.batch, proxy.num_images))
        return [
            NasTask(
                units=tuple(group),
                index=index,
                set_name=proxy.set_name,
                seeds=tuple(unit.spec["seed"] for unit in group),
                recipe=recipe.model_copy(update={"epochs": proxy.epochs or recipe.epochs}).dump(),
                space=self.space_options(proxy.mixture),
                num_steps=proxy.num_steps,
                shuffle=proxy.shuffle,
                cost=work * len(group),
            )
            for group in ([units] if fused else [[unit] for unit in units])
        ]

    def data(self, tasks: Sequence[NasTask]) -> SweepData:
        """Return what these tasks need: arrays, and names of packed images."""
        names = {task.set_name for task in tasks}
        sets = {proxy.set_name: proxy.data for proxy in self.proxies if proxy.set_name in names}
        if names - sets.keys():
            sets[self._whole.set_name] = self._whole.data
        test = None
        if self.test is not None and any(task.units[0].kind == "truth" for task in tasks):
            test = (shared(self.test.images), self.test.labels.numpy())
        val = (shared(self.val.images), self.val.labels.numpy())
        return SweepData(sets, val, test, self.dataset.num_classes, self.dataset.can_flip)


def patience(options: NasOptions, tasks: Sequence[NasTask]) -> float:
    """Return the seconds after which a task counts as hung.

    A task with several seeds may take as long as its units together. The default is two hours, or what the
    longest task takes on a very slow device: training on the whole set may take days on one core.
    """
    if options.unit_timeout is not None:
        return options.unit_timeout * max(len(task.units) for task in tasks)
    slowest = _SLOWEST[options.device]
    return max(_LEAST_PATIENCE_S, max(task.cost for task in tasks) / slowest)


def split_of(options: NasOptions) -> SplitName:
    """Return what a sweep trains on: train without the images that it ranks by."""
    return SplitName(options.seed, options.val_images)


def choose_architectures(options: NasOptions, config: NasConfig, dataset: Dataset) -> tuple[int, ...]:
    """Return the indices of the architectures to train.

    Raises:
        InputError: an unknown space, or a sample larger than it.
    """
    indices = sample(
        get_space(options.space, **config.space_options()),
        options.sample,
        seed=options.seed,
        image_shape=dataset.image_shape,
        num_classes=dataset.num_classes,
        max_mflops=options.max_mflops,
        uniform=options.sampling == "uniform",
    )
    return tuple(indices)


def run_sweep(
    sweep: Sweep, executor: Executor, *, run_dir: Path | None, resume: bool
) -> tuple[Run, list[Row]]:
    """Run the missing units of a sweep; return its run and all its rows.

    Raises:
        InputError: the folder can't be used.
        StorageError: a row can't be written.
        InterruptedRunError: SIGINT or SIGTERM; says how to resume.
    """
    run = open_run(run_dir, sweep.describe(), command="nas", resume=resume)
    tasks = sweep.tasks(fused=sweep.device == "cuda")
    units = {unit.key: unit for task in tasks for unit in task.units}
    _take_known_truth(run, [unit for unit in units.values() if unit.kind == "truth"])
    done = {row.key for row in run.ledger.rows()}
    missing = [remaining for task in tasks if (remaining := _without(task, done)) is not None]
    if missing:
        with run.continued("the sweep"):
            _run_missing(sweep, executor, run, missing, num_units=len(units))
    return run, [row for row in run.ledger.rows() if row.key in units]


def _without(task: NasTask, done: set[str]) -> NasTask | None:
    """Return the task without its finished units; None if nothing is left."""
    left = [(unit, seed) for unit, seed in zip(task.units, task.seeds, strict=True) if unit.key not in done]
    if not left:
        return None
    units, seeds = zip(*left, strict=True)
    return replace(task, units=units, seeds=seeds, cost=task.cost * len(units) / len(task.units))


def _take_known_truth(run: Run, units: Sequence[Unit]) -> None:
    """Copy truth that other runs have trained into this run's ledger."""
    for unit in units:
        if run.ledger.row(unit.key) is None and (row := _known_truth(unit)) is not None:
            run.ledger.publish(unit, row.model_copy(update={"epoch": 0}), epoch=run.epoch)


def _known_truth(unit: Unit) -> Row | None:
    """Return a unit's row, or that of its twin with a test score, without the score."""
    shared = truth_ledger()
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
    job = SweepJob(str(run.folder), run.epoch, secrets.token_hex(8), options.device)
    by_key = {task.key: task for task in tasks}
    total, done_cost = sum(task.cost for task in tasks), 0.0
    done_units = num_units - sum(len(task.units) for task in tasks)

    def on_start(key: str, attempt: int) -> None:
        for unit in by_key[key].units:
            run.ledger.event("start" if attempt == 1 else "retry", unit.key, run.epoch)

    with (
        progress(
            f"{options.space} on {sweep.dataset.name}", num_units, start=done_units, watch=run.reports
        ) as show,
        executor.workers() as workers,
    ):
        show(done_units, "", work=0.0)  # of what is left, as networks differ in cost
        data = workers.share(sweep.data(tasks))
        calls = [Task(task.key, run_task, (job, data, task), task.units[0].spec["arch"]) for task in tasks]
        for outcome in workers.run(calls, timeout_s=patience(options, tasks), on_start=on_start):
            task = by_key[outcome.key]
            if isinstance(outcome.error, StorageError | InputError):
                raise outcome.error
            if outcome.error is not None:
                for unit in task.units:
                    arch, reason = unit.spec["arch"], one_line(outcome.error, 300)
                    log.warning("%s failed %d times: %s", arch, outcome.attempts, reason)
                    row = Row.failed(unit, reason, result={"attempts": outcome.attempts})
                    run.ledger.publish(unit, row, epoch=run.epoch)
            done_cost += task.cost
            done_units += len(task.units)
            show(done_units, "", work=done_cost / total)
