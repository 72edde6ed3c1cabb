"""Presets of DSDM, and settings that are refused."""

from __future__ import annotations

from typing import Any

import pytest

from ddray.distillation.method import Target
from ddray.errors import InputError
from ddray.jobs.plan import resolve
from ddray.methods import get_method
from ddray.methods.dsdm import preset


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"method": {"use_proto": False, "use_sd": False}}, "dsdm needs use_proto, or use_sd"),
        ({"method": {"use_proto": False, "factor": 1}}, "2 images per class and step, .* 1 mini-images"),
        ({"method": {"use_proto": False, "batch_syn": 1}}, "2 images per class and step, .* 1 mini-images"),
        ({"method": {"use_proto": False, "batch_real": 1}}, "2 images per class and step, .* and 1 real"),
        ({"pixel_space": "raw"}, "dsdm needs pixel_space=normalized.*got raw"),
        ({"pixel_space": "zca"}, "dsdm needs pixel_space=normalized.*got zca"),
        ({"method": {"augment": "dsa", "strategy": "color_crap"}}, "DSA operation must be one of .*crop"),
        ({"method": {"factor": 3}, "shape": (3, 2, 16)}, "factor must be at most the image's side of 2 px"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    layers: dict[str, Any], message: str, toy: Any, planned: Any
) -> None:
    shape = layers.pop("shape", (3, 16, 16))
    arch = "convnet1_w8" if min(shape[1:]) < 16 else "convnet2_w8"
    _, ctx, distiller = planned("dsdm", toy(shape=shape), steps=1, arch=arch, **layers)

    with pytest.raises(InputError, match=message):
        distiller.setup(ctx)


def target(name: str, shape: tuple[int, int, int], ipc: int, **options: Any) -> Target:
    return Target(name, shape, 10, ipc, **options)


def test_presets_hold_the_table_of_methods() -> None:
    preset = get_method("dsdm").preset
    paper, repo = (preset(name, target("cifar10", (3, 32, 32), 10)) for name in ("paper", "repo"))

    assert (paper["steps"], repo["steps"]) == (10_000, 10_000)
    assert paper["evaluate"] == repo["evaluate"]
    assert paper["evaluate"] == {
        "epochs": 1500,
        "batch": 64,
        "schedule": "multistep",
        "augment": "dsa_idc",
        "strategy": "color_crop_flip_scale_rotate",
        "cutmix": 0.5,
    }
    defaults = get_method("dsdm").config_type()
    # "We follow the configuration of DM" (Sec 5.1): DM's momentum and DSA, at DSDM's own rate.
    theirs = get_method("dm").config_type()
    assert (theirs.momentum, theirs.augment, theirs.batch_real) == (0.5, "dsa", defaults.batch_real)
    assert paper["method"] == {"momentum": 0.5, "augment": "dsa"}
    expected = {
        "lr_img": 0.1,
        "momentum": 0.0,
        "lambda1": 50.0,
        "lambda2": 0.2,
        "ema": 0.99,
        "factor": 2,
        "unbiased": False,
        "augment": "none",
        "init": "random",
        "history_first": "zero",
        "batch_real": 256,
    }
    assert {key: getattr(defaults, key) for key in expected} == expected
    assert (defaults.pool.num_models, defaults.pool.epochs, defaults.pool.cutmix) == (10, 20, 0.0)
    assert repo["method"]["history_from"] == 2001
    assert repo["method"]["strategy"] == "color_crop_cutout"
    assert repo["method"]["pool"] == {"augment": "dsa_idc", "strategy": "color_crop", "cutmix": 0.5}


@pytest.mark.parametrize(
    ("name", "shape", "ipc", "lr"),
    [
        ("cifar10", (3, 32, 32), 10, 0.1),
        ("cifar10", (3, 32, 32), 1, 0.01),
        ("cifar10", (3, 32, 32), 50, 0.5),
        ("mnist", (1, 28, 28), 10, 0.1),
        ("tiny_imagenet", (3, 64, 64), 10, 0.4),
        ("imagenette", (3, 112, 112), 10, 0.025),
        ("/data/grey_pictures", (1, 64, 64), 10, 0.4),
    ],
)
def test_the_repos_step_size_follows_ipc_and_size(
    name: str, shape: tuple[int, int, int], ipc: int, lr: float
) -> None:
    assert preset("repo", target(name, shape, ipc))["method"]["lr_img"] == pytest.approx(lr)


def test_the_repos_step_size_for_speech_has_a_base_of_its_own() -> None:
    words = target("/data/words", (1, 64, 64), 20, is_audio=True)
    assert preset("repo", words)["method"]["lr_img"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("name", "shape", "options", "strategy", "cutmix"),
    [
        ("mnist", (1, 28, 28), {"can_flip": False}, "color_crop_scale_rotate", 0.0),
        ("mnist", (1, 28, 28), {"can_flip": False, "factor": 2}, "color_crop_scale_rotate", 0.0),
        ("mnist", (1, 28, 28), {"can_flip": False, "factor": 1}, "color_crop_scale_rotate", 0.5),
        ("svhn", (3, 32, 32), {"can_flip": False}, "color_crop_scale_rotate", 0.5),
        ("cifar10", (3, 32, 32), {"can_flip": False}, "color_crop_scale_rotate", 0.5),
        ("cifar100", (3, 32, 32), {}, "color_crop_flip_scale_rotate", 0.5),
        ("speech_commands_mini", (1, 64, 64), {"is_audio": True}, None, 0.0),
        ("grey_pictures", (1, 64, 64), {}, "color_crop_flip_scale_rotate", 0.5),
    ],
)
def test_evaluation_follows_the_dataset(
    name: str, shape: tuple[int, int, int], options: dict[str, Any], strategy: str | None, cutmix: float
) -> None:
    settings = preset("repo", target(name, shape, 10, **options))

    assert settings["evaluate"].get("strategy") == strategy
    assert settings["evaluate"]["cutmix"] == cutmix
    assert (
        (settings["evaluate"]["augment"] == "none")
        == (strategy is None)
        == ("augment" not in settings["method"])
    )


@pytest.mark.parametrize(
    ("name", "options", "matching", "cutmix"),
    [
        ("mnist", {}, "color_crop", 0.0),
        ("mnist", {"factor": 2}, "color_crop", 0.0),
        ("mnist", {"factor": 1}, "color_crop_cutout", 0.5),
        ("fashion_mnist", {}, "color_crop_cutout", 0.5),
        ("svhn", {"can_flip": False}, "color_crop_cutout", 0.5),
        ("cifar10", {}, "color_crop_cutout", 0.5),
    ],
)
def test_mnist_at_factor_2_is_matched_without_cutout_and_cutmix(
    name: str, options: dict[str, Any], matching: str, cutmix: float
) -> None:
    """IDC's misc/reproduce.py, which DSDM's --reproduce runs: aug_type and mixup_net."""
    method = preset("repo", target(name, (1, 28, 28), 10, **options))["method"]
    assert (method["augment"], method["strategy"]) == ("dsa_idc", matching)
    assert method["pool"] == {"augment": "dsa_idc", "strategy": "color_crop", "cutmix": cutmix}


@pytest.mark.parametrize(
    ("ipc", "factor", "strategy", "cutmix"),
    [
        (1, 1, "color_crop_cutout_scale_rotate", 0.0),
        (1, 2, "color_crop_scale_rotate", 0.5),
        (1, None, "color_crop_scale_rotate", 0.5),
        (10, 1, "color_crop_scale_rotate", 0.5),
    ],
)
def test_one_uncut_image_of_a_house_number_is_not_mixed(
    ipc: int, factor: int | None, strategy: str, cutmix: float
) -> None:
    house_numbers = target("svhn", (3, 32, 32), ipc, can_flip=False, factor=factor)
    evaluate = preset("repo", house_numbers)["evaluate"]
    assert (evaluate["strategy"], evaluate["cutmix"]) == (strategy, cutmix)
    assert preset("paper", house_numbers)["evaluate"] == evaluate


def test_speech_is_matched_without_augmentation_in_both_presets() -> None:
    words = target("/data/words", (1, 64, 64), 20, is_audio=True)
    assert preset("paper", words)["method"] == {"momentum": 0.5, "augment": "none"}
    assert "augment" not in preset("repo", words)["method"]


def test_nested_pool_settings_are_set_one_by_one(digits: Any) -> None:
    plan = resolve("dsdm", digits, ipc=1, layers=[{"method": {"pool": {"num_models": 3}}}, {"steps": 2}])

    assert (plan.config.method.pool.num_models, plan.config.method.pool.epochs) == (3, 10)
    with pytest.raises(
        InputError, match=r"unknown option 'method\.pool\.num_model'.*did you mean 'num_models'"
    ):
        resolve("dsdm", digits, ipc=1, layers=[{"method": {"pool": {"num_model": 3}}}])
