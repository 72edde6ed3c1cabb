"""NAS-Bench-201 as a space: its 15,625 cells by the benchmark's own indices, and their true accuracies.

The benchmark (Dong and Yang, ICLR 2020; MIT) is read from the table that ships with ddray, or from the
original `NAS-Bench-201-v1_*.pth` through the package nas-bench-201. That package calls torch.load in a way
that fails since torch 2.6: the file is loaded here, as plain values only, and passed to it.

Cells are trained on proxies as DC-BENCH does (Cui et al., NeurIPS 2022), whose settings DataDAM's Table 5
takes over: C = 16, N = 1, BN without weight and bias in cells; SGD with momentum .9 and weight decay 3e-4,
gradients clipped to norm 5, batches of 64, no augmentation, and a rate that falls from .025 towards .001 by a
cosine after each of 50 epochs (10 on the whole set). Its 100 cells are drawn uniformly and ranked by the mean
over 5 seeds on 10,000 images of train: `--sample 100 --sampling uniform --seeds 5 --val-images 10000`.

**Deviations** from DC-BENCH's code
- Its 10,000 images are any fifth of train, and the sets were distilled from all of train. Here val is the
  same share of every class, and a set of `ddray bench` has not seen it.
- It scores the networks of every set on images of one normalisation, here in the set's own pixel space.
- The same cell is not drawn twice.
- The faults of its harness are left out, and offered by `--compat dcbench` (`ddray.nets.nasbench201`).
"""

from __future__ import annotations

import hashlib
import importlib
import io
import math
import re
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from pydantic import Field

from ddray.config import Config, read_yaml
from ddray.errors import InputError, unknown
from ddray.nets.build import Net
from ddray.nets.nasbench201 import Skeleton, build_cell_net, cell_net_size, parse_arch_str, to_arch_str
from ddray.ranking.options import NasConfig
from ddray.ranking.spaces import Device, Shape, SpaceDefinition
from ddray.ranking.truth import Truth
from ddray.system.shipped import shipped
from ddray.system.tensors import load_plain

if TYPE_CHECKING:
    import pandas as pd

_FOLDER: Final = ("search_spaces", "nas")
_COLUMNS: Final = {name: f"{name}_test_200_mean" for name in ("cifar10", "cifar100", "imagenet16")}
DEFAULT_COLUMN: Final = _COLUMNS["cifar10"]
_COLUMN = re.compile(
    r"(cifar10|cifar100|imagenet16)_(valid|test|valtest)_(12|200)(?:_(mean|mean_derived|s\d+))?$"
)
_API_NAMES: Final = {"cifar10": "cifar10", "cifar100": "cifar100", "imagenet16": "ImageNet16-120"}


DC_BENCH: Final = {
    **{"epochs": 50, "lr": 0.025, "lr_min": 0.001, "lr_every": "epoch", "momentum": 0.9, "nesterov": False},
    **{"weight_decay": 3e-4, "batch": 64, "clip": 5.0, "augment": "none"},
}
"""DC-BENCH's recipe (Cui et al., NeurIPS 2022; darts-pt/nasbench201/train_search.py of its code)."""


class CellOptions(Config):
    """The network that is trained: DC-BENCH's proxy setting."""

    channels: int = Field(default=16, ge=1)
    num_cells: int = Field(default=1, ge=1)
    cell_affine: bool = False


class NasBench201Config(NasConfig):
    """How cells are trained."""

    cells: CellOptions = CellOptions()


@cache
def _space_file() -> dict[str, Any]:
    return read_yaml(shipped(*_FOLDER, "nasbench201.yaml"))


@cache
def read_table() -> pd.DataFrame:
    """Return the benchmark's accuracies (percent), seconds and parameters (millions): row i is cell i.

    `search_spaces/nas/nasbench201.yaml` describes the columns and the wrong parameter counts of 150 cells.
    The frame is shared: do not modify it.

    Raises:
        InputError: the shipped file is missing, or its hash differs from the one in the space file.
    """
    import pandas as pd

    manifest = _space_file()["table"]
    path = shipped(*_FOLDER, manifest["file"])
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"the NAS-Bench-201 table must be readable, got {path}: {error.strerror}; reinstall ddray"
        ) from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != manifest["sha256"]:
        raise InputError(
            f"the NAS-Bench-201 table must have sha256 {manifest['sha256']}, got {digest} ({path}); "
            "reinstall ddray"
        )
    return pd.read_csv(io.BytesIO(content), compression="gzip")


class NasBench201:
    """The cells of NAS-Bench-201.

    Args:
        options: fields of `Skeleton` for the trained networks; the defaults are DC-BENCH's proxy
            setting (C = 16, N = 1, non-affine BN in cells).

    Raises:
        InputError: an option out of range, or a damaged table.
    """

    name = "nasbench201"

    def __init__(self, **options: Any) -> None:
        self.skeleton = Skeleton(**{**_space_file()["proxy"], **options})
        table = read_table()
        self._arch_strs: list[str] = table["arch_str"].tolist()
        self._unique: list[str] = table["unique_str"].tolist()
        self._canonical: list[int] = table.groupby("unique_str")["index"].transform("min").tolist()
        self._indices = {text: index for index, text in enumerate(self._arch_strs)}

    def __len__(self) -> int:
        return len(self._arch_strs)

    def index_of(self, arch_str: str) -> int:
        """Return the benchmark's index of a cell; InputError if the text is not a valid arch_str."""
        return self._indices[to_arch_str(parse_arch_str(arch_str))]

    def choices(self, index: int) -> dict[str, Any]:
        """Return the cell's arch_str."""
        return {"arch_str": self._arch_str(index)}

    def arch_name(self, index: int) -> str:
        """Return the name shown in tables, such as `nasbench201_17`."""
        self._arch_str(index)
        return f"{self.name}_{index}"

    def describe(self, index: int) -> dict[str, Any]:
        """Return index, name, arch_str, unique_str, canonical index, and parameters and FLOPs in millions.

        Sizes are those of the benchmark's own network (C = 16, N = 5, affine BN) for 3x32x32 and 10 classes.
        `unique_str` is the same for cells that sum the same branches; `canonical` is the first index with it.
        """
        params, flops = cell_net_size(self._ops(index), (3, 32, 32), 10)
        return {
            "index": index,
            "name": self.arch_name(index),
            **self.choices(index),
            "params_m": params / 1e6,
            "flops_m": flops / 1e6,
            "unique_str": self._unique[index],
            "canonical": self._canonical[index],
        }

    def build(
        self, index: int, image_shape: Shape, num_classes: int, *, seed: int, device: Device = "cpu"
    ) -> Net:
        """Build a cell's network."""
        return build_cell_net(
            self._arch_str(index),
            image_shape,
            num_classes,
            name=self.arch_name(index),
            skeleton=self.skeleton,
            seed=seed,
            device=device,
        )

    def cost(self, index: int, image_shape: Shape, num_classes: int) -> float:
        """Return the multiply-adds of one image's forward pass, in millions."""
        return cell_net_size(self._ops(index), image_shape, num_classes, self.skeleton)[1] / 1e6

    def _ops(self, index: int) -> tuple[str, ...]:
        return parse_arch_str(self._arch_str(index))

    def _arch_str(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise InputError(f"indices of {self.name} must be in 0..{len(self) - 1}, got {index}")
        return self._arch_strs[index]


def table_truth(indices: Sequence[int], column: str | None = None, file: Path | None = None) -> Truth:
    """Return an accuracy column of the NAS-Bench-201 table; NaN for a cell without a run of that seed.

    `file` is unused: the table ships with ddray.

    Raises:
        InputError: an unknown column, or a cell that does not exist.
    """
    column = column or DEFAULT_COLUMN
    dataset, _, epochs, _ = _parse_column(column)
    test = f"{dataset}_test_{epochs}" + ("_mean" if epochs == "200" else "")
    values, tested = (_cells(indices, name) / 100 for name in (column, test))
    return Truth(f"table:{column}", values, tested, _facts(column))


def _cells(indices: Sequence[int], column: str) -> np.ndarray[Any, Any]:
    """Return a column of the table at `indices`; InputError if a cell does not exist."""
    values = read_table()[column]
    if wrong := [index for index in indices if not 0 <= index < len(values)]:
        raise InputError(f"index must be in 0..{len(values) - 1} for nasbench201, got {wrong[0]}")
    return values.iloc[list(indices)].to_numpy()


def _parse_column(column: str) -> tuple[str, str, str, str]:
    """Split an accuracy column's name into dataset, split, epochs and suffix (`mean`, `s777`, ...)."""
    columns = {name: match for name in read_table().columns if (match := _COLUMN.match(name))}
    if column not in columns:
        raise unknown("--truth-column", column, columns)
    dataset, split, epochs, suffix = columns[column].groups(default="")
    return dataset, split, epochs, suffix


def _facts(column: str) -> dict[str, Any]:
    """Return what a column's name says; `seeds`: the one of a single run, else `all` that there are."""
    dataset, split, epochs, suffix = _parse_column(column)
    seeds = suffix[1:] if suffix.startswith("s") else "all"
    return {"column": column, "dataset": dataset, "split": split, "epochs": int(epochs), "seeds": seeds}


def api_truth(indices: Sequence[int], column: str | None, path: Path) -> Truth:
    """Return accuracies from the original file (`NAS-Bench-201-v1_0-e61699.pth` or `-v1_1-096897.pth`).

    It is read through its package. Cells are matched by structure. Columns are the table's: `*_mean` averages
    all seeds, `*_s777` takes one: NaN for a cell without that run. The table had to derive its `*_derived`
    columns; the file contains their values.

    Raises:
        InputError: the package or the file is missing, the file is damaged, the wrong one, or lacks a cell or
            the dataset, or the column is unknown.
    """
    column = column or DEFAULT_COLUMN
    dataset, split, epochs, suffix = _parse_column(column)
    api, positions = _open_api(path, [str(structure) for structure in _cells(indices, "arch_str")])

    def accuracies(split: str, seed: int | bool) -> np.ndarray[Any, Any]:
        percent = [_query(api, position, dataset, split, epochs, seed) for position in positions]
        return np.array(percent) / 100

    values = accuracies(split, int(suffix[1:]) if suffix.startswith("s") else False)
    if not np.isfinite(values).any():
        raise InputError(
            f"{path} has no {column} for these {len(values)} cells; choose another --truth-column"
        )
    test = accuracies("test", False)
    tested = test if np.isfinite(test).any() else None
    return Truth(f"api:{path.name}:{column}", values, tested, _facts(column))


def _open_api(path: Path, structures: Sequence[str]) -> tuple[Any, list[int]]:
    """Return the package's API for the given cells of a file, and their positions in it.

    The package copies its input: no other cell is passed to it.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"--truth api:FILE must name NAS-Bench-201's .pth file, {path} {what}")
    try:
        package = importlib.import_module("nas_201_api")
    except ImportError as error:
        raise InputError(
            "--truth api:FILE needs the package: pip install nas-bench-201; or use --truth table"
        ) from error
    benchmark = _load(path)
    infos = benchmark["arch2infos"]
    position_of = {structure: position for position, structure in enumerate(benchmark["meta_archs"])}
    if missing := [structure for structure in structures if position_of.get(structure) not in infos]:
        raise InputError(
            f"{path} must hold every cell that is ranked, "
            f"{len(missing)} are missing, the first is {missing[0]}"
        )
    positions = [position_of[structure] for structure in structures]
    benchmark["arch2infos"] = {position: infos[position] for position in positions}
    benchmark["evaluated_indexes"] = positions
    try:
        api = package.NASBench201API(benchmark, verbose=False)
    except Exception as error:  # failed assertions, or keys missing at any depth
        raise InputError(f"nas-bench-201 cannot read {path} ({type(error).__name__}: {error})") from error
    return api, positions


def _query(api: Any, position: int, dataset: str, split: str, epochs: str, seed: int | bool) -> float:
    """Return one accuracy in percent, averaged over seeds (`seed` False) or of one; NaN if there is none."""
    # For CIFAR-10, only networks trained on half of train have validation accuracies.
    name = "cifar10-valid" if (dataset, split) == ("cifar10", "valid") else _API_NAMES[dataset]
    try:
        info = api.get_more_info(position, name, iepoch=None, hp=epochs, is_random=seed)
    except (KeyError, ValueError):  # the file has no such dataset, or no such seed of this cell
        return math.nan
    return float(info.get(f"{split}-accuracy", math.nan))


def _load(path: Path) -> dict[str, Any]:
    """Load the original file: plain values, NumPy scalars and tensors, never anything that runs code."""
    try:
        content = load_plain(path)
    except ValueError as error:
        raise InputError(
            f"{path} must be NAS-Bench-201's undamaged file: {error}; download it again"
        ) from error
    required = ("meta_archs", "arch2infos", "evaluated_indexes")
    if not isinstance(content, dict) or not set(required) <= content.keys():
        raise InputError(f"{path} must be NAS-Bench-201's file, a dict with {', '.join(required)}")
    return content


SPACE: Final = SpaceDefinition(
    NasBench201,
    recipe=DC_BENCH,
    # DC-BENCH trains on proxies for 50 epochs, and on the whole set as a proxy for 10.
    whole_epochs=10,
    config_type=NasBench201Config,
    options=tuple(field.name for field in fields(Skeleton)),
    truths={"table": table_truth, "api:FILE": api_truth},
    truth_columns=_COLUMNS,
    # `one_hot` without num_classes matters only under the softmax, whose width it sets: the two go together.
    harnesses={
        "dcbench": {
            "softmax over one-hot": {"mixture": "softmax"},
            "softmax, one_hot cut": {"mixture": "softmax_truncated"},
            "unshuffled": {"shuffle": False},
            "all three": {"mixture": "softmax_truncated", "shuffle": False},
        }
    },
    published=("datadam", "Table 5"),
    published_options={
        **{"sample": 100, "sampling": "uniform", "max_mflops": None, "seeds": 5, "epochs": None},
        **{"val_images": 10_000, "truth": "table", "truth_column": DEFAULT_COLUMN},
    },
)
