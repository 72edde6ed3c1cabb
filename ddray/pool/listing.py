"""The pool's entries as rows for `ddray pool list` and `show`."""

import logging
from typing import Any

from ddray.config import Result
from ddray.errors import InputError
from ddray.pool.files import TENSORS, DamagedEntryError, PoolFiles
from ddray.system.files import home

log = logging.getLogger(__name__)


class PoolModel(Result):
    """One entry of the pool; `epochs` is None where there are none."""

    key: str
    kind: str | None
    dataset: str | None
    arch: str | None
    epochs: int | None
    times_trained: int
    size_bytes: int


class PoolList(Result):
    """What `ddray pool list` returns."""

    models: list[PoolModel]


class PoolEntryInfo(Result):
    """What `ddray pool show` returns; the tensors' types and shapes by name."""

    key: str
    folder: str
    meta: dict[str, Any] | None
    tensors: dict[str, dict[str, Any]]


def list_pool() -> PoolList:
    """Return the entries; damaged ones are logged and left out."""
    files = PoolFiles(home() / "pool")
    models = []
    for key in files.list_keys():
        try:
            meta = files.describe(key)
            size = sum(path.stat().st_size for path in (files.folder / key).iterdir())
        except FileNotFoundError:  # set aside by another process since it was listed
            continue
        except DamagedEntryError as error:
            log.warning("pool entry %s is damaged (%s): trained again when needed", key[:12], error)
            continue
        spec = meta["spec"]
        models.append(
            {
                "key": key,
                "kind": spec.get("kind"),
                "dataset": meta.get("dataset_name") or spec.get("dataset"),
                "arch": spec.get("arch"),
                "epochs": spec.get("recipe", {}).get("epochs"),
                "times_trained": meta.get("times_trained", 1),
                "size_bytes": size,
            }
        )
    return PoolList.parse({"models": models})


def show_entry(prefix: str) -> PoolEntryInfo:
    """Return an entry's meta and the types and shapes of its tensors.

    `prefix` is its key, or enough of its first characters to be unique.

    Raises:
        InputError: no entry or several start with `prefix`, or the entry is damaged.
    """
    from safetensors import safe_open

    files = PoolFiles(home() / "pool")
    keys = [key for key in files.list_keys() if key.startswith(prefix)]
    if len(keys) != 1:
        available = ", ".join(key[:12] for key in (keys or files.list_keys())[:8]) or "none"
        raise InputError(
            f"key must fit one entry of {files.folder}, {len(keys)} start with {prefix!r}; there: {available}"
        )
    folder = files.folder / keys[0]
    try:
        meta = files.read(folder.name)
    except DamagedEntryError as error:
        raise InputError(
            f"pool entry {folder} must be undamaged: {error}; it is trained again when needed"
        ) from error
    tensors = {}
    with safe_open(folder / TENSORS, framework="numpy") as file:
        for name in sorted(file.keys()):
            tensor_slice = file.get_slice(name)
            tensors[name] = {"dtype": tensor_slice.get_dtype(), "shape": tensor_slice.get_shape()}
    return PoolEntryInfo(key=folder.name, folder=str(folder), meta=meta, tensors=tensors)
