"""MTT: dataset distillation by matching training trajectories (Cazenavette et al., CVPR 2022; Algorithm 1).

Each step trains a student for N steps on the synthetic images, from the weights of an expert after epoch t,
and moves the images and the student's learning rate so that it ends where the expert was M epochs later.
Labels are hard and fixed. TESLA's cheaper gradient is `gradient=tesla`, FTD's experts are those with
`experts.rho` and `experts.alpha`.

**Deviations** (paper | authors' code | ours)

- lr_img of CIFAR-10 at ipc 10: 1e5 | 1e5 in its table, a typo by its author (the rate explodes) | 100, as in
  DC-BENCH's command and FTD's.
- lr_img of ImageNet subsets: - | 1000 in its README, 1e5 in its author's answer | 1000.
- CIFAR-100 without ZCA: - | normalised by CIFAR-10's mean and standard deviation | by its own.
- the learned rate: trainable | never clamped, can turn negative | the run fails with a message at a <= 0.
- experts: sampled | a shuffled cycle, without replacement; `--load_all`: uniform | uniform.
- experts have seen: all of train | all of train | the nine tenths that a search distils from, by which ZCA is
  fitted too: runs of all seeds and searches share them.
- batches of a step: - | of a permutation, from its end; a fresh one when used up and in each iteration | the
  same.
- gradient: through the whole graph of N steps | the same | the same, by a reverse sweep in constant memory.
- score: 5 networks, the best of looks at test every 1,000 iterations | every 100 | the last iteration, by the
  learned rate; `--set evaluate.lr=.01` for a common one.
- settings of other datasets: - | - | those of CIFAR-10 to 20 classes and of CIFAR-100 beyond, without ZCA; of
  Tiny ImageNet from 64 px, of ImageNet from 128 px; of the next lower ipc.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final, Literal

from ddray.distillation.method import DistillContext, Target
from ddray.methods.families.factory import make_method
from ddray.methods.families.matching.initial import initial_images
from ddray.methods.families.trajectories import (
    COUPLING,
    QUICK,
    SEARCH_SPACE,
    TrajectoryConfig,
    TrajectoryMatching,
    evaluation,
    expert_specs,
    family,
    in_expert_space,
)

_DIGITS: Final = {"num_models": 5, "epochs": 12, "lr": 0.02, "batch": 32}
_FIELDS: Final = ("inner_steps", "expert_epochs", "max_start", "batch_syn", "lr_img", "lr_lr", "lr_start")
_TABLE: Final[dict[str, dict[int, tuple[Any, ...]]]] = {
    "cifar10": {
        1: (50, 2, 2, None, 100.0, 1e-7, 0.01),
        10: (30, 2, 20, None, 100.0, 1e-5, 0.001),
        50: (30, 2, 40, None, 1000.0, 1e-5, 0.001),
    },
    "cifar100": {
        1: (20, 3, 20, None, 1000.0, 1e-5, 0.01),
        10: (20, 2, 20, None, 1000.0, 1e-5, 0.01),
        50: (80, 2, 40, 125, 1000.0, 1e-5, 0.01),
    },
    "tinyimagenet": {
        1: (10, 2, 10, None, 1e4, 1e-4, 0.01),
        10: (20, 2, 40, 200, 1e4, 1e-4, 0.01),
        50: (20, 2, 40, 300, 1e4, 1e-4, 0.01),
    },
    "imagenet": {
        1: (20, 2, 10, None, 1000.0, 1e-6, 0.01),
        10: (20, 2, 10, 20, 1000.0, 1e-6, 0.01),
    },
}
_WHITENED: Final = {("cifar10", 1), ("cifar10", 10), ("cifar100", 1), ("cifar100", 50)}


class MTTConfig(TrajectoryConfig):
    """MTT's settings; defaults are those of CIFAR-10 at ipc 1."""

    search_space: ClassVar = {**SEARCH_SPACE, "max_start": {"choice": [1, 2, 3, 5, 10]}}
    dataset_settings: ClassVar = {
        "digits": {
            "arch": "convnet3_w32",
            "steps": 300,
            "method": {
                **{"inner_steps": 20, "expert_epochs": 3, "max_start": 4, "batch_syn": None},
                **{"lr_img": 100.0, "lr_lr": 1e-7, "lr_start": 0.02, "experts": _DIGITS},
            },
        }
    }
    quick: ClassVar = QUICK

    init: Literal["random", "noise"] = "random"
    """Initial images: random real ones, or Gaussian noise."""


def preset(name: str, target: Target) -> dict[str, Any]:
    """Return the settings; those of the paper's table and of the code are the same (see Deviations)."""
    rows = _TABLE[family(target)]
    ipc = max((published for published in rows if published <= target.ipc), default=1)
    whitened = family(target) == target.dataset and (target.dataset, ipc) in _WHITENED
    return {
        "steps": 5000,
        "pixel_space": "zca" if whitened else "normalized",
        "evaluate": evaluation(),
        "method": dict(zip(_FIELDS, rows[ipc], strict=True)),
    }


def start(ctx: DistillContext, config: MTTConfig) -> TrajectoryMatching:
    """Return trajectory matching from random real images, with their classes as labels."""
    ctx = in_expert_space(ctx)
    experts = ctx.pool.get(expert_specs(ctx, config))
    images, labels = initial_images(ctx, config.init)
    return TrajectoryMatching(ctx, config, experts, images, labels)


METHOD: Final = make_method(MTTConfig, preset, start, specs_of=expert_specs, coupling=COUPLING)
