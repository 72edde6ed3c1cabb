"""Recipes: how a network is trained on a distilled set, as a teacher, as a probe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from pydantic import Field, field_validator

from ddray.config import Config, added
from ddray.errors import unknown

if TYPE_CHECKING:
    from ddray.data import Split

Augment = Literal["dsa", "dsa_idc", "autoaugment", "randaugment", "crop_flip", "crop_jitter", "none"]
Schedule = Literal["vico", "step15", "multistep", "cosine", "constant"]


class ProbeConfig(Config):
    """How the linear classifier is trained (SGD, cosine to 0, no weight decay)."""

    steps: int = Field(default=5000, ge=1)
    lr: float = Field(default=0.2, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    batch: int = Field(default=512, ge=1)


class FinetuneConfig(Config):
    """How the whole network is fine-tuned (KRR-ST; SGD, cosine to 0, random crops and flips)."""

    steps: int | None = Field(default=None, ge=1)
    """Default: 10,000 from 50,000 images on, else 5,000."""
    lr: float = Field(default=0.01, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    batch: int = Field(default=128, ge=1)


class Recipe(Config):
    """How a network is trained (cross entropy, or the mean squared error from values)."""

    epochs: int = Field(default=1000, ge=1)
    """E; the `vico` schedule runs E + 1, as the peers' loop does."""
    lr: float = Field(default=0.01, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    batch: int = Field(default=256, ge=1)
    schedule: Schedule = "vico"
    """`vico`: E + 1 epochs, after epoch E // 2 + 1 the rate falls tenfold and momentum is reset (DC, DM,
    DataDAM code); `step15`: x.5 every 15 epochs (DataDAM supplement Table 2); `multistep`: x.2 after 2/3 and
    5/6 of the epochs (IDC, DSDM); `cosine` to 0; `constant`."""
    augment: Augment = "dsa"
    """Augmentation of pictures; spectrograms have none."""
    strategy: str | None = None
    """Operations of `dsa` and `dsa_idc`, joined by "_" (flip is left out where it changes the class);
    default: all of them."""
    cutmix: float = Field(default=0.0, ge=0, le=1)
    """Probability that a batch of pictures is mixed with itself by CutMix (IDC: .5, without cutout)."""
    optimizer: Literal["sgd", "adam"] = added("sgd")
    """`adam` has no momentum setting (FRePo)."""
    warmup: int = added(0, ge=0)
    """Steps over which the rate rises from 0 (FRePo: 500); schedule `cosine` then falls step by step to a
    hundredth of lr."""

    @field_validator("strategy")
    @classmethod
    def _known_operations(cls, value: str | None) -> str | None:
        from ddray.training.dsa import Dsa  # torch: options and --help go without

        if value is not None:
            Dsa(value)
        return value

    def without_augmentation(self) -> Self:
        """Return the same training on the images as they are."""
        return self.model_copy(update={"augment": "none", "strategy": None, "cutmix": 0.0})

    def on(self, split: Split) -> Self:
        """Return the recipe for a split: picture augmentations do not apply to spectrograms (IDC, DSDM)."""
        return self.without_augmentation() if split.is_audio else self


_VICO: Final = Recipe().every_value()
RECIPES: Final[Mapping[str, Mapping[str, Any]]] = {
    "vico": _VICO,
    "idc": {
        **_VICO,
        "epochs": 1500,
        "batch": 64,
        "schedule": "multistep",
        "augment": "dsa_idc",
        "strategy": "color_crop_flip_scale_rotate",
        "cutmix": 0.5,
    },
    "minimax": {
        **_VICO,
        "epochs": 2000,
        "batch": 64,
        "schedule": "multistep",
        "augment": "crop_jitter",
        "cutmix": 1.0,
    },
}
"""Whole recipes by name: `vico` of DC, DSA, DM and their kin; `idc` of IDC and DSDM (DSDM's 1,500 epochs);
`minimax` of Minimax and DiT, with its epochs at 2 to 10 images per class (`minimax_epochs`)."""


class TeacherRecipe(Recipe):
    """How a teacher is trained on the real images (SGD, cross entropy)."""

    epochs: int = Field(default=50, ge=1)
    lr: float = Field(default=0.05, gt=0)
    batch: int = Field(default=64, ge=1)
    schedule: Schedule = "cosine"
    augment: Augment = "dsa"


def named_recipe(
    values: Mapping[str, Any], *, dataset: str = "", factor: int = 1, ipc: int = 10, num_classes: int = 10
) -> dict[str, Any]:
    """Return evaluation settings with the name under `recipe` replaced by its fields; the other settings win.

    `idc` has exceptions by the set's dataset and `factor`, the parts along each axis of a stored image;
    `minimax` trains longer on fewer images, `factor`^2 for each of the `ipc` of a class.

    Raises:
        InputError: no recipe has this name.
    """
    rest = dict(values)
    if rest.get("recipe") is None:
        return rest
    name = str(rest.pop("recipe"))
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    exceptions: dict[str, Any] = {}
    if name == "idc" and not idc_mixes(dataset, factor):
        exceptions = {"cutmix": 0.0}
    elif name == "minimax":
        exceptions = {"epochs": minimax_epochs(ipc * factor**2, num_classes)}
    return {**RECIPES[name], **exceptions, **rest}


def minimax_epochs(ipc: int, num_classes: int) -> int:
    """Return the epochs of Minimax's code: fewer on more images.

    For 100 classes two thirds of them, in whole hundreds.
    """
    lengths = {1: 3000, 10: 2000, 50: 1500, 200: 1000, 500: 500}
    epochs = next((epochs for most, epochs in lengths.items() if ipc <= most), 300)
    return epochs * 2 // 300 * 100 if num_classes == 100 else epochs


def idc_mixes(dataset: str, factor: int) -> bool:
    """Return whether IDC and DSDM's code mixes the images by CutMix: not MNIST's at factor 2."""
    return not (dataset == "mnist" and factor == 2)
