"""Proxies: distilled sets and baselines that architectures are trained on in place of the whole dataset."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from ddray.artifact import DistilledSet
from ddray.data import Dataset, Split
from ddray.errors import InputError, unknown
from ddray.methods import method_names
from ddray.nas.options import NasConfig
from ddray.nas.units import TrainingSet, real_set, training_set

log = logging.getLogger(__name__)

EARLY_STOPPING: Final = "early-stopping"
WHOLE: Final = "whole"
COMPATS: Final = ("dcbench",)


@dataclass(frozen=True)
class Proxy:
    """What architectures are trained on.

    Attributes:
        name: as tables show it.
        key: sha256 of its content.
        set_name: the name of its data among a sweep's sets; variants of one proxy share it.
        data: images and labels.
        num_images: images as decoded.
        storage_images: what it stores, in images' worth of floats.
        num_steps: optimiser steps; None for the recipe's epochs.
        mixture: which bug of DC-BENCH's harness the network reproduces, if any.
        shuffle: off for its unshuffled loader.
    """

    name: str
    key: str
    set_name: str
    data: TrainingSet
    num_images: int
    storage_images: float
    num_steps: int | None = None
    mixture: str | None = None
    shuffle: bool = True

    def variant(self) -> dict[str, Any]:
        """Return what tells this proxy's units from those of others with the same data."""
        held = {"num_steps": self.num_steps, "mixture": self.mixture, "shuffle": self.shuffle}
        return {name: value for name, value in held.items() if value is not None and value is not True}


def file_proxies(paths: Sequence[Path], sets: Sequence[DistilledSet]) -> list[Proxy]:
    """Return distilled sets as proxies, named by their files (by longer paths where names repeat)."""
    names = [path.name for path in paths]
    found: list[Proxy] = []
    for path, held in zip(paths, sets, strict=True):
        name = path.name if names.count(path.name) == 1 else str(path)
        if any(proxy.name == name for proxy in found):
            raise InputError(f"--proxy must name each file once, got {path} twice")
        decoded = held.decode()
        data = training_set(decoded.images, decoded.labels, held.space())
        floats = math.prod(held.meta.image_shape)
        found.append(
            Proxy(
                name, data.key, f"file {name}", data, len(decoded.labels), held.meta.storage_floats / floats
            )
        )
    return found


def warn_of_seen_val(paths: Sequence[Path], sets: Sequence[DistilledSet], split_name: str) -> None:
    """Say which sets were distilled from images that the ranking is scored on."""
    seen = [path.name for path, held in zip(paths, sets, strict=True) if held.meta.split != split_name]
    if seen:
        log.warning(
            "%s: not known to be distilled without val (distill --val-seed keeps it back); "
            "a coreset of all of train repeats some of val",
            ", ".join(seen),
        )


def baseline_proxies(
    names: Sequence[str],
    proxies: Sequence[Proxy],
    dataset: Dataset,
    train: Split,
    config: NasConfig,
    *,
    seed: int,
    device: torch.device,
) -> list[Proxy]:
    """Return the baselines to a sweep's proxies: coresets of the same ipc, early stopping at the same steps.

    Args:
        names: `early-stopping`, `whole` (all of `train` for `whole_epochs`), or a method that selects real
            images (random, kcenter, herding, ...).
        proxies: the distilled sets; every size among them gets its baselines.
        dataset: the real data.
        train: what to select from.
        config: gives the proxies' steps.
        seed: of the selection.
        device: where pool networks are trained.

    Raises:
        InputError: an unknown baseline, one that has to be distilled, or one that is named twice.
    """
    check_baselines(names, dataset)
    found: list[Proxy] = []
    for name in names:
        if name == WHOLE:
            held = real_set(train, dataset)
            steps = None if config.whole_epochs is None else config.whole_recipe().num_steps(len(train))
            found.append(
                Proxy(WHOLE, held.key, "whole", held, len(train), float(len(train)), num_steps=steps)
            )
            continue
        if name == EARLY_STOPPING:
            held = real_set(train, dataset)
            for steps in sorted({config.recipe.num_steps(proxy.num_images) for proxy in proxies}):
                label = f"{EARLY_STOPPING} ({steps} steps)"
                found.append(
                    Proxy(label, held.key, "whole", held, len(train), float(len(train)), num_steps=steps)
                )
            continue
        for ipc in sorted({max(1, round(p.storage_images / dataset.num_classes)) for p in proxies}):
            found.append(_coreset(name, ipc, dataset, train, seed, device))
    return found


def check_baselines(names: Sequence[str], dataset: Dataset) -> None:
    """Refuse baselines that can't be made.

    Args:
        names: as for `baseline_proxies`.
        dataset: the real data; none of it is read.

    Raises:
        InputError: an unknown baseline, one that has to be distilled, or one that is named twice.
    """
    from ddray.plan import resolve

    for name in names:
        if names.count(name) > 1:
            raise InputError(f"--baseline must name each once, got {name} {names.count(name)} times")
        if name in (EARLY_STOPPING, WHOLE):
            continue
        if name not in method_names():
            raise unknown("--baseline", name, [EARLY_STOPPING, WHOLE, *method_names()])
        if resolve(name, dataset, ipc=1).config.steps:
            raise InputError(
                f"--baseline must be {EARLY_STOPPING} or a method that selects images, got {name}; "
                f"run ddray distill --method {name} and pass its file with --proxy"
            )


def _coreset(name: str, ipc: int, dataset: Dataset, train: Split, seed: int, device: torch.device) -> Proxy:
    from ddray.distill import run_distillation
    from ddray.plan import make_context, make_distiller, resolve

    plan = resolve(name, dataset, ipc=ipc, seed=seed)
    ctx = make_context(plan, train, split_name=f"train-val{seed}", device=device)
    made = run_distillation(make_distiller(plan), ctx).distilled
    data = training_set(made.images, made.labels, made.space())
    label = f"{name} (ipc {ipc})"
    return Proxy(label, data.key, f"baseline {label}", data, len(made.labels), float(len(made.labels)))


def check_names(proxies: Sequence[Proxy]) -> None:
    """Refuse proxies of one name: rows, tables and pages tell them apart by it.

    Raises:
        InputError: a file is called as a baseline is.
    """
    names = [proxy.name for proxy in proxies]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"proxies must have different names, 2 are called {name}; rename the file")


def dcbench_variants(proxies: Sequence[Proxy]) -> list[Proxy]:
    """Return every proxy under each bug of the public DC-BENCH harness, and under all three.

    Early stopping, which that harness does not have, is left out.

    `one_hot` without num_classes harms only under the softmax, whose width it sets: the two stand together.
    """
    variants: list[tuple[str, dict[str, Any]]] = [
        ("softmax over one-hot", {"mixture": "softmax"}),
        ("softmax, one_hot cut", {"mixture": "softmax_truncated"}),
        ("unshuffled", {"shuffle": False}),
        ("all three", {"mixture": "softmax_truncated", "shuffle": False}),
    ]
    return [
        replace(
            _class_sorted(proxy) if "shuffle" in changes else proxy, name=f"{proxy.name} [{label}]", **changes
        )
        for proxy in proxies
        if not proxy.name.startswith(EARLY_STOPPING)
        for label, changes in variants
    ]


def _class_sorted(proxy: Proxy) -> Proxy:
    """Return a proxy whose images stand class by class, as in the harness's files."""
    import numpy as np

    order = np.argsort(proxy.data.labels, kind="stable")
    if bool((order == np.arange(len(order))).all()):
        return proxy
    data = TrainingSet(proxy.data.images[order], proxy.data.labels[order], proxy.data.space)
    return replace(proxy, key=data.key, set_name=f"{proxy.set_name} by class", data=data)
