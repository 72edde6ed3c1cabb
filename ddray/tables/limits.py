"""What a scale's limits make of the settings of methods and evaluations: they lower, and never raise."""

from collections.abc import Mapping
from typing import Any, cast

from ddray.evaluation import get_protocol
from ddray.evaluation.options import EvaluateConfig, overrides
from ddray.evaluation.soft import recipe_epochs
from ddray.evaluation.soft_recipes import TABLE5, SoftConfig
from ddray.jobs.plan import Plan
from ddray.tables.spec import EvaluateSpec, Limits
from ddray.training.recipe import RECIPES, TeacherRecipe, named_recipe


def lowered(settings: Mapping[str, Any], word: str, limit: int | None) -> dict[str, Any]:
    """Return the (nested) settings with a word in their name, such as `inner_steps`, that exceed a limit."""
    lower: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and (within := lowered(value, word, limit)):
            lower[name] = within
        elif word in name.split("_") and _is_above(value, limit):
            lower[name] = limit
    return lower


def exceeded(settings: Mapping[str, Any], **limits: int | None) -> dict[str, Any]:
    """Return the limits that the settings of these names exceed."""
    return {name: limit for name, limit in limits.items() if _is_above(settings.get(name), limit)}


def _is_above(value: Any, limit: int | None) -> bool:
    """Return whether an integer is above a limit; anything else is refused later, by its own rule."""
    return limit is not None and isinstance(value, int) and value > limit


def limited_epochs(
    evaluation_spec: EvaluateSpec,
    recipe: str | None,
    limit: int | None,
    plan: Plan,
    choices: Mapping[str, Any],
) -> int | None:
    """Return the table's epochs within the limit; or the limit, where the evaluation's own are more.

    None: its own decide, a method's and those of `sets` within the limit already.
    """
    if limit is None or evaluation_spec.epochs is not None:
        return min(filter(None, (evaluation_spec.epochs, limit)), default=None)
    sets = overrides(evaluation_spec.options.get("sets") or ())
    if "epochs" in sets:
        return None
    recipe = recipe or sets.get("recipe")
    epochs = own_epochs(evaluation_spec.protocol, recipe, plan, choices["archs"][0])
    return limit if _is_above(epochs, limit) else None


def own_epochs(protocol: str, recipe: str | None, plan: Plan, arch: str) -> int | None:
    """Return the epochs of a protocol with a recipe, by default the method's; None: the method's settings."""
    config_type, num_classes = get_protocol(protocol).config_type, plan.dataset.num_classes
    if recipe in RECIPES:
        return int(named_recipe({"recipe": recipe}, ipc=plan.ipc, num_classes=num_classes)["epochs"])
    if recipe == TABLE5 or config_type is SoftConfig:
        return recipe_epochs(
            recipe,
            plan.method,
            plan.config.method.dump(),
            arch=arch,
            num_images=plan.budget or num_classes * plan.ipc,
            num_classes=num_classes,
            size=max(plan.dataset.image_shape[1:]),
        )
    if config_type is not EvaluateConfig and "epochs" in config_type.model_fields:
        return cast("int", config_type.model_fields["epochs"].default)
    return None


def limited_options(evaluation_spec: EvaluateSpec, limits: Limits) -> dict[str, Any]:
    """Return the options `full_epochs` and `sets`, with epochs and teachers' epochs within the limits."""
    sets, full = (evaluation_spec.options.get(name) for name in ("sets", "full_epochs"))
    parsed = overrides(sets or ())
    teacher = parsed.get("teacher", {})
    teacher_epochs = teacher.get("epochs", TeacherRecipe().epochs) if isinstance(teacher, Mapping) else None
    lowered = [f"epochs={limits.epochs}"] if _is_above(parsed.get("epochs"), limits.epochs) else []
    has_teachers = "teachers" in get_protocol(evaluation_spec.protocol).options
    if has_teachers and _is_above(teacher_epochs, limits.teacher_epochs):
        lowered.append(f"teacher.epochs={limits.teacher_epochs}")
    return {
        "sets": [*(sets or ()), *lowered] or None,
        "full_epochs": limits.epochs if _is_above(full, limits.epochs) else full,
    }
