"""`res_*.pt` of the DC family (DC, DSA, DM): a set per experiment, all of which their tables average over.

`accs_all_exps` holds as many accuracies per network for each of the sets, by which such a file is told from
one that holds the looks at a single run (`datadam`).
"""

from pathlib import Path
from typing import Any, Final

from ddray.artifact.foreign import ForeignFile, ForeignFormat, ForeignRequest, ForeignSet
from ddray.system.tensors import is_plain


def pairs(contents: Any) -> list[Any]:
    """Return the [images, labels] pairs of `{"data": [[images, labels], ...]}`; empty if it is not that."""
    match contents:
        case {"data": [*data]} if all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in data):
            return data if all(is_plain(tensor) for pair in data for tensor in pair) else []
    return []


def num_accuracies(contents: Any) -> list[int]:
    """Return how many accuracies the file has for each network."""
    match contents.get("accs_all_exps"):
        case {**by_network}:
            return [len(values) for values in by_network.values() if isinstance(values, list)]
    return []


def _read(path: Path, contents: Any, request: ForeignRequest) -> ForeignFile:
    sets = [ForeignSet(images, labels) for images, labels in pairs(contents)]
    counts = num_accuracies(contents)
    is_per_run = bool(counts) and all(count and count % len(sets) == 0 for count in counts)
    return ForeignFile(sets, "all" if is_per_run else None)


FORMAT: Final = ForeignFormat(
    '{"data": [[images, labels], ...]} (DC family)', lambda path, contents: bool(pairs(contents)), _read
)
