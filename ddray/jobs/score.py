"""`ddray evaluate` as a function: a distilled set's file, a protocol and its options, scored on a dataset."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddray.artifact.distilled_set import DistilledSet, TrainSet
from ddray.artifact.partition import default_factor
from ddray.artifact.reading import load
from ddray.config import merge, parse_overrides
from ddray.data import Dataset, PixelSpace, Split, carve_val, fit_zca, open_dataset
from ddray.data.catalog import KNOWN
from ddray.errors import InputError, unknown
from ddray.evaluation.config import EvaluateConfig
from ddray.evaluation.continual import Continual
from ddray.evaluation.hard import Hard
from ddray.evaluation.linear import Linear
from ddray.evaluation.options import HARD_RECIPE, NUM_TASKS, EvaluateOptions, PixelKind
from ddray.evaluation.protocol import EvalContext, EvalResult, Evaluator, evaluate_archs
from ddray.evaluation.robust import Robust
from ddray.evaluation.soft import Soft, SoftConfig
from ddray.evaluation.subsets import limited
from ddray.evaluation.teachers import Teachers, get_teachers
from ddray.jobs.trainers import PoolTrainer
from ddray.nets.names import resolve_arch
from ddray.pool.local import LocalPool
from ddray.seeding import derive
from ddray.system.progress import progress
from ddray.training.recipe import named_recipe

log = logging.getLogger(__name__)


def evaluate(
    path: Path, options: EvaluateOptions, *, device: torch.device, dataset: Dataset | None = None
) -> dict[str, Any]:
    """Score a distilled set.

    Args:
        path: the artifact, ours or another project's.
        options: what to do.
        device: where to compute.
        dataset: the target, opened; default `options.dataset`.

    Returns:
        The command's JSON (docs/architecture.md, Commands).

    Raises:
        InputError: the file, the dataset or an option is bad, or the set does not fit the dataset.
        DivergedError: a training loss became NaN.
    """
    dataset = dataset or _target(options.dataset, options)
    space = foreign_space(dataset, options.pixel_space)
    distilled = load(path, dataset=dataset, pixel_space=space)
    target = dataset or _target(distilled.meta.dataset, options)
    if target is None:
        raise InputError(f"{path} does not say which dataset it was distilled from: add --dataset NAME")
    check_fits(distilled, target, path, options.protocol)
    meta = distilled.meta
    archs = tuple(resolve_arch(arch, meta.image_shape) for arch in options.archs) or (meta.arch,)
    real, real_name, held_out = _real_and_held_out(target, options.split, distilled)
    if held_out.is_audio and options.augment not in (None, "none"):
        raise InputError(f"--augment must be none for spectrograms ({target.name}), got {options.augment}")
    distilled = distilled.generated(options.ipc, device)  # after every check: this takes minutes
    ctx = EvalContext(target, held_out, distilled.space(), device)
    details: dict[str, Any] = {}
    evaluator: Evaluator
    lesson = teach(options, distilled, ctx, (real, real_name))
    if lesson is not None:
        evaluator, num_seeds, details = lesson.evaluator, lesson.num_seeds, lesson.describe()
    else:
        config = evaluation_config(distilled, options)
        evaluator, num_seeds = _evaluator(config, options, distilled, (real, real_name)), config.seeds
        if options.protocol == "robust":
            full_epochs = options.full_epochs or config.epochs
            details = {"full_epochs": full_epochs, "random_per_class": _images_at_storage(distilled)}
    results = _score(
        evaluator,
        _train_set(distilled, options),
        ctx,
        archs=archs,
        num_seeds=num_seeds,
        seed=options.seed,
        title=f"evaluating {path.name}",
    )
    return {"protocol": options.protocol, "split": options.split, **details, "results": results}


def _score(
    evaluator: Evaluator,
    train_set: TrainSet,
    ctx: EvalContext,
    *,
    archs: Sequence[str],
    num_seeds: int,
    seed: int,
    title: str,
) -> list[dict[str, Any]]:
    """Score every architecture, showing progress under a title."""
    with progress(title, len(archs) * num_seeds) as show:
        done = 0

        def note(result: EvalResult) -> None:
            nonlocal done
            done += 1
            show(done, f"{result.arch}: {result.accuracy:.1%}")

        return evaluate_archs(
            evaluator, train_set, ctx, archs=archs, num_seeds=num_seeds, seed=seed, on_result=note
        )


def _train_set(distilled: DistilledSet, options: EvaluateOptions) -> TrainSet:
    """Return the set as decoded, or a stratified part of it."""
    if options.protocol == "linear":
        return distilled.decode()
    return _limited(distilled.decode(), options)


def _limited(train_set: TrainSet, options: EvaluateOptions) -> TrainSet:
    """Return at most `train_limit` images of a set, stratified."""
    if options.train_limit is None:
        return train_set
    return limited(train_set, options.train_limit, derive(options.seed, "evaluate", "train-limit"))


def _images_at_storage(distilled: DistilledSet) -> int:
    """Return how many real images per class fit the storage of a set."""
    per_class = len(distilled.meta.class_names) * math.prod(distilled.meta.image_shape)
    return max(1, distilled.meta.storage_floats // per_class)


def _evaluator(
    config: EvaluateConfig, options: EvaluateOptions, distilled: DistilledSet, real: tuple[Split, str]
) -> Evaluator:
    """Return the protocol of the options; `real` are the real images and their split's name."""
    recipe = config.as_recipe()
    if options.protocol == "linear":
        train_set = _limited(TrainSet(real[0].images, real[0].labels), options)
        catalog_entry = KNOWN.get(distilled.meta.dataset)
        return Linear(
            recipe,
            config.probe,
            real=Split(train_set.images, train_set.labels),
            can_flip=catalog_entry is not None and catalog_entry.can_flip,
            finetune=config.finetune if options.finetune else None,
        )
    if options.protocol == "continual":
        return Continual(recipe, NUM_TASKS if options.num_tasks is None else options.num_tasks)
    if options.protocol == "robust":
        return Robust(
            recipe,
            real=real[0],
            split_name=real[1],
            random_per_class=_images_at_storage(distilled),
            full_epochs=options.full_epochs,
        )
    return Hard(recipe)


def _target(name: str | None, options: EvaluateOptions) -> Dataset | None:
    return None if name is None else open_dataset(name, data_dir=options.data_dir, download=options.download)


def foreign_space(dataset: Dataset | None, kind: PixelKind) -> PixelSpace | None:
    """Return the space that a foreign file's pixels are said to be in; None for the default, normalised."""
    if dataset is None or kind == "normalized":
        return None
    if kind == "zca":
        return fit_zca(dataset.train())
    return PixelSpace("raw", dataset.mean, dataset.std)


def evaluation_config(distilled: DistilledSet, options: EvaluateOptions) -> EvaluateConfig:
    """Return the evaluation settings: the artifact's own, overridden by the options."""
    option_values = {"seeds": options.seeds, "epochs": options.epochs, "augment": options.augment}
    settings = distilled.meta.config.get("evaluate", {})
    method = distilled.meta.config.get("method", {})
    factor = method.get("factor", 1) if isinstance(method, dict) else 1
    recipe = functools.partial(named_recipe, dataset=distilled.meta.dataset, factor=factor)
    sets = recipe(parse_overrides(options.sets))
    if not isinstance(settings, dict):
        raise InputError(f"meta.config.evaluate must be a mapping, got {settings!r}")
    if options.recipe is not None:
        settings = {**settings, **recipe({"recipe": options.recipe})}
    if options.augment not in (None, settings.get("augment", "dsa")):
        settings = {**settings, "strategy": None, "cutmix": 0.0}
    if options.augment == "none" and options.epochs is None:
        # The peers' length without augmentation.
        settings = {**settings, "epochs": min(300, settings.get("epochs", 300))}
    return EvaluateConfig.parse(
        {**settings, **sets, **{k: v for k, v in option_values.items() if v is not None}}, prefix="evaluate."
    )


def check_fits(distilled: DistilledSet, target: Dataset, path: Path, protocol: str = "hard") -> None:
    """Refuse to score a set on a dataset with other classes or another image shape, except under `linear`."""
    meta = distilled.meta
    if meta.dataset == target.name and meta.fingerprint != target.fingerprint:
        log.warning("%s was distilled from another copy of %s (fingerprints differ)", path, target.name)
    if protocol == "linear":
        return
    if distilled.targets is not None:
        raise InputError(f"{path} holds targets, not labels: --protocol must be linear, got {protocol}")
    if meta.image_shape != target.image_shape:
        raise InputError(
            f"{path} holds images of shape {meta.image_shape}, {target.name} has {target.image_shape}: "
            "evaluate it on the dataset it was distilled from"
        )
    if meta.class_names != target.class_names:
        raise InputError(
            f"{path} has {len(meta.class_names)} classes of {meta.dataset}, {target.name} has "
            f"{target.num_classes} different ones: evaluate it on the dataset it was distilled from"
        )
    if len(distilled.labels) and int(distilled.labels.max()) >= target.num_classes:
        raise InputError(f"{path}: labels must be < {target.num_classes} for {target.name}")


def _real_and_held_out(target: Dataset, split: str, distilled: DistilledSet) -> tuple[Split, str, Split]:
    """Return the real images to train on, their split's name, and the split to score on.

    Val is what a search with the artifact's seed holds out of train.
    """
    if split == "test":
        return target.train(), "train", target.test()
    seed = distilled.meta.seed or 0
    if distilled.meta.split != f"train-val{seed}":
        log.warning("val is a tenth of train: a set that was distilled from all of train has seen it")
    real, val = carve_val(target.train(), seed=seed)
    return real, f"train-val{seed}", val


@dataclass(frozen=True)
class Lesson:
    """A protocol that is ready to train, with its teachers.

    Attributes:
        evaluator: the protocol.
        num_seeds: networks per architecture.
        teachers: None on hard labels.
    """

    evaluator: Soft
    num_seeds: int
    teachers: Teachers | None

    def describe(self) -> dict[str, Any]:
        """Return the teacher's part of the command's JSON; empty without one."""
        return {} if self.teachers is None else {"teacher": self.teachers.describe()}


def teach(
    options: EvaluateOptions, distilled: DistilledSet, ctx: EvalContext, real: tuple[Split, str]
) -> Lesson | None:
    """Return training on soft labels, or on hard ones as in D3HR's Table 5; None for any other protocol.

    Teachers are trained, and checked to be better than chance, before any student.

    Args:
        options: the options of `ddray evaluate`.
        distilled: the artifact.
        ctx: the target, and the held-out part that teachers are scored on.
        real: the images that teachers are trained on, and their split's name; nothing held out is among them.

    Raises:
        InputError: an option does not go with the protocol, or a setting or network is unknown.
        DdrayError: a teacher is no better than chance.
    """
    if not options.is_soft:
        return None
    config = soft_config(options, distilled)
    if options.protocol != "soft":
        return Lesson(Soft(config, None), config.seeds, None)
    names = [resolve_arch(arch, distilled.meta.image_shape) for arch in options.teachers or ("resnet18",)]
    pool = LocalPool(PoolTrainer(ctx.dataset, real[0], ctx.device))
    teachers = get_teachers(pool, names, config.teacher, ctx, split_name=real[1])
    log.info("teacher %s: accuracy %.1f%%", teachers.arch, 100 * teachers.accuracy)
    return Lesson(Soft(config, teachers), config.seeds, teachers)


def soft_config(options: EvaluateOptions, distilled: DistilledSet) -> SoftConfig:
    """Return the settings: options over `--set` over the recipe; stitched sets default to their own patches.

    Raises:
        InputError: a setting is unknown, or the recipe belongs to the other protocol.
    """
    sets = parse_overrides(options.sets)
    names = ("paper", "repo") if options.protocol == "soft" else (HARD_RECIPE,)
    recipe = options.recipe or sets.get("recipe") or names[0]
    if recipe not in names:
        raise unknown(f"recipe of --protocol {options.protocol}", recipe, names)
    defaults: dict[str, Any] = {}
    if distilled.meta.method == "rded":
        factor = distilled.meta.config.get("method", {}).get("factor")
        defaults["patches"] = factor or default_factor(distilled.meta.image_shape)
    option_values = {"seeds": options.seeds, "epochs": options.epochs}
    overrides = {key: value for key, value in option_values.items() if value is not None}
    return SoftConfig.parse(merge(defaults, sets, overrides, {"recipe": recipe}))
