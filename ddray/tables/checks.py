"""What a bench refuses before anything is distilled."""

from typing import Final

from ddray.config import flatten, merge, nest
from ddray.data import Dataset, Split
from ddray.errors import InputError, unknown
from ddray.evaluation import get_protocol, protocol_names, target_protocols
from ddray.evaluation.options import EvaluateConfig, EvaluateOptions, overrides
from ddray.jobs.plan import Plan, budget_method
from ddray.jobs.shards import check_shards
from ddray.system.options import ContentOptions
from ddray.tables.spec import WHOLE, BenchSpec, EvaluateSpec, MethodSpec

# Options of an evaluation that the table itself sets; datasets carry their options in their names.
_SET_BY_TABLE: Final = (
    *("dataset", "protocol", "archs", "seeds", "epochs", "split", "augment", "teachers"),
    *("pixel_space", "index", "factor", "seed", "data_dir", "download"),
    *ContentOptions.model_fields,
)


def check_names(spec: BenchSpec) -> None:
    """Refuse unknown protocols and recipes, and settings that a protocol does not take.

    Raises:
        InputError: with the nearest name, or where the setting belongs.
    """
    protocols = (*protocol_names(), "nas")
    for evaluation_spec in spec.evaluate:
        protocol = evaluation_spec.protocol
        if protocol not in protocols:
            raise unknown("evaluate.protocol", protocol, protocols)
        for name in ("archs", "epochs", "seeds", "augment", "target", "teacher"):
            if protocol == "nas" and getattr(evaluation_spec, name):
                raise InputError(
                    f"evaluate.{name} must be left out with protocol nas, which takes its own under options "
                    f"(as `ddray nas` has them), got {getattr(evaluation_spec, name)!r}"
                )
        recipes = ("none",) if protocol == "nas" else get_protocol(protocol).recipes
        if recipes and evaluation_spec.recipe is not None and evaluation_spec.recipe not in recipes:
            raise unknown(f"evaluate.recipe of {protocol}", evaluation_spec.recipe, recipes)
        if "seeds" in overrides(evaluation_spec.options.get("sets") or ()):
            raise InputError("evaluate.options.sets must not have seeds=...; use evaluate.seeds")


def check_sections(spec: BenchSpec) -> None:
    """Refuse rows that no evaluation scores, and settings of `evaluate` that none takes.

    Raises:
        InputError: with the row, or the setting and where it belongs.
    """
    for row in spec.rows():
        if row.name == WHOLE and (row.preset != "paper" or (row.steps, row.shards) != (None, None)):
            raise InputError(f"row {row.row} has no method: preset, steps and shards must be left out")
        if not any(one.takes(row) for one in spec.evaluate):
            raise InputError(
                f"every row must be scored, but no evaluation takes {row.row}; name it under rows: of one"
            )
    if any(one.protocol != "nas" and has_recipe(one.protocol) for one in spec.evaluate):
        return
    for name in flatten(merge(*(nest(name, value) for name, value in spec.set.items()))):
        if name.startswith("evaluate.") and name != "evaluate.every":
            field = name.removeprefix("evaluate.")
            place = field if field in EvaluateSpec.model_fields else f"options.sets: [{field}=...]"
            raise InputError(
                f"set.{name} is not taken by {spec.evaluate[0].protocol}, which has settings of its own; put "
                f"it under evaluate.{place}"
            )


def has_recipe(protocol: str) -> bool:
    """Return whether networks are trained by the recipe of the sets' own run (`EvaluateConfig`)."""
    return get_protocol(protocol).config_type is EvaluateConfig


def _trains_on_target(evaluation_spec: EvaluateSpec) -> bool:
    """Return whether the protocol takes sets without labels, and any target."""
    return evaluation_spec.protocol != "nas" and get_protocol(evaluation_spec.protocol).trains_on_target


def check_row(row: MethodSpec, evaluation_spec: EvaluateSpec) -> None:
    """Refuse to score the sets of a self-supervised method with a protocol that needs labels (InputError)."""
    if budget_method(row.name) is not None and not _trains_on_target(evaluation_spec):
        raise InputError(
            f"evaluate.protocol must be {target_protocols()} for {row.row}, whose sets hold targets and no "
            f"labels, got {evaluation_spec.protocol}"
        )


def check_row_shards(row: MethodSpec, plan: Plan, num_shards: int, split: Split | None) -> None:
    """Refuse shards that would change a row's sets.

    Raises:
        InputError: with the row and the reason; of what needs the images of `split` only if it is not None.
    """
    if num_shards == 1:
        return
    try:
        check_shards(plan, num_shards, split, option="shards")
    except InputError as error:
        raise InputError(f"row {row.row}: {error}; shards: 1 in the row switches them off") from error


def check_evaluation(evaluation_spec: EvaluateSpec, plan: Plan, target: Dataset) -> None:
    """Refuse options that `ddray evaluate` lacks, and what would not fit a set of this plan.

    Raises:
        InputError: with what would be allowed.
    """
    option_names = EvaluateOptions.model_fields.keys() - _SET_BY_TABLE
    for name, value in evaluation_spec.options.items():
        if name in ContentOptions.model_fields:
            raise InputError(
                f"evaluate.options.{name} must be left out, got {value!r}: it is a dataset's; put {name}: at "
                f"the top of the file, or ?{name}= after a dataset's name"
            )
        if name not in option_names:
            raise unknown("evaluate.options", name, option_names)
    if "ipc" in evaluation_spec.options and getattr(plan.config.method, "store", "images") != "statistics":
        raise InputError(
            f"evaluate.options.ipc must be left out for {plan.method}, whose sets hold their images "
            f"(d3hr with method.store=statistics generates them), got {evaluation_spec.options['ipc']}"
        )
    protocol = get_protocol(evaluation_spec.protocol)
    if protocol.check_method is not None:
        settings = overrides(evaluation_spec.options.get("sets") or ())
        protocol.check_method(plan.method, plan.config.method, settings)
    distilled = plan.dataset
    if not _trains_on_target(evaluation_spec) and (
        target.image_shape != distilled.image_shape or target.class_names != distilled.class_names
    ):
        raise InputError(
            f"evaluate.target must have the classes and images of {distilled.name} with protocol "
            f"{evaluation_spec.protocol} ({target_protocols()} takes any), got {target.name}"
        )
