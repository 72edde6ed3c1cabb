"""The units of a bench: one distillation per (row, dataset, size, seed), one evaluation per set and cell."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from ddray.config import merge
from ddray.data import Dataset
from ddray.distillation.snapshots import snapshot_steps
from ddray.drawing.text import settings_text
from ddray.errors import InputError
from ddray.evaluation import get_protocol
from ddray.evaluation.options import EvaluateOptions
from ddray.jobs.context import make_distiller
from ddray.jobs.distill import edition_of
from ddray.jobs.plan import Plan, RunConfig, resolve
from ddray.methods import get_method
from ddray.nets import multiply_adds
from ddray.nets.names import resolve_arch
from ddray.ranking import DEFAULT_SPACE
from ddray.runs.ledger import Unit
from ddray.seeding import derive_seed
from ddray.system.options import ContentOptions
from ddray.tables.checks import check_evaluation, check_names, check_row, check_sections
from ddray.tables.facts import facts_of, generator_layer, teachers_of
from ddray.tables.limits import exceeded, limited_epochs, limited_options, lowered
from ddray.tables.spec import WHOLE, BenchSpec, EvaluateSpec, Limits, MethodSpec, PublishedSource
from ddray.tables.units import BenchUnit, Cell, Graph, SweepSpec
from ddray.training.recipe import RECIPES, named_recipe

# Changing how many networks are trained on a set does not change the set.
_COUNTS = ("seeds", "val_seeds")
_POOLS: Final = ("experts", "pool")  # sections of a method's settings that have `num_models`
_WHOLE_IMAGES: Final = 50_000  # for the cost of a whole dataset, which is not read before the run
OpenDataset = Callable[[str], Dataset]
CheckSet = Callable[[MethodSpec, BenchUnit, Plan], object]
Sets = list[tuple[BenchUnit, Plan]]
"""The distillations of one row, dataset and size, by seed."""


def build_graph(
    spec: BenchSpec, open_dataset: OpenDataset, check: CheckSet = lambda row, unit, plan: None
) -> Graph:
    """Resolve every row and list the units.

    `open_dataset` returns a dataset by name, of which only facts and fingerprint are used. `check` raises for
    sets that can't be distilled; it is called once per row, dataset and size.

    Raises:
        InputError: a method, preset, setting, protocol or architecture is bad, or a dataset is missing.
    """
    distil: dict[str, BenchUnit] = {}
    evaluate: dict[str, BenchUnit] = {}
    plans: dict[str, Plan] = {}
    cells: list[Cell] = []
    proxies: dict[tuple[int, str, tuple[str, int]], list[Cell]] = {}
    check_names(spec)
    check_sections(spec)
    for row, name, size in _combinations(spec):
        seeds, source = range(spec.seed, spec.seed + spec.seeds), spec.source(row, name)
        make_unit = whole_unit if row.name == WHOLE else distil_unit
        sets = [make_unit(spec, row, open_dataset(source), source, size, seed) for seed in seeds]
        check(row, *sets[0])
        for unit, plan in sets if row.name != WHOLE else ():
            distil.setdefault(unit.key, unit)
            plans.setdefault(unit.key, plan)
        for evaluation_index, evaluation_spec in enumerate(map(spec.within, spec.evaluate)):
            if name not in spec.datasets(evaluation_spec) or not evaluation_spec.takes(row):
                continue
            if row.name != WHOLE:
                check_row(row, evaluation_spec)
            elif evaluation_spec.protocol == "nas":  # its baselines have a `whole` of their own
                continue
            if evaluation_spec.protocol == "nas":
                space = str(evaluation_spec.options.get("space", DEFAULT_SPACE))
                target = sets[0][1].dataset.name
                proxy_cell = _cell(spec, row, evaluation_spec, sets, {}, arch=space, target=target)
                proxies.setdefault((evaluation_index, source, size), []).append(proxy_cell)
                continue
            for cell, units in _cells(spec, row, evaluation_spec, sets, open_dataset):
                cells.append(cell)
                evaluate.update({unit.key: unit for unit in units})
    ordered = dict(sorted(distil.items(), key=lambda item: -item[1].amount))
    sweeps = tuple(
        SweepSpec(evaluation_index, spec.evaluate[evaluation_index], name, tuple(proxy_cells))
        for (evaluation_index, name, _), proxy_cells in proxies.items()
    )
    return Graph(ordered, evaluate, tuple(cells), sweeps, plans)


def _combinations(spec: BenchSpec) -> Iterator[tuple[MethodSpec, str, tuple[str, int]]]:
    """Yield each row, dataset and size once: a scale may map several rows' datasets to one."""
    seen: set[tuple[str, str, tuple[str, int]]] = set()
    for row in spec.rows():
        if row.name != WHOLE:
            get_method(row.name)
        sizes = [(WHOLE, 0)] if row.name == WHOLE else spec.sizes(row)
        for name, size in itertools.product(spec.datasets(row), sizes):
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
        "split": str(spec.split),
        "config": set_config,
        **edition_of(plan),
    }
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
        amount=plan.work,
        split=spec.split,
        shards=spec.num_shards(row, dataset.num_classes),
    )
    return unit, plan


def whole_unit(
    spec: BenchSpec, row: MethodSpec, dataset: Dataset, name: str, size: tuple[str, int], seed: int
) -> tuple[BenchUnit, Plan]:
    """Return what the evaluations of a `whole` row are made from: a unit that is not run, and its plan.

    Its settings are those of `random`, so that networks are trained on the whole as on a set.
    """
    stand_in = row.model_copy(update={"name": "random", "label": row.row, "preset": "paper"})
    of_any = (RunConfig.model_fields.keys() | ContentOptions.model_fields.keys()) - {"method", "steps"}
    settings = {k: v for k, v in spec.set.items() if k.partition(".")[0] in of_any}
    table = spec.model_copy(update={"set": settings})
    unit, plan = distil_unit(table, stand_in, dataset, name, ("ipc", 1), seed)
    title = f"{row.row} {dataset.name} seed {seed}"
    return replace(unit, size=size, title=title, limit=spec.limits.whole, shards=1), plan


def _limited(spec: BenchSpec, row: MethodSpec, dataset: Dataset, size: tuple[str, int], seed: int) -> Plan:
    """Resolve a row, then lower what exceeds the spec's limits."""
    table_layers = [
        generator_layer(spec, row, dataset.name),
        *MethodSpec(name=row.name, set=spec.set).layers(),
    ]
    layers = [*table_layers, *row.layers()]
    size_argument: dict[str, Any] = {size[0]: size[1]}

    def resolved(*limits: dict[str, Any]) -> Plan:
        all_layers = [*layers, *limits]
        try:
            return resolve(
                row.name, dataset, **size_argument, seed=seed, preset=row.preset, layers=all_layers
            )
        except InputError as error:
            raise InputError(f"row {row.row}: {error}") from error

    plan, limits = resolved(), spec.limits
    config, fewer_epochs = plan.config.dump(), lowered(plan.config.method.dump(), "epochs", limits.epochs)
    if fewer_epochs:
        fewer_epochs |= getattr(plan.config.method, "with_fewer_epochs", {})
    lower: dict[str, Any] = {
        "method": merge(
            lowered(config["method"], "steps", limits.steps),
            fewer_epochs,
            lowered({name: config["method"].get(name) for name in _POOLS}, "models", limits.networks),
            exceeded(config["method"], batch_real=limits.batch_real),
        ),
        "evaluate": exceeded(config["evaluate"], epochs=limits.epochs, seeds=limits.networks),
        **exceeded(config, steps=limits.steps),
    }
    if "steps" in lower and plan.config.evaluate.every is not None:  # as many sets along the steps
        every = -(-plan.config.evaluate.every * lower["steps"] // plan.config.steps)
        lower["evaluate"]["every"] = max(1, every)
    return plan if lower == {"method": {}, "evaluate": {}} else resolved(lower)


def _cells(
    spec: BenchSpec, row: MethodSpec, evaluation_spec: EvaluateSpec, sets: Sets, open_dataset: OpenDataset
) -> Iterator[tuple[Cell, list[BenchUnit]]]:
    """Yield the cells of a row's sets under one evaluation, each with its units."""
    first, plan = sets[0]
    for name, teacher, arch in itertools.product(
        evaluation_spec.target or (first.dataset,),
        teachers_of(evaluation_spec, plan, spec.limits.teachers),
        evaluation_spec.archs or (plan.arch,),
    ):
        target = open_dataset(name)
        choices = {
            "dataset": None if name == first.dataset else name,
            "archs": [resolve_arch(arch, plan.dataset.image_shape)],
            "teachers": None if teacher is None else teacher.split("+"),
        }
        units = []
        for unit, set_plan in sets:
            check_evaluation(evaluation_spec, set_plan, target)
            options = _evaluate_options(evaluation_spec, spec.limits, set_plan, choices)
            units.append(_evaluate_unit(evaluation_spec, unit, set_plan, target, options))
        along = _along(units, plan)
        cell = _cell(
            spec,
            row,
            evaluation_spec,
            sets,
            units[0].options,
            arch=units[0].identity.spec["arch"],
            target=target.name,
            teacher=teacher,
            keys=tuple(unit.key for unit in units),
            along=tuple((step, tuple(unit.key for unit in scored)) for step, scored in along),
        )
        yield cell, [*units, *(unit for _, scored in along for unit in scored)]


def _along(units: Sequence[BenchUnit], plan: Plan) -> list[tuple[int, list[BenchUnit]]]:
    """Return the steps whose sets are kept, and the last, each with the evaluations that score them."""
    every, last = plan.config.evaluate.every, plan.config.steps
    if every is None or units[0].is_whole:
        return []
    along = [(step, [_at_step(unit, step) for unit in units]) for step in snapshot_steps(every, last)]
    return [*along, (last, list(units))]


def _at_step(unit: BenchUnit, step: int) -> BenchUnit:
    """Return the unit that scores the set of a step as this one scores the last."""
    identity = unit.identity.model_copy(update={"spec": {**unit.identity.spec, "step": step}})
    return replace(unit, identity=identity, title=f"{unit.title}, step {step}", step=step)


def _cell(
    spec: BenchSpec,
    row: MethodSpec,
    evaluation_spec: EvaluateSpec,
    sets: Sets,
    options: Mapping[str, Any],
    **scored_as: Any,
) -> Cell:
    """Return the cell of a row's sets; of its sources, the last one that sets a field wins."""
    unit, plan = sets[0]
    sources = (spec.published, evaluation_spec.published, row.published)
    return Cell(
        method=row.row,
        name=row.name,
        dataset=plan.dataset.name,
        num_classes=plan.dataset.num_classes,
        size=unit.size,
        protocol=evaluation_spec.protocol,
        augment=evaluation_spec.augment,
        settings=_settings(evaluation_spec, options, unit.limit),
        source=PublishedSource.parse(merge(*(source.model_dump(exclude_none=True) for source in sources))),
        sets=() if unit.is_whole else tuple(unit.key for unit, _ in sets),
        **facts_of(row, evaluation_spec, plan, options, unit.limit),
        **scored_as,
    )


def _settings(
    evaluation_spec: EvaluateSpec, options: Mapping[str, Any], limit: int | None = None
) -> str | None:
    """Return what distinguishes evaluations of one protocol: the table's settings, within the limits."""
    settings = {"recipe": evaluation_spec.recipe, "epochs": evaluation_spec.epochs, **evaluation_spec.options}
    settings["images"] = limit
    limited = {name: options.get(name, value) for name, value in settings.items() if value is not None}
    return settings_text(limited) or None


def _evaluate_options(
    evaluation_spec: EvaluateSpec, limits: Limits, plan: Plan, choices: Mapping[str, Any]
) -> dict[str, Any]:
    """Return an evaluation's options (see `EvaluateOptions`) within the limits, without those that are None.

    Epochs that the method decides are left out: they are limited already.
    """
    recipe = evaluation_spec.recipe or evaluation_spec.options.get("recipe")
    protocol, networks = get_protocol(evaluation_spec.protocol), evaluation_spec.seeds
    if networks := networks or plan.config.evaluate.seeds:
        networks = min(networks, limits.networks or networks)
    options = {
        "precision": None if plan.config.precision == "tf32" else plan.config.precision,
        "deterministic": plan.config.deterministic or None,
        **evaluation_spec.options,
        **choices,
        "protocol": evaluation_spec.protocol,
        "epochs": limited_epochs(evaluation_spec, recipe, limits.epochs, plan, choices),
        "seeds": networks,
        "augment": evaluation_spec.augment,
        "recipe": recipe,
        # The same networks for every method, so that rows differ only in their sets.
        "seed": derive_seed(plan.seed, "bench", "evaluate") % 2**31,
        **limited_options(evaluation_spec, limits),
    }
    named = {*evaluation_spec.options, *evaluation_spec.model_dump(exclude_defaults=True)}
    unused = {*protocol.without} - named
    return {k: v for k, v in options.items() if v is not None and k not in unused}


def _evaluate_unit(
    evaluation_spec: EvaluateSpec, unit: BenchUnit, plan: Plan, target: Dataset, options: Mapping[str, Any]
) -> BenchUnit:
    """Return the unit that scores one set with one architecture."""
    for teacher in EvaluateOptions.parse(options, prefix="evaluate.options.").teachers:
        resolve_arch(teacher, plan.dataset.image_shape)
    (arch,) = options.get("archs", (plan.arch,))
    described = {
        **_trained_on(unit, plan),
        "seed": unit.seed,
        "arch": arch,
        "target": target.name,
        "target_fingerprint": target.fingerprint,
        "split": "test",
        "options": {k: v for k, v in options.items() if k not in ("archs", "dataset")},
    }
    editions = get_protocol(evaluation_spec.protocol).editions
    if edition := editions.get(options.get("recipe", "default")):
        described["edition"] = edition
    title = (
        unit.title,
        f"{evaluation_spec.protocol} {arch}" + (f" on {target.name}" if "dataset" in options else ""),
        f"teacher {'+'.join(options['teachers'])}" if "teachers" in options else None,
        evaluation_spec.augment and f"augment {evaluation_spec.augment}",
        _settings(evaluation_spec, options, unit.limit),
    )
    of_set = plan.budget or plan.dataset.num_classes * plan.ipc
    images = unit.limit or _WHOLE_IMAGES if unit.is_whole else of_set
    epochs = options.get("epochs") or plan.config.evaluate.epochs
    if "epochs" not in options and options.get("recipe") in RECIPES:
        named = named_recipe(
            {"recipe": options["recipe"]}, ipc=plan.ipc, num_classes=plan.dataset.num_classes
        )
        epochs = named["epochs"]
    operations = images * multiply_adds(arch, plan.dataset.image_shape)
    return replace(
        unit,
        identity=Unit(kind="evaluate", spec=described, inputs=() if unit.is_whole else (unit.key,)),
        title=", ".join(filter(None, title)),
        options=options,
        amount=float(options.get("seeds", 1) * epochs * operations),
    )


def _trained_on(unit: BenchUnit, plan: Plan) -> dict[str, Any]:
    """Return what describes the images that an evaluation trains on; a set's other facts are in its key."""
    if not unit.is_whole:
        return {"method": unit.method, "dataset": plan.dataset.name, unit.size[0]: unit.size[1]}
    described = unit.identity.spec
    facts = {name: described[name] for name in ("fingerprint", "split")}
    config = {name: described["config"][name] for name in ("pixel_space", "evaluate")}
    whole = {**facts, **config, "images": unit.limit}
    return {"method": WHOLE, "dataset": plan.dataset.name, "trained_on": whole}
