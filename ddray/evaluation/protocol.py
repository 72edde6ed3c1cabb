"""What a protocol is: its definition, the evaluator that it makes, and an evaluator's results."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from ddray.artifact.distilled_set import DistilledSet, TrainSet
from ddray.config import Config, option_name, parse_overrides
from ddray.data import Dataset, PixelSpace, Split
from ddray.errors import InputError
from ddray.evaluation.options import EvaluateConfig, EvaluateOptions, check_settings
from ddray.nets import Net, build_net
from ddray.pool.spec import ModelPool
from ddray.seeding import derive_seed
from ddray.system import numerics
from ddray.system.memory import total_bytes
from ddray.system.options import Precision
from ddray.training.embedding import Score
from ddray.training.loop import score_net
from ddray.training.recipe import RECIPES

_HALF_A_POINT: Final = 0.005


@dataclass(frozen=True)
class EvalContext:
    """What a protocol scores against.

    Attributes:
        dataset: the target (classes, whether images may be flipped).
        split: its held-out part: val while searching, test at the end.
        space: pixel space of the training images, applied to the split too.
        device: where to compute.
        precision: of the networks' training (`system.numerics`).
        deterministic: whether only deterministic algorithms are used.
    """

    dataset: Dataset
    split: Split
    space: PixelSpace
    device: torch.device
    precision: Precision = "tf32"
    deterministic: bool = False

    @cached_property
    def _resident(self) -> tuple[Split, PixelSpace]:
        """The split, on a GPU if it takes at most a sixteenth of its memory; the space on the device."""
        split, space = self.split, self.space.to(self.device)
        if self.device.type == "cuda" and 16 * split.images.nbytes <= total_bytes(self.device):
            split = replace(split, images=split.images.to(self.device), labels=split.labels.to(self.device))
        return split, space

    def score(self, net: Net) -> Score:
        """Return the fractions of the split that `net` (in eval mode) classifies correctly."""
        split, space = self._resident
        return score_net(net, split, space, device=self.device)

    def fresh_net(self, arch: str, images: Tensor, *, seed: int, outputs: int | None = None) -> Net:
        """Return a fresh network for images [N, C, H, W] on the device; by default, an output per class."""
        _, channels, height, width = images.shape
        num = self.dataset.num_classes if outputs is None else outputs
        seed = derive_seed(seed, "evaluate", "net")
        return build_net(arch, (channels, height, width), num, seed=seed, device=self.device)


@dataclass(frozen=True)
class EvalResult:
    """One network's score.

    Attributes:
        arch: canonical architecture name.
        seed: which network.
        accuracy: fraction right on the split.
        num_images: images trained on, as decoded.
        wall_s: seconds.
        measures: the protocol's other measures by name: a number, or one per step.
        per_class: fraction right of each class [K], None for a class without images; () if not measured.
    """

    arch: str
    seed: int
    accuracy: float
    num_images: int
    wall_s: float
    measures: Mapping[str, float | tuple[float, ...]] = field(default_factory=dict)
    per_class: tuple[float | None, ...] = ()


class Evaluator(Protocol):
    """A protocol: trains something on a set and scores it."""

    def evaluate(self, train_set: TrainSet, ctx: EvalContext, *, arch: str, seed: int) -> EvalResult:
        """Train one network on `train_set` and score it on the context's split.

        Args:
            train_set: images [N, C, H, W] in the context's space, with labels [N] or targets [N, D].
            ctx: target and split.
            arch: architecture name.
            seed: which network: decides weights, batch order, augmentation and the protocol's own draws.

        Raises:
            InputError: the architecture is unknown or does not fit the images, or the set the protocol.
            DivergedError: a training loss became NaN.
        """
        ...


@dataclass(frozen=True)
class RealImages:
    """The real images that a protocol may train on; nothing that it is scored on is among them.

    Attributes:
        images: the images.
        split_name: which part of the dataset they are.
        pool: networks trained on them.
    """

    images: Split
    split_name: str
    pool: ModelPool


@dataclass(frozen=True)
class Scoring:
    """A protocol with its settings, ready to score a set.

    Attributes:
        evaluator: trains and scores.
        num_seeds: networks per architecture.
        details: the protocol's own part of the command's JSON.
    """

    evaluator: Evaluator
    num_seeds: int
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measure:
    """What a protocol measures besides the accuracy.

    Attributes:
        title: of its column; a measure with a value per step gets a column each.
        in_tables: whether it has a column in a bench's tables.
        is_fraction: whether people read it in percent.
    """

    title: str
    in_tables: bool = False
    is_fraction: bool = True


@dataclass(frozen=True)
class EvaluationProtocol:
    """What a module in `ddray/evaluation/`, or a module that a package offers, brings as `PROTOCOL`.

    Attributes:
        make: returns the protocol with the settings of a command for a set, scored in a context.
        config_type: what `--set` takes; a run's `evaluate` section with its recipe by default.
        check: refuses options before there is a set; default: parses `--set` by `config_type`.
        options: fields of `EvaluateOptions` that only this protocol takes.
        recipes: names that `--recipe` takes.
        editions: how often a recipe (`default`: the one of a set's method) has come to train otherwise under
            its name; a bench scores anew what was scored by an earlier edition.
        measures: what it measures besides the accuracy, by name.
        trains_on_target: whether sets only pre-train networks, whose classifiers the target's images train:
            sets may have targets instead of labels, and other classes; `--train-limit` cuts the target.
        without: options that it has no use for and refuses (`epochs`, `seeds`, ...); a bench leaves them out.
        why: the reason, for whoever names one.
        check_method: refuses a method whose sets it can't score, by name, the method's settings and its own.
        trains_for_all_seeds: whether an architecture's networks need one that is trained for all of them: one
            worker trains these.
        published_metric: metric of its published accuracies (reports/published.csv); None: there are none.
    """

    make: Callable[[EvaluateOptions, DistilledSet, EvalContext, RealImages], Scoring]
    config_type: type[Config] = EvaluateConfig
    check: Callable[[EvaluateOptions], None] | None = None
    options: tuple[str, ...] = ()
    recipes: tuple[str, ...] = tuple(RECIPES)
    editions: Mapping[str, int] = field(default_factory=dict)
    measures: Mapping[str, Measure] = field(default_factory=dict)
    trains_on_target: bool = False
    without: tuple[str, ...] = ()
    why: str = ""
    check_method: Callable[[str, Config, Mapping[str, Any]], None] | None = None
    trains_for_all_seeds: bool = False
    published_metric: str | None = None

    def check_options(self, options: EvaluateOptions) -> None:
        """Refuse options and settings that do not go with the protocol.

        Raises:
            InputError: with what would be allowed.
        """
        for name in self.without:
            if getattr(options, name) not in (None, ()):
                option = option_name(name, EvaluateOptions.model_fields[name])
                raise InputError(
                    f"--{option} must be left out with --protocol {options.protocol}: {self.why}"
                )
        if self.check is not None:
            self.check(options)
        elif self.config_type is EvaluateConfig:
            check_settings(options)
        else:
            self.config_type.parse(parse_overrides(options.sets))


def summarise(results: Sequence[EvalResult]) -> dict[str, Any]:
    """Return an arch's results as mean, sample standard deviation (None for one network) and all values.

    A measure `m` becomes its mean `m` and standard deviation `m_std`; one with a value per step, a list of
    each. The values of each network stand in `measures_per_seed`. Of classes, the mean accuracies and their
    mean, the balanced accuracy, follow.
    """
    values = [result.accuracy for result in results]
    mean, std = _over_seeds(values)
    summary = {"arch": results[0].arch, "accuracy_mean": mean, "accuracy_std": std, "per_seed": values}
    summary["num_images"] = results[0].num_images
    if results[0].per_class:
        balanced = [Score(result.accuracy, result.per_class).balanced_accuracy for result in results]
        summary["balanced_accuracy_mean"], summary["balanced_accuracy_std"] = _over_seeds(balanced)
        by_class = zip(*(result.per_class for result in results), strict=True)
        summary["per_class"] = [None if None in shares else statistics.fmean(shares) for shares in by_class]
    for name in results[0].measures:
        of_networks = [result.measures[name] for result in results]
        summary[name], summary[f"{name}_std"] = _over_seeds(of_networks)
        if not isinstance(of_networks[0], tuple):
            summary.setdefault("measures_per_seed", {})[name] = of_networks
    return {**summary, "wall_s": sum(result.wall_s for result in results)}


def balance_matters(summaries: Iterable[Mapping[str, Any]]) -> bool:
    """Return whether some balanced accuracy is half a point or more from its accuracy: worth a column."""
    means = ((each.get("balanced_accuracy_mean"), each["accuracy_mean"]) for each in summaries)
    return any(None not in pair and abs(pair[0] - pair[1]) >= _HALF_A_POINT for pair in means)


def _over_seeds(values: Sequence[Any]) -> tuple[Any, Any]:
    """Return mean and standard deviation of numbers, or of each position of equally long tuples."""
    if isinstance(values[0], tuple):
        steps = [_over_seeds(step) for step in zip(*values, strict=True)]
        return [mean for mean, _ in steps], [std for _, std in steps]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _results(
    evaluator: Evaluator, train: TrainSet, ctx: EvalContext, arch: str, seeds: Sequence[int]
) -> Iterator[EvalResult]:
    """Yield a network's result per seed; on a GPU all at once if the evaluator can train them together."""
    together = getattr(evaluator, "evaluate_together", None)
    if together is not None and ctx.device.type == "cuda":
        yield from together(train, ctx, arch=arch, seeds=seeds)
        return
    for seed in seeds:
        yield evaluator.evaluate(train, ctx, arch=arch, seed=seed)


def evaluate_archs(
    evaluator: Evaluator,
    train: TrainSet,
    ctx: EvalContext,
    *,
    archs: Sequence[str],
    num_seeds: int,
    seed: int = 0,
    on_result: Callable[[EvalResult], None] | None = None,
) -> list[dict[str, Any]]:
    """Score every architecture with `num_seeds` networks; return one summary each, in order.

    A summary names the `precision` that was used, of `auto` what the probe chose.
    """
    summaries = []
    device = ctx.device.type
    for arch in archs:
        results = []
        with numerics.applied(ctx.precision, deterministic=ctx.deterministic, device=device) as applied:
            for result in _results(evaluator, train, ctx, arch, range(seed, seed + num_seeds)):
                results.append(result)
                if on_result is not None:
                    on_result(result)
        summaries.append({**summarise(results), "precision": applied.used()})
    return summaries
