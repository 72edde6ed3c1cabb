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
        table = pq.read_table(path)
        columns = {name: _tensor(table[name]) for name in table.column_names if name != "image"}
    except (OSError, pa.ArrowException, ValueError) as error:
        raise InputError(f"{path} must be an undamaged parquet file: {one_line(error, 160)}") from error
    text = (table.schema.metadata or {}).get(b"ddray")
    second = next((name for name in ("soft_label", "target", "label") if name in columns), "label")
    if text is None or not {"tensor", second} <= columns.keys():
        raise InputError(
            f"{path} must be a parquet file that ddray export wrote; one of real images is a dataset: "
            "name its folder with --dataset"
        )
    meta = parsed_meta(path, lambda: text)
    images = columns["tensor"].float().reshape(-1, *meta.image_shape)
    none = torch.zeros(0, dtype=torch.int64)
    targets, soft = columns.get("target"), columns.get("soft_label")
    labels = none if targets is not None else columns["label"] if soft is None else soft.argmax(1)
    if meta.decoder is not None:
        stored = images.numel() + (0 if targets is None else targets.numel())
        floats = meta.storage_floats if targets is None else stored
        meta = meta.model_copy(update={**_STORED_OTHERWISE, "storage_floats": floats})
    return DistilledSet(images, labels, meta, read_whitening(path, meta), targets, soft_labels=soft)


def _tensor(column: Any) -> Tensor:
    """Return a column of numbers, or of lists of equally many, as [N] or [N, values]."""
    values, num = column.combine_chunks(), len(column)
    while hasattr(values.type, "value_type"):
        values = values.flatten()
    tensor = torch.from_numpy(values.to_numpy(zero_copy_only=False).copy())
    return tensor if len(tensor) == num else tensor.reshape(num, -1)


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
