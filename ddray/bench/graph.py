"""The units of a bench: one distillation per (row, dataset, size, seed), one evaluation per set and cell."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ddray.bench.checks import check_evaluation, check_names, check_row
from ddray.bench.spec import BenchSpec, EvaluateSpec, Limits, MethodSpec, Source
from ddray.bench.units import Cell, Graph, Ranking, Work
from ddray.config import merge, parse_overrides
from ddray.data import Dataset
from ddray.errors import InputError
from ddray.evaluate.teachers import TeacherRecipe
from ddray.evaluate.training import RECIPES
from ddray.ledger import Unit
from ddray.methods import get_method
from ddray.nets import multiply_adds
from ddray.plan import Plan, make_distiller, resolve, resolve_arch
from ddray.pool import PoolSpec
from ddray.scoring import EvaluateOptions, check_options
from ddray.seeding import derive_seed

# A set is not distilled again because more networks are trained on it.
_COUNTS = ("seeds", "val_seeds")
OpenDataset = Callable[[str], Dataset]


def build_graph(
    spec: BenchSpec, open_dataset: OpenDataset, check: Callable[[Plan], object] = lambda plan: None
) -> Graph:
    """Resolve every row and list the units.

    Args:
        spec: the table.
        open_dataset: gives a dataset by name; nothing but its facts and fingerprint is used.
        check: raises for a plan that can't be run; called once per row, dataset and size.

    Raises:
        InputError: a method, preset, setting, protocol or architecture is bad, or a dataset is missing.
    """
    distil: dict[str, Work] = {}
    evaluate: dict[str, Work] = {}
    plans: dict[str, Plan] = {}
    labels: dict[str, list[str]] = {}
    cells = []
    rankings: dict[tuple[int, str, tuple[str, int]], list[tuple[Cell, tuple[str, ...]]]] = {}
    check_names(spec)
    for row, name, size in _places(spec):
        sets = [
            distil_work(spec, row, open_dataset(name), name, size, spec.seed + number)
            for number in range(spec.seeds)
        ]
        check(sets[0][1])
        for work, plan in sets:
            distil.setdefault(work.key, work)
            plans.setdefault(work.key, plan)
            labels.setdefault(work.key, []).append(row.row)
        for number, held in enumerate(map(spec.within, spec.evaluate)):
            if name not in spec.scored(held):
                continue
            check_row(row, held)
            if held.protocol == "nas":
                own = rankings.setdefault((number, name, size), [])
                own.append((_proxy_cell(spec, row, held, *sets[0]), tuple(w.key for w, _ in sets)))
                continue
            for cell, works in _cells(spec, row, held, sets, open_dataset):
                cells.append(cell)
                evaluate.update({work.key: work for work in works})
    ordered = dict(sorted(distil.items(), key=lambda item: -item[1].amount))
    sweeps = tuple(
        Ranking(number, spec.evaluate[number], name, tuple(proxies))
        for (number, name, _), proxies in rankings.items()
    )
    return Graph(ordered, evaluate, tuple(cells), sweeps, plans, labels)


def _places(spec: BenchSpec) -> Iterator[tuple[MethodSpec, str, tuple[str, int]]]:
    """Yield every row with its datasets and sizes, once: a scale may put rows of several datasets on one."""
    seen: set[tuple[str, str, tuple[str, int]]] = set()
    for row in spec.rows():
        get_method(row.name)
        for name, size in itertools.product(spec.datasets(row), spec.sizes(row)):
            if (row.row, name, size) not in seen:
                seen.add((row.row, name, size))
                yield row, name, size


def distil_work(
    spec: BenchSpec, row: MethodSpec, dataset: Dataset, name: str, size: tuple[str, int], seed: int
) -> tuple[Work, Plan]:
    """Return the unit that distils one set, and its plan."""
    plan = _limited(spec, row, dataset, size, seed)
    make_distiller(plan)
    config = plan.config.dump()
    kept = {k: v for k, v in config.items() if k != "checkpoint_every"}
    kept["evaluate"] = {k: v for k, v in config["evaluate"].items() if k not in _COUNTS}
    held = {
        "method": row.name,
        "dataset": dataset.name,
        "fingerprint": dataset.fingerprint,
        size[0]: size[1],
        "seed": seed,
        "split": "train" if spec.val_seed is None else f"train-val{spec.val_seed}",
        "config": kept,
    }
    real = getattr(plan.config.method, "batch_real", 0)  # of a class, or of all where a budget is spent
    images = plan.budget + real if plan.budget else dataset.num_classes * (plan.ipc + real)
    one = multiply_adds(plan.arch, dataset.image_shape)
    work = Work(
        unit=Unit(kind="distill", spec=held),
        title=f"{row.row} {dataset.name} {size[0]} {size[1]} seed {seed}",
        method=row.name,
        dataset=name,
        size=size,
        ipc=plan.ipc,
        budget=plan.budget,
        seed=seed,
        config=config,
        amount=float((1 + plan.config.steps) * images * one),
        val_seed=spec.val_seed,
    )
    return work, plan


def _limited(spec: BenchSpec, row: MethodSpec, dataset: Dataset, size: tuple[str, int], seed: int) -> Plan:
    """Resolve a row, then lower what exceeds the spec's limits."""
    shared = MethodSpec(name=row.name, set=spec.set).layers()
    layers = [*shared, *row.layers()]
    stored: dict[str, Any] = {size[0]: size[1]}

    def resolved(more: list[dict[str, Any]]) -> Plan:
        try:
            return resolve(row.name, dataset, **stored, seed=seed, preset=row.preset, layers=[*layers, *more])
        except InputError as error:
            raise InputError(f"row {row.row}: {error}") from error

    plan, limits = resolved([]), spec.limits
    lower: dict[str, Any] = {}
    own = plan.config.method.dump()
    if limits.steps is not None:
        if plan.config.steps > limits.steps:
            lower["steps"] = limits.steps
        lower = merge(lower, {"method": _lowered(own, "steps", limits.steps)})
    if limits.epochs is not None:
        lower = merge(lower, {"method": _lowered(own, "epochs", limits.epochs)})
        if plan.config.evaluate.epochs > limits.epochs:
            lower = merge(lower, {"evaluate": {"epochs": limits.epochs}})
    if limits.networks is not None and plan.config.evaluate.seeds > limits.networks:
        lower = merge(lower, {"evaluate": {"seeds": limits.networks}})
    if limits.batch_real is not None and getattr(plan.config.method, "batch_real", 0) > limits.batch_real:
        lower = merge(lower, {"method": {"batch_real": limits.batch_real}})
    return resolved([lower]) if lower not in ({}, {"method": {}}) else plan


def _lowered(settings: Mapping[str, Any], what: str, limit: int) -> dict[str, Any]:
    """Return at the limit what is longer of a method's own: epochs of teachers, steps of inner networks.

    Args:
        settings: the method's, nested.
        what: `epochs` or `steps`, a word of the settings' names.
        limit: the most.
    """
    lower: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and (within := _lowered(value, what, limit)):
            lower[name] = within
        elif what in name.split("_") and isinstance(value, int) and value > limit:
            lower[name] = limit
    return lower


def _cells(
    spec: BenchSpec,
    row: MethodSpec,
    held: EvaluateSpec,
    sets: list[tuple[Work, Plan]],
    open_dataset: OpenDataset,
) -> list[tuple[Cell, list[Work]]]:
    """Return the cells of a row's sets under one evaluation, each with its units."""
    found = []
    first, plan = sets[0]
    for name in held.target or (first.dataset,):
        target = open_dataset(name)
        for teacher in held.teacher or (None,):
            for arch in held.archs or (plan.arch,):
                works = [
                    _evaluate_work(
                        spec,
                        held,
                        work,
                        own,
                        target,
                        name,
                        resolve_arch(arch, plan.dataset.image_shape),
                        teacher,
                    )
                    for work, own in sets
                ]
                cell = Cell(
                    method=row.row,
                    name=row.name,
                    dataset=plan.dataset.name,
                    num_classes=plan.dataset.num_classes,
                    size=first.size,
                    protocol=held.protocol,
                    arch=works[0].unit.spec["arch"],
                    target=target.name,
                    teacher=teacher,
                    augment=held.augment,
                    settings=_settings(held, works[0].options),
                    keys=tuple(work.key for work in works),
                    source=_source(spec.published, held.published, row.published),
                )
                found.append((cell, works))
    return found


def _settings(held: EvaluateSpec, options: Mapping[str, Any]) -> str | None:
    """Return what tells apart evaluations of one protocol: what the table sets, as `options` limit it."""
    given = {"recipe": held.recipe, "epochs": held.epochs, **held.options}
    shown = {name: options.get(name, value) for name, value in given.items() if value is not None}
    return ", ".join(f"{name}={value}" for name, value in shown.items()) or None


def _proxy_cell(spec: BenchSpec, row: MethodSpec, held: EvaluateSpec, work: Work, plan: Plan) -> Cell:
    """Return the cell of a row's sets as proxies."""
    return Cell(
        method=row.row,
        name=row.name,
        dataset=plan.dataset.name,
        num_classes=plan.dataset.num_classes,
        size=work.size,
        protocol="nas",
        arch=str(held.options.get("space", "convnet720")),
        target=plan.dataset.name,
        teacher=None,
        augment=None,
        settings=_settings(held, {}),
        keys=(),
        source=_source(spec.published, held.published, row.published),
    )


def _source(*held: Source) -> Source:
    """Return the last word on each of the source's fields."""
    return Source.parse(merge(*({k: v for k, v in one.dump().items() if v is not None} for one in held)))


def _evaluate_work(
    spec: BenchSpec,
    held: EvaluateSpec,
    work: Work,
    plan: Plan,
    target: Dataset,
    name: str,
    arch: str,
    teacher: str | None,
) -> Work:
    """Return the unit that scores one set with one architecture."""
    check_evaluation(held, plan, target)
    own, recipe = plan.config.evaluate, held.recipe or held.options.get("recipe")
    networks = min(held.seeds or own.seeds, spec.limits.networks or 2**31)
    named = RECIPES.get(recipe or "", {}).get("epochs")
    fixed = recipe is not None or held.protocol == "soft"
    epochs = _within(spec.limits.epochs, held.epochs, named, fixed=fixed)
    options: dict[str, Any] = {
        **held.options,
        "dataset": None if name == work.dataset else name,
        "protocol": held.protocol,
        "archs": [arch],
        "epochs": epochs,
        "seeds": networks,
        "augment": held.augment,
        "recipe": recipe,
        # The same networks for every method: differences between rows are the sets'.
        "seed": derive_seed(work.seed, "bench", "evaluate") % 2**31,
        "teachers": None if teacher is None else teacher.split("+"),
    }
    options |= _limited_options(held, spec.limits)
    options = {k: v for k, v in options.items() if v is not None}
    check_options(EvaluateOptions(**options), plan.dataset.image_shape)
    described = {
        "method": work.method,
        "dataset": plan.dataset.name,
        work.size[0]: work.size[1],
        "seed": work.seed,
        "arch": arch,
        "target": target.name,
        "target_fingerprint": target.fingerprint,
        "split": "test",
        "options": {k: v for k, v in options.items() if k not in ("archs", "dataset")},
    }
    images = plan.budget or plan.dataset.num_classes * plan.ipc
    one = multiply_adds(arch, plan.dataset.image_shape)
    return replace(
        work,
        unit=Unit(kind="evaluate", spec=described, inputs=(work.key,)),
        title=", ".join(
            part
            for part in (
                work.title,
                f"{held.protocol} {arch}" + (f" on {target.name}" if name != work.dataset else ""),
                teacher and f"teacher {teacher}",
                held.augment and f"augment {held.augment}",
                _settings(held, options),
            )
            if part
        ),
        options=options,
        amount=float(networks * (epochs or named or own.epochs) * images * one),
    )


def _limited_options(held: EvaluateSpec, limits: Limits) -> dict[str, Any]:
    """Return a protocol's `full_epochs` and `sets`, whose epochs and soft labels' teachers are limited."""
    sets = held.options.get("sets")
    parsed = parse_overrides(sets or ())
    teacher = parsed.get("teacher", {})
    taught = teacher.get("epochs", TeacherRecipe().epochs) if isinstance(teacher, Mapping) else None
    more = []
    if _is_above(parsed.get("epochs"), limits.epochs):
        more.append(f"epochs={limits.epochs}")
    if held.protocol == "soft" and _is_above(taught, limits.teacher_epochs):
        more.append(f"teacher.epochs={limits.teacher_epochs}")
    full = held.options.get("full_epochs")
    return {
        "sets": [*(sets or ()), *more] or None,
        "full_epochs": limits.epochs if _is_above(full, limits.epochs) else full,
    }


def _is_above(asked: Any, limit: int | None) -> bool:
    """Return whether a number is above a limit; what is no number is refused later, by its own rule."""
    return limit is not None and isinstance(asked, int) and asked > limit


def _within(most: int | None, asked: int | None, named: int | None, *, fixed: bool) -> int | None:
    """Return an evaluation's epochs within a limit; None leaves them to the method, whose own are within it.

    Args:
        most: the limit.
        asked: by the table.
        named: the recipe's, where they are known.
        fixed: whether the recipe or the protocol decides the epochs, and not the method.
    """
    if most is None or (asked is None and not fixed):
        return asked
    return min(asked or named or most, most)


def pool_work(asker: Work, spec: PoolSpec) -> Work:
    """Return the unit that trains a pool entry, with the trainer of the set that asked for it."""
    return replace(
        asker,
        unit=Unit(kind="pool", spec={"pool_key": spec.key, **spec.dump()}),
        title=f"pool {spec.kind} {spec.arch} seed {spec.seed}",
        pool=spec,
        amount=0.0,
        waited=False,
    )
