"""DataDAM's files: `res_DataDAM_*.pt`, and `syn_data_*.pt` as released.

Its code saves the set at every evaluation during a run, the first of them before any step, and writes the
file before it notes an accuracy; the last set is the result. The released file has a single set, not in a
list.
"""

from pathlib import Path
from typing import Any, Final

from ddray.artifact.foreign import ForeignFile, ForeignFormat, ForeignRequest, ForeignSet
from ddray.artifact.foreign.dc import num_accuracies, pairs
from ddray.system.tensors import is_plain


def _is_released(contents: Any) -> bool:
    match contents:
        case {"data": [images, labels]}:
            return is_plain(images) and is_plain(labels)
    return False


def _fits(path: Path, contents: Any) -> bool:
    if _is_released(contents) or len(pairs(contents)) < 2:
        return _is_released(contents)
    has_none = "accs_all_exps" in contents and not sum(num_accuracies(contents))
    return has_none or "datadam" in path.name.lower()


def _read(path: Path, contents: Any, request: ForeignRequest) -> ForeignFile:
    if _is_released(contents):
        return ForeignFile([ForeignSet(*contents["data"])])
    return ForeignFile([ForeignSet(images, labels) for images, labels in pairs(contents)], "last")


FORMAT: Final = ForeignFormat('{"data": [images, labels]} (DataDAM)', _fits, _read)
