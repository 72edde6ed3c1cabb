"""Proxies: distilled sets and baselines that architectures are trained on in place of the whole dataset."""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch

from ddray.artifact.distilled_set import DistilledSet, name_of_file
from ddray.data import Dataset, Split, SplitName
from ddray.data.packed import PackedImages
from ddray.errors import InputError, unknown
from ddray.methods import method_names
from ddray.ranking.options import NamedFile, NasConfig
from ddray.ranking.worker import TrainingSet, real_set, training_set

log = logging.getLogger(__name__)

EARLY_STOPPING: Final = "early-stopping"
WHOLE: Final = "whole"


@dataclass(frozen=True)
class Proxy:
    """What architectures are trained on.

    Attributes:
        name: identifies it in rows, tables and pages.
        set_name: name of its data among a sweep's sets; variants of one proxy share it.
        storage_images: stored floats, in units of one image.
        num_steps: optimiser steps; None for the recipe's epochs.
        epochs: of the learning rate's schedule, if they are not the recipe's.
        mixture: the bug of DC-BENCH's harness that the network reproduces, if any.
        shuffle: False reproduces that harness's unshuffled loader.
    """

    name: str
    set_name: str
    data: TrainingSet
    storage_images: float
    num_steps: int | None = None
    epochs: int | None = None
    mixture: str | None = None
    shuffle: bool = True

    @property
    def num_images(self) -> int:
        """Number of decoded images."""
        return len(self.data.labels)

    def variant(self) -> dict[str, Any]:
        """Return the settings that distinguish this proxy from others with the same data."""
        settings = {"num_steps": self.num_steps, "mixture": self.mixture, "shuffle": self.shuffle}
        return {name: value for name, value in settings.items() if value is not None and value is not True}


def whole_proxy(train: Split, dataset: Dataset) -> Proxy:
    """Return all of `train` as a proxy."""
    return Proxy(WHOLE, "whole", real_set(train, dataset), float(len(train)))


def proxy_names(
    files: Sequence[NamedFile], sets: Sequence[DistilledSet], earlier: Collection[str] = ()
) -> list[str]:
    """Return what the sets' proxies are called: what people say, the file's name, or what is in it.

    The last is for files that ddray has named, and for files of the same name; the path tells apart those of
    the same settings. What `earlier` has by a file's name or path keeps that name: a resumed run's rows do.
    """
    contents = [distilled.meta.name for distilled in sets]
    file_names = [file.path.name for file in files]
    short = [
        file.name
        or (file.path.name if name_of_file(file.path, distilled.meta) == file.path.stem else content)
        for file, distilled, content in zip(files, sets, contents, strict=True)
    ]
    names = []
    for file, brief, content in zip(files, short, contents, strict=True):
        former = file.path.name if file_names.count(file.path.name) == 1 else str(file.path)
        candidates = [brief] if short.count(brief) == 1 or file.name else []
        candidates += [content] if contents.count(content) == 1 else []
        names.append(former if file.name is None and former in earlier else [*candidates, str(file.path)][0])
    return names


def file_proxies(
    files: Sequence[NamedFile],
    sets: Sequence[DistilledSet],
    split_name: str,
    earlier: Collection[str] = (),
) -> list[Proxy]:
    """Return distilled sets as proxies, named by `proxy_names`.

    Warn of sets from another split: val images, which the ranking is scored on, may have been among theirs.
    """
    names = proxy_names(files, sets, earlier)
    proxies: list[Proxy] = []
    for name, file, distilled in zip(names, files, sets, strict=True):
        if any(proxy.name == name for proxy in proxies):
            raise InputError(f"--proxy must name each file once, got {file.name or file.path} twice")
        decoded = distilled.decode()
        if distilled.meta.label_kind == "values":
            log.warning("%s holds values to regress to: architectures are trained on their classes", name)
        data = training_set(decoded.images, decoded.classes, distilled.space())
        storage_images = distilled.meta.storage_floats / math.prod(distilled.meta.image_shape)
        proxies.append(Proxy(name, f"file {name}", data, storage_images))
    if seen := [name for name, each in zip(names, sets, strict=True) if each.meta.split != split_name]:
        log.warning(
            "%s: may have been distilled from val images (distill --val-seed, and --val-images where nas has "
            "it, leaves them out); a coreset of all of train contains some of val",
            ", ".join(seen),
        )
    return proxies


def baseline_proxies(
    names: Sequence[str],
    proxies: Sequence[Proxy],
    dataset: Dataset,
    train: Split,
    config: NasConfig,
    *,
    split: SplitName,
) -> list[Proxy]:
    """Return the baselines of distilled sets: coresets of the same ipc, early stopping at the same steps.

    A name is `early-stopping`, `whole` (all of `train` for `whole_epochs`), or a method that selects images
    of `train` by the split's seed (random, kcenter, herding, ...). Each size of the sets gets its baselines.

    Raises:
        InputError: an unknown baseline, one that has to be distilled, or a duplicate.
    """
    check_baselines(names, dataset)
    whole = whole_proxy(train, dataset)
    baselines: list[Proxy] = []
    for name in names:
        if name == WHOLE:
            steps = None if config.whole_epochs is None else config.whole_recipe().num_steps(len(train))
            baselines.append(replace(whole, num_steps=steps, epochs=config.whole_epochs))
        elif name == EARLY_STOPPING:
            for steps in sorted({config.recipe.num_steps(proxy.num_images) for proxy in proxies}):
                label = f"{EARLY_STOPPING} ({steps} steps)"
                baselines.append(replace(whole, name=label, num_steps=steps))
        else:
            sizes = sorted({max(1, round(p.storage_images / dataset.num_classes)) for p in proxies})
            baselines += [_coreset(name, ipc, dataset, train, split) for ipc in sizes]
    return baselines


def check_baselines(names: Sequence[str], dataset: Dataset) -> None:
    """Check that baselines can be built; the data are not read.

    Raises:
        InputError: an unknown baseline, one that has to be distilled, or a duplicate.
    """
    from ddray.jobs.plan import resolve

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


def _coreset(name: str, ipc: int, dataset: Dataset, train: Split, split: SplitName) -> Proxy:
    from ddray.distillation.loop import run_distillation
    from ddray.jobs.context import make_context, make_distiller
    from ddray.jobs.plan import resolve

    plan = resolve(name, dataset, ipc=ipc, seed=split.val_seed or 0)
    ctx = make_context(plan, train, split_name=str(split), device=torch.device("cpu"))
    coreset = run_distillation(make_distiller(plan), ctx).distilled
    data = training_set(coreset.images, coreset.labels, coreset.space())
    label = f"{name} (ipc {ipc})"
    return Proxy(label, f"baseline {label}", data, float(len(coreset.labels)))


def harness_variants(proxies: Sequence[Proxy], faults: Mapping[str, Mapping[str, Any]]) -> list[Proxy]:
    """Return every proxy under each fault of another harness (by label, what it changes in a proxy)."""
    variants = []
    for proxy in proxies:
        if proxy.name.startswith(EARLY_STOPPING):  # DC-BENCH's harness does not have it
            continue
        for label, changes in faults.items():
            base = _class_sorted(proxy) if "shuffle" in changes else proxy
            variants.append(replace(base, name=f"{proxy.name} [{label}]", **changes))
    return variants


def _class_sorted(proxy: Proxy) -> Proxy:
    """Return a proxy with its images sorted by class, as in the harness's files."""
    labels = proxy.data.labels
    order = np.argsort(labels if labels.ndim == 1 else labels.argmax(1), kind="stable")
    if (order == np.arange(len(order))).all():
        return proxy
    images, labels = proxy.data.images, proxy.data.labels[order]
    in_order = images.rows(torch.from_numpy(order)) if isinstance(images, PackedImages) else images[order]
    data = TrainingSet(in_order, labels, proxy.data.space)
    return replace(proxy, set_name=f"{proxy.set_name} by class", data=data)
