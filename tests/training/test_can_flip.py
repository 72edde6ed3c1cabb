"""No method, protocol or sweep mirrors the images of a dataset whose classes a mirror changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ddray.artifact.distilled_set import TrainSet
from ddray.data import normalized_space, open_dataset
from ddray.evaluation import get_protocol
from ddray.evaluation.options import EvaluateOptions
from ddray.evaluation.protocol import EvalContext, RealImages
from ddray.jobs.plan import budget_method, resolve
from ddray.jobs.trainers import PoolTrainer
from ddray.methods import get_method, method_names
from ddray.methods.families.ssl import teacher
from ddray.pool.local import LocalPool
from ddray.ranking.options import NasConfig, NasOptions
from ddray.ranking.proxies import whole_proxy
from ddray.ranking.spaces import resolve_config
from ddray.ranking.sweep import Sweep
from ddray.ranking.worker import Workbench
from ddray.training import crops, operations
from tests.methods.diffusion_models import BASE

CPU = torch.device("cpu")
COUNTS = (12, 12, 12)


@pytest.fixture
def mirrored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lists who mirrors images."""
    seen: list[str] = []

    def watch(module: Any, name: str, mirrors: Callable[..., bool]) -> Callable[..., Any]:
        original = getattr(module, name)

        def call(*args: Any, **options: Any) -> Any:
            if mirrors(*args, **options):
                seen.append(name)
            return original(*args, **options)

        monkeypatch.setattr(module, name, call)
        return call

    flip = watch(operations, "flip", lambda *args: True)
    monkeypatch.setitem(operations.OPERATIONS, "flip", flip)
    watch(crops, "resized_crops", lambda images, boxes, flips=None: flips is not None and bool(flips.any()))
    watch(teacher, "random_view", lambda *args, flip, **options: flip)
    return seen


def distil(method: str, dataset: Any, planned: Any) -> Any:
    """Distil for a step, augmented where there is augmentation."""
    config_type = get_method(method).config_type
    settings = dict(getattr(config_type, "quick", {}))
    fields = config_type.model_fields
    if "augment" in fields:
        settings |= {"augment": "dsa_idc", **({"strategy": None} if "strategy" in fields else {})}
    if method in ("datm", "mtt"):  # an operation a step, which must be flip once
        settings |= {"augment": "dsa", "inner_steps": 40}
    if "augment_real" in fields:
        settings["augment_real"] = "crop_flip"
    if method == "d3hr":
        settings |= BASE
    if method == "dsdm":
        settings["pool"] = {"num_models": 1, "epochs": 1, "augment": "dsa_idc"}
    steps = {"steps": 1} if resolve(method, dataset, ipc=1).config.steps else {}
    _, ctx, distiller = planned(method, dataset, method=settings, **steps)
    distiller.setup(ctx)
    for _ in range(distiller.num_steps):
        distiller.step()
    return distiller.snapshot()


MIRRORING = {"cafe", "datadam", "datm", "dc", "dd", "dm", "dsa", "dsdm", "idm", "m3d", "mmd_pixel"}
MIRRORING |= {"biggan", "esfr", "mtt", "boost_ssdd", "krr_st", "kmeans_ssl", "random_ssl"}


@pytest.mark.parametrize("method", method_names())
def test_methods_mirror_images_only_where_they_may(
    method: str, mirrored: list[str], toy: Any, planned: Any
) -> None:
    distil(method, toy(COUNTS, name="turned", can_flip=False), planned)
    assert not mirrored
    if method in MIRRORING:
        distil(method, toy(COUNTS, seed=1), planned)
        assert mirrored, "the test would see it"
    assert budget_method(method) is None or method in MIRRORING


@pytest.mark.parametrize("protocol", ["continual", "hard", "linear", "finetune", "robust", "soft"])
@pytest.mark.parametrize("can_flip", [False, True])
def test_protocols_mirror_images_only_where_they_may(
    protocol: str, can_flip: bool, mirrored: list[str], toy: Any, planned: Any
) -> None:
    dataset = toy(COUNTS, can_flip=can_flip)
    _, ctx, distiller = planned("random", dataset, ipc=4)
    distiller.setup(ctx)
    distilled = distiller.snapshot()
    options: dict[str, Any] = {"protocol": protocol, "epochs": 3, "augment": "dsa_idc"}
    if protocol == "soft":
        options = {**options, "augment": None, "teachers": ("convnet2_w8",), "sets": ("teacher.epochs=20",)}
    elif protocol == "finetune":
        options |= {"protocol": "linear", "finetune": True, "augment": "none", "sets": ("finetune.steps=2",)}
    elif protocol == "continual":
        options["num_tasks"] = 2
    parsed = EvaluateOptions(**options)
    context = EvalContext(dataset, dataset.test(), normalized_space(dataset), CPU)
    real = RealImages(dataset.train(), "train", LocalPool(PoolTrainer(dataset, dataset.train(), CPU)))
    scoring = get_protocol(parsed.protocol).make(parsed, distilled, context, real)
    train_set = TrainSet(distilled.images, distilled.labels)

    scoring.evaluator.evaluate(train_set, context, arch="convnet1_w8", seed=0)

    assert bool(mirrored) == can_flip


def sweep_of(dataset: Any) -> Sweep:
    options = NasOptions(sample=1, epochs=6, executor="local")
    config: NasConfig = resolve_config(options, ({"recipe": {"batch": 4, "augment": "dsa"}},))
    split = dataset.train()
    return Sweep(options, config, dataset, split, split, (whole_proxy(split, dataset),), (0,), "cpu")


@pytest.mark.parametrize("can_flip", [False, True])
def test_sweeps_mirror_images_only_where_they_may(can_flip: bool, mirrored: list[str], toy: Any) -> None:
    sweep = sweep_of(toy(COUNTS, can_flip=can_flip))
    tasks = sweep.tasks(fused=False)
    Workbench(sweep.data(tasks), CPU).run(tasks[0])
    assert bool(mirrored) == can_flip


def test_truth_of_images_that_are_mirrored_is_another() -> None:
    """The fingerprint is that of the images, which are the same."""
    keys = {
        name: {task.key for task in sweep_of(open_dataset(name)).tasks(fused=False)}
        for name in ("digits", "digits?can_flip=true", "digits?can_flip=false")
    }
    assert not keys["digits"] & keys["digits?can_flip=true"]
    assert not keys["digits?can_flip=false"] & keys["digits?can_flip=true"]


def test_the_setting_decides_the_preset_of_the_idc_family() -> None:
    for name, expected in (
        ("digits", "color_crop_scale_rotate"),
        ("digits?can_flip=true", "color_crop_flip_scale_rotate"),
    ):
        assert resolve("dsdm", open_dataset(name), ipc=1).config.evaluate.strategy == expected


def test_images_of_a_folder_pretrain_as_their_dataset_says(toy: Any, planned: Any) -> None:
    """A set of its own target's dataset, which no catalog knows."""
    for can_flip in (True, False):
        dataset = toy(name="/pictures", can_flip=can_flip)
        _, ctx, distiller = planned("random", dataset)
        distiller.setup(ctx)
        context = EvalContext(dataset, dataset.test(), normalized_space(dataset), CPU)
        pool: Any = None
        real = RealImages(dataset.train(), "train", pool)
        options = EvaluateOptions(protocol="linear")
        evaluator: Any = get_protocol("linear").make(options, distiller.snapshot(), context, real).evaluator
        assert evaluator.can_flip is can_flip
