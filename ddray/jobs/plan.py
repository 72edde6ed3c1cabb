"""Turns a command's options into what a run needs: resolved configuration, context, shared networks."""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final, Generic, Literal, TypeVar, cast

from pydantic import BeforeValidator, Field

from ddray.config import (
    Config,
    added,
    dotted_names,
    flatten,
    merge,
    nest,
    parse_overrides,
    read_yaml,
)
from ddray.data import Dataset, open_dataset
from ddray.data.catalog import KNOWN
from ddray.distillation.method import BudgetDistiller, MethodConfig, Target
from ddray.errors import InputError, did_you_mean, unknown
from ddray.evaluation import get_protocol
from ddray.evaluation.options import EvaluateConfig
from ddray.jobs.options import PlanOptions
from ddray.methods import get_method
from ddray.nets.names import resolve_arch
from ddray.system.memory import parse_bytes
from ddray.system.options import ContentOptions, Precision
from ddray.system.shipped import shipped
from ddray.training.recipe import named_recipe

PRESETS: Final = ("paper", "repo")
M = TypeVar("M", bound=Config)
MemoryBudget = Annotated[
    int | None, BeforeValidator(lambda value: None if value in (None, "auto") else parse_bytes(value))
]


class RunConfig(Config, Generic[M]):
    """All settings that affect a distillation and its score."""

    steps: int = Field(ge=0)
    checkpoint_every: int = Field(default=100, ge=1)
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the real branch; `auto`: if there is a compiler and the run is long enough to pay off."""
    arch: str = "auto"
    """Network to match in; `auto` is the field's ConvNet for the resolution, suffixes as in `auto_bn`."""
    pixel_space: Literal["normalized", "raw", "zca"] = "normalized"
    memory_budget: MemoryBudget = added(None)
    """Memory of one part of a step (bytes, 64MiB, 2GiB); `auto`: a third of the device's.

    Classes are matched in groups that fit it; sums over more groups may differ in their last digits."""
    precision: Precision = added("tf32")
    """auto, tf32, fp32 or bf16, of the distillation and of the searches' scoring (`system.numerics`)."""
    deterministic: bool = added(False)
    """Compute by deterministic algorithms only."""
    evaluate: EvaluateConfig = EvaluateConfig()
    method: M


@dataclass(frozen=True)
class Plan:
    """A resolved distillation: what to run on what."""

    method: str
    dataset: Dataset
    """Opened, its test set unread."""
    ipc: int
    """Images per class; for a budget, the budget per class, at least 1."""
    seed: int
    config: RunConfig[Any]
    budget: int | None = None
    """Storage in images, for methods without classes."""
    scoring: Mapping[str, Any] | None = None
    """What is set of a protocol with settings of its own; None: sets are scored by `config.evaluate`."""
    preset: str = "paper"
    """What the settings started from."""

    def describe(self) -> dict[str, Any]:
        """Return plain values that identify the run (for config.yaml and unit keys)."""
        return {
            "method_name": self.method,
            "dataset": self.dataset.name,
            "fingerprint": self.dataset.fingerprint,
            "ipc": self.ipc,
            **({} if self.budget is None else {"budget": self.budget}),
            "seed": self.seed,
            **self.config.dump(),
        }

    @property
    def arch(self) -> str:
        """Canonical name of the network to match in."""
        return resolve_arch(self.config.arch, self.dataset.image_shape)

    @property
    def work(self) -> float:
        """What distilling the set computes, up to a factor of the method; a budget's images have no class."""
        num_classes, method = 1 if self.budget else self.dataset.num_classes, self.config.method
        size = (self.budget or num_classes * self.ipc, num_classes, self.arch, self.dataset.image_shape)
        of_step = getattr(method, "work_per_step", functools.partial(MethodConfig.work_per_step, method))
        return float((1 + self.config.steps) * of_step(*size))


def resolve(
    method: str,
    dataset: Dataset,
    *,
    ipc: int | None = None,
    budget: int | None = None,
    seed: int = 0,
    preset: str = "paper",
    layers: Sequence[Mapping[str, Any]] = (),
) -> Plan:
    """Resolve a run: preset, settings for dataset and ipc (the method's, shipped files), the user's layers.

    The last one wins; the user's may name the method's own settings in short (`lr_img`). No preset augments
    spectrograms (IDC, DSDM); later layers may. For a method that takes a budget (storage in images, >= 1),
    `ipc` is a budget of as many images per class. InputError for an unknown name, or a value out of range.
    """
    method_class = get_method(method)
    layers = [_in_full(layer, method_class.config_type) for layer in layers]
    variants = preset_variants(method)
    if preset not in (*PRESETS, *variants):
        raise unknown("preset", preset, (*PRESETS, *variants))
    variant, settings = variants.get(preset, {}), "paper" if preset in variants else preset
    ipc, budget = _size(method, dataset, ipc, budget)
    declared: Mapping[str, Mapping[str, Any]] = getattr(method_class.config_type, "dataset_settings", {})
    upper_layers = (
        *(declared[name] for name in (dataset.base, f"{dataset.base}_ipc{ipc}") if name in declared),
        *(read_yaml(path) for path in shipped_configs(method, dataset.base, ipc)),
        variant,
        *layers,
    )
    method_settings = merge(*upper_layers).get("method")
    target = Target(
        dataset.base,
        dataset.image_shape,
        dataset.num_classes,
        ipc,
        budget,
        is_audio=_is_audio(dataset),
        factor=method_settings.get("factor") if isinstance(method_settings, Mapping) else None,
        can_flip=dataset.can_flip,
    )
    fields = method_class.config_type.model_fields
    sound = {"method": {"augment": "none"}} if target.is_audio and "augment" in fields else {}
    factor = target.factor or (fields["factor"].default if "factor" in fields else 1)
    all_layers = (method_class.preset(settings, target), sound, *upper_layers)
    facts = {"dataset": dataset.base, "factor": factor, "ipc": ipc, "num_classes": dataset.num_classes}
    merged = merge({"method": {}}, *(_with_recipe(layer, facts) for layer in all_layers))
    config = RunConfig[method_class.config_type].parse(merged)  # type: ignore[name-defined]
    resolve_arch(config.arch, dataset.image_shape)
    return Plan(method, dataset, ipc, seed, config, budget, preset=preset)


def _in_full(layer: Mapping[str, Any], method_type: type[Config]) -> dict[str, Any]:
    """Return a layer with the method's own settings under `method`, also those that go by short names.

    A name that the run has too (`precision`) is the run's. InputError for a name that neither has, or a
    setting that goes by both names.
    """
    run = {name: value for name, value in layer.items() if name in RunConfig.model_fields}
    short = {name: value for name, value in layer.items() if name not in run}
    for name in flatten(short):
        if name.partition(".")[0] not in method_type.model_fields:
            names = [*RunConfig.model_fields, *dotted_names(method_type)]
            names += dotted_names(EvaluateConfig, "evaluate.")
            hint = did_you_mean(name, names)
            hint = hint or f"; known: {', '.join(sorted(RunConfig.model_fields | method_type.model_fields))}"
            raise InputError(f"unknown option {name!r}{hint}")
    if not short or not isinstance(full := run.get("method", {}), Mapping):
        return run
    if both := flatten(short).keys() & flatten(full).keys():
        raise InputError(f"{min(both)} must be set once, got method.{min(both)} too: keep one")
    return {**run, "method": merge(full, short)}


def preset_variants(method: str) -> Mapping[str, Mapping[str, Any]]:
    """Return the settings of the presets that a method has besides `PRESETS`, by name."""
    variants: Mapping[str, Mapping[str, Any]] = getattr(get_method(method).config_type, "variants", {})
    return variants


def plan_of(
    options: PlanOptions,
    dataset: Dataset | None = None,
    settings: Mapping[str, Any] | None = None,
    protocol: str = "hard",
) -> Plan:
    """Return the run that options ask for, on `dataset` if it is already open.

    `settings` are overrides by dotted name; they win over the options' `sets`, and these over its `config`
    file. All may name options of the dataset's content, such as `can_flip`. If sets will be scored by a
    `protocol` with settings of its own, what the user sets under `evaluate` are these. InputError as for
    `resolve`, or if the dataset is missing.
    """
    get_method(options.method)
    layers = [
        {} if options.config is None else read_yaml(options.config),
        parse_overrides(options.sets),
        {} if options.steps is None else {"steps": options.steps},
        options.numerics(),
        *(nest(name, value) for name, value in (settings or {}).items()),
    ]
    in_file, *in_settings = (
        {name: layer.pop(name) for name in ContentOptions.model_fields if name in layer} for layer in layers
    )
    content = {k: v for values in (in_file, options.content(), *in_settings) for k, v in values.items()}
    if dataset is None:
        dataset = open_dataset(options.dataset, **{**options.opening(), **content})
    else:
        dataset = dataset.with_options(**content)
    is_separate = get_protocol(protocol).config_type is not EvaluateConfig
    scoring = _taken_from(layers) if is_separate else None
    plan = resolve(
        options.method,
        dataset,
        ipc=options.ipc,
        budget=options.budget,
        seed=options.seed,
        preset=options.preset,
        layers=layers,
    )
    return replace(plan, scoring=scoring)


def _taken_from(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Take the settings under `evaluate` out of the layers, all but `val_seeds`, which are the search's."""
    taken: dict[str, Any] = {}
    for layer in layers:
        if isinstance(layer.get("evaluate"), Mapping):
            taken = merge(taken, layer.pop("evaluate"))
    if "val_seeds" in taken:
        layers.append({"evaluate": {"val_seeds": taken.pop("val_seeds")}})
    return taken


def budget_method(method: str) -> type[BudgetDistiller] | None:
    """Return the method's class if it takes a budget of storage instead of images per class, else None."""
    method_class = get_method(method)
    takes_budget = getattr(method_class, "uses_budget", False)
    return cast("type[BudgetDistiller]", method_class) if takes_budget else None


def _size(method: str, dataset: Dataset, ipc: int | None, budget: int | None) -> tuple[int, int | None]:
    """Return a run's images per class and budget; InputError unless one is given that fits and is >= 1."""
    sizes = {name: value for name, value in (("ipc", ipc), ("budget", budget)) if value is not None}
    takes_budget = budget_method(method) is not None
    if len(sizes) != 1 or (budget is not None and not takes_budget):
        option = "--budget N (images of storage)" if takes_budget else "--ipc K (images per class)"
        raise InputError(f"{method} takes {option}, got {' and '.join(sizes) or 'neither ipc nor budget'}")
    ((name, size),) = sizes.items()
    if size < 1:
        raise InputError(f"{name} must be >= 1, got {size}")
    if not takes_budget:
        return size, None
    images = size * (1 if name == "budget" else dataset.num_classes)
    return max(1, images // dataset.num_classes), images


def _with_recipe(layer: Mapping[str, Any], facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a layer with a recipe's name replaced by its fields, so that they override earlier layers.

    `facts` of the run are what a recipe may depend on (`named_recipe`).
    """
    if not isinstance(evaluate_layer := layer.get("evaluate"), Mapping):
        return layer
    return {**layer, "evaluate": named_recipe(evaluate_layer, **facts)}


def shipped_configs(method: str, dataset: str, ipc: int) -> list[Path]:
    """Return the shipped files that apply: `<dataset>.yaml` for every ipc, then `<dataset>_ipc<k>.yaml`."""
    if not re.fullmatch(r"[a-z0-9_]+", dataset):
        return []
    paths = [shipped("configs", method, f"{name}.yaml") for name in (dataset, f"{dataset}_ipc{ipc}")]
    return [path for path in paths if path.is_file()]


def _is_audio(dataset: Dataset) -> bool:
    """Return whether images are spectrograms; train is read only of one channel that the catalog lacks."""
    if dataset.base in KNOWN:
        return KNOWN[dataset.base].layout == "wavs"
    return dataset.image_shape[0] == 1 and dataset.train().is_audio
