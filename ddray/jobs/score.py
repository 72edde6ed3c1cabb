"""`ddray evaluate` as a function: a distilled set's file, a protocol and its options, scored on a dataset."""

import functools
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ddray.artifact.distilled_set import DistilledSet
from ddray.artifact.foreign import ForeignRequest
from ddray.artifact.options import ForeignOptions
from ddray.artifact.reading import check_options, dataset_of, load_all
from ddray.data import Dataset, PixelSpace, Split, SplitName, carve_val, open_dataset
from ddray.data.catalog import KNOWN
from ddray.data.pixels import pixel_space
from ddray.data.reference import DatasetRef
from ddray.errors import InputError
from ddray.evaluation import get_protocol, target_protocols
from ddray.evaluation.options import EvaluateOptions, EvaluateResult
from ddray.evaluation.protocol import (
    EvalContext,
    EvalResult,
    RealImages,
    Scoring,
    evaluate_archs,
    summarise,
)
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

    The sets of a file's several runs are scored together: each trains its own networks, and the results are
    over all of them. InputError if the file, the dataset or an option is bad (an open dataset takes no other
    options of content than `can_flip`), or the set does not fit the dataset; DivergedError if a training loss
    became NaN.
    """
    if dataset is not None:
        dataset = dataset.with_options(**options.content())
    else:
        dataset = _target(options.dataset or dataset_of(path), options)
    sets = load_all(path, foreign_request(dataset, options), options.index)
    check_options(options, sets)
    meta = sets[0].meta
    target = dataset or _target(meta.dataset, options)
    if target is None:
        raise InputError(f"{path} does not say which dataset it was distilled from: add --dataset NAME")
    return score_sets(path, sets, target, options, device=device)


def score_sets(
    path: Path,
    sets: Sequence[DistilledSet],
    target: Dataset,
    options: EvaluateOptions,
    *,
    device: torch.device,
) -> EvaluateResult:
    """Score sets together on an open dataset, as `evaluate` does; messages name them by `path`.

    Raises:
        InputError: the sets do not fit the dataset, or an option does not fit them.
        DivergedError: a training loss became NaN.
    """
    for distilled in sets:
        check_fits(distilled, target, path, options.protocol)
    meta = sets[0].meta
    archs = tuple(resolve_arch(arch, meta.image_shape) for arch in options.archs) or (meta.arch,)
    real, real_name, held_out = _real_and_held_out(target, options.split, sets[0])
    if held_out.is_audio and options.augment not in (None, "none"):
        raise InputError(f"--augment must be none for spectrograms ({target.name}), got {options.augment}")
    sets = [one.generated(options.ipc, device) for one in sets]  # after every check: this takes minutes
    precision, deterministic = options.precision or "tf32", bool(options.deterministic)
    ctx = EvalContext(target, held_out, sets[0].space(), device, precision, deterministic)
    images = RealImages(real, real_name, LocalPool(PoolTrainer(target, real, device)))
    scorings = [get_protocol(options.protocol).make(options, one, ctx, images) for one in sets]
    results = _score(sets, scorings, ctx, archs, options, f"evaluating {path.name}")
    details = {"protocol": options.protocol, "split": options.split, **scorings[0].details}
    if len(sets) > 1:
        details["num_sets"] = len(sets)
    return EvaluateResult.parse({**details, "results": results})


def _score(
    sets: Sequence[DistilledSet],
    scorings: Sequence[Scoring],
    ctx: EvalContext,
    archs: Sequence[str],
    options: EvaluateOptions,
    label: str,
) -> list[dict[str, Any]]:
    """Return a summary per architecture, over all networks of all sets."""
    num_seeds, done = scorings[0].num_seeds, itertools.count(1)
    results: dict[str, list[EvalResult]] = {}
    summaries: list[dict[str, Any]] = []
    with progress(label, len(sets) * len(archs) * num_seeds) as show:

        def keep(result: EvalResult) -> None:
            results.setdefault(result.arch, []).append(result)
            show(next(done), f"{result.arch}: {result.accuracy:.1%}")

        for number, (distilled, scoring) in enumerate(zip(sets, scorings, strict=True)):
            train_set = distilled.decode()
            if not get_protocol(options.protocol).trains_on_target:
                train_set = limited_set(train_set, options)
            summaries = evaluate_archs(
                scoring.evaluator,
                train_set,
                ctx,
                archs=archs,
                num_seeds=num_seeds,
                seed=options.seed + number * num_seeds,
                on_result=keep,
            )
    if len(sets) == 1:
        return summaries
    used = {summary["arch"]: summary["precision"] for summary in summaries}
    return [{**summarise(networks), "precision": used[arch]} for arch, networks in results.items()]


def _target(name: str | None, options: EvaluateOptions) -> Dataset | None:
    return None if name is None else open_dataset(name, **options.opening())


def foreign_request(dataset: Dataset | None, options: ForeignOptions) -> ForeignRequest | None:
    """Return how another project's file is read as a set of a dataset; None without one."""
    if dataset is None:
        return None
    if options.pixel_space is None:
        return ForeignRequest(dataset, factor=options.factor)
    kind, _, name = options.pixel_space.partition(":")
    if name and len(KNOWN[name].mean) != dataset.image_shape[0]:
        raise InputError(
            f"--pixel-space must be of a dataset with {dataset.image_shape[0]} channels, "
            f"got {name} with {len(KNOWN[name].mean)}"
        )

    @functools.cache
    def space() -> PixelSpace:
        if name:
            return PixelSpace("normalized", KNOWN[name].mean, KNOWN[name].std)
        return pixel_space(kind, dataset, dataset.train())

    return ForeignRequest(dataset, space, options.factor)


def _content(name: str) -> str:
    """Return a dataset's name without `can_flip`, which changes no fingerprint."""
    return str(DatasetRef.parse(name).model_copy(update={"can_flip": None}))


def check_fits(distilled: DistilledSet, target: Dataset, path: Path, protocol: str = "hard") -> None:
    """Refuse to score a set on other classes or another image shape, unless the protocol takes any."""
    meta = distilled.meta
    if _content(meta.dataset) == _content(target.name) and meta.fingerprint != target.fingerprint:
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
