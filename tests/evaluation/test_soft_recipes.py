from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ddray.distillation.method import Target
from ddray.errors import InputError
from ddray.evaluation.soft_recipes import (
    Settings,
    SoftConfig,
    check_loss,
    own_recipe,
    rate_factor,
    recipe_teachers,
    resolve_settings,
)
from ddray.methods.d3hr import preset

TARGET = Target("cifar10", (3, 32, 32), 10, 10)


def resolved(
    ipc: int = 10, num_classes: int = 10, size: int = 32, arch: str = "resnet18", **options: Any
) -> Settings:
    config = SoftConfig.parse(options)
    return resolve_settings(
        config, arch=arch, num_images=ipc * num_classes, num_classes=num_classes, size=size
    )


@pytest.mark.parametrize(
    ("recipe", "task", "expected"),
    [
        ("paper", {}, (400, 0.01, 100)),  # never more than the set has
        ("paper", {"ipc": 50}, (400, 0.01, 128)),
        ("paper", {"num_classes": 200, "size": 64}, (300, 0.01, 128)),
        ("repo", {}, (400, 0.001, 50)),
        ("repo", {"ipc": 50, "num_classes": 100}, (400, 0.001, 200)),
        ("repo", {"ipc": 50, "num_classes": 1000, "size": 224}, (300, 0.001, 100)),
        ("repo", {"ipc": 1, "arch": "mobilenet_v2"}, (400, 0.0025, 10)),
        ("repo", {"lr": 0.1, "batch": 7, "epochs": 3, "arch": "vgg11"}, (3, 0.1, 7)),
        ("table5", {"size": 224}, (2000, 0.001, 50)),
        ("table5", {"ipc": 50, "size": 224}, (1500, 0.001, 100)),
        ("table5", {"ipc": 100, "size": 224}, (1000, 0.001, 100)),
        ("rded", {"ipc": 1, "num_classes": 100}, (300, 0.001, 20)),
        ("rded", {"ipc": 50, "num_classes": 1000, "size": 224}, (300, 0.001, 200)),
        ("rded", {"num_classes": 200, "size": 64}, (300, 0.001, 100)),
        ("rded", {"arch": "vgg11"}, (300, 0.0005, 50)),
        ("sre2l", {"ipc": 50, "num_classes": 100}, (400, 0.001, 128)),
        ("sre2l", {"ipc": 50, "num_classes": 200, "size": 64}, (100, 0.2, 256)),
        ("sre2l", {"ipc": 10, "num_classes": 1000, "size": 224}, (300, 0.001, 1024)),
        ("rd3", {}, (400, 0.001, 50)),
        ("rd3", {"ipc": 50, "num_classes": 1000, "size": 224, "arch": "convnet3"}, (400, 0.001, 50)),
        ("sre2l_cifar", {"ipc": 50, "size": 64}, (400, 0.001, 128)),
        ("gvbsm", {}, (1000, 0.001, 100)),
        ("gvbsm", {"num_classes": 100}, (1000, 0.1, 64)),
        ("gvbsm", {"num_classes": 200, "size": 64}, (100, 0.1, 100)),
        ("gvbsm", {"ipc": 50, "num_classes": 1000, "size": 224}, (300, 0.001, 1024)),
        ("d3hr", {"ipc": 50, "num_classes": 100}, (400, 0.001, 200)),
        ("dwa", {"ipc": 50, "num_classes": 100}, (400, 0.001, 128)),
        ("dwa", {"ipc": 50, "num_classes": 200, "size": 64}, (200, 0.2, 64)),
        ("dwa", {"ipc": 10, "num_classes": 1000, "size": 224}, (300, 0.001, 128)),
    ],
)
def test_lengths_rates_and_batches(recipe: str, task: dict[str, Any], expected: tuple[Any, ...]) -> None:
    settings = resolved(recipe=recipe, **task)

    assert (settings.epochs, settings.lr, settings.batch) == expected


COMMON = {
    **{
        "optimizer": "adamw",
        "weight_decay": 0.01,
        "decay": "matrices",
        "temperature": 20.0,
        "scale_loss": False,
    },
    **{"crop": "resized", "min_scale": 0.08, "mix_alpha": 1.0, "warmup": 0, "bn_updates": 1},
    **{"teacher_mode": "eval", "average": "probabilities"},
}
CODE = {"schedule": "half_cosine", "mix": "cutmix", "bn_updates": 2}
SRE2L_CIFAR = {
    **{"schedule": "cosine", "mix": "mixup", "mix_alpha": 0.8, "crop": "padded", "decay": "all"},
    **{"temperature": 30.0, "teacher_mode": "train"},
}
GVBSM = {"loss": "mse_gt", "ce_weight": 0.15, "average": "logits", "zeta": 1.0, "mix": "cutmix"}
GVBSM_SGD = {**GVBSM, "optimizer": "sgd", "weight_decay": 5e-4}
TINY_SGD = {"optimizer": "sgd", "weight_decay": 1e-4, "decay": "all", "warmup": 5, "scale_loss": True}


@pytest.mark.parametrize(
    ("recipe", "task", "differences"),
    [
        ("paper", {}, {"schedule": "cosine", "mix": "none"}),  # Table A1 names neither half nor CutMix
        ("repo", {}, {**CODE, "average": "logits"}),
        ("table5", {}, {"schedule": "half_cosine", "mix": "mixup", "average": "logits"}),
        ("rded", {}, {**CODE, "min_scale": 1.0}),
        ("rded", {"size": 224, "patches": 2}, {**CODE, "min_scale": 0.5}),
        ("sre2l", {}, SRE2L_CIFAR),
        ("sre2l", {"size": 64}, {**TINY_SGD, "schedule": "cosine", "mix": "none"}),
        ("sre2l", {"size": 224}, {"schedule": "cosine", "mix": "cutmix"}),
        ("sre2l_cifar", {}, SRE2L_CIFAR),
        ("sre2l_cifar", {"size": 224}, SRE2L_CIFAR),
        ("d3hr", {}, {**CODE, "average": "logits", "loss": "kl"}),
        ("dwa", {}, SRE2L_CIFAR),
        ("dwa", {"size": 64}, {**TINY_SGD, "schedule": "cosine", "mix": "cutmix"}),
        ("dwa", {"size": 224}, {"schedule": "cosine", "mix": "cutmix"}),
        ("gvbsm", {}, {**GVBSM, "weight_decay": 0.0}),
        ("gvbsm", {"num_classes": 100}, GVBSM_SGD),
        ("gvbsm", {"num_classes": 200, "size": 64}, {**GVBSM_SGD, "ce_weight": 0.1}),
        ("gvbsm", {"size": 224}, {**GVBSM, "average": "scaled_logits", "ce_weight": 0.1}),
        ("rd3", {}, {"zeta": 1.0, "mix": "cutmix", "weight_decay": 0.0, "loss": "kl"}),
        ("rd3", {"arch": "convnet3_bn"}, {"zeta": 2.0, "mix": "cutmix", "weight_decay": 0.0}),
    ],
)
def test_a_recipe_is_its_source(recipe: str, task: dict[str, Any], differences: dict[str, Any]) -> None:
    settings = resolved(recipe=recipe, **task).dump()

    expected = {**COMMON, **differences}
    assert {name: settings[name] for name in expected} == expected


def test_a_setting_wins_over_the_recipe() -> None:
    settings = resolved(recipe="sre2l", temperature=4.0, mix="none", scale_loss=True, min_scale=0.3)

    assert (settings.temperature, settings.mix, settings.scale_loss, settings.min_scale) == (
        4.0,
        "none",
        True,
        0.3,
    )
    assert resolved(recipe="sre2l", mix="auto").mix == "mixup"


def test_half_a_cosine_is_the_codes_and_ends_near_half_the_rate() -> None:
    factors = [rate_factor(resolved(recipe="repo", epochs=40), epoch) for epoch in range(40)]

    assert factors == pytest.approx([0.5 * (1 + math.cos(math.pi * epoch / 40 / 2)) for epoch in range(40)])
    assert factors[0] == 1
    assert 0.5 < factors[-1] < 0.52


def test_zeta_two_is_half_a_cosine_and_zeta_one_ends_near_zero() -> None:
    """RD3's rate .5 (1 + cos(pi e / (zeta E))); it wins over the schedule of the recipe."""

    def factors(**options: Any) -> list[float]:
        settings = resolved(epochs=40, **options)
        return [rate_factor(settings, epoch) for epoch in range(40)]

    assert factors(recipe="paper", zeta=2) == factors(recipe="repo")
    assert factors(recipe="repo", zeta=1) == factors(recipe="paper")
    assert factors(recipe="rd3", arch="convnet3") == factors(recipe="repo")
    assert factors(recipe="rd3") == pytest.approx(
        [0.5 * (1 + math.cos(math.pi * epoch / 40)) for epoch in range(40)]
    )
    assert factors(recipe="rd3")[-1] < 0.002
    assert factors(recipe="rd3", zeta=3)[-1] > 0.7
    with pytest.raises(InputError, match=r"zeta: input should be greater than or equal to 1, got 0\.5"):
        SoftConfig.parse({"zeta": 0.5})


def test_settings_that_the_loss_lacks_are_refused() -> None:
    assert resolved(recipe="rd3", loss="mse_gt").average == "logits"
    assert resolved(recipe="rd3", loss="mse_gt", average="scaled_logits").average == "scaled_logits"
    for options, reason in (
        ({"ce_weight": 0.1}, "ce_weight must be left out with loss kl, got 0.1; add --set loss=mse_gt"),
        ({"recipe": "gvbsm", "average": "probabilities"}, "average must be logits or scaled_logits"),
        ({"recipe": "table5", "loss": "kl"}, "loss must be left out with recipe table5, got kl; it has no"),
        ({"recipe": "table5", "average": "logits"}, "average must be left out with recipe table5, got log"),
        ({"recipe": "gvbsm", "temperature": 4.0}, "temperature must be left out with loss mse_gt, got 4.0"),
    ):
        with pytest.raises(InputError, match=reason):
            check_loss(SoftConfig.parse(options))


def test_what_came_later_is_no_part_of_older_settings() -> None:
    assert not {"zeta", "loss", "ce_weight"} & SoftConfig().dump().keys()


def test_the_teachers_of_a_recipe() -> None:
    assert recipe_teachers("rd3", 32) == recipe_teachers("paper", 224) == ("resnet18",)
    assert len(recipe_teachers("gvbsm", 32)) == 5
    assert len(recipe_teachers("gvbsm", 224)) == 4


@pytest.mark.parametrize("recipe", ["paper", "sre2l"])
def test_a_whole_cosine_is_torchs(recipe: str) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)
    settings = resolved(recipe=recipe, epochs=30)

    for epoch in range(30):
        assert rate_factor(settings, epoch) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        schedule.step()


def test_a_warm_up_is_that_of_sre2ls_log() -> None:
    """The rates that its log of Tiny-ImageNet prints, epochs 0 to 8 of 100."""
    printed = [0.002, 0.0416, 0.0812, 0.1208, 0.1604, 0.2, 0.19994532573, 0.19978136272, 0.19950829025]
    settings = resolved(recipe="sre2l", num_classes=200, size=64)

    rates = [settings.lr * rate_factor(settings, epoch) for epoch in range(9)]

    assert rates == pytest.approx(printed, rel=1e-9)
    assert [
        rate_factor(resolved(recipe="sre2l", size=64, epochs=2), epoch) for epoch in range(2)
    ] == pytest.approx([0.01, 0.208])


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        ("rded", {"factor": 2}, "rded"),
        ("sre2l", {}, "sre2l"),
        ("d3hr", {"form": "paper"}, "paper"),
        ("d3hr", {"form": "repo", "lambda_skew": 0.1}, "paper"),  # an ablation of the score
        ("d3hr", preset("repo", TARGET)["method"], "repo"),
        ("d3hr", preset("paper", TARGET)["method"], "paper"),
        ("d3hr", {"sampling": "kmeans"}, "paper"),  # an ablation
        ("d3hr", {"sampling": "kmeans", "km_expand": 1, "guidance": 8.0}, "sre2l"),  # D4M's settings
        ("dwa", {}, "dwa"),
        ("g_vbsm", {}, "gvbsm"),
        ("d3s", {}, "d3hr"),
        ("minimax", {}, "rded"),
        ("dit", {}, "rded"),
        ("rd3", {}, "paper"),
        ("dm", {}, "paper"),
        ("table5", {}, "paper"),
    ],
)
def test_a_methods_own_recipe(method: str, settings: dict[str, Any], expected: str) -> None:
    assert own_recipe(method, settings) == expected
