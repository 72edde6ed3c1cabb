"""Which pool entries a run will ask for, and whether they are there: for forecasts, which read no image."""

from __future__ import annotations

import contextlib
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, NoReturn

import torch

from ddray.data import PixelSpace, Split
from ddray.data.reference import DatasetRef
from ddray.errors import DdrayError
from ddray.jobs.context import declared_specs, make_context, make_distiller
from ddray.jobs.plan import Plan
from ddray.pool.files import PoolFiles
from ddray.pool.spec import PoolSpec
from ddray.runs.ledger import canonical_json
from ddray.system.files import home

_PER_BUDGET: Final = 20  # distilled images that fit in one image of storage
_MAX_BLANK: Final = 2**26  # values: above this, blank images would take too much memory just to learn a count
_FINGERPRINT: Final = "stand-in"


class _AskedError(Exception):
    """Raised inside a method's setup when it asks for networks."""

    def __init__(self, specs: tuple[PoolSpec, ...]) -> None:
        super().__init__(specs)
        self.specs = specs


class _AskingPool:
    """A pool that has nothing and trains nothing."""

    def get(self, specs: Sequence[PoolSpec]) -> NoReturn:
        """Raise what is asked for."""
        raise _AskedError(tuple(specs))


def predict_pool_specs(
    plan: Plan, split_name: str = "train", device: str = "cpu"
) -> tuple[PoolSpec, ...] | None:
    """Return the pool entries that a method asks for first, without reading images; None if unknown.

    In place of the dataset's fingerprint they have a stand-in; `device` is the kind that they are trained on.
    """
    num, shape = max(plan.dataset.num_classes, _PER_BUDGET * (plan.budget or 0)), plan.dataset.image_shape
    if num * math.prod(shape) > _MAX_BLANK:
        return None
    labels = torch.arange(num) % plan.dataset.num_classes
    split = Split(torch.zeros(num, *shape, dtype=torch.uint8), labels)
    stand_in = replace(plan.dataset, load_train=lambda: split, load_test=lambda: split)
    stand_in.__dict__["fingerprint"] = _FINGERPRINT
    config = plan.config.model_copy(update={"compile": "off"})
    stand_in_plan = replace(plan, dataset=stand_in, config=config, ipc=1)
    space = PixelSpace("normalized", plan.dataset.mean, plan.dataset.std)
    specs: Sequence[PoolSpec] = ()
    logger = logging.getLogger("ddray")
    level = logger.level
    logger.setLevel(logging.ERROR)  # what the stand-in is warned of says nothing about the run
    try:
        ctx = make_context(
            stand_in_plan, split, split_name=split_name, device=torch.device("cpu"), space=space
        )
        specs = declared_specs(stand_in_plan, ctx)
        if not specs:
            make_distiller(stand_in_plan).setup(replace(ctx, pool=_AskingPool()))
    except _AskedError as request:
        specs = request.specs
    except Exception:  # a method may need real images before it asks
        return None
    finally:
        logger.setLevel(level)
    return tuple(_on(spec, device) for spec in specs)


def _on(spec: PoolSpec, device: str) -> PoolSpec:
    """Return the spec of an entry that is made on another kind of device, as is the network below it."""
    if (network := _network_of(spec)) is None:
        return spec.model_copy(update={"device": device})
    recipe = {**spec.recipe, "network": _on(network, device).dump()}
    return spec.model_copy(update={"device": device, "recipe": recipe})


def _network_of(spec: PoolSpec) -> PoolSpec | None:
    """Return the spec of the network that an entry is made with, if it is one of its own."""
    network = spec.recipe.get("network")
    return None if network is None else PoolSpec.parse(network)


class StoredEntries:
    """What the pool in $DDRAY_HOME holds; specs are compared by all but the fingerprints of their images."""

    def __init__(self) -> None:
        files = PoolFiles(home() / "pool")
        self._identities: set[str] = set()
        self._seconds: dict[tuple[str, ...], list[float]] = {}
        for key in files.list_keys():
            with contextlib.suppress(DdrayError, FileNotFoundError, KeyError):  # damaged, or set aside
                meta = files.describe(key)
                spec, dataset = meta["spec"], str(meta["dataset_name"])
                self._identities.add(_identity(spec, dataset))
                rate = float(meta["wall_s"]) / _epochs(spec)
                self._seconds.setdefault(_kind(spec, dataset), []).append(rate)

    def has(self, spec: PoolSpec, dataset: str) -> bool:
        """Return whether the entry of a predicted spec is there."""
        return _identity(spec.dump(), dataset) in self._identities

    def seconds(self, spec: PoolSpec, dataset: str, requested: Sequence[PoolSpec]) -> float | None:
        """Return what an entry's training should take, from those of its kind by epoch; None without any.

        With the training of the network below it, if that is neither there nor `requested` itself.
        """
        values = spec.dump()
        if (rates := self._seconds.get(_kind(values, dataset))) is None:
            return None
        seconds, network = statistics.median(rates) * _epochs(values), _network_of(spec)
        if network is None or network in requested or self.has(network, dataset):
            return seconds
        below = self.seconds(network, dataset, requested)
        return None if below is None else below + seconds


def _epochs(spec: Mapping[str, Any]) -> float:
    return float(spec["recipe"].get("epochs") or 1)


def _kind(spec: Mapping[str, Any], dataset: str) -> tuple[str, ...]:
    return (str(spec["kind"]), str(spec["arch"]), str(spec["device"]), DatasetRef.parse(dataset).base)


def _identity(spec: Mapping[str, Any], dataset: str) -> str:
    """Return a spec as text, with the dataset's name in place of its fingerprint."""
    values = {name: value for name, value in spec.items() if name not in ("dataset", "parents")}
    if network := spec["recipe"].get("network"):
        values["recipe"] = {**spec["recipe"], "network": _identity(network, dataset)}
    return canonical_json({**values, "dataset": DatasetRef.parse(dataset).base})
