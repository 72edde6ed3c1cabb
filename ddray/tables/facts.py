"""What decides whether a cell may be set beside a published number: facts of its sets and its evaluation."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from ddray.config import flatten, merge
from ddray.data.catalog import KNOWN
from ddray.data.reference import DatasetRef
from ddray.errors import InputError
from ddray.evaluation import get_protocol
from ddray.evaluation.options import EvaluateConfig, overrides
from ddray.evaluation.soft_recipes import own_recipe, recipe_teachers
from ddray.jobs.plan import Plan, budget_method, resolve
from ddray.methods import get_method
from ddray.tables.checks import has_recipe
from ddray.tables.spec import BenchSpec, EvaluateSpec, MethodSpec, PublishedSource
from ddray.training.recipe import RECIPES, named_recipe

OWN_TEACHER: Final = "own"
# Settings that change no number, or that a cell holds as facts of their own.
_ELSEWHERE: Final = frozenset(
    {"checkpoint_every", "compile", "memory_budget", "arch"}
    | {"evaluate.seeds", "evaluate.val_seeds", "evaluate.every"}
    | {"method.diffusion", "method.class_ids", "method.generator.init", "method.teacher_arch"}
)
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
    return {
        "image_size": max(plan.dataset.image_shape[1:]),
        "distilled_in": plan.arch,
        "distilled_with": getattr(plan.config.method, "teacher_arch", None),
        "num_images": stored,
        "generator": generator_of(plan),
        "changes": (
            *dict.fromkeys(_changes(row, evaluation_spec, plan, options)),
            *(() if limit is None else (f"trained on {limit} images, theirs on all",)),
        ),
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
) -> Iterator[str]:
    """Yield what differs from the preset's conditions, in words."""
    size: dict[str, Any] = {"ipc": plan.ipc} if plan.budget is None else {"budget": plan.budget}
    layers = row.layers() if _vouches(row.published) else ()
    preset = resolve(plan.method, plan.dataset, **size, seed=plan.seed, preset=row.preset, layers=layers)
    protocol = evaluation_spec.protocol
    by_recipe = protocol != "nas" and has_recipe(protocol)
    ours, theirs = flatten(plan.config.dump()), flatten(preset.config.dump())
    for name in sorted(ours.keys() | theirs.keys()):
        is_idle = name in _ELSEWHERE or (name.startswith("evaluate.") and not by_recipe)
        if not is_idle and ours.get(name) != theirs.get(name):
            yield f"{name} {yaml_text(ours.get(name))}, the preset's {yaml_text(theirs.get(name))}"
    if plan.arch != preset.arch:
        yield f"distilled in {plan.arch}, by the preset in {preset.arch}"
    reference = DatasetRef.parse(plan.dataset.name)
    native = KNOWN[reference.base].can_flip if reference.base in KNOWN else reference.can_flip
    if reference.can_flip not in (None, native):
        yield f"can_flip {yaml_text(reference.can_flip)}, the dataset's {yaml_text(native)}"
    yield from _cuts(evaluation_spec, options)
    if not _vouches(evaluation_spec.published):
        evaluate = preset.config.evaluate if by_recipe else None
        yield from _evaluation_changes(evaluate, plan, options)


def _cuts(evaluation_spec: EvaluateSpec, options: Mapping[str, Any]) -> Iterator[str]:
    """Yield what no paper's evaluation has, and what a limit has lowered below what the table asks for."""
    for name in _CUTS:
        if options.get(name) is not None:
            yield f"evaluate.{name} {options[name]}"
    if options.get("finetune"):
        yield "evaluate.finetune true"
    section = {**evaluation_spec.options, "epochs": evaluation_spec.epochs}
    for name in ("epochs", "sets", "full_epochs"):
        if options.get(name) != section.get(name):
            yield f"evaluate.{name} {options.get(name)} by a limit"


def _evaluation_changes(
    preset: EvaluateConfig | None, plan: Plan, options: Mapping[str, Any]
) -> Iterator[str]:
    """Yield what a table sets in an evaluation otherwise than its preset; None: the protocol's own."""
    sets, recipe = options.get("sets") or (), options.get("recipe")
    if preset is None:
        if recipe not in (None, own_recipe(plan.method, plan.config.method.dump())):
            yield f"evaluate.recipe {recipe}, not the method's own"
        if options.get("epochs") is not None:
            yield f"evaluate.epochs {options['epochs']}, not the protocol's own"
        yield from (f"evaluate.{text.replace('=', ' ')}, not the protocol's own" for text in sets)
        return
    theirs = flatten(preset.every_value())
    if recipe is not None and _is_other(str(recipe), theirs, plan):
        yield f"evaluate.recipe {recipe}, not the method's own"
    plain = {name: options[name] for name in ("epochs", "augment") if options.get(name) is not None}
    for name, value in flatten(merge(plain, overrides(sets))).items():
        if value != theirs.get(name):
            yield f"evaluate.{name} {yaml_text(value)}, the preset's {yaml_text(theirs.get(name))}"


def _is_other(recipe: str, theirs: Mapping[str, Any], plan: Plan) -> bool:
    """Return whether a named recipe is not what the preset trains networks by."""
    if recipe not in RECIPES:
        return True
    factor = getattr(plan.config.method, "factor", None) or 1
    facts = {"factor": factor, "ipc": plan.ipc, "num_classes": plan.dataset.num_classes}
    fields = named_recipe({"recipe": recipe}, dataset=plan.dataset.base, **facts)
    return any(value != theirs.get(name) for name, value in fields.items())


def yaml_text(value: Any) -> str:
    """Return a value as people write it in YAML."""
    return "unset" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
