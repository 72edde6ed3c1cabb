"""What a bench refuses before anything is distilled."""

from __future__ import annotations

from dataclasses import fields
from typing import Final

from ddray.bench.spec import BenchSpec, EvaluateSpec, MethodSpec
from ddray.data import Dataset
from ddray.errors import InputError, unknown
from ddray.evaluate.training import RECIPES
from ddray.methods import get_method
from ddray.plan import Plan
from ddray.scoring import PROTOCOLS, EvaluateOptions
from ddray.teaching import HARD_RECIPE

# Options of an evaluation that the table itself sets.
_OURS: Final = {
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
    """Refuse a protocol or a recipe that is not there, and what a protocol does not take.

    Raises:
        InputError: with the nearest name, or where it belongs.
    """
    known = {"hard": (*RECIPES, HARD_RECIPE), "soft": ("paper", "repo"), "nas": ("none",)}
    for held in spec.evaluate:
        if held.protocol not in (*PROTOCOLS, "nas"):
            raise unknown("evaluate.protocol", held.protocol, (*PROTOCOLS, "nas"))
        for name in ("archs", "epochs", "seeds", "augment", "target", "teacher"):
            if held.protocol == "nas" and getattr(held, name):
                raise InputError(
                    f"evaluate.{name} must be left out with protocol nas, which takes its own under options "
                    f"(as `ddray nas` has them), got {getattr(held, name)!r}"
                )
        names = known.get(held.protocol, tuple(RECIPES))
        if held.recipe is not None and held.recipe not in names:
            raise unknown(f"evaluate.recipe of {held.protocol}", held.recipe, names)


def check_row(row: MethodSpec, held: EvaluateSpec) -> None:
    """Refuse to score sets without labels by a protocol that needs them.

    Raises:
        InputError: the row is of a self-supervised method, and the protocol is not `linear`.
    """
    if getattr(get_method(row.name), "uses_budget", False) and held.protocol != "linear":
        raise InputError(
            f"evaluate.protocol must be linear for {row.row}, whose sets hold targets and no labels, "
            f"got {held.protocol}"
        )


def check_evaluation(held: EvaluateSpec, plan: Plan, target: Dataset) -> None:
    """Refuse an option that `ddray evaluate` has not, and what would not fit a set of this plan.

    Raises:
        InputError: with what would fit.
    """
    known = {one.name for one in fields(EvaluateOptions)} - _OURS
    for name in held.options:
        if name not in known:
            raise unknown("evaluate.options", name, known)
    if "ipc" in held.options and getattr(plan.config.method, "store", "images") != "statistics":
        raise InputError(
            f"evaluate.options.ipc must be left out for {plan.method}, whose sets hold their images "
            f"(d3hr with method.store=statistics generates them), got {held.options['ipc']}"
        )
    own = plan.dataset
    if held.protocol != "linear" and (
        target.image_shape != own.image_shape or target.class_names != own.class_names
    ):
        raise InputError(
            f"evaluate.target must have the classes and images of {own.name} with protocol {held.protocol} "
            f"(linear takes any), got {target.name}"
        )
