"""`ddray evaluate` as a function: a distilled set's file, a protocol and its options, scored on a dataset."""

import functools
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from ddray.artifact.distilled_set import DistilledSet, TrainSet
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
from ddray.jobs.score_record import record_score
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
    became NaN. The result goes into the record of the run that wrote the file.
    """
    sets, target = read_sets(path, options, dataset)
    result = score_sets(path, sets, target, options, device=device)
    return record_score(path, sets, target.name, options, result)


def read_sets(
    path: Path, options: EvaluateOptions, dataset: Dataset | None = None
) -> tuple[list[DistilledSet], Dataset]:
    """Return the sets of a file, and the open dataset to score them on, as `evaluate` takes both.

    Raises:
        InputError: the file, the dataset or an option is bad.
    """
    if dataset is not None:
        dataset = dataset.with_options(**options.content())
    else:
        dataset = _target(options.dataset or dataset_of(path), options)
    sets = load_all(path, foreign_request(dataset, options), options.index)
    check_options(options, sets)
    target = dataset or _target(sets[0].meta.dataset, options)
    if target is None:
        raise InputError(f"{path} does not say which dataset it was distilled from: add --dataset NAME")
    return sets, target


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
    archs = check_sets(path, sets, target, options)
    scorer = Scorer.of(with_images(sets, options, device), target, options, device)
    results = _score(scorer, archs, f"evaluating {path.name}")
    return EvaluateResult.parse({**scorer.details(), "results": results})


def check_sets(
    path: Path, sets: Sequence[DistilledSet], target: Dataset, options: EvaluateOptions
) -> tuple[str, ...]:
    """Check sets and options against the dataset; return the architectures' canonical names.

    Raises:
        InputError: the sets do not fit the dataset, or an option does not fit them.
    """
    for distilled in sets:
        check_fits(distilled, target, path, options.protocol)
    meta = sets[0].meta
    names = [resolve_arch(arch, meta.image_shape) for arch in options.archs] or [meta.arch]
    archs = tuple(dict.fromkeys(names))  # `auto` may be another's name
    split = target.test() if options.split == "test" else target.train()
    if split.is_audio and options.augment not in (None, "none"):
        raise InputError(f"--augment must be none for spectrograms ({target.name}), got {options.augment}")
    return archs


def with_images(
    sets: Sequence[DistilledSet], options: EvaluateOptions, device: torch.device
) -> list[DistilledSet]:
    """Return the sets with images: of those that store statistics they are sampled, which takes minutes.

    Raises:
        InputError: `--ipc` for a set that stores its images, or a generator is gone.
    """
    return [distilled.generated(options.ipc, device) for distilled in sets]


@dataclass(frozen=True)
class Scorer:
    """Sets with a protocol that is ready to score them: its teachers are trained.

    Attributes:
        sets: of one file, with images.
        scorings: the protocol's, one for each set.
        ctx: what it scores against.
        options: of the evaluation.
    """

    sets: Sequence[DistilledSet]
    scorings: Sequence[Scoring]
    ctx: EvalContext
    options: EvaluateOptions
    _decoded: dict[int, TrainSet] = field(default_factory=dict, repr=False)  # the latest

    @classmethod
    def of(
        cls,
        sets: Sequence[DistilledSet],
        target: Dataset,
        options: EvaluateOptions,
        device: torch.device,
    ) -> Self:
        """Return the scorer of sets that `check_sets` has passed; trains what the protocol needs first.

        Raises:
            InputError: a setting does not fit the protocol or the set.
        """
        real, real_name, held_out = _real_and_held_out(target, options.split, sets[0])
        precision, deterministic = options.precision or "tf32", bool(options.deterministic)
        ctx = EvalContext(target, held_out, sets[0].space(), device, precision, deterministic)
        images = RealImages(real, real_name, LocalPool(PoolTrainer(target, real, device)))
        make = get_protocol(options.protocol).make
        return cls(sets, [make(options, distilled, ctx, images) for distilled in sets], ctx, options)

    @property
    def num_seeds(self) -> int:
        """Networks per set and architecture."""
        return self.scorings[0].num_seeds

    def details(self) -> dict[str, Any]:
        """Return the command's JSON but for the results."""
        details = {
            "protocol": self.options.protocol,
            "split": self.options.split,
            **self.scorings[0].details,
        }
        if len({scoring.details.get("learned_lr") for scoring in self.scorings}) > 1:
            details.pop("learned_lr", None)  # each set has its own
        return {**details, "num_sets": len(self.sets)} if len(self.sets) > 1 else details

    def first_seed(self, set_index: int) -> int:
        """Return the seed of a set's first network; the others' follow it."""
        return self.options.seed + set_index * self.num_seeds

    def train_set(self, set_index: int) -> TrainSet:
        """Return what networks are trained on; the latest one stays in memory."""
        if set_index not in self._decoded:
            self._decoded.clear()
            train_set = self.sets[set_index].decode()
            if not get_protocol(self.options.protocol).trains_on_target:
                train_set = limited_set(train_set, self.options)
            self._decoded[set_index] = train_set
        return self._decoded[set_index]


def _score(scorer: Scorer, archs: Sequence[str], label: str) -> list[dict[str, Any]]:
    """Return a summary per architecture, over all networks of all sets."""
    num_seeds, done = scorer.num_seeds, itertools.count(1)
    results: dict[str, list[EvalResult]] = {}
    summaries: list[dict[str, Any]] = []
    with progress(label, len(scorer.sets) * len(archs) * num_seeds) as show:

        def keep(result: EvalResult) -> None:
            results.setdefault(result.arch, []).append(result)
            show(next(done), f"{result.arch}: {result.accuracy:.1%}")

        for set_index, scoring in enumerate(scorer.scorings):
            summaries = evaluate_archs(
                scoring.evaluator,
                scorer.train_set(set_index),
                scorer.ctx,
                archs=archs,
                num_seeds=num_seeds,
                seed=scorer.first_seed(set_index),
                on_result=keep,
            )
    if len(scorer.sets) == 1:
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
