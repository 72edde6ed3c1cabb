"""Files below a folder, what is left out of it, and which part of a dataset a name stands for."""

import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ddray.errors import InputError

log = logging.getLogger(__name__)

_PARTS: Final = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "development"), "val"),
}
_FILLERS: Final = {
    *("set", "sets", "split", "data", "dataset", "images", "imgs", "pictures", "files", "folder"),
    *("label", "labels", "list", "metadata", "annotations"),
}
_WORD: Final = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_GLUED: Final = re.compile(rf"({'|'.join(_PARTS)})(?:set|data|images)?")
_SHARD: Final = re.compile(r"-\d+-of-\d+.*")

HIDDEN: Final = "folders that are hidden or begin with _"
NO_FILES: Final = "files of another kind"
LOOPS: Final = "links to a folder that holds them"
UNREAD: Final = "folders that are neither train nor test"
LOOSE: Final = "files outside the folders of classes"
UNLISTED: Final = "files that no list names"


@dataclass
class Skipped:
    """What is left out of a folder, by reason, to be said in one line each."""

    root: Path
    paths: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))

    def add(self, reason: str, path: Path) -> None:
        """Note a file or folder that is left out."""
        self.paths[reason].append(path)

    def warn(self) -> None:
        """Warn of what is left out, and forget it."""
        for reason, paths in self.paths.items():
            names = [f"{p.relative_to(self.root)}{_num_below(p)}" for p in paths[:3]]
            ellipsis = ", ..." if len(paths) > 3 else ""
            log.warning("%s: left out %d %s: %s%s", self.root, len(paths), reason, ", ".join(names), ellipsis)
        self.paths.clear()


def _num_below(path: Path) -> str:
    """Return how many files a folder holds, in brackets; nothing for a file."""
    if not path.is_dir() or _is_loop(path):
        return ""
    return f" ({sum(len(names) for _, _, names in os.walk(path))} files)"


def subfolders(folder: Path, skipped: Skipped | None = None) -> list[str]:
    """Return the names of the folders in a folder, sorted, without hidden ones, `__MACOSX` and loops."""
    names = []
    for path in sorted(Path(entry.path) for entry in _scan(folder) if _is_folder(entry)):
        reason = HIDDEN if path.name[0] in "._" else LOOPS if _is_loop(path) else None
        if reason is None:
            names.append(path.name)
        elif skipped is not None:
            skipped.add(reason, path)
    return names


def loose_files(folder: Path) -> list[Path]:
    """Return the files directly in a folder, sorted."""
    return sorted(Path(entry.path) for entry in _scan(folder) if not _is_folder(entry))


def _scan(folder: Path) -> list["os.DirEntry[str]"]:
    """Return what is in a folder; nothing if there is none."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _unreadable(error) from error


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def files_below(folder: Path, suffixes: tuple[str, ...], skipped: Skipped | None = None) -> Iterator[Path]:
    """Yield the files at any depth with one of the suffixes, in sorted order.

    Raises:
        InputError: a folder can't be read.
    """
    if not folder.is_dir():
        return
    skipped = skipped or Skipped(folder)
    for directory, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        visible = []
        for name in sorted(folders):
            hidden = name.startswith(".") or name == "__MACOSX"
            if hidden or (os.path.islink(os.path.join(directory, name)) and _is_loop(Path(directory, name))):
                skipped.add(HIDDEN if hidden else LOOPS, Path(directory, name))
            else:
                visible.append(name)
        folders[:] = visible
        for name in sorted(names):
            if name.lower().endswith(suffixes) and not name.startswith("."):
                yield Path(directory, name)
            else:
                skipped.add(NO_FILES, Path(directory, name))


def has_files(folder: Path, suffixes: tuple[str, ...]) -> bool:
    """Return whether a file with one of the suffixes is below a folder."""
    return next(files_below(folder, suffixes), None) is not None


def _raise(error: OSError) -> None:
    raise _unreadable(error)


def _unreadable(error: OSError) -> InputError:
    return InputError(f"folders of a dataset must be readable, got {error.filename}: {error.strerror}")


def _is_loop(path: Path) -> bool:
    """Return whether a path is a link to one of the folders on its way."""
    if not path.is_symlink():
        return False
    try:
        target = path.resolve(strict=True)
        return any(target == parent.resolve() for parent in path.parents)
    except (OSError, RuntimeError):  # a link to itself
        return True


def part_of(name: str) -> tuple[str, str] | None:
    """Return (`train`, `test` or `val`; the rest of the name) for names such as `Training_set`, `seg_test`.

    None for a name with none of their words, or with two.
    """
    words = [word.lower() for word in _WORD.findall(_SHARD.sub("", name))]
    matches = [(word, _GLUED.fullmatch(word)) for word in words]
    parts = [match[1] for _, match in matches if match]
    rest = [word for word, match in matches if not match and word not in _FILLERS]
    return (_PARTS[parts[0]], " ".join(rest)) if len(parts) == 1 else None


def find_parts(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the names that are train, test and val, by part; those with the same rest beside the part.

    Plain names (`train`, `Testing`) come before others (`seg_train`, `seg_test`), of which it takes two.

    Raises:
        InputError: two names could be one part.
    """
    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        if (part := part_of(name)) is not None:
            groups[part[1]][part[0]].append(name)
    plain = groups.pop("", {})
    pairs = [group for group in groups.values() if "train" in group and len(group) > 1]
    parts: dict[str, list[str]] = defaultdict(list)
    for group in [plain] if "train" in plain else pairs:
        for kind, candidates in group.items():
            parts[kind] += candidates
    for kind, candidates in parts.items():
        if len(candidates) > 1:
            raise InputError(
                f"one name must be {kind}, got {' and '.join(candidates)} in {folder}; rename or move one"
            )
    return {kind: candidates[0] for kind, candidates in parts.items()}
