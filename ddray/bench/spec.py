"""A bench file: methods x datasets x sizes x seeds x evaluation, and what its smaller scales change."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from ddray.config import Config, merge, nest, parse_overrides, read_yaml
from ddray.data.catalog import KNOWN
from ddray.errors import InputError, did_you_mean, unknown

ScaleName = Literal["paper", "cpu", "smoke"]

# What a scale changes in every file; the file's own `scales` section wins over it.
SCALES: Final[dict[str, dict[str, Any]]] = {
    "paper": {},
    "cpu": {
        "seeds": 1,
        "limits": {"steps": 300, "epochs": 300, "networks": 3, "ipc": 10, "batch_real": 64, "sample": 36},
    },
    "smoke": {
        "dataset": ["digits"],
        "seeds": 1,
        "limits": {
            "steps": 2,
            "epochs": 2,
            "networks": 1,
            "ipc": 1,
            "archs": 1,
            "targets": 0,
            "teachers": 1,
            "teacher_epochs": 5,
            "batch_real": 8,
            "sample": 4,
        },
    },
}


def _listed(value: Any) -> Any:
    """Return one value as a list of one."""
    return value if isinstance(value, list | tuple) or value is None else [value]


def _absolute(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return datasets' names, folders as absolute paths: a bench is continued from anywhere."""
    paths = (Path(name).expanduser() for name in names)
    return tuple(
        str(path.absolute()) if name not in KNOWN and path.is_dir() else name
        for name, path in zip(names, paths, strict=True)
    )


Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Datasets = Annotated[Names, AfterValidator(_absolute)]
Sizes = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_listed)]


class Source(Config):
    """Where a row's or a table's published numbers stand in published.csv; None means any."""

    paper: str | None = None
    table: str | None = None
    method: str | None = None
    """The paper's own name of the method, where it is not ours."""
    setting: str | None = None


class MethodSpec(Config):
    """One row of the table: a method with its settings."""

    name: str
    label: str | None = None
    """The row's name; default the method's, with the preset if that is not `paper`."""
    preset: str = "paper"
    steps: int | None = Field(default=None, ge=0)
    set: dict[str, Any] = Field(default_factory=dict)
    """Overrides as for --set: dotted names to values, or a list of key=value."""
    sweep: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    """Dotted names to lists of values: one row for each combination."""
    dataset: Datasets = ()
    """Datasets of this row, among the table's; default all."""
    ipc: Sizes = ()
    """Sizes of this row, in place of the table's."""
    budget: Sizes = ()
    published: Source = Source()

    @model_validator(mode="before")
    @classmethod
    def _plain_name(cls, value: Any) -> Any:
        """Take `dm` for `{name: dm}`, and a list of key=value for a mapping."""
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
        return [merge(*(nest(name, value) for name, value in self.set.items())), *steps]

    def expanded(self) -> list[MethodSpec]:
        """Return one row per combination of `sweep`, labelled by its values."""
        if not self.sweep:
            return [self]
        rows = []
        for values in itertools.product(*self.sweep.values()):
            chosen = dict(zip(self.sweep, values, strict=True))
            text = ", ".join(f"{name.rpartition('.')[2]}={value}" for name, value in chosen.items())
            more = {"label": f"{self.row}, {text}", "set": {**self.set, **chosen}, "sweep": {}}
            rows.append(self.model_copy(update=more))
        return rows


class EvaluateSpec(Config):
    """How every set is scored; None leaves a setting to the method."""

    protocol: str = "hard"
    """One of `ddray evaluate`'s, or `nas`: the sets as proxies that rank architectures."""
    archs: Names = ()
    """Networks to train; default the one that the set was distilled in."""
    epochs: int | None = Field(default=None, ge=1)
    seeds: int | None = Field(default=None, ge=1)
    """Networks per set and architecture."""
    augment: str | None = None
    recipe: str | None = None
    """How networks are trained on every row's sets: a recipe by name, as `ddray evaluate --recipe` has it."""
    dataset: Datasets = ()
    """Distilled datasets that are scored so; default all."""
    target: Datasets = ()
    """Datasets to score on; default the set's own."""
    teacher: Names = ()
    """Teachers of the protocol `soft`, one cell each; of names joined by "+", the average."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further options of the protocol, as `ddray evaluate` has them (`train_limit: 500`); of `nas`, as
    `ddray nas` has them (`space: convnet720`, `baselines: [early-stopping]`)."""
    published: Source = Source()

    @field_validator("options")
    @classmethod
    def _lists(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Take one value for a list of one, as everywhere in a bench file."""
        return {k: (_listed(v) or []) if k in ("baselines", "sets") else v for k, v in options.items()}


class Limits(Config):
    """Upper bounds that a scale puts on whatever the methods ask for."""

    steps: int | None = Field(default=None, ge=0)
    epochs: int | None = Field(default=None, ge=1)
    networks: int | None = Field(default=None, ge=1)
    ipc: int | None = Field(default=None, ge=1)
    """Larger sizes are left out; of a row that has only larger ones, the smallest is cut to this."""
    budget: int | None = Field(default=None, ge=1)
    archs: int | None = Field(default=None, ge=1)
    """The first so many architectures are kept."""
    targets: int | None = Field(default=None, ge=0)
    """The first so many target datasets are kept; of none, the set's own."""
    teachers: int | None = Field(default=None, ge=1)
    teacher_epochs: int | None = Field(default=None, ge=1)
    """Of those who label in the protocol `soft`, who must be better than chance."""
    batch_real: int | None = Field(default=None, ge=1)
    sample: int | None = Field(default=None, ge=1)
    """Architectures that a NAS sweep trains on a set."""


class BenchSpec(Config):
    """A bench file at one scale."""

    name: str
    dataset: Datasets = Field(min_length=1)
    methods: tuple[MethodSpec, ...] = Field(min_length=1)
    ipc: Sizes = ()
    budget: Sizes = ()
    """Images of storage, of self-supervised methods."""
    seeds: int = Field(default=1, ge=1)
    """Distilled sets per cell."""
    seed: int = 0
    """The first set's seed."""
    evaluate: Annotated[tuple[EvaluateSpec, ...], BeforeValidator(_listed)] = (EvaluateSpec(),)
    set: dict[str, Any] = Field(default_factory=dict)
    """Overrides for every method."""
    skip: Names = ()
    """Rows, by label, that this scale leaves out."""
    limits: Limits = Limits()
    replaced: bool = False
    """Whether a scale has replaced the table's datasets: rows that name others then run on all."""
    published: Source = Source()

    @model_validator(mode="after")
    def _checked(self) -> Self:
        """Check what one field can't tell."""
        if not self.evaluate:
            raise ValueError("evaluate must name at least one protocol, got none")
        known = [row.row for method in self.methods for row in method.expanded()]
        if strange := [label for label in self.skip if label not in known]:
            raise ValueError(
                f"skip must name rows, got {strange[0]!r}{did_you_mean(strange[0], known)}; "
                f"there are {', '.join(known)}"
            )
        if not self.rows():
            raise ValueError(f"at least one row must be left, skip names all: {', '.join(self.skip)}")
        labels = [
            (row.row, name, size)
            for row in self.rows()
            for name in self.datasets(row)
            for size in self.sizes(row)
        ]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice and not self.replaced:
            raise ValueError(f"labels must differ, got {twice[0][0]!r} twice; add label: to one of them")
        for row in self.rows():
            if not (row.ipc or row.budget or self.ipc or self.budget):
                raise ValueError(f"{row.row} must have a size, got none; add ipc: [1] (or budget:)")
        for what, named in (("a method's", self.methods), ("evaluate", self.evaluate)):
            strange = [name for one in named for name in one.dataset if name not in self.dataset]
            if strange and not self.replaced:
                rule = f"{what} dataset must be among {list(self.dataset)}"
                raise ValueError(f"{rule}, got {strange[0]!r}")
        return self

    @property
    def val_seed(self) -> int | None:
        """Whose val tenth the sets are distilled without: a ranking of architectures is scored on it."""
        return self.seed if any(one.protocol == "nas" for one in self.evaluate) else None

    def rows(self) -> list[MethodSpec]:
        """Return the table's rows, sweeps expanded, without those that are skipped."""
        found = [row for method in self.methods for row in method.expanded()]
        return [row for row in found if row.row not in self.skip]

    def sizes(self, row: MethodSpec) -> list[tuple[str, int]]:
        """Return a row's sizes as (`ipc` or `budget`, value), within the limits."""
        own = row.ipc or row.budget
        found: list[tuple[str, int]] = []
        for kind, mine, shared in (("ipc", row.ipc, self.ipc), ("budget", row.budget, self.budget)):
            values = mine if own else shared
            most = getattr(self.limits, kind)
            kept = [value for value in values if most is None or value <= most]
            found += [(kind, value) for value in kept or ([most] if values else [])]
        return found

    def datasets(self, row: MethodSpec) -> list[str]:
        """Return a row's datasets; all where a scale has replaced those that it names."""
        kept = [name for name in self.dataset if name in row.dataset]
        return kept or list(self.dataset)

    def scored(self, held: EvaluateSpec) -> list[str]:
        """Return the distilled datasets of an evaluation; all where a scale has replaced those it names."""
        kept = [name for name in self.dataset if name in held.dataset]
        return kept or list(self.dataset)

    def within(self, held: EvaluateSpec) -> EvaluateSpec:
        """Return an evaluation with as many architectures, targets and teachers as the limits allow."""
        limits = self.limits
        return held.model_copy(
            update={
                "archs": held.archs[: limits.archs],
                "target": held.target[: limits.targets],
                "teacher": held.teacher[: limits.teachers],
            }
        )


def read_spec(path: Path, scale: str = "paper") -> BenchSpec:
    """Read a bench file at a scale.

    Args:
        path: the YAML.
        scale: `paper` takes the file as written; `cpu` and `smoke` put limits on it, then the file's own
            `scales: {<scale>: ...}` is merged over it.

    Raises:
        InputError: the file or a value is bad, or there is no such scale.
    """
    if scale not in SCALES:
        raise unknown("--scale", scale, SCALES)
    held = read_yaml(path)
    own = held.pop("scales", {})
    if not isinstance(own, Mapping) or not all(isinstance(value, Mapping) for value in own.values()):
        raise InputError(f"{path}: scales must map names of scales to what they change, got {own!r}")
    for name in own:
        if name not in SCALES:
            raise unknown(f"{path}: a scale", str(name), SCALES)
    merged = merge(held, SCALES[scale], own.get(scale, {}))
    if _listed(merged.get("dataset")) != _listed(held.get("dataset")):
        merged["replaced"] = True
    return BenchSpec.parse(merged, source=str(path))
