"""The units of a bench: one distillation per (row, dataset, size, seed), one evaluation per set and cell."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ddray.config import merge, parse_overrides
from ddray.data import Dataset, SplitName
from ddray.errors import InputError
from ddray.evaluation import get_protocol
from ddray.evaluation.options import EvaluateConfig, EvaluateOptions
from ddray.jobs.context import make_distiller
from ddray.jobs.plan import Plan, resolve
from ddray.methods import get_method
from ddray.nets import multiply_adds
from ddray.nets.names import resolve_arch
from ddray.pool.spec import PoolSpec
from ddray.ranking import DEFAULT_SPACE
from ddray.runs.ledger import Unit
from ddray.seeding import derive_seed
from ddray.tables.checks import check_evaluation, check_names, check_row
from ddray.tables.spec import BenchSpec, EvaluateSpec, Limits, MethodSpec, PublishedSource
from ddray.tables.units import BenchUnit, Cell, Graph, SweepSpec
from ddray.training.recipe import RECIPES, TeacherRecipe

# Changing how many networks are trained on a set does not change the set.
_COUNTS = ("seeds", "val_seeds")
OpenDataset = Callable[[str], Dataset]


def build_graph(
    spec: BenchSpec, open_dataset: OpenDataset, check: Callable[[Plan], object] = lambda plan: None
) -> Graph:
    """Resolve every row and list the units.

    Args:
        spec: the table.
        open_dataset: returns a dataset by name; only its facts and fingerprint are used.
        check: raises for plans that can't be run; called once per row, dataset and size.

    Raises:
        InputError: a method, preset, setting, protocol or architecture is bad, or a dataset is missing.
    """
    distil: dict[str, BenchUnit] = {}
    evaluate: dict[str, BenchUnit] = {}
    plans: dict[str, Plan] = {}
    labels: dict[str, list[str]] = {}
    cells = []
    proxies: dict[tuple[int, str, tuple[str, int]], list[tuple[Cell, tuple[str, ...]]]] = {}
    check_names(spec)
    for row, name, size in _combinations(spec):
        sets = [
            distil_unit(spec, row, open_dataset(name), name, size, spec.seed + seed_index)
            for seed_index in range(spec.seeds)
        ]
        check(sets[0][1])
        for unit, plan in sets:
            distil.setdefault(unit.key, unit)
            plans.setdefault(unit.key, plan)
            labels.setdefault(unit.key, []).append(row.row)
        for evaluation_index, evaluation_spec in enumerate(map(spec.within, spec.evaluate)):
            if name not in spec.scored(evaluation_spec):
                continue
            check_row(row, evaluation_spec)
            if evaluation_spec.protocol == "nas":
                proxy_sets = proxies.setdefault((evaluation_index, name, size), [])
                proxy_sets.append(
                    (_proxy_cell(spec, row, evaluation_spec, *sets[0]), tuple(w.key for w, _ in sets))
                )
                continue
            for cell, units in _cells(spec, row, evaluation_spec, sets, open_dataset):
                cells.append(cell)
                evaluate.update({unit.key: unit for unit in units})
    ordered = dict(sorted(distil.items(), key=lambda item: -item[1].amount))
    sweeps = tuple(
        SweepSpec(evaluation_index, spec.evaluate[evaluation_index], name, tuple(proxy_sets))
        for (evaluation_index, name, _), proxy_sets in proxies.items()
    )
    return Graph(ordered, evaluate, tuple(cells), sweeps, plans, labels)


def _combinations(spec: BenchSpec) -> Iterator[tuple[MethodSpec, str, tuple[str, int]]]:
    """Yield each row, dataset and size once: a scale may map several rows' datasets to one."""
    seen: set[tuple[str, str, tuple[str, int]]] = set()
    for row in spec.rows():
        get_method(row.name)
        for name, size in itertools.product(spec.datasets(row), spec.sizes(row)):
            if (row.row, name, size) not in seen:
                seen.add((row.row, name, size))
                yield row, name, size


def distil_unit(
    spec: BenchSpec, row: MethodSpec, dataset: Dataset, name: str, size: tuple[str, int], seed: int
) -> tuple[BenchUnit, Plan]:
    """Return the unit that distils one set, and its plan."""
    plan = _limited(spec, row, dataset, size, seed)
    make_distiller(plan)
    config = plan.config.dump()
    set_config = {k: v for k, v in config.items() if k != "checkpoint_every"}
    set_config["evaluate"] = {k: v for k, v in config["evaluate"].items() if k not in _COUNTS}
    unit_spec = {
        "method": row.name,
        "dataset": dataset.name,
        "fingerprint": dataset.fingerprint,
        size[0]: size[1],
        "seed": seed,
        "split": str(SplitName(spec.val_seed)),
        "config": set_config,
    }
    real = getattr(plan.config.method, "batch_real", 0)  # per class, or in total with a budget
    images = plan.budget + real if plan.budget else dataset.num_classes * (plan.ipc + real)
    one = multiply_adds(plan.arch, dataset.image_shape)
    unit = BenchUnit(
        identity=Unit(kind="distill", spec=unit_spec),
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
    return unit, plan


def _limited(spec: BenchSpec, row: MethodSpec, dataset: Dataset, size: tuple[str, int], seed: int) -> Plan:
    """Resolve a row, then lower what exceeds the spec's limits."""
    shared = MethodSpec(name=row.name, set=spec.set).layers()
    layers = [*shared, *row.layers()]
    size_argument: dict[str, Any] = {size[0]: size[1]}

    def resolved(limit_layers: list[dict[str, Any]]) -> Plan:
        try:
            return resolve(
                row.name,
                dataset,
                **size_argument,
                seed=seed,
                preset=row.preset,
                layers=[*layers, *limit_layers],
            )
        except InputError as error:
            raise InputError(f"row {row.row}: {error}") from error

    plan, limits = resolved([]), spec.limits
    lower: dict[str, Any] = {}
    method_settings = plan.config.method.dump()
    if limits.steps is not None:
        if plan.config.steps > limits.steps:
            lower["steps"] = limits.steps
        lower = merge(lower, {"method": _lowered(method_settings, "steps", limits.steps)})
    if limits.epochs is not None:
        lower = merge(lower, {"method": _lowered(method_settings, "epochs", limits.epochs)})
        if plan.config.evaluate.epochs > limits.epochs:
            lower = merge(lower, {"evaluate": {"epochs": limits.epochs}})
    if limits.networks is not None and plan.config.evaluate.seeds > limits.networks:
        lower = merge(lower, {"evaluate": {"seeds": limits.networks}})
    if limits.batch_real is not None and getattr(plan.config.method, "batch_real", 0) > limits.batch_real:
        lower = merge(lower, {"method": {"batch_real": limits.batch_real}})
    return resolved([lower]) if lower not in ({}, {"method": {}}) else plan


def _lowered(settings: Mapping[str, Any], word: str, limit: int) -> dict[str, Any]:
    """Return the method's own settings that exceed a limit (teachers' epochs, inner steps), set to it.

    Args:
        settings: the method's settings, nested.
        word: `epochs` or `steps`: applies to settings with this word in their name.
        limit: the maximum.
    """
    lower: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and (within := _lowered(value, word, limit)):
            lower[name] = within
        elif word in name.split("_") and isinstance(value, int) and value > limit:
            lower[name] = limit
    return lower


def _cells(
    spec: BenchSpec,
    row: MethodSpec,
    evaluation_spec: EvaluateSpec,
    sets: list[tuple[BenchUnit, Plan]],
    open_dataset: OpenDataset,
) -> list[tuple[Cell, list[BenchUnit]]]:
    """Return the cells of a row's sets under one evaluation, each with its units."""
    cells = []
    first, plan = sets[0]
    for name in evaluation_spec.target or (first.dataset,):
        target = open_dataset(name)
        for teacher in evaluation_spec.teacher or (None,):
            for arch in evaluation_spec.archs or (plan.arch,):
                units = [
                    _evaluate_unit(
                        spec,
                        evaluation_spec,
                        unit,
                        set_plan,
                        target,
                        name,
                        resolve_arch(arch, plan.dataset.image_shape),
                        teacher,
                    )
                    for unit, set_plan in sets
                ]
                cell = Cell(
                    method=row.row,
                    name=row.name,
                    dataset=plan.dataset.name,
                    num_classes=plan.dataset.num_classes,
                    size=first.size,
                    protocol=evaluation_spec.protocol,
                    arch=units[0].identity.spec["arch"],
                    target=target.name,
                    teacher=teacher,
                    augment=evaluation_spec.augment,
                    settings=_settings(evaluation_spec, units[0].options),
                    keys=tuple(unit.key for unit in units),
                    source=_source(spec.published, evaluation_spec.published, row.published),
                )
                cells.append((cell, units))
    return cells


def _settings(evaluation_spec: EvaluateSpec, options: Mapping[str, Any]) -> str | None:
    """Return what distinguishes evaluations of one protocol: the table's settings, within the limits."""
    table_settings = {
        "recipe": evaluation_spec.recipe,
        "epochs": evaluation_spec.epochs,
        **evaluation_spec.options,
    }
    limited_settings = {
        name: options.get(name, value) for name, value in table_settings.items() if value is not None
    }
    return ", ".join(f"{name}={value}" for name, value in limited_settings.items()) or None


def _proxy_cell(
    spec: BenchSpec, row: MethodSpec, evaluation_spec: EvaluateSpec, unit: BenchUnit, plan: Plan
) -> Cell:
    """Return the cell of a row's sets as proxies."""
    return Cell(
        method=row.row,
        name=row.name,
        dataset=plan.dataset.name,
        num_classes=plan.dataset.num_classes,
        size=unit.size,
        protocol="nas",
        arch=str(evaluation_spec.options.get("space", DEFAULT_SPACE)),
        target=plan.dataset.name,
        teacher=None,
        augment=None,
        settings=_settings(evaluation_spec, {}),
        keys=(),
        source=_source(spec.published, evaluation_spec.published, row.published),
    )


def _source(*sources: PublishedSource) -> PublishedSource:
    """Merge sources field by field; the last one that sets a field wins."""
    return PublishedSource.parse(
        merge(*({k: v for k, v in source.dump().items() if v is not None} for source in sources))
    )


def _evaluate_unit(
    spec: BenchSpec,
    evaluation_spec: EvaluateSpec,
    unit: BenchUnit,
    plan: Plan,
    target: Dataset,
    name: str,
    arch: str,
    teacher: str | None,
) -> BenchUnit:
    """Return the unit that scores one set with one architecture."""
    check_evaluation(evaluation_spec, plan, target)
    method_defaults = plan.config.evaluate
    recipe = evaluation_spec.recipe or evaluation_spec.options.get("recipe")
    networks = min(evaluation_spec.seeds or method_defaults.seeds, spec.limits.networks or 2**31)
    recipe_epochs = RECIPES.get(recipe or "", {}).get("epochs")
    is_fixed = recipe is not None or get_protocol(evaluation_spec.protocol).config_type is not EvaluateConfig
    epochs = _within(spec.limits.epochs, evaluation_spec.epochs, recipe_epochs, is_fixed=is_fixed)
    options: dict[str, Any] = {
        **evaluation_spec.options,
        "dataset": None if name == unit.dataset else name,
        "protocol": evaluation_spec.protocol,
        "archs": [arch],
        "epochs": epochs,
        "seeds": networks,
        "augment": evaluation_spec.augment,
        "recipe": recipe,
        # The same networks for every method, so that rows differ only in their sets.
        "seed": derive_seed(unit.seed, "bench", "evaluate") % 2**31,
        "teachers": None if teacher is None else teacher.split("+"),
    }
    options |= _limited_options(evaluation_spec, spec.limits)
    options = {k: v for k, v in options.items() if v is not None}
    for teacher_arch in EvaluateOptions.parse(options, prefix="evaluate.options.").teachers:
        resolve_arch(teacher_arch, plan.dataset.image_shape)
    described = {
        "method": unit.method,
        "dataset": plan.dataset.name,
        unit.size[0]: unit.size[1],
        "seed": unit.seed,
        "arch": arch,
        "target": target.name,
        "target_fingerprint": target.fingerprint,
        "split": "test",
        "options": {k: v for k, v in options.items() if k not in ("archs", "dataset")},
    }
    where = f" on {target.name}" if name != unit.dataset else ""
    told = (
        teacher and f"teacher {teacher}",
        evaluation_spec.augment and f"augment {evaluation_spec.augment}",
        _settings(evaluation_spec, options),
    )
    images = plan.budget or plan.dataset.num_classes * plan.ipc
    one = multiply_adds(arch, plan.dataset.image_shape)
    return replace(
        unit,
        identity=Unit(kind="evaluate", spec=described, inputs=(unit.key,)),
        title=", ".join(filter(None, (unit.title, f"{evaluation_spec.protocol} {arch}{where}", *told))),
        options=options,
        amount=float(networks * (epochs or recipe_epochs or method_defaults.epochs) * images * one),
    )


def _limited_options(evaluation_spec: EvaluateSpec, limits: Limits) -> dict[str, Any]:
    """Return the options `full_epochs` and `sets`, with epochs and teachers' epochs within the limits."""
    sets = evaluation_spec.options.get("sets")
    parsed = parse_overrides(sets or ())
    teacher = parsed.get("teacher", {})
    teacher_epochs = teacher.get("epochs", TeacherRecipe().epochs) if isinstance(teacher, Mapping) else None
    overrides = []
    if _is_above(parsed.get("epochs"), limits.epochs):
        overrides.append(f"epochs={limits.epochs}")
    has_teachers = "teachers" in get_protocol(evaluation_spec.protocol).options
    if has_teachers and _is_above(teacher_epochs, limits.teacher_epochs):
        overrides.append(f"teacher.epochs={limits.teacher_epochs}")
    full = evaluation_spec.options.get("full_epochs")
    return {
        "sets": [*(sets or ()), *overrides] or None,
        "full_epochs": limits.epochs if _is_above(full, limits.epochs) else full,
    }


def _is_above(value: Any, limit: int | None) -> bool:
    """Return whether an integer is above a limit; anything else is refused later, by its own rule."""
    return limit is not None and isinstance(value, int) and value > limit


def _within(
    limit: int | None, table_epochs: int | None, recipe_epochs: int | None, *, is_fixed: bool
) -> int | None:
    """Return an evaluation's epochs within a limit; None leaves them to the method, which is limited already.

    Args:
        limit: the maximum.
        table_epochs: set by the table.
        recipe_epochs: the recipe's, if known.
        is_fixed: whether the recipe or protocol decides the epochs, not the method.
    """
    if limit is None or (table_epochs is None and not is_fixed):
        return table_epochs
    return min(table_epochs or recipe_epochs or limit, limit)


def pool_unit(asker: BenchUnit, spec: PoolSpec) -> BenchUnit:
    """Return the unit that trains a pool entry, with the settings of the unit that asked for it."""
    return replace(
        asker,
        identity=Unit(kind="pool", spec={"pool_key": spec.key, **spec.dump()}),
        title=f"pool {spec.kind} {spec.arch} seed {spec.seed}",
        pool=spec,
        amount=0.0,
        waited=False,
    )
