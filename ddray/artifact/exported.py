"""Reading what `ddray export` wrote: a parquet file is the set again; of a folder, its meta and whitening."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ddray.artifact.card import is_parquet_name
from ddray.artifact.distilled_set import ZCA, DistilledSet, Meta
from ddray.artifact.export import META, whitening_file
from ddray.errors import InputError, one_line
from ddray.system.memory import available_bytes

_SECOND: Final = ("soft_label", "target", "label")  # what a file has beside images; the first that is there
_STORED_OTHERWISE: Final = {"decoder": None, "partition": None, "bases": None}


def is_parquet(path: Path) -> bool:
    """Return whether a set's path is a parquet file."""
    return is_parquet_name(path) and path.is_file()


def read_parquet(path: Path) -> DistilledSet:
    """Return the set of a parquet file: images as networks are trained on them, labels as stored, and meta.

    InputError if the file is torn, or `ddray export` did not write it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            text, names = (file.schema_arrow.metadata or {}).get(b"ddray"), file.schema_arrow.names
            second = next((name for name in _SECOND if name in names), _SECOND[-1])
            if text is None or not {"tensor", second} <= {*names}:
                raise InputError(
                    f"{path} must be a parquet file that ddray export wrote; one of real images is a "
                    "dataset: name its folder with --dataset"
                )
            _check_fits(file.metadata)
            meta = parsed_meta(path, lambda: text)
            table = file.read(["tensor", second])
        images = _tensor(table["tensor"]).float().reshape(-1, *meta.image_shape)
        values = _tensor(table[second])
    except (OSError, pa.ArrowException, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path} must be an undamaged parquet file: {one_line(error, 160)}") from error
    targets, soft = values if second == "target" else None, values if second == "soft_label" else None
    none = torch.zeros(0, dtype=torch.int64)
    labels = none if targets is not None else values if soft is None else soft.argmax(1)
    if meta.decoder is not None:
        stored = images.numel() + (0 if targets is None else targets.numel())
        floats = meta.storage_floats if targets is None else stored
        meta = meta.model_copy(update={**_STORED_OTHERWISE, "storage_floats": floats})
    return DistilledSet(images, labels, meta, read_whitening(path, meta), targets, soft_labels=soft)


def _check_fits(facts: Any) -> None:
    """Refuse (ValueError) a parquet file whose columns, unpacked, take more than the memory that is free."""
    groups = [facts.row_group(index) for index in range(facts.num_row_groups)]
    columns = [group.column(index) for group in groups for index in range(group.num_columns)]
    size = max(
        8 * sum(column.num_values for column in columns), sum(group.total_byte_size for group in groups)
    )
    available = available_bytes(torch.device("cpu"))
    if size > available:
        raise ValueError(f"it would unpack to {size / 2**30:.1f} GiB, {available / 2**30:.1f} are free")


def _tensor(column: Any) -> Tensor:
    """Return a column of numbers, or of lists of equally many, as [N] or [N, values]."""
    parts = []
    for values in column.chunks:
        while hasattr(values.type, "value_type"):
            values = values.flatten()
        parts.append(torch.from_numpy(values.to_numpy(zero_copy_only=False).copy()))
    tensor = torch.cat(parts)
    return tensor if len(tensor) == len(column) else tensor.reshape(len(column), -1)


def exported_meta(path: Path) -> Meta | None:
    """Return the meta that `ddray export` wrote into a folder of pictures; None if there is none."""
    file = path / META
    return parsed_meta(file, file.read_bytes) if file.is_file() else None


def parsed_meta(file: Path, read: Callable[[], bytes]) -> Meta:
    """Return the meta in a file's JSON; InputError if it is none."""
    try:
        values = dict(json.loads(read().decode()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{file} must be a JSON object that ddray export wrote; remove it") from error
    return Meta.parse(values, prefix="meta.", source=str(file))


def read_whitening(out: Path, meta: Meta) -> Mapping[str, Tensor]:
    """Return the whitening of an exported set by the names of `ZCA`; empty if it is not whitened.

    InputError if its file is missing or torn.
    """
    if meta.pixel_space != "zca":
        return {}
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = whitening_file(out)
    try:
        tensors = load_file(file)
        return {name: tensors[name.removeprefix("zca_")] for name in ZCA}
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(
            f"{out} is whitened, so that {file.name} must be there, which ddray export wrote with it: "
            f"{one_line(error, 160)}; export it again"
        ) from error
