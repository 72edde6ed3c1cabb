"""`ddray methods`: what each method is, and what it costs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from ddray.commands import display
from ddray.commands.options import Emit, command, retyped
from ddray.config import Config, Result, lookup
from ddray.system.options import DataFolder

if TYPE_CHECKING:
    from ddray.data import Dataset

_PAPER: Final = re.compile(r"[( ]([A-Z][\w-]+(?: et al\.| & [A-Z]\w+)?,? (?:[A-Z][\w ]*?)?(?:19|20)\d\d)")
_BRACKETS: Final = re.compile(r" \([^()]*\)")
_START: Final = 400  # characters of a description in which the paper is named


class MethodChoice(DataFolder):
    """Which methods, and what they would distil."""

    name: str | None = None
    """A method, for its settings and search space; default a list of all."""
    dataset: str = "digits"
    """Dataset whose presets and costs are shown."""
    ipc: int = 1
    """Images per class of these (of self-supervised methods, as many images of storage per class)."""


class MethodLine(Result):
    """What one method is, and what its preset costs; costs are absent where it can't distil the dataset."""

    name: str
    summary: str
    paper: str | None
    protocol: str
    """What its sets are scored by."""
    size: str
    """`ipc`, or `budget` for self-supervised methods."""
    steps: int | None = None
    networks: int | None = None
    """Networks of the pool that are trained before; None if the method says only once it starts."""
    networks_missing: int | None = None
    """Of these, the ones that this machine's pool does not hold."""
    estimate_s: float | None = None
    """Seconds of the steps, from past runs on this machine; None without any."""
    unsuited: str | None = None
    """Why it can't distil the dataset."""


class MethodList(Result):
    """What `ddray methods` returns."""

    dataset: str
    ipc: int
    methods: list[MethodLine]


class MethodPage(MethodLine):
    """What `ddray methods NAME` returns."""

    description: str
    """From its module: paper, equations, deviations."""
    presets: list[str]
    settings: list[dict[str, Any]]
    """`name` as for --set, `default`, `value` in the preset for the dataset (absent where it has none), and
    `meaning`."""
    search_space: dict[str, Any]
    """What `ddray tune` varies."""


@command(MethodChoice, example="ddray methods datadam --dataset cifar10 --ipc 10", arguments=("name",))
def methods(emit: Emit, name: str | None = None, **options: Any) -> None:
    """List the methods: what each is, paper, protocol, cost; of one, its settings too."""
    from ddray.data import open_dataset
    from ddray.methods import get_method, method_names

    choice = MethodChoice.pick(options)
    if name is not None:
        get_method(name)
    dataset = open_dataset(choice.dataset, data_dir=choice.data_dir)
    if name is not None:
        page = _page(name, dataset, choice.ipc)
        size = choice.ipc * (dataset.num_classes if page.size == "budget" else 1)
        words = ("--method", name, "--dataset", dataset.name, f"--{page.size}", size)
        next_step = display.next_step("distill", *words, *retyped(options, DataFolder))
        emit(page, lambda: display.method_tables(page, dataset.name, choice.ipc, next_step))
        return
    lines = [_line(method, dataset, choice.ipc) for method in method_names()]
    result = MethodList(dataset=dataset.name, ipc=choice.ipc, methods=lines)
    emit(result, lambda: display.methods_table(result))


def description_of(method: str) -> str:
    """Return a method's description: the docstring of its module."""
    from ddray.methods import REGISTRY

    return (REGISTRY.module(method).__doc__ or "").strip()


def summary_of(method: str) -> str:
    """Return a method's description in one line, without its name."""
    return re.sub(r"^[^:]{1,40}: ", "", description_of(method).split("\n")[0])


def paper_of(method: str) -> str | None:
    """Return authors, venue and year as the description names them; None for what has no paper of its own."""
    match = _PAPER.search(" ".join(description_of(method)[:_START].split()))
    return None if match is None else match[1]


def fields_of(config: type[Config], prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield the name, default and meaning of each setting, nested ones by dotted names."""
    for name, field in config.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Config):
            yield from fields_of(kind, f"{prefix}{name}.")
            continue
        default = field.get_default(call_default_factory=True)
        yield f"{prefix}{name}", default, " ".join((field.description or "").split())


def _line(method: str, dataset: Dataset, ipc: int) -> MethodLine:
    from ddray.jobs.plan import budget_method
    from ddray.tuning.settings import method_protocol

    return MethodLine.parse(
        {
            "name": method,
            "summary": _BRACKETS.sub("", summary_of(method)).strip(),
            "paper": paper_of(method),
            "protocol": method_protocol(method),
            "size": "ipc" if budget_method(method) is None else "budget",
            **_costs(method, dataset, ipc),
        }
    )


def _costs(method: str, dataset: Dataset, ipc: int) -> dict[str, Any]:
    """Return what a method's preset for a dataset costs; instead, why it has none."""
    from ddray.errors import InputError
    from ddray.jobs.plan import resolve
    from ddray.jobs.pool_needs import StoredEntries, predict_pool_specs
    from ddray.runs.costs import History
    from ddray.system.gpus import num_gpus

    try:
        plan = resolve(method, dataset, ipc=ipc)
    except InputError as error:
        return {"unsuited": str(error)}
    device = "cuda" if num_gpus() else "cpu"
    specs, stored = predict_pool_specs(plan, device=device), StoredEntries()
    signature = {"kind": "distill", "what": method, "which": dataset.name}
    return {
        "steps": plan.config.steps,
        "networks": None if specs is None else len(specs),
        "networks_missing": None
        if specs is None
        else sum(not stored.has(spec, dataset.name) for spec in specs),
        "estimate_s": History(device).estimate(signature, plan.work).wall_s,
    }


def _page(method: str, dataset: Dataset, ipc: int) -> MethodPage:
    from ddray.errors import InputError
    from ddray.jobs.plan import PRESETS, preset_variants, resolve
    from ddray.methods import get_method
    from ddray.tuning.space import method_space

    config = get_method(method).config_type
    try:
        space, _ = method_space(method, config)
    except InputError:  # a method without one
        space = {}
    try:
        values = resolve(method, dataset, ipc=ipc).config.method.every_value()
    except InputError:  # the dataset does not suit it
        values = None
    settings = [
        {"name": name, "default": default, "meaning": meaning}
        | ({} if values is None else {"value": lookup(values, name)})
        for name, default, meaning in fields_of(config)
    ]
    return MethodPage.parse(
        {
            **_line(method, dataset, ipc).dump(),
            "description": description_of(method),
            "presets": [*PRESETS, *preset_variants(method)],
            "settings": settings,
            "search_space": {name: each.describe() for name, each in space.items()},
        }
    )
