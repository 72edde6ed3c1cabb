"""Recipes of protocol `soft` by name: what the papers, or their authors' code, train students with.

`paper` is D3HR's Table A1 as printed, `repo` D3HR's code (also called `d3hr`); `table5` is that code on hard
labels; `rded`, `sre2l`, `dwa` and `gvbsm` are the code of these, the last three one recipe each for images up
to 32 px (CIFAR), up to 64 px (Tiny-ImageNet) and above (ImageNet); `sre2l_cifar` is SRe2L's first one at any
size. `rd3` is the one protocol under which RD3 (ICLR 2026, arXiv 2509.19743) scores everybody's sets. All
rates change between epochs.

**Deviations** (paper | authors' code | ours). The papers of RDED, SRe2L, DWA and G-VBSM were not compared.

D3HR:
- rate, batch: .01, 128 (Table A1) | .001, others for some networks; 15, 50, 100 from 1, 10, 50 images per
  class on, twice that for 100 classes | by recipe.
- schedule: "CosineAnneal" | half a cosine, .5 (1 + cos(pi e / 2E)) | `paper` a whole one, `repo` the half.
- CutMix: not in Table A1, which is to be RDED's configuration | on every batch, Beta(1, 1) | `paper` none.
- weight decay of .01: not said of what | weights of two or more axes | the same in both.
- batch norm: - | each batch, mixed in place by then, passes through the student once more for its log, so the
  running averages move twice a step | `repo` and `rded`: twice, without the pass (one with dropout before a
  batch norm would draw anew).
- several teachers: their soft labels are averaged (Sec 6.5) | their logits | by recipe.
- result: - | the best score on test after epoch 290 | the last epoch's.
- hard labels (Table 5, Minimax's setting): - | mixup, Beta(1, 1); 2,000 / 1,500 / 1,000 epochs at ipc 10 /
  50 / 100; the best score of the last 100 epochs | `table5`, the last epoch's.

RDED:
- crops: ? | of 1/factor to all of the image's area, after its strips are shuffled; at factor 1 the whole
  image | the same.
- batch: ? | 10, 50, 100 at 1, 10, 50 images per class, twice that for 100 and 1,000 classes, 100 on
  Tiny-ImageNet; no other ipc runs | the next lower ipc's.
- rate: ? | that of D3HR's code, 0 for networks that it does not list; a ConvNet-3 taught by one on CIFAR-100
  takes .002 and batches of 25 | .001 for such networks and this one.
- result: ? | the best of every tenth epoch in the last fifth | the last epoch's.

SRe2L:
- CIFAR teacher: ? | never put into eval mode, so its labels come from the statistics of the mixed batch; its
  running averages move, unread | its batch norms alone are in that mode, its averages stay.
- CIFAR-10: ? | CIFAR-100's code | the same.
- Tiny-ImageNet: ? | no mixing in the commands and logs; divergence times T^2 | the same.
- ImageNet: ? | labels of 300 epochs, stored as float16, serve every student; two halves of a batch | new
  labels in float32, whole batches.
- result: ? | CIFAR: the last epoch's, otherwise the best on test | the last epoch's.

DWA:
- CIFAR: ? | SRe2L's code, its teacher in train mode too | recipe `sre2l_cifar`.
- Tiny-ImageNet: ? | as SRe2L's, with 200 epochs, batches of 64 and CutMix | the same.
- result: ? | the best on test | the last epoch's.

G-VBSM:
- loss: ? | mean squared error of logits over batch and classes, plus a share of the cross entropy from an
  image's own label, unmixed; no temperature | the same.
- several teachers: ? | their logits are averaged, on ImageNet after scaling each teacher's batch of logits to
  the teachers' mean norm | the same.
- teachers: ? | ResNet-18, ConvNet of width 128, MobileNetV2 and ShuffleNetV2 of half width, WRN-16-2;
  ImageNet: ResNet-18, MobileNetV2, EfficientNet-B0, ShuffleNetV2 of half width | whole widths, densenet_cifar
  for the WRN, all trained by this protocol's `teacher` settings.
- CIFAR-10: ? | normalised by CIFAR-100's mean and deviation | by its own.
- labels: ? | stored once as float16, for every student | new ones in float32.
- result: ? | the best on test | the last epoch's.

RD3 (read second-hand): temperature and weight decay are not known to us | - | 20, none. Its one teacher is a
ResNet-18; `--teacher` names another. RDED's sets have their strips shuffled, as under their own recipe.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from pydantic import Field

from ddray.config import Config, added
from ddray.errors import InputError
from ddray.nets.names import parse_arch
from ddray.training.engine import cosine
from ddray.training.recipe import TeacherRecipe

RECIPES: Final = ("paper", "repo", "rded", "sre2l", "rd3", "sre2l_cifar", "gvbsm", "d3hr", "dwa")
TABLE5: Final = "table5"
Average = Literal["probabilities", "logits", "scaled_logits"]
"""What of several teachers is averaged; `scaled_logits`: logits scaled to one norm per batch first."""
_LR: Final = {
    "vgg11": 5e-4,
    "vgg11_tv": 5e-4,
    "efficientnet_b0": 2e-3,
    "mobilenet_v2": 2.5e-3,
    "alexnet": 1e-4,
}
_WARMUP_START: Final = 0.01
_CE_WEIGHT: Final = 0.15
_D3HR_REPO: Final = {"form": "repo", "encoding": "sample", "shared_draws": True}
_D4M: Final = {"sampling": "kmeans", "km_expand": 1}
# Methods and the recipe that they were published with, where its name is another.
_OWN: Final = {
    **{name: name for name in ("rded", "sre2l", "dwa")},
    **{"g_vbsm": "gvbsm", "d3s": "d3hr", "minimax": "rded", "dit": "rded"},
}


class SoftConfig(Config):
    """Settings of the protocol; None: as the recipe says."""

    recipe: Literal[
        "paper", "repo", "rded", "sre2l", "rd3", "sre2l_cifar", "gvbsm", "d3hr", "dwa", "table5"
    ] = "paper"
    """`paper`: D3HR's Table A1; `repo` or `d3hr`: its code; `rded`, `sre2l`, `sre2l_cifar`, `gvbsm`, `dwa`:
    theirs; `rd3`: RD3's one protocol for all; `table5`: D3HR's hard labels."""
    epochs: int | None = Field(default=None, ge=1)
    lr: float | None = Field(default=None, gt=0)
    batch: int | None = Field(default=None, ge=1)
    """Never more than the set has."""
    optimizer: Literal["adamw", "sgd"] | None = None
    """`sgd`: with momentum .9."""
    weight_decay: float | None = Field(default=None, ge=0)
    decay: Literal["all", "matrices"] | None = None
    """What is decayed: all parameters, or weights of two or more axes (no biases and norms)."""
    schedule: Literal["cosine", "half_cosine"] | None = None
    """From lr to 0, or along the first half of that: to lr / 2."""
    zeta: float | None = added(None, ge=1)
    """Over `schedule`: the rate falls by .5 (1 + cos(pi e / (zeta E))); 1 is `cosine`, 2 `half_cosine`."""
    loss: Literal["kl", "mse_gt"] | None = added(None)
    """The divergence of softened probabilities, or G-VBSM's squared error of logits and cross entropy."""
    ce_weight: float | None = added(None, ge=0)
    """Weight of the cross entropy from an image's own label in the loss `mse_gt`; default .15."""
    warmup: int | None = Field(default=None, ge=0)
    """Epochs in which the rate first rises, from a hundredth of lr."""
    temperature: float | None = Field(default=None, gt=0)
    scale_loss: bool | None = None
    """Multiply the divergence by the temperature's square."""
    mix: Literal["auto", "cutmix", "mixup", "none"] = "auto"
    """`auto`: as the recipe says."""
    mix_alpha: float | None = Field(default=None, gt=0)
    """Mixup's share of an image is a draw of Beta(alpha, alpha)."""
    crop: Literal["resized", "padded"] | None = None
    """Random resized crops, or crops of the image with 4 black pixels around it."""
    min_scale: float | None = Field(default=None, gt=0, le=1)
    """Smallest resized crop, as a share of the image's area."""
    patches: int | None = Field(default=None, ge=1)
    """Strips shuffled along each axis before the crop (RDED's stitched images); default: the set's."""
    bn_updates: int | None = Field(default=None, ge=1)
    """How often a step moves the running averages of batch norms towards its batch."""
    teacher_mode: Literal["eval", "train"] | None = None
    """`train`: batch norms of teachers use the mixed batch's statistics."""
    average: Average | None = None
    """What of several teachers is averaged; `scaled_logits`: logits of one norm (G-VBSM on ImageNet)."""
    seeds: int = Field(default=5, ge=1)
    """Networks per architecture."""
    teacher: TeacherRecipe = TeacherRecipe()


class Settings(SoftConfig):
    """The settings of one training, all resolved."""

    epochs: int
    lr: float
    batch: int
    optimizer: Literal["adamw", "sgd"]
    weight_decay: float
    decay: Literal["all", "matrices"]
    schedule: Literal["cosine", "half_cosine"]
    zeta: float
    loss: Literal["kl", "mse_gt"]
    ce_weight: float
    warmup: int
    temperature: float
    scale_loss: bool
    mix: Literal["cutmix", "mixup", "none"]
    mix_alpha: float
    crop: Literal["resized", "padded"]
    min_scale: float
    patches: int
    bn_updates: int
    teacher_mode: Literal["eval", "train"]
    average: Average


@dataclass(frozen=True)
class _Training:
    """What a recipe may depend on: `arch`, images per class, classes, the images' larger side, strips."""

    arch: str
    ipc: int
    num_classes: int
    size: int
    patches: int

    @property
    def lr(self) -> float:
        """The rate of RDED's and D3HR's code."""
        return _LR.get(parse_arch(self.arch).base, 1e-3)


_COMMON: Final[Mapping[str, Any]] = {
    "optimizer": "adamw",
    "weight_decay": 0.01,
    "decay": "matrices",
    "schedule": "cosine",
    "loss": "kl",
    "ce_weight": _CE_WEIGHT,
    "warmup": 0,
    "temperature": 20.0,
    "scale_loss": False,
    "mix": "cutmix",
    "mix_alpha": 1.0,
    "crop": "resized",
    "min_scale": 0.08,
    "bn_updates": 1,
    "teacher_mode": "eval",
    "average": "probabilities",
}


def _paper(training: _Training) -> dict[str, Any]:
    """D3HR, Table A1."""
    return {"epochs": 400 if training.size <= 32 else 300, "lr": 0.01, "batch": 128, "mix": "none"}


def _repo(training: _Training) -> dict[str, Any]:
    """D3HR's validate.py."""
    batch = 100 if training.ipc >= 50 else 50 if training.ipc >= 10 else 15
    return {
        "epochs": 400 if training.size <= 32 else 300,
        "lr": training.lr,
        "batch": batch * (2 if training.num_classes == 100 else 1),
        "schedule": "half_cosine",
        "bn_updates": 2,
        "average": "logits",
    }


def _table5(training: _Training) -> dict[str, Any]:
    """D3HR's validate_hardlabel.py."""
    epochs = 2000 if training.ipc <= 10 else 1500 if training.ipc <= 50 else 1000
    return {**_repo(training), "epochs": epochs, "mix": "mixup", "bn_updates": 1}


def _rded(training: _Training) -> dict[str, Any]:
    """RDED's validation/main.py and scripts."""
    batch = 100 if training.ipc >= 50 else 50 if training.ipc >= 10 else 10
    if training.num_classes == 200 and training.size <= 64:  # Tiny-ImageNet
        batch = 100
    return {
        "epochs": 300,
        "lr": training.lr,
        "batch": batch * (2 if training.num_classes in (100, 1000) else 1),
        "schedule": "half_cosine",
        "min_scale": 1 / training.patches,
        "bn_updates": 2,
    }


def _sre2l(training: _Training) -> dict[str, Any]:
    """SRe2L's relabel_cifar.py, its train_kd.py for Tiny-ImageNet, or its train_FKD.py for ImageNet."""
    if training.size <= 32:
        return _sre2l_cifar(training)
    if training.size <= 64:
        return {"epochs": 100, "batch": 256, "mix": "none", **_TINY_SGD}
    return {"epochs": 300, "lr": 0.001, "batch": 1024}


def _sre2l_cifar(_: _Training) -> dict[str, Any]:
    """SRe2L's relabel_cifar.py, at any size."""
    mix = {"mix": "mixup", "mix_alpha": 0.8, "crop": "padded", "temperature": 30.0, "teacher_mode": "train"}
    return {"epochs": 400, "lr": 0.001, "batch": 128, "decay": "all", **mix}


_TINY_SGD: Final[Mapping[str, Any]] = {
    **{"optimizer": "sgd", "lr": 0.2, "weight_decay": 1e-4, "decay": "all", "warmup": 5, "scale_loss": True}
}


def _dwa(training: _Training) -> dict[str, Any]:
    """DWA's validation_cifar.py, or its commands for Tiny-ImageNet and ImageNet."""
    if training.size <= 32:
        return _sre2l_cifar(training)
    if training.size <= 64:
        return {"epochs": 200, "batch": 64, **_TINY_SGD}
    return {"epochs": 300, "lr": 0.001, "batch": 128}


def _gvbsm(training: _Training) -> dict[str, Any]:
    """G-VBSM's train_FKD.py of its four branches."""
    common = {"loss": "mse_gt", "average": "logits"}
    if training.size > 64:
        scaled = {**common, "average": "scaled_logits", "ce_weight": 0.1}
        return {"epochs": 300, "lr": 0.001, "batch": 1024, **scaled}
    if training.size <= 32 and training.num_classes < 100:
        return {"epochs": 1000, "lr": 0.001, "batch": 100, "weight_decay": 0.0, **common}
    sgd = {"optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4, **common}
    if training.size <= 32:
        return {"epochs": 1000, "batch": 64, **sgd}
    return {"epochs": 100, "batch": 100, "ce_weight": 0.1, **sgd}


def _rd3(training: _Training) -> dict[str, Any]:
    """RD3's protocol for all methods: zeta is 1 for a ResNet-18 and 2 for other networks."""
    schedule = "cosine" if parse_arch(training.arch).base.startswith("resnet18") else "half_cosine"
    return {"epochs": 400, "lr": 0.001, "batch": 50, "weight_decay": 0.0, "schedule": schedule}


_BY_NAME: Final[Mapping[str, Callable[[_Training], dict[str, Any]]]] = {
    "paper": _paper,
    "repo": _repo,
    "rded": _rded,
    "sre2l": _sre2l,
    "rd3": _rd3,
    "sre2l_cifar": _sre2l_cifar,
    "gvbsm": _gvbsm,
    "d3hr": _repo,
    "dwa": _dwa,
    "table5": _table5,
}
GVBSM_NETWORKS: Final = ("resnet18", "convnet3", "mobilenet_v2", "densenet_cifar", "shufflenet_v2")
GVBSM_ON_IMAGENET: Final = ("resnet18", "mobilenet_v2", "efficientnet_b0", "shufflenet_v2")


def resolve_settings(
    config: SoftConfig, *, arch: str, num_images: int, num_classes: int, size: int
) -> Settings:
    """Return the settings for a network and a set whose images' larger side has `size` pixels."""
    patches = config.patches or 1
    training = _Training(arch, max(1, num_images // num_classes), num_classes, size, patches)
    defaults = {**_COMMON, **_BY_NAME[config.recipe](training), "patches": patches}
    overrides = {k: v for k, v in config.dump().items() if v is not None and (k, v) != ("mix", "auto")}
    resolved = {**defaults, **overrides}
    if "zeta" not in resolved:
        resolved["zeta"] = 2.0 if resolved["schedule"] == "half_cosine" else 1.0
    if resolved["loss"] == "mse_gt" and resolved["average"] == "probabilities":
        resolved["average"] = "logits"  # it has no probabilities
    return Settings.parse({**resolved, "batch": min(resolved["batch"], num_images)})


def check_loss(config: SoftConfig) -> None:
    """Refuse settings of a loss that the recipe does not have (InputError)."""
    loss = config.loss or ("mse_gt" if config.recipe == "gvbsm" else "kl")
    unused: tuple[str, ...] = ("ce_weight",)
    what, fix = "loss kl", "add --set loss=mse_gt"
    if config.recipe == TABLE5:
        unused = ("loss", "ce_weight", "temperature", "scale_loss", "teacher_mode", "average")
        what, fix = f"recipe {TABLE5}", "it has no teacher"
    elif loss == "mse_gt":
        unused, what, fix = ("temperature", "scale_loss"), "loss mse_gt", "its logits are not softened"
    for name in unused:
        if (value := getattr(config, name)) is not None:
            raise InputError(f"{name} must be left out with {what}, got {value}; {fix}")
    if loss == "mse_gt" and config.average == "probabilities":
        raise InputError("average must be logits or scaled_logits with loss mse_gt, got probabilities")


def recipe_teachers(recipe: str, size: int) -> tuple[str, ...]:
    """Return the networks that label by a recipe, where nobody names one, on images of `size` pixels."""
    if recipe != "gvbsm":
        return ("resnet18",)
    return GVBSM_NETWORKS if size <= 64 else GVBSM_ON_IMAGENET


def rate_factor(settings: Settings, epoch: int) -> float:
    """Return the factor on lr in an epoch counted from 0: a linear warm-up, then a cosine or half of it."""
    if epoch < settings.warmup:
        return _WARMUP_START + (1 - _WARMUP_START) * epoch / settings.warmup
    return cosine(epoch - settings.warmup, settings.zeta * (settings.epochs - settings.warmup))


def own_recipe(method: str, settings: Mapping[str, Any]) -> str:
    """Return the soft recipe that a method was published with, D3HR's `paper` where it has none.

    By a set's `settings` of its method: those of D3HR's preset `repo` are trained on by its code's recipe and
    those of `d4m` by SRe2L's; an ablation that has only some of them by `paper`.
    """
    if method == "d3hr":
        if settings.items() >= _D3HR_REPO.items():
            return "repo"
        return "sre2l" if settings.items() >= _D4M.items() else "paper"
    return _OWN.get(method, "paper")
