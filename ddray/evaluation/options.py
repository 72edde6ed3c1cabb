"""What `ddray evaluate` was asked for, the settings of a scoring, and what comes back."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, Self, get_args

from pydantic import (
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from ddray.artifact.options import ForeignOptions
from ddray.config import AbsolutePath, Names, Result, added, merge, named, option_name, parse_overrides
from ddray.data.reference import DatasetRef
from ddray.errors import InputError, unknown
from ddray.evaluation import get_protocol, protocol_names
from ddray.system.options import DataOptions, DeviceOptions, Gpus, NumericOptions, RunOptions
from ddray.training.recipe import RECIPES, Augment, FinetuneConfig, ProbeConfig, Recipe, named_recipe

if TYPE_CHECKING:
    import pandas as pd

    from ddray.artifact.distilled_set import DistilledSet

log = logging.getLogger(__name__)

SplitName = Literal["val", "test"]
LEARNED: Final = "learned"
_NAMES: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "split": ("split", get_args(SplitName)),
    "augment": ("--augment", get_args(Augment)),
}
# Options of one protocol each.
_OF_ONE_PROTOCOL: Final = ("num_tasks", "full_epochs", "finetune", "teachers")


class EvaluateOptions(DataOptions, ForeignOptions, NumericOptions):
    """Options of `ddray evaluate`, with the checks that need no distilled set; None: as the artifact says."""

    dataset: str | None = None
    """Target; default the artifact's own."""
    protocol: str = "hard"
    """hard: train on hard labels; soft: on a teacher's; linear: pre-train, freeze, probe; robust: LRS and
    ARS; continual: class by class, as a memory; distribution: where it lies among the real images; kernel: a
    kernel regression; steps: the set's own ordered steps."""
    archs: Names = named("arch", "archs")
    """Network to train; repeatable."""
    seeds: int | None = None
    """Networks per architecture; default 5."""
    epochs: int | None = None
    """Epochs of training; default the method's."""
    split: SplitName = "test"
    """test, or val: the tenth of train a search keeps back."""
    augment: Augment | None = None
    """dsa, dsa_idc, autoaugment, randaugment, crop_flip, crop_jitter or none; default the method's."""
    recipe: str | None = None
    """hard: vico, idc, minimax or table5 (D3HR's); soft: paper or repo (D3HR's), rded, sre2l, sre2l_cifar,
    gvbsm, dwa, or rd3, one protocol for all. How all sets are trained on; default the method's."""
    train_limit: int | None = None
    """Train on at most so many images (linear: of the target)."""
    num_tasks: int | None = None
    """continual: tasks the classes come in; default 5."""
    full_epochs: int | None = None
    """robust: epochs on the whole dataset; default as --epochs."""
    teachers: Names = named("teacher", "teachers")
    """soft: who labels; several are averaged; default resnet18."""
    ipc: int | None = None
    """Images per class, for sets that generate them."""
    sets: Names = named("set", "sets")
    """key=value of the protocol, such as teacher.epochs=30; repeatable."""
    finetune: bool = False
    """linear: fine-tune the whole network instead of probing."""
    seed: int = 0
    """Every draw is derived from it."""

    @field_validator(*_NAMES, mode="before")
    @classmethod
    def _known_name(cls, value: Any, info: ValidationInfo) -> Any:
        label, names = _NAMES[str(info.field_name)]
        if value is not None and value not in names:
            raise unknown(label, str(value), names)
        return value

    @field_validator("train_limit", "num_tasks", "full_epochs", "ipc")
    @classmethod
    def _positive(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value < 1:
            raise InputError(f"--{str(info.field_name).replace('_', '-')} must be >= 1, got {value}")
        return value

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        """Refuse options that do not go with the protocol, and settings that it does not have."""
        protocol = get_protocol(self.protocol)
        for name in _OF_ONE_PROTOCOL:
            if getattr(self, name) not in (None, False, ()) and name not in protocol.options:
                option = option_name(name, type(self).model_fields[name])
                owners = [other for other in protocol_names() if name in get_protocol(other).options]
                raise InputError(
                    f"--{option} must be left out, or used with --protocol {' or '.join(owners)}"
                )
        protocol.check_options(self)
        if self.recipe not in (None, *protocol.recipes):
            label = "recipe" if {*RECIPES} <= {*protocol.recipes} else f"recipe of --protocol {self.protocol}"
            raise unknown(label, str(self.recipe), protocol.recipes)
        return self


class EvaluateRunOptions(RunOptions, DeviceOptions):
    """Where networks are trained, and whether the record is kept."""

    run_dir: AbsolutePath | None = None
    """Folder that keeps the record, a row per network; default none, with --save or --max-concurrent
    runs/evaluate-<number>."""
    save: bool = False
    """Keep the record in a run folder: rows, table, settings."""
    max_concurrent: int | None = Field(default=None, ge=1)
    """Networks at a time, on Ray workers; default one after another in this process."""
    cpus_per_unit: float = Field(default=1.0, gt=0)
    """CPU cores per network that is trained at a time."""
    gpus_per_unit: Gpus | None = None
    """GPUs per network, at most 1; fractions share one; default 1 where the cluster has GPUs, else 0."""
    address: str | None = None
    """Ray cluster to connect to; default a local one."""

    @model_validator(mode="after")
    def _workers_are_asked_for(self) -> Self:
        if not self.is_parallel:
            for name in ("cpus_per_unit", "gpus_per_unit"):
                if name in self.model_fields_set:
                    raise ValueError(
                        f"--{name.replace('_', '-')} needs --max-concurrent N: without it networks are "
                        f"trained one after another in this process; got {getattr(self, name)}"
                    )
        elif self.device not in ("auto", "cpu"):
            raise ValueError(
                "--device must be left out, or cpu, with --max-concurrent; --gpus-per-unit says how much of "
                f"a GPU each worker gets; got {self.device}"
            )
        elif self.device == "cpu" and self.gpus:
            raise ValueError(f"--gpus-per-unit must be 0 with --device cpu, got {self.gpus:g}")
        return self

    @property
    def is_parallel(self) -> bool:
        """Whether networks are trained by Ray workers."""
        return self.max_concurrent is not None or self.address is not None

    @property
    def has_folder(self) -> bool:
        """Whether the record is kept in a run folder."""
        return self.is_parallel or self.save or self.resume or self.run_dir is not None

    @property
    def gpus(self) -> float:
        """GPUs of a worker; 0 until the default is resolved (`cluster.resources`)."""
        return self.gpus_per_unit or 0.0


class EvaluateConfig(Recipe):
    """How a distilled set is scored; `evaluate.recipe=vico|idc|minimax` sets a recipe by name (`RECIPES`)."""

    lr: float | Literal["learned"] = 0.01  # type: ignore[assignment]
    """A learning rate, or `learned`: the one that the set holds (MTT, DATM)."""
    seeds: int = Field(default=5, ge=1)
    """Networks per architecture."""
    val_seeds: int = Field(default=2, ge=1)
    """Networks per evaluation at a rung of a search (never more than `seeds`)."""
    probe: ProbeConfig = ProbeConfig()
    """Protocol `linear`: the classifier on frozen embeddings."""
    finetune: FinetuneConfig = FinetuneConfig()
    """Protocol `linear` with --finetune: KRR-ST's full fine-tuning."""
    every: int | None = added(None, ge=1)
    """Keep the set of every so many steps of a distillation; `ddray bench` scores each (a cell's `along`).
    Searches keep none."""

    @field_validator("lr", mode="wrap")
    @classmethod
    def _rate(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            if value == LEARNED or handler(value) > 0:
                return handler(value)
        except ValidationError:
            pass
        raise ValueError(f"must be a number > 0, or {LEARNED}")

    def as_recipe(self) -> Recipe:
        """Return the training part, the fields of `Recipe`; the rate must be a number."""
        return Recipe.parse(self.model_dump(include=set(Recipe.model_fields)))


def check_settings(options: EvaluateOptions) -> None:
    """Refuse `--set` of what a run's `evaluate` section lacks, with the nearest name or a value's rule."""
    sets = overrides(options.sets)
    if "every" in sets:
        raise InputError(
            "--set every=N is for `ddray distill --set evaluate.every=N`, which keeps sets; leave it out"
        )
    EvaluateConfig.parse(named_recipe(sets), prefix="evaluate.")


def overrides(sets: Iterable[str]) -> dict[str, Any]:
    """Return what `--set` sets; names may begin with `evaluate.`, as in a run's configuration."""
    parsed = parse_overrides(sets)
    section = parsed.pop("evaluate", {})
    return merge(section, parsed) if isinstance(section, Mapping) else {"evaluate": section}


def evaluation_config(distilled: DistilledSet, options: EvaluateOptions) -> EvaluateConfig:
    """Return the evaluation settings: the artifact's own, overridden by the options; `lr` is a number.

    Raises:
        InputError: a setting is wrong, or the learned rate is asked of a set that has none.
    """
    config, rate = _configured(distilled, options), distilled.meta.learned_lr
    if config.lr != LEARNED:
        return config
    if rate is None:
        raise InputError(
            f"evaluate.lr must be a number for a set without a learned rate, got {LEARNED}; add --set lr=0.01"
        )
    return config.model_copy(update={"lr": rate})


def learned_rate(distilled: DistilledSet, options: EvaluateOptions) -> dict[str, float]:
    """Return `{"learned_lr": rate}` and log it if networks are trained at the rate of the set; else {}."""
    rate = distilled.meta.learned_lr
    if rate is None or _configured(distilled, options).lr != LEARNED:
        return {}
    log.info("networks are trained at the set's learned rate, %.4g (--set lr=0.01 for another)", rate)
    return {"learned_lr": rate}


def _configured(distilled: DistilledSet, options: EvaluateOptions) -> EvaluateConfig:
    """Return the evaluation settings: the artifact's own, overridden by the options."""
    settings = distilled.meta.config.get("evaluate", {})
    method = distilled.meta.config.get("method", {})
    factor = method.get("factor", 1) if isinstance(method, dict) else 1
    meta = distilled.meta
    recipe = functools.partial(
        named_recipe,
        dataset=DatasetRef.parse(meta.dataset).base,
        factor=factor,
        ipc=options.ipc or meta.ipc,
        num_classes=len(meta.class_names),
    )
    sets = recipe(overrides(options.sets))
    if not isinstance(settings, dict):
        raise InputError(f"meta.config.evaluate must be a mapping, got {settings!r}")
    if options.recipe is not None:
        settings = {**settings, **recipe({"recipe": options.recipe})}
    if options.augment not in (None, settings.get("augment", "dsa")):
        settings = {**settings, "strategy": None, "cutmix": 0.0}
    if options.augment == "none" and options.epochs is None and not settings.get("warmup"):
        # The peers' length without augmentation; a warm-up counts on the set's own.
        settings = {**settings, "epochs": min(300, settings.get("epochs", 300))}
    values = options.model_dump(include={"seeds", "epochs", "augment"}, exclude_none=True)
    return EvaluateConfig.parse({**settings, **sets, **values}, prefix="evaluate.")


class ArchResult(Result):
    """One architecture's networks: accuracies as fractions, and the protocol's own measures by name."""

    model_config = ConfigDict(extra="allow")

    arch: str
    accuracy_mean: float
    accuracy_std: float | None
    """Sample standard deviation; None for one network."""
    per_seed: list[float]
    balanced_accuracy_mean: float | None = None
    """Mean over classes of the fraction right; `balanced_accuracy_std` over networks."""
    balanced_accuracy_std: float | None = None
    per_class: list[float | None] | None = None
    """Fraction right of each class, mean over networks; None for a class without images."""
    num_images: int
    """Images trained on, as decoded."""
    wall_s: float
    precision: str | None = None
    """In which the networks were trained: fp32, tf32 or bf16."""
    peak_memory_bytes: int | None = None
    """The largest of its networks, where a record is kept. GPU: of its tensors; CPU: of the process."""


class EvaluateResult(Result):
    """What `ddray evaluate` returns, with the protocol's own details; accuracies are fractions."""

    model_config = ConfigDict(extra="allow")

    protocol: str
    split: str
    teacher: dict[str, Any] | None = None
    """Under protocol `soft`: who labels (`arch`), how well (`accuracy`); `each` if several are averaged."""
    results: list[ArchResult]
    run_dir: str | None = None
    """Where the record is kept; absent if it isn't. With it come `num_failed` and `failures`."""
    num_failed: int = 0
    """Networks that failed; `failures` names them, and `results` are over the others."""
    failures: list[dict[str, Any]] = Field(default_factory=list)
    name: str | None = Field(default=None, exclude=True)
    """What people call the set."""
    recorded_in: str | None = Field(default=None, exclude=True)
    """Folder of the run that wrote the set, whose record the result is now in; None: of no run."""

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per architecture."""
        import pandas as pd

        return pd.DataFrame([result.dump() for result in self.results])
