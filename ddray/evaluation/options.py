"""What `ddray evaluate` was asked for, and the checks that need no distilled set."""

from typing import Any, Final, Literal, Self, get_args

from pydantic import ValidationInfo, field_validator, model_validator

from ddray.config import Names, named
from ddray.errors import InputError, unknown
from ddray.evaluation import get_protocol, protocol_names
from ddray.system.options import DataOptions
from ddray.training.recipe import RECIPES, Augment

SplitName = Literal["val", "test"]
PixelKind = Literal["normalized", "raw", "zca"]
_NAMES: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "split": ("split", get_args(SplitName)),
    "augment": ("--augment", get_args(Augment)),
    "pixel_space": ("--pixel-space", get_args(PixelKind)),
}
# Options of one protocol each.
_OF_ONE_PROTOCOL: Final = ("num_tasks", "full_epochs", "finetune", "teachers")


class EvaluateOptions(DataOptions):
    """Options of `ddray evaluate`; None means: as the artifact says."""

    dataset: str | None = None
    """Target; default the artifact's own."""
    protocol: str = "hard"
    """hard: train on hard labels; soft: on a teacher's; linear: pre-train, freeze, probe; robust: LRS and
    ARS; continual: class by class, as a memory."""
    archs: Names = named("arch", "archs")
    """Network to train; repeatable."""
    seeds: int | None = None
    """Networks per architecture; default 5."""
    epochs: int | None = None
    """Epochs of training; default the method's."""
    split: SplitName = "test"
    """test, or val: the tenth of train a search keeps back."""
    augment: Augment | None = None
    """dsa, dsa_idc, autoaugment, randaugment or none; default the method's."""
    recipe: str | None = None
    """hard: vico, idc or table5 (D3HR's); soft: paper or repo. How all sets are trained on."""
    train_limit: int | None = None
    """Train on at most so many images (linear: of the target)."""
    num_tasks: int | None = None
    """continual: tasks the classes come in; default 5."""
    full_epochs: int | None = None
    """robust: epochs on the whole dataset; default as --epochs."""
    teachers: Names = named("teacher", "teachers")
    """soft: who labels; several are averaged; default resnet18."""
    ipc: int | None = None
    """Images per class, for sets that generate them."""
    sets: Names = named("set", "sets")
    """key=value of the protocol, such as teacher.epochs=30; repeatable."""
    finetune: bool = False
    """linear: fine-tune the whole network instead of probing."""
    pixel_space: PixelKind = "normalized"
    """Of another project's file: normalized, zca or raw."""
    seed: int = 0
    """Every draw is derived from it."""

    @field_validator(*_NAMES, mode="before")
    @classmethod
    def _known_name(cls, value: Any, info: ValidationInfo) -> Any:
        label, names = _NAMES[str(info.field_name)]
        if value is not None and value not in names:
            raise unknown(label, str(value), names)
        return value

    @field_validator("train_limit", "num_tasks", "full_epochs", "ipc")
    @classmethod
    def _positive(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value < 1:
            raise InputError(f"--{str(info.field_name).replace('_', '-')} must be >= 1, got {value}")
        return value

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        """Refuse options that do not go with the protocol, and settings that it does not have."""
        protocol = get_protocol(self.protocol)
        for name in _OF_ONE_PROTOCOL:
            if getattr(self, name) not in (None, False, ()) and name not in protocol.options:
                option = "--teacher" if name == "teachers" else "--" + name.replace("_", "-")
                owners = [other for other in protocol_names() if name in get_protocol(other).options]
                raise InputError(f"{option} must be left out, or used with --protocol {' or '.join(owners)}")
        if self.recipe not in (None, *protocol.recipes):
            label = "recipe" if {*RECIPES} <= {*protocol.recipes} else f"recipe of --protocol {self.protocol}"
            raise unknown(label, str(self.recipe), protocol.recipes)
        protocol.check_options(self)
        return self
