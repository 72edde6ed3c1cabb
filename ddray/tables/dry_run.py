"""What a bench would cost: its units, without reading an image."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ddray.config import read_yaml
from ddray.data import Dataset, open_dataset
from ddray.data.catalog import KNOWN
from ddray.errors import InputError
from ddray.jobs.context import check_plan
from ddray.runs.ledger import Ledger
from ddray.tables.cost import forecast, sweep_of
from ddray.tables.graph import build_graph
from ddray.tables.nas_table import sweep_folder
from ddray.tables.options import BenchOptions
from ddray.tables.result import Forecast
from ddray.tables.run import check_sweeps
from ddray.tables.spec import BenchSpec

# Datasets whose class names are only in their files: the number of classes, for dry runs without the files.
_NUM_CLASSES = {
    "tiny_imagenet": 200,
    "imagenet": 1000,
    "cub200": 200,
    "stanford_dogs": 120,
    "speech_commands_mini": 8,
}


def dry_run(spec: BenchSpec, options: BenchOptions, *, run_dir: Path | None) -> Forecast:
    """Return the unit graph with an estimated cost; no image is read, and datasets may be missing.

    Args:
        spec: the table.
        options: how it would be run.
        run_dir: a run to continue: its finished units are marked.

    Raises:
        InputError: a row is bad.
    """
    fingerprints: dict[str, str] = {}
    ledger = None
    if run_dir is not None and (run_dir / "config.yaml").is_file():
        fingerprints = dict(read_yaml(run_dir / "config.yaml").get("fingerprints", {}))
        ledger = Ledger(run_dir)
    opened: dict[str, Dataset] = {}

    def get(name: str) -> Dataset:
        if name not in opened:
            opened[name] = _facts(name, options.data_dir)
            opened[name].__dict__["fingerprint"] = fingerprints.get(name, "unread")
        return opened[name]

    graph = build_graph(spec, get, check_plan)
    sweeps = check_sweeps(graph, spec, options, get)
    priced = []
    for sweep, sweep_options in zip(graph.sweeps, sweeps, strict=True):
        num_done = 0 if run_dir is None else len(Ledger(sweep_folder(sweep, sweep_options, run_dir)).rows())
        priced.append(replace(sweep_of(sweep, sweep_options, get(sweep.dataset)), num_done=num_done))
    return Forecast.parse(
        {
            "name": spec.name,
            "scale": options.scale,
            **forecast(graph, ledger, options.device, priced),
            "nas_sweeps": [sweep_options.space for sweep_options in sweeps],
        }
    )


def _facts(name: str, data_dir: Path | None) -> Dataset:
    """Open a dataset, or return the catalog's facts about a missing one."""
    try:
        return open_dataset(name, data_dir=data_dir)
    except InputError:
        if name not in KNOWN:
            raise
    catalog_entry = KNOWN[name]
    names = catalog_entry.class_names or tuple(
        f"class {class_index}" for class_index in range(_NUM_CLASSES[name])
    )
    channels = catalog_entry.shape[0]
    return Dataset(
        name=name,
        class_names=names,
        image_shape=catalog_entry.shape,
        mean=catalog_entry.mean or (0.5,) * channels,
        std=catalog_entry.std or (0.5,) * channels,
        can_flip=catalog_entry.can_flip,
        load_train=_no_images,
        load_test=_no_images,
    )


def _no_images() -> Any:
    raise InputError("a dry run reads no images")
