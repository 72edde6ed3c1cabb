"""Reading distilled sets: ours, and those of other projects."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from ddray.artifact.conversion import FOREIGN, adopt, selected
from ddray.artifact.decoders import get_decoder
from ddray.artifact.distilled_set import (
    FORMAT_VERSIONS,
    RESULT,
    WHITENING,
    ZCA,
    DistilledSet,
    Meta,
    whitening_in,
)
from ddray.artifact.exported import exported_meta, is_parquet, read_parquet
from ddray.artifact.foreign import ForeignRequest, format_of
from ddray.artifact.options import ForeignOptions
from ddray.errors import InputError
from ddray.system.tensors import is_plain, read_tensors

_IN_FOLDERS: Final = ("images.pt", "images_best.pt", "x_syn.pt", "data.pt")
"""Names by which a project's folder is read as the set in it."""


def load(path: Path, request: ForeignRequest | None = None, index: int | None = None) -> DistilledSet:
    """Read a distilled set: ours, or another project's (`ddray.artifact.foreign`).

    Args:
        path: the file, a folder of pictures by class, or a parquet file that `ddray export` wrote.
        request: what another project's file is read as, which few files say.
        index: which set of another project's file, from 0; default: its only one, or the last of a series.

    Raises:
        InputError: the file is missing, torn, not a distilled set, or holds more than tensors and plain
            values; or there are several sets, one per run, and no `index`.
    """
    sets = load_all(path, request, index)
    if len(sets) > 1:
        raise InputError(f"{path} must be read with --index 0..{len(sets) - 1}: it holds a set per run")
    return sets[0]


def load_all(path: Path, request: ForeignRequest | None, index: int | None = None) -> list[DistilledSet]:
    """Read a file as `load` does; one of several runs gives all their sets, unless `index` names one."""
    path = _file_in(path)
    if is_parquet(path):
        return [_validated(path, partial(read_parquet, path))]
    contents = None if path.is_dir() else read_tensors(path)
    if isinstance(contents, dict) and "format_version" in contents:
        return [_own(path, contents)]
    form = format_of(path, contents)
    if request is None:
        raise InputError(f"{path} does not say which dataset it is of: add --dataset NAME")
    sets = selected(path, form.read(path, contents, request), index)
    return [_validated(path, partial(adopt, path, name, one, request)) for name, one in sets.items()]


def check_options(options: ForeignOptions, sets: Sequence[DistilledSet]) -> None:
    """Refuse options of other projects' files where all sets are ours, which say so themselves."""
    if any(one.meta.method.startswith(FOREIGN) for one in sets):
        return
    for name in ForeignOptions.model_fields:
        if getattr(options, name) is not None:
            option, value = name.replace("_", "-"), getattr(options, name)
            raise InputError(f"--{option} must be left out for ddray's own files, got {value}")


def dataset_of(path: Path) -> str | None:
    """Return the dataset that an exported folder of pictures names; None for everything else."""
    meta = exported_meta(path)
    return None if meta is None else meta.dataset


def _file_in(path: Path) -> Path:
    """Return the file that a folder without pictures is read by; the path itself for anything else."""
    files = [path / name for name in _IN_FOLDERS if (path / name).is_file()]
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise InputError(f"{path} must hold one set, got {names}: name one of the files")
    return files[0] if files else path


def _own(path: Path, contents: Mapping[str, Any]) -> DistilledSet:
    version = contents["format_version"]
    if not isinstance(version, int) or version not in FORMAT_VERSIONS:
        versions = ", ".join(map(str, FORMAT_VERSIONS))
        raise InputError(f"{path}: format_version must be {versions}, got {version}; update ddray")
    others = ("format_version", "meta", WHITENING)
    tensors = {key: value for key, value in contents.items() if key not in others}
    if WHITENING in contents:
        tensors |= _whitening(path, str(contents[WHITENING]))
    wrong = [key for key, value in tensors.items() if not is_plain(value)]
    if wrong:
        raise InputError(f"{path}: {', '.join(wrong)} must be dense tensors")
    meta = _meta(path, contents)
    zca: dict[str, Tensor] = {key: tensors.pop(key) for key in ZCA if key in tensors}
    return _validated(path, lambda: get_decoder(meta.decoder).read(meta, tensors, zca))


def has_whitening(path: Path) -> bool:
    """Return whether a run's set is readable, with the whitening that it shares with others, if it does."""
    try:
        contents = read_tensors(path)
        return WHITENING not in contents or _whitening_file(path, str(contents[WHITENING])) is not None
    except InputError:
        return False


def _whitening_file(path: Path, name: str) -> Path | None:
    """Return the file near a set that has a whitening: one of that name, or the run's result."""
    folders = path.absolute().parents[:3]
    files = (folder / last for folder in folders for last in (Path(name).name, RESULT))
    return next((file for file in files if whitening_in(file) == name), None)


def _whitening(path: Path, name: str) -> dict[str, Tensor]:
    """Return the ZCA of a set in a run folder, whose sets share it."""
    if (file := _whitening_file(path, name)) is None:
        raise InputError(
            f"{path} must have its whitening beside it, as its run folder has: copy {name} too, or the "
            f"run's {RESULT}"
        )
    contents = read_tensors(file)
    return {key: contents[key] for key in ZCA}


def _meta(path: Path, contents: Mapping[str, Any]) -> Meta:
    try:
        values = dict(json.loads(contents["meta"]))
    except KeyError as error:
        raise InputError(f"{path} must hold meta, got {sorted(contents)}") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: meta must be a JSON object, got {str(contents['meta'])[:60]!r}") from error
    return Meta.parse(values, prefix="meta.", source=str(path))


def _validated(path: Path, build: Callable[[], DistilledSet]) -> DistilledSet:
    try:
        distilled = build()
        distilled.validate()
    except InputError as error:
        text = str(error)
        raise InputError(text if text.startswith(str(path)) else f"{path}: {text}") from error
    return distilled
