"""A bench file: methods x datasets x sizes x seeds x evaluation, and the changes of its smaller scales."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from ddray.config import Config, added, merge, nest, parse_overrides, read_yaml
from ddray.data.reference import DatasetRef
from ddray.errors import InputError, did_you_mean, unknown
from ddray.system.options import ContentOptions
from ddray.tables.claims import Claim

if TYPE_CHECKING:
    from ddray.data import SplitName

ScaleName = Literal["paper", "cpu", "smoke"]
C = TypeVar("C", bound=Config)
WHOLE: Final = "whole"
"""A row whose networks are trained on all real images: it has no set, and one cell per dataset."""

# What a scale changes in every file; a file's own `scales` section overrides it.
SCALES: Final[dict[str, dict[str, Any]]] = {
    "paper": {},
    "cpu": {
        "seeds": 1,
        "limits": {
            **{"steps": 300, "epochs": 300, "networks": 3, "ipc": 10, "batch_real": 64},
            **{"whole": 2000, "sample": 36},
        },
    },
    "smoke": {
        "dataset": ["digits"],
        "seeds": 1,
        "limits": {
            **{"steps": 2, "epochs": 2, "teacher_epochs": 5, "batch_real": 8, "whole": 100, "sample": 4},
            **{"networks": 1, "ipc": 1, "archs": 1, "targets": 0, "teachers": 1},
        },
    },
}


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) or value is None else [value]


def _absolute(names: tuple[str, ...]) -> tuple[str, ...]:
    """Make folders absolute, so that a bench can be resumed from anywhere; other names stay."""
    return tuple(str(DatasetRef.parse(name).absolute()) for name in names)


def _absolute_folder(name: str) -> str:
    return str(Path(name).expanduser().absolute())


def _without_flip(dataset: str) -> str:
    return str(DatasetRef.parse(dataset).model_copy(update={"can_flip": None}))


Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Datasets = Annotated[Names, AfterValidator(_absolute)]
Sizes = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_listed)]


class PublishedSource(Config):
    """Where to find a row's or table's published numbers in published.csv; None means any."""

    paper: str | None = None
    table: str | None = None
    method: str | None = None
    """The paper's name for the method, where it differs from ours."""
    setting: str | None = None


class MethodSpec(Config):
    """One row of the table: a method with its settings."""

    name: str
    """A method's, or `whole`: networks trained on all real images, one cell per dataset."""
    label: str | None = None
    """The row's name; default the method's, with the preset if that is not `paper`."""
    preset: str = "paper"
    steps: int | None = Field(default=None, ge=0)
    set: dict[str, Any] = Field(default_factory=dict)
    """Overrides as with --set: dotted names mapped to values, or a list of key=value; also `can_flip`."""
    sweep: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    """Dotted names mapped to lists of values: one row per combination."""
    dataset: Datasets = ()
    """Datasets of this row, among the table's; default all."""
    ipc: Sizes = ()
    """Sizes of this row, instead of the table's."""
    budget: Sizes = ()
    shards: int | None = added(None, ge=1)
    """Shards of this row's sets, instead of the table's; 1: none."""
    published: PublishedSource = PublishedSource()
    """With a method or a setting it says that `set` and `sweep` make the row what the paper has there."""

    @model_validator(mode="before")
    @classmethod
    def _plain_name(cls, value: Any) -> Any:
        """Accept `dm` for `{name: dm}`, and a list of key=value for a mapping."""
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict) and isinstance(value.get("set"), list):
            return {**value, "set": parse_overrides(map(str, value["set"]))}
        return value

    @property
    def row(self) -> str:
        """The row's label."""
        return self.label or (self.name if self.preset == "paper" else f"{self.name} ({self.preset})")

    def layers(self) -> list[dict[str, Any]]:
        """Return the overrides as nested layers, the last one winning."""
        steps = [] if self.steps is None else [{"steps": self.steps}]
        settings = (nest(name, value) for name, value in self.set.items() if name != "can_flip")
        return [merge(*settings), *steps]

    def expanded(self) -> list[MethodSpec]:
        """Return one row per combination of `sweep`, labelled by its values."""
        if not self.sweep:
            return [self]
        rows = []
        for values in itertools.product(*self.sweep.values()):
            combination = dict(zip(self.sweep, values, strict=True))
            text = ", ".join(f"{name.rpartition('.')[2]}={value}" for name, value in combination.items())
            changes = {"label": f"{self.row}, {text}", "set": {**self.set, **combination}, "sweep": {}}
            rows.append(self.model_copy(update=changes))
        return rows


class EvaluateSpec(Config):
    """How every set is scored; None leaves a setting to the method."""

    protocol: str = "hard"
    """A protocol of `ddray evaluate`, or `nas`: the sets are proxies that rank architectures."""
    archs: Names = ()
    """Networks to train; default the one the set was distilled with."""
    epochs: int | None = Field(default=None, ge=1)
    seeds: int | None = Field(default=None, ge=1)
    """Networks per set and architecture."""
    augment: str | None = None
    recipe: str | None = None
    """Name of the recipe that trains networks on every row's sets, as for `ddray evaluate --recipe`."""
    dataset: Datasets = ()
    """Distilled datasets that this applies to; default all."""
    rows: Names = added(())
    """Rows that this applies to, by label or by the method's name; default all."""
    target: Datasets = ()
    """Datasets to score on; default the set's own."""
    teacher: Names = ()
    """Teachers for the protocol `soft`, one cell each; names joined by "+" are averaged, `own` is the network
    that made the row's sets (RDED, SRe2L)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further options of the protocol, as in `ddray evaluate` (`train_limit: 500`); for `nas`, as in
    `ddray nas` (`space: convnet720`, `baselines: [early-stopping]`)."""
    published: PublishedSource = PublishedSource()
    """With a setting it says that this section's epochs, recipe and options are the paper's there."""

    @field_validator("options")
    @classmethod
    def _lists(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Accept a single value for a list, as everywhere in a bench file."""
        return {k: (_listed(v) or []) if k in ("baselines", "sets") else v for k, v in options.items()}

    def takes(self, row: MethodSpec) -> bool:
        """Return whether a row's sets are scored so."""
        return not self.rows or row.row in self.rows or row.name in self.rows


class Limits(Config):
    """Upper bounds that a scale puts on the methods' settings."""

    steps: int | None = Field(default=None, ge=0)
    epochs: int | None = Field(default=None, ge=1)
    networks: int | None = Field(default=None, ge=1)
    """Of an evaluation; also experts whose trajectories are matched."""
    ipc: int | None = Field(default=None, ge=1)
    """Larger sizes are left out; a row with only larger ones gets this size."""
    budget: int | None = Field(default=None, ge=1)
    archs: int | None = Field(default=None, ge=1)
    """Only this many architectures are used, the first ones."""
    targets: int | None = Field(default=None, ge=0)
    """Only this many target datasets are used, the first ones; with 0, the set's own."""
    teachers: int | None = Field(default=None, ge=1)
    teacher_epochs: int | None = Field(default=None, ge=1)
    """Epochs of the teachers in the protocol `soft`, which must beat chance."""
    batch_real: int | None = Field(default=None, ge=1)
    whole: int | None = Field(default=None, ge=1)
    """Real images, of every class in proportion, that a row `whole` trains on."""
    sample: int | None = Field(default=None, ge=1)
    """Architectures that a NAS sweep trains on a set."""


class BenchSpec(Config):
    """A bench file at one scale."""

    name: str
    dataset: Datasets = Field(min_length=1)
    methods: tuple[MethodSpec, ...] = Field(min_length=1)
    ipc: Sizes = ()
    budget: Sizes = ()
    """Images of storage, for self-supervised methods."""
    seeds: int = Field(default=1, ge=1)
    """Distilled sets per cell."""
    seed: int = 0
    """The first set's seed."""
    evaluate: Annotated[tuple[EvaluateSpec, ...], BeforeValidator(_listed)] = (EvaluateSpec(),)
    set: dict[str, Any] = Field(default_factory=dict)
    """Overrides for every method; a row's own win."""
    shards: int | None = added(None, ge=1)
    """Groups of classes that each set is distilled in, a unit each, as with `ddray distill --shards`."""
    generator: dict[str, str] | str | None = None
    """Folder of a DiTPipeline for the rows that take one (`method.diffusion`), or one for each dataset."""
    skip: Names = ()
    """Rows, by label, that this scale leaves out."""
    limits: Limits = Limits()
    replaced: bool = False
    """Whether a scale has replaced the table's datasets; rows that name others then run on all of them."""
    published: PublishedSource = PublishedSource()
    claims: tuple[Claim, ...] = added(())
    """Statements about its rows that are decided once it has run; no part of the run's identity."""

    @field_validator("generator")
    @classmethod
    def _absolute_folders(cls, value: dict[str, str] | str | None) -> dict[str, str] | str | None:
        """Make folders absolute, so that a bench can be resumed from anywhere."""
        if isinstance(value, dict):
            names = _absolute(tuple(value))
            return dict(zip(names, map(_absolute_folder, value.values()), strict=True))
        return None if value is None else _absolute_folder(value)

    @model_validator(mode="after")
    def _checked(self) -> Self:
        """Check what involves several fields."""
        if not self.evaluate:
            raise ValueError("evaluate must name at least one protocol, got none")
        row_labels = [row.row for method in self.methods for row in method.expanded()]
        for label in self.skip:
            if label not in row_labels:
                raise ValueError(
                    f"skip must name rows, got {label!r}{did_you_mean(label, row_labels)}; "
                    f"there are {', '.join(row_labels)}"
                )
        self._check_filters(row_labels)
        rows = self.rows()
        if not rows:
            raise ValueError(f"at least one row must be left, but skip names all: {', '.join(self.skip)}")
        labels = [
            (row.row, *place)
            for row in rows
            for place in itertools.product(self.datasets(row), self.sizes(row))
        ]
        duplicates = sorted({label for label in labels if labels.count(label) > 1})
        if duplicates and not self.replaced:
            raise ValueError(f"labels must differ, got {duplicates[0][0]!r} twice; add label: to one of them")
        for row in rows:
            if row.name != WHOLE and not (row.ipc or row.budget or self.ipc or self.budget):
                raise ValueError(f"{row.row} must have a size, got none; add ipc: [1] (or budget:)")
        for section, entries in (("a method's", self.methods), ("evaluate", self.evaluate)):
            for name in itertools.chain(*(entry.dataset for entry in entries)):
                if name not in self.dataset and not self.replaced:
                    rule = f"{section} dataset must be among {list(self.dataset)}"
                    raise ValueError(f"{rule}, got {name!r}")
        return self

    def _check_filters(self, row_labels: list[str]) -> None:
        """Check that what an evaluation or a generator is for is in the table."""
        names = [*row_labels, *(method.name for method in self.methods)]
        for label in itertools.chain(*(one.rows for one in self.evaluate)):
            if label not in names:
                raise ValueError(f"evaluate.rows must name rows, got {label!r}{did_you_mean(label, names)}")
        for name in self.generator if isinstance(self.generator, dict) else ():
            if name not in self.dataset and not self.replaced:
                raise ValueError(f"generator must be for datasets among {list(self.dataset)}, got {name!r}")

    @property
    def split(self) -> SplitName:
        """What the sets are distilled from: without the val images that NAS rankings are scored on."""
        from ddray.data import SplitName  # torch: --help goes without

        sizes = [one.options.get("val_images") for one in self.evaluate if one.protocol == "nas"]
        if any(size != sizes[0] for size in sizes):
            raise InputError(
                f"all nas evaluations of {self.name} must have the same val_images, which the sets leave "
                f"out, got {', '.join(map(str, sizes))}"
            )
        return SplitName(self.seed, sizes[0]) if sizes else SplitName()

    def rows(self) -> list[MethodSpec]:
        """Return the table's rows, with sweeps expanded and skipped rows left out."""
        rows = [row for method in self.methods for row in method.expanded()]
        return [row for row in rows if row.row not in self.skip]

    def sizes(self, row: MethodSpec) -> list[tuple[str, int]]:
        """Return a row's sizes as (`ipc` or `budget`, value), within the limits."""
        source = row if row.ipc or row.budget else self
        sizes: list[tuple[str, int]] = []
        for kind, values, limit in (
            ("ipc", source.ipc, self.limits.ipc),
            ("budget", source.budget, self.limits.budget),
        ):
            within_limit = [value for value in values if limit is None or value <= limit]
            sizes += [(kind, value) for value in within_limit or ([limit] if values and limit else [])]
        return sizes

    def num_shards(self, row: MethodSpec, num_classes: int) -> int:
        """Return how many shards a row's sets have, at most one per class where a scale picks the dataset."""
        num = 1 if row.name == WHOLE else row.shards or self.shards or 1
        return min(num, num_classes) if self.replaced else num

    def datasets(self, entry: MethodSpec | EvaluateSpec) -> list[str]:
        """Return the datasets that a row distils or that an evaluation applies to.

        They are all of them if a scale has replaced those it names.
        """
        return [name for name in self.dataset if name in entry.dataset] or list(self.dataset)

    def generator_for(self, dataset: str) -> str | None:
        """Return the folder of the generator for a dataset; None: each row's own."""
        if not isinstance(self.generator, dict):
            return self.generator
        folders = {_without_flip(name): folder for name, folder in self.generator.items()}
        return folders.get(_without_flip(dataset))

    def source(self, row: MethodSpec, dataset: str) -> str:
        """Return the name that a row's dataset is opened by: with `can_flip`, if the settings have it."""
        can_flip = {**self.set, **row.set}.get("can_flip")
        return str(DatasetRef.parse(dataset).with_options(can_flip=can_flip))

    def with_content(self, content: Mapping[str, Any]) -> Self:
        """Return the spec with options of content in the names of all its datasets."""

        def named(dataset: str) -> str:
            return str(DatasetRef.parse(dataset).with_options(**content))

        def renamed(entry: C, *fields: str) -> C:
            return entry.model_copy(
                update={field: tuple(map(named, getattr(entry, field))) for field in fields}
            )

        changes: dict[str, Any] = {
            "methods": tuple(renamed(method, "dataset") for method in self.methods),
            "evaluate": tuple(renamed(one, "dataset", "target") for one in self.evaluate),
        }
        if isinstance(self.generator, dict):
            changes["generator"] = {named(name): folder for name, folder in self.generator.items()}
        return renamed(self, "dataset").model_copy(update=changes)

    def within(self, evaluation_spec: EvaluateSpec) -> EvaluateSpec:
        """Return an evaluation with as many architectures, targets and teachers as the limits allow."""
        limits = {"archs": self.limits.archs, "target": self.limits.targets, "teacher": self.limits.teachers}
        first = {name: getattr(evaluation_spec, name)[:limit] for name, limit in limits.items()}
        return evaluation_spec.model_copy(update=first)


def read_spec(
    source: Path | Mapping[str, Any],
    scale: str = "paper",
    content: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> BenchSpec:
    """Read a bench file (or take what it would hold) at a scale.

    `paper` takes the file as written; `cpu` and `smoke` put limits on it, then the file's own
    `scales: {<scale>: ...}` is merged over it. Options of content, such as `image_size`, at the top of the
    file or in `content`, which wins, are written into the names of all its datasets; a scale with other
    datasets (`smoke`) leaves out columns, clips and generators. `overrides` win over the file's `set`.

    Raises:
        InputError: the file or a value is bad, or there is no such scale.
    """
    if scale not in SCALES:
        raise unknown("--scale", scale, SCALES)
    document, path = (read_yaml(source), source) if isinstance(source, Path) else (dict(source), "bench")
    file_scales = document.pop("scales", {})
    is_nested = isinstance(file_scales, Mapping)
    if not is_nested or not all(isinstance(value, Mapping) for value in file_scales.values()):
        raise InputError(f"{path}: scales must map names of scales to what they change, got {file_scales!r}")
    for name in file_scales:
        if name not in SCALES:
            raise unknown(f"{path}: a scale", str(name), SCALES)
    merged = merge(document, SCALES[scale], file_scales.get(scale, {}))
    if _listed(merged.get("dataset")) != _listed(document.get("dataset")):
        merged["replaced"] = True
    in_file = {name: merged.pop(name) for name in ContentOptions.model_fields if name in merged}
    if "replaced" in merged:  # what only files of the table's own datasets have
        in_scale = file_scales.get(scale, {})
        in_file = {k: v for k, v in in_file.items() if k in ("image_size", "can_flip") or k in in_scale}
        merged["generator"] = in_scale.get("generator")
    if overrides and isinstance(file_set := merged.get("set", {}), Mapping):
        merged["set"] = merge(*(nest(name, value) for name, value in file_set.items()), overrides)
    return BenchSpec.parse(merged, source=str(path)).with_content({**in_file, **(content or {})})
