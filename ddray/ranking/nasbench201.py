"""NAS-Bench-201 as a space: its 15,625 cells by the benchmark's own indices, from the shipped table."""

from __future__ import annotations

import gzip
import hashlib
import io
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import torch

from ddray.config import read_yaml
from ddray.errors import InputError
from ddray.nets.build import Net
from ddray.nets.nasbench201 import Skeleton, build_cell_net, cell_net_size, parse_arch_str, to_arch_str
from ddray.system.shipped import shipped

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["NasBench201", "parse_arch_str", "read_table", "to_arch_str"]

_FOLDER: Final = ("search_spaces", "nas")
_SHAPE: Final = (3, 32, 32)
_NUM_CLASSES: Final = 10


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
    return pd.read_csv(io.BytesIO(gzip.decompress(content)), dtype={"arch_str": str, "unique_str": str})


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
        self._benchmark = Skeleton(**_space_file()["benchmark"])
        self._indices = {text: index for index, text in enumerate(self._arch_strs)}
        self._first: dict[str, int] = {}
        for index, unique in enumerate(self._unique):
            self._first.setdefault(unique, index)

    def __len__(self) -> int:
        return len(self._arch_strs)

    def index_of(self, arch_str: str) -> int:
        """Return the benchmark's index of a cell.

        Raises:
            InputError: the text is not a valid arch_str.
        """
        return self._indices[to_arch_str(parse_arch_str(arch_str))]

    def choices(self, index: int) -> dict[str, Any]:
        """Return the cell's arch_str.

        Raises:
            InputError: the index is out of range.
        """
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
        params, flops = cell_net_size(self._ops(index), _SHAPE, _NUM_CLASSES, self._benchmark)
        unique = self._unique[index]
        return {
            "index": index,
            "name": self.arch_name(index),
            **self.choices(index),
            "params_m": params / 1e6,
            "flops_m": flops / 1e6,
            "unique_str": unique,
            "canonical": self._first[unique],
        }

    def build(
        self,
        index: int,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        seed: int,
        device: str | torch.device = "cpu",
    ) -> Net:
        """Build a cell's network for images of `image_shape` (C, H, W); `seed` determines every weight."""
        return build_cell_net(
            self._arch_str(index),
            image_shape,
            num_classes,
            name=self.arch_name(index),
            skeleton=self.skeleton,
            seed=seed,
            device=device,
        )

    def cost(self, index: int, image_shape: tuple[int, int, int], num_classes: int) -> float:
        """Return the multiply-adds of one image's forward pass, in millions."""
        return cell_net_size(self._ops(index), image_shape, num_classes, self.skeleton)[1] / 1e6

    def _ops(self, index: int) -> tuple[str, ...]:
        return parse_arch_str(self._arch_str(index))

    def _arch_str(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise InputError(f"indices of {self.name} must be in 0..{len(self) - 1}, got {index}")
        return self._arch_strs[index]
