"""What a bench refuses before anything is distilled."""

from __future__ import annotations

from typing import Final

from ddray.data import Dataset
from ddray.errors import InputError, unknown
from ddray.evaluation.options import PROTOCOLS, EvaluateOptions, recipes_of
from ddray.jobs.plan import Plan
from ddray.methods import get_method
from ddray.tables.spec import BenchSpec, EvaluateSpec, MethodSpec

# Options of an evaluation that the table itself sets.
_SET_BY_TABLE: Final = {
    "dataset",
    "protocol",
    "archs",
    "seeds",
    "epochs",
    "split",
    "augment",
    "teachers",
    "pixel_space",
    "seed",
    "data_dir",
    "download",
}


def check_names(spec: BenchSpec) -> None:
    """Refuse unknown protocols and recipes, and settings that a protocol does not take.

    Raises:
        InputError: with the nearest name, or where the setting belongs.
    """
    for evaluation_spec in spec.evaluate:
        if evaluation_spec.protocol not in (*PROTOCOLS, "nas"):
            raise unknown("evaluate.protocol", evaluation_spec.protocol, (*PROTOCOLS, "nas"))
        for name in ("archs", "epochs", "seeds", "augment", "target", "teacher"):
            if evaluation_spec.protocol == "nas" and getattr(evaluation_spec, name):
                raise InputError(
                    f"evaluate.{name} must be left out with protocol nas, which takes its own under options "
                    f"(as `ddray nas` has them), got {getattr(evaluation_spec, name)!r}"
                )
        recipes = ("none",) if evaluation_spec.protocol == "nas" else recipes_of(evaluation_spec.protocol)
        if evaluation_spec.recipe is not None and evaluation_spec.recipe not in recipes:
            raise unknown(f"evaluate.recipe of {evaluation_spec.protocol}", evaluation_spec.recipe, recipes)


def check_row(row: MethodSpec, evaluation_spec: EvaluateSpec) -> None:
    """Refuse to score sets without labels with a protocol that needs them.

    Raises:
        InputError: the row is of a self-supervised method, and the protocol is not `linear`.
    """
    if getattr(get_method(row.name), "uses_budget", False) and evaluation_spec.protocol != "linear":
        raise InputError(
            f"evaluate.protocol must be linear for {row.row}, whose sets hold targets and no labels, "
            f"got {evaluation_spec.protocol}"
        )


def check_evaluation(evaluation_spec: EvaluateSpec, plan: Plan, target: Dataset) -> None:
    """Refuse options that `ddray evaluate` lacks, and what would not fit a set of this plan.

    Raises:
        InputError: with what would be allowed.
    """
    option_names = EvaluateOptions.model_fields.keys() - _SET_BY_TABLE
    for name in evaluation_spec.options:
        if name not in option_names:
            raise unknown("evaluate.options", name, option_names)
    if "ipc" in evaluation_spec.options and getattr(plan.config.method, "store", "images") != "statistics":
        raise InputError(
            f"evaluate.options.ipc must be left out for {plan.method}, whose sets hold their images "
            f"(d3hr with method.store=statistics generates them), got {evaluation_spec.options['ipc']}"
        )
    distilled = plan.dataset
    if evaluation_spec.protocol != "linear" and (
        target.image_shape != distilled.image_shape or target.class_names != distilled.class_names
    ):
        raise InputError(
            f"evaluate.target must have the classes and images of {distilled.name} with protocol "
            f"{evaluation_spec.protocol} (linear takes any), got {target.name}"
        )
