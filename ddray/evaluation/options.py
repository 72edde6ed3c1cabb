"""What `ddray evaluate` was asked for, and the checks that need no distilled set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ddray.config import parse_overrides
from ddray.errors import InputError, unknown
from ddray.evaluation.config import EvaluateConfig
from ddray.evaluation.soft import SoftConfig
from ddray.nets.names import resolve_arch
from ddray.training.policies import Augment
from ddray.training.recipe import named_recipe

PROTOCOLS = ("hard", "soft", "linear", "robust", "continual")
NUM_TASKS = 5
SplitName = Literal["val", "test"]
PixelKind = Literal["normalized", "raw", "zca"]
HARD_RECIPE = "table5"


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of `ddray evaluate`; None means: as the artifact says.

    Attributes:
        dataset: target; default the artifact's own.
        protocol: the protocol's name.
        archs: networks to train; default the artifact's own.
        seeds: networks per architecture.
        epochs: of training.
        split: `test` or `val`.
        augment: default the method's; another one also drops the method's strategy and CutMix.
        recipe: a whole recipe by name, instead of the method's; default: the method's.
        train_limit: train on at most so many images of the set; with `linear`, of the target.
        num_tasks: of `continual`; default 5.
        full_epochs: of `robust`, on the whole dataset; default as `epochs`.
        finetune: with `linear`, fine-tune the whole network instead of probing (KRR-ST).
        pixel_space: space of a foreign file's pixels.
        seed: first network's seed.
        teachers: networks whose soft labels are averaged; default resnet18 (protocol `soft`).
        sets: further settings of the protocol, as `key=value`.
        ipc: images per class of a set that generates them; default as it was distilled.
        data_dir: where datasets are looked for.
        download: let torchvision download.
    """

    dataset: str | None = None
    protocol: str = "hard"
    archs: tuple[str, ...] = ()
    seeds: int | None = None
    epochs: int | None = None
    split: SplitName = "test"
    augment: Augment | None = None
    recipe: str | None = None
    train_limit: int | None = None
    num_tasks: int | None = None
    full_epochs: int | None = None
    finetune: bool = False
    pixel_space: PixelKind = "normalized"
    seed: int = 0
    teachers: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()
    ipc: int | None = None
    data_dir: Path | None = None
    download: bool = False


def check_options(options: EvaluateOptions, image_shape: tuple[int, int, int]) -> None:
    """Check options before there is a set to evaluate.

    Args:
        options: the options to check.
        image_shape: (C, H, W) of the set.

    Raises:
        InputError: a name is unknown, a number out of range, or an option does not go with the protocol.
    """
    _check_options(options)
    soft = options.protocol == "soft" or (options.protocol, options.recipe) == ("hard", HARD_RECIPE)
    if options.teachers and options.protocol != "soft":
        raise InputError("--teacher must be left out, or used with --protocol soft")
    if options.augment is not None and soft:
        raise InputError("--augment must be left out here: the recipe trains on random resized crops")
    if options.augment not in (None, *get_args(Augment)):
        raise unknown("--augment", str(options.augment), get_args(Augment))
    for name in ("train_limit", "num_tasks", "ipc"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be >= 1, got {value}")
    for teacher in options.teachers:
        resolve_arch(teacher, image_shape)
    sets = parse_overrides(options.sets)
    if soft:
        SoftConfig.parse(sets if options.recipe is None else {**sets, "recipe": options.recipe})
    else:
        EvaluateConfig.parse(named_recipe(sets, dataset="", factor=1), prefix="evaluate.")


def _check_options(options: EvaluateOptions) -> None:
    """Refuse names that are unknown, and options that do not go together."""
    if options.protocol not in PROTOCOLS:
        raise unknown("protocol", options.protocol, PROTOCOLS)
    if options.split not in ("val", "test"):
        raise unknown("split", options.split, ("val", "test"))
    if options.pixel_space not in get_args(PixelKind):
        raise unknown("--pixel-space", options.pixel_space, get_args(PixelKind))
    for name, value, owner in (
        ("--num-tasks", options.num_tasks, "continual"),
        ("--full-epochs", options.full_epochs, "robust"),
        ("--finetune", options.finetune or None, "linear"),
    ):
        if value is not None and options.protocol != owner:
            raise InputError(f"{name} must be left out, or used with --protocol {owner}")
    if options.full_epochs is not None and options.full_epochs < 1:
        raise InputError(f"--full-epochs must be >= 1, got {options.full_epochs}")
    if options.train_limit is not None and options.protocol == "robust":
        raise InputError(
            "--train-limit must be left out with --protocol robust: it compares at equal storage"
        )
