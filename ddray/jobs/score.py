"""`ddray evaluate` as a function: a distilled set's file, a protocol and its options, scored on a dataset."""

import itertools
import logging
from pathlib import Path

import torch

from ddray.artifact.distilled_set import DistilledSet
from ddray.artifact.reading import load
from ddray.data import Dataset, PixelSpace, Split, SplitName, carve_val, fit_zca, open_dataset
from ddray.errors import InputError
from ddray.evaluation import get_protocol, target_protocols
from ddray.evaluation.options import EvaluateOptions, EvaluateResult, PixelKind
from ddray.evaluation.protocol import EvalContext, RealImages, evaluate_archs
from ddray.evaluation.subsets import limited_set
from ddray.jobs.trainers import PoolTrainer
from ddray.nets.names import resolve_arch
from ddray.pool.local import LocalPool
from ddray.system.progress import progress

log = logging.getLogger(__name__)


def evaluate(
    path: Path, options: EvaluateOptions, *, device: torch.device, dataset: Dataset | None = None
) -> EvaluateResult:
    """Score a distilled set's file, ours or another project's, on an open dataset or `options.dataset`.

    InputError if the file, the dataset or an option is bad, or the set does not fit the dataset;
    DivergedError if a training loss became NaN.
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
    protocol = get_protocol(options.protocol)
    pool = LocalPool(PoolTrainer(target, real, device))
    scoring = protocol.make(options, distilled, ctx, RealImages(real, real_name, pool))
    train_set = distilled.decode()
    if not protocol.trains_on_target:
        train_set = limited_set(train_set, options)
    done = itertools.count(1)
    with progress(f"evaluating {path.name}", len(archs) * scoring.num_seeds) as show:
        results = evaluate_archs(
            scoring.evaluator,
            train_set,
            ctx,
            archs=archs,
            num_seeds=scoring.num_seeds,
            seed=options.seed,
            on_result=lambda result: show(next(done), f"{result.arch}: {result.accuracy:.1%}"),
        )
    return EvaluateResult.parse(
        {"protocol": options.protocol, "split": options.split, **scoring.details, "results": results}
    )


def _target(name: str | None, options: EvaluateOptions) -> Dataset | None:
    return None if name is None else open_dataset(name, **options.opening())


def foreign_space(dataset: Dataset | None, kind: PixelKind) -> PixelSpace | None:
    """Return the space that a foreign file's pixels are said to be in; None for the default, normalised."""
    if dataset is None or kind == "normalized":
        return None
    return fit_zca(dataset.train()) if kind == "zca" else PixelSpace("raw", dataset.mean, dataset.std)


def check_fits(distilled: DistilledSet, target: Dataset, path: Path, protocol: str = "hard") -> None:
    """Refuse to score a set on other classes or another image shape, unless the protocol takes any."""
    meta = distilled.meta
    if meta.dataset == target.name and meta.fingerprint != target.fingerprint:
        log.warning("%s was distilled from another copy of %s (fingerprints differ)", path, target.name)
    if get_protocol(protocol).trains_on_target:
        return
    if distilled.targets is not None:
        raise InputError(
            f"{path} holds targets, not labels: --protocol must be {target_protocols()}, got {protocol}"
        )
    advice = "evaluate it on the dataset it was distilled from"
    if meta.image_shape != target.image_shape:
        raise InputError(
            f"{path} holds images of shape {meta.image_shape}, {target.name} has {target.image_shape}: "
            f"{advice}"
        )
    if meta.class_names != target.class_names:
        raise InputError(
            f"{path} has {len(meta.class_names)} classes of {meta.dataset}, {target.name} has "
            f"{target.num_classes} different ones: {advice}"
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
    name = str(SplitName(seed))
    if distilled.meta.split != name:
        log.warning("val is a tenth of train: a set that was distilled from all of train has seen it")
    real, val = carve_val(target.train(), seed=seed)
    return real, name, val
