"""What decides whether a cell may be set beside a published number: facts of its sets and its evaluation."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ddray.config import flatten, merge
from ddray.data.catalog import KNOWN
from ddray.data.reference import DatasetRef
from ddray.errors import InputError
from ddray.evaluation import get_protocol
from ddray.evaluation.options import overrides
from ddray.evaluation.soft_recipes import own_recipe, recipe_teachers
from ddray.jobs.plan import Plan, budget_method
from ddray.jobs.preset import ALL, Change, departure, plan_changes, preset_of, yaml_text
from ddray.methods import get_method
from ddray.tables.checks import has_recipe
from ddray.tables.limits import own_epochs
from ddray.tables.spec import BenchSpec, EvaluateSpec, MethodSpec, PublishedSource
from ddray.training.recipe import RECIPES, named_recipe

OWN_TEACHER: Final = "own"
_CUTS: Final = ("train_limit", "ipc")
_MANY: Final = 2**31  # more images than a dataset has, for a count that needs to read none


def facts_of(
    row: MethodSpec, evaluation_spec: EvaluateSpec, plan: Plan, options: Mapping[str, Any], limit: int | None
) -> dict[str, Any]:
    """Return a `Cell`'s facts of its sets, and what the table changes in the conditions of the preset.

    `plan` is one set's, within the scale's limits; `options` are its evaluation's (see `EvaluateOptions`).
    `limit` is the number of images that stand for the whole dataset, if they are not all.
    """
    method = budget_method(plan.method)
    stored = None
    if method is not None and plan.budget is not None:
        stored = method.num_distilled(plan.config.method, plan.budget, plan.dataset.image_shape, _MANY)
    changes = list(_changes(row, evaluation_spec, plan, options))
    if limit is not None:
        changes.append(Change("images", f"trained on {limit} images, theirs on all", limit, ALL))
    return {
        "image_size": max(plan.dataset.image_shape[1:]),
        "distilled_in": plan.arch,
        "distilled_with": getattr(plan.config.method, "teacher_arch", None),
        "num_images": stored,
        "generator": generator_of(plan),
        "changes": tuple(dict.fromkeys(change.text for change in changes)),
        **departure(changes),
    }


def generator_layer(spec: BenchSpec, row: MethodSpec, dataset: str) -> dict[str, Any]:
    """Return the table's generator as a layer of settings; empty for methods that take none."""
    folder = spec.generator_for(dataset)
    if folder is None or "diffusion" not in get_method(row.name).config_type.model_fields:
        return {}
    return {"method": {"diffusion": folder}}


def generator_of(plan: Plan) -> str | None:
    """Return the diffusion model that makes a plan's images; None for methods without one."""
    method = plan.config.method
    if not hasattr(method, "diffusion"):
        return None
    if method.diffusion is not None:
        return _name_of(method.diffusion)
    recipe = getattr(method, "generator", None)
    if recipe is None:
        return "trained here"
    start = "" if recipe.init is None else f"{_name_of(recipe.init)}, "
    return f"{start}trained here for {recipe.epochs} epochs"


def _name_of(folder: str) -> str:
    """Return a folder's name, with its parent's where several models may have the same."""
    return "/".join(Path(folder).parts[-2:])


def teachers_of(
    evaluation_spec: EvaluateSpec, plan: Plan, limit: int | None = None
) -> tuple[str | None, ...]:
    """Return the teachers of soft labels; `own` is the network that made the row's sets.

    Of a recipe's own teachers at most `limit` are taken.

    Raises:
        InputError: `own` for a method without one.
    """
    own_teacher = getattr(plan.config.method, "teacher_arch", None)
    if OWN_TEACHER in evaluation_spec.teacher and own_teacher is None:
        raise InputError(
            f"evaluate.teacher {OWN_TEACHER} needs rows whose sets are made with a teacher "
            f"(method.teacher_arch), got {plan.method}; leave it out by rows:"
        )
    names = (own_teacher if name == OWN_TEACHER else name for name in evaluation_spec.teacher)
    return tuple(dict.fromkeys(names)) or (_recipes_teachers(evaluation_spec, plan, limit),)


def _recipes_teachers(evaluation_spec: EvaluateSpec, plan: Plan, limit: int | None) -> str | None:
    """Return the teachers of a recipe that has several, joined by "+"; None: the protocol's default."""
    protocol = evaluation_spec.protocol
    if protocol == "nas" or "teachers" not in get_protocol(protocol).options:
        return None
    sets = overrides(evaluation_spec.options.get("sets") or ())
    recipe = evaluation_spec.recipe or evaluation_spec.options.get("recipe") or sets.get("recipe")
    recipe = recipe or own_recipe(plan.method, plan.config.method.dump())
    teachers = recipe_teachers(str(recipe), max(plan.dataset.image_shape[1:]))[:limit]
    return "+".join(teachers) if len(teachers) > 1 else None


def _vouches(source: PublishedSource) -> bool:
    """Return whether a source names the paper's row: what its section sets is then that row's."""
    return source.method is not None or source.setting is not None


def _changes(
    row: MethodSpec, evaluation_spec: EvaluateSpec, plan: Plan, options: Mapping[str, Any]
) -> Iterator[Change]:
    """Yield what differs from the preset's conditions."""
    layers = row.layers() if _vouches(row.published) else ()
    protocol = evaluation_spec.protocol
    by_recipe = protocol != "nas" and has_recipe(protocol)
    yield from plan_changes(plan, layers, lambda name: name.startswith("evaluate.") and not by_recipe)
    reference = DatasetRef.parse(plan.dataset.name)
    native = KNOWN[reference.base].can_flip if reference.base in KNOWN else reference.can_flip
    if reference.can_flip not in (None, native):
        text = f"can_flip {yaml_text(reference.can_flip)}, the dataset's {yaml_text(native)}"
        yield Change("can_flip", text)
    yield from _cuts(evaluation_spec, options)
    if not _vouches(evaluation_spec.published):
        yield from _evaluation_changes(evaluation_spec, layers if by_recipe else None, plan, options)


def _cuts(evaluation_spec: EvaluateSpec, options: Mapping[str, Any]) -> Iterator[Change]:
    """Yield what no paper's evaluation has, and what a limit has lowered below what the table asks for."""
    for name in _CUTS:
        if (value := options.get(name)) is not None:
            yield Change(f"evaluate.{name}", f"evaluate.{name} {value}", value, ALL)
    if options.get("finetune"):
        yield Change("evaluate.finetune", "evaluate.finetune true")
    section = {**evaluation_spec.options, "epochs": evaluation_spec.epochs}
    for name in ("epochs", "sets", "full_epochs"):
        if (value := options.get(name)) != section.get(name):
            full_name = f"evaluate.{name}"
            yield Change(full_name, f"{full_name} {value} by a limit", value, section.get(name))


def _evaluation_changes(
    evaluation_spec: EvaluateSpec,
    layers: Sequence[Mapping[str, Any]] | None,
    plan: Plan,
    options: Mapping[str, Any],
) -> Iterator[Change]:
    """Yield what a table sets in an evaluation otherwise than the preset with `layers` over it.

    None for `layers`: than the protocol, which has settings of its own.
    """
    sets, recipe = options.get("sets") or (), options.get("recipe")
    if layers is None:
        if recipe not in (None, own_recipe(plan.method, plan.config.method.dump())):
            yield Change("evaluate.recipe", f"evaluate.recipe {recipe}, not the method's own")
        if (epochs := options.get("epochs")) is not None:
            protocol, arch = evaluation_spec.protocol, (options.get("archs") or (plan.arch,))[0]
            full = None if protocol == "nas" else own_epochs(protocol, None, plan, arch)
            text = f"evaluate.epochs {epochs}, not the protocol's own"
            yield Change("evaluate.epochs", text, epochs, full)
        for text in sets:
            name = f"evaluate.{text.partition('=')[0].removeprefix('evaluate.')}"
            yield Change(name, f"evaluate.{text.replace('=', ' ')}, not the protocol's own")
        return
    theirs = flatten(preset_of(plan, layers).config.evaluate.every_value())
    if recipe is not None and _is_other(str(recipe), theirs, plan):
        yield Change("evaluate.recipe", f"evaluate.recipe {recipe}, not the method's own")
    plain = {name: options[name] for name in ("epochs", "augment") if options.get(name) is not None}
    for name, value in flatten(merge(plain, overrides(sets))).items():
        if value != theirs.get(name):
            text = f"evaluate.{name} {yaml_text(value)}, the preset's {yaml_text(theirs.get(name))}"
            yield Change(f"evaluate.{name}", text, value, theirs.get(name))


def _is_other(recipe: str, theirs: Mapping[str, Any], plan: Plan) -> bool:
    """Return whether a named recipe is not what the preset trains networks by."""
    if recipe not in RECIPES:
        return True
    factor = getattr(plan.config.method, "factor", None) or 1
    facts = {"factor": factor, "ipc": plan.ipc, "num_classes": plan.dataset.num_classes}
    fields = named_recipe({"recipe": recipe}, dataset=plan.dataset.base, **facts)
    return any(value != theirs.get(name) for name, value in fields.items())
