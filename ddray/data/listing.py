"""Files below a folder, what is left out of it, and which part of a dataset a name stands for."""

import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
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

IMAGE_SUFFIXES: Final = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".tif", ".tiff"),
)
SOUND_SUFFIXES: Final = (".wav", ".flac", ".ogg", ".mp3")
_DATA: Final = (*IMAGE_SUFFIXES, *SOUND_SUFFIXES, ".parquet", ".arrow", ".npz", ".npy", ".tar")
_ABOUT: Final = re.compile(r"(readme|licen[cs]e|citation)\b.*|dataset_infos?\.json", re.IGNORECASE)

HIDDEN: Final = "folders that are hidden or begin with _"
NO_FILES: Final = "files of another kind"
LOOPS: Final = "links to a folder that holds them"
UNREAD: Final = "folders that are neither train nor test"
LOOSE: Final = "files outside the folders of classes"
FIFTH: Final = "a fixed 20% of train is test (of sound: each 8th file of a class)"


@dataclass
class Skipped:
    """What is left out of a folder, by reason, to be said in one line each.

    Attributes:
        root: the folder (or file), to which the lines name their paths.
        suffixes: endings of the files that are read, in lower case.
        loose: why one of these is left out.
        covered: files and folders that are read or accounted for elsewhere.
        deep: whether files are named below folders of which nothing is covered too.
        paths: what is left out, by reason.
    """

    root: Path
    suffixes: tuple[str, ...] = ()
    loose: str = LOOSE
    covered: Collection[Path] = ()
    deep: bool = False
    paths: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))

    def add(self, reason: str, *paths: Path) -> None:
        """Note files or folders that are left out; not a README, nor hidden ones without data in them."""
        for path in paths:
            quiet = (reason == NO_FILES and _is_about(path.name)) or (
                reason == HIDDEN and not any(map(_is_data, _names_below(path)))
            )
            if not quiet:
                self.paths[reason].append(path)

    def add_rest(self) -> None:
        """Note what lies below the root and is neither covered nor noted yet."""
        covered = {str(path) for paths in (self.covered, *self.paths.values()) for path in paths}
        on_the_way = {os.path.dirname(path) for path in covered}
        for folder in list(on_the_way):
            while len(folder := os.path.dirname(folder)) >= len(str(self.root)) and folder not in on_the_way:
                on_the_way.add(folder)
        pending = [self.root]
        while pending:
            for entry in sorted(_scan(pending.pop(0)), key=lambda entry: entry.name):
                if entry.path in covered:
                    continue
                if not _is_folder(entry):
                    is_read = entry.name.lower().endswith(self.suffixes) and entry.name[0] != "."
                    self.add(self.loose if is_read else NO_FILES, Path(entry.path))
                elif entry.path in on_the_way:
                    pending.append(Path(entry.path))
                elif (reason := _reason(path := Path(entry.path))) is not None:
                    self.add(reason, path)
                elif self.deep:
                    pending.append(path)
                elif any(_names_below(path)):
                    self.add(UNREAD, path)

    def warn(self) -> None:
        """Warn of what is left out, and forget it."""
        for reason, paths in self.paths.items():
            names = [f"{os.path.relpath(path, self.root)}{_num_below(path)}" for path in paths[:3]]
            ellipsis = ", ..." if len(paths) > 3 else ""
            log.warning("%s: left out %d %s: %s%s", self.root, len(paths), reason, ", ".join(names), ellipsis)
        self.paths.clear()


def _is_data(name: str) -> bool:
    return name.lower().endswith(_DATA)


def _is_about(name: str) -> bool:
    """Return whether a file holds no data: a README, a licence, a hidden file such as .gitattributes."""
    return bool(_ABOUT.fullmatch(name)) or (name.startswith(".") and not _is_data(name))


def _reason(folder: Path) -> str | None:
    """Return why no folder like this is looked into; None if it is."""
    return HIDDEN if folder.name[0] in "._" else LOOPS if _is_loop(folder) else None


def _names_below(folder: Path) -> Iterator[str]:
    """Yield the names of the files below a folder, at any depth; none for a file."""
    return (name for _, _, names in os.walk(folder) for name in names)


def _num_below(path: Path) -> str:
    """Return how many files a folder holds, in brackets; nothing for a file."""
    return f" ({sum(1 for _ in _names_below(path))} files)" if path.is_dir() and not _is_loop(path) else ""


def halves_of(
    parts: Mapping[str, Sequence[Path]],
    skipped: Skipped,
    what: str,
    has_labels: Callable[[str], bool] = lambda kind: True,
) -> tuple[str, str | None]:
    """Return the keys of the parts that are train and test; the others are noted as left out.

    Train is the part of that name, or the one of no name (`""`). Test is the first of test and val with
    labels; None if a fifth of train is, which is said if there is any named part.

    Args:
        parts: what belongs to `train`, `test`, `val` and `""`.
        skipped: of the whole dataset.
        what: the parts' content, for messages, such as `tars`.
        has_labels: whether a part, test or val, has labels.

    Raises:
        InputError: there is no train.
    """
    train = "train" if "train" in parts else ""
    if train not in parts:
        kinds = " and ".join(sorted(parts))
        raise InputError(f"{what} must have a train part, got only {kinds} in {skipped.root}; rename one")
    labelled = [kind for kind in ("test", "val") if kind in parts and has_labels(kind)]
    test = labelled[0] if labelled else None
    for kind in ("test", "val"):
        if kind in parts and kind != test:
            reason = f"beside those of {test}" if kind in labelled else "without labels"
            skipped.add(f"{what} of {kind} {reason}", *parts[kind])
    if train and "" in parts:
        skipped.add(f"{what} that are neither train nor test", *parts[""])
    elif not train and test:
        line = "%s: %d %s whose names say no part are train, such as %s"
        log.warning(line, skipped.root, len(parts[""]), what, parts[""][0].name)
    if test is None and (train or len(parts) > 1):
        log.warning("%s has no labelled test part: %s", skipped.root, FIFTH)
    return train, test


def subfolders(folder: Path, skipped: Skipped | None = None) -> list[str]:
    """Return the names of the folders in a folder, sorted, without hidden ones, `__MACOSX` and loops."""
    names = []
    for path in sorted(Path(entry.path) for entry in _scan(folder) if _is_folder(entry)):
        if (reason := _reason(path)) is None:
            names.append(path.name)
        elif skipped is not None:
            skipped.add(reason, path)
    return names


def loose_files(folder: Path, suffixes: tuple[str, ...] = ("",)) -> list[Path]:
    """Return the files directly in a folder with one of the suffixes, sorted, without hidden ones."""
    return sorted(
        Path(entry.path)
        for entry in _scan(folder)
        if entry.name.lower().endswith(suffixes) and entry.name[0] != "." and not _is_folder(entry)
    )


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


def part_in(path: Path) -> str:
    """Return the part that a file's name, or else that of a folder on its way, says; "" if none does."""
    return next(filter(None, map(part_of, (path.stem, *path.parts[:-1]))), ("", ""))[0]


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
