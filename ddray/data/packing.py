"""Decoded images on the disk: `$DDRAY_HOME/packed/<key>/`, written once, in parallel, and checked.

`<key>.partial/` is one that is being written: `images.npy` in its final size, and `blocks.jsonl` a line for
every finished block of it (labels, hashes, what was done to its images). A process that is killed leaves
it, and the next one goes on from there. `facts.json` is written last, and then the folder is renamed. The key
covers name, size and modification time of every source file, and how they are read.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np
import torch

from ddray.data.cache import file_key, writing
from ddray.data.dataset import Split
from ddray.data.packed import IMAGES, PACKED, REMEMBERED, PackedImages
from ddray.data.pictures import RESIZED, Change, Geometry, Item, decode
from ddray.errors import InputError, StorageError
from ddray.system.files import file_sha256, home, write_text
from ddray.system.progress import progress
from ddray.system.worker import cpu_count

if TYPE_CHECKING:
    from ddray.data.sources import Source

log = logging.getLogger(__name__)
T = TypeVar("T")

LABELS: Final = "labels.npy"
_FACTS: Final = "facts.json"
_BLOCKS: Final = "blocks.jsonl"
_LOCK: Final = "lock"
_IN_MEMORY_BYTES: Final = 1 << 30  # bigger images stay on the disk
_TASK: Final = 64  # images that a thread decodes at a time: fewer would be all bookkeeping
_MOST_THREADS: Final = 32  # Pillow releases the interpreter lock, but what is around it takes a few percent
_EXAMPLES: Final = 2  # images that a warning names
_DAMAGED: Final = (OSError, ValueError, EOFError, LookupError, TypeError)  # by what is read from such files


def packed(source: Source, settings: str, choose: Callable[[], Geometry]) -> tuple[Split, dict[str, Any]]:
    """Return the decoded images of a source with their facts: a geometry's fields, and `notes`, one a line.

    Images of more than 1 GiB stay on the disk (`PackedImages`).

    Args:
        source: the encoded images.
        settings: everything else that determines the result.
        choose: returns their geometry; called if they aren't stored yet.

    Raises:
        InputError: there is no image, or one can't be read or has a size that the geometry refuses.
        StorageError: they can't be stored, or the disk has no space for them, which is seen beforehand.
    """
    entry = home() / PACKED / file_key(source.files, settings)
    if (stored := _load(entry)) is not None:
        return stored
    partial = entry.with_name(f"{entry.name}.partial")
    try:
        with writing(entry.parent, "you can write"):
            entry.parent.mkdir(parents=True, exist_ok=True)
        with writing(partial, "with free space"), _locked(partial):
            _mend(entry, partial)
            if _load(entry) is None:
                _make(entry, partial, source, choose)
            else:  # another process has made it meanwhile
                shutil.rmtree(partial, ignore_errors=True)
    except StorageError:  # a copy in a folder that can't be written
        if _damage(entry) is not None or (stored := _load(entry, stamped=False)) is None:
            raise
        log.warning("%s can't be written: its images are checked by every process that opens it", entry)
        return stored
    if (stored := _load(entry)) is None:
        raise StorageError(f"a decoded dataset must be readable after it was written, got {entry}")
    return stored


def _load(entry: Path, *, stamped: bool = True) -> tuple[Split, dict[str, Any]] | None:
    """Return an entry's images and facts; None unless it is complete and, if `stamped`, as it was checked."""
    try:
        facts: dict[str, Any] = json.loads((entry / _FACTS).read_text(encoding="utf-8"))
        if stamped and facts["stamp"] != _stamp(entry):
            return None
        labels = torch.from_numpy(np.load(entry / LABELS))
        file = entry / IMAGES
        in_memory = file.stat().st_size <= _IN_MEMORY_BYTES
        images = torch.from_numpy(np.load(file)) if in_memory else PackedImages(file)
        return Split(images, labels), facts
    except (InputError, *_DAMAGED):
        return None


def _stamp(entry: Path) -> list[int]:
    """Return size and time of the files, by which a change of them is noticed."""
    stats = [(entry / name).stat() for name in (IMAGES, LABELS)]
    return [number for stat in stats for number in (stat.st_size, stat.st_mtime_ns)]


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Lock an unfinished entry, whose folder is created; of several processes one decodes, others wait."""
    while True:
        with suppress(FileExistsError):
            partial.mkdir()
        try:
            file = (partial / _LOCK).open("w")
        except FileNotFoundError:  # its last owner has renamed the folder
            continue
        with file:
            with suppress(OSError):  # a file system without locks: both write the same bytes
                fcntl.flock(file, fcntl.LOCK_EX)
            try:
                is_current = (partial / _LOCK).stat().st_ino == os.fstat(file.fileno()).st_ino
            except FileNotFoundError:  # its last owner has renamed the folder
                continue
            if is_current:
                yield
                return


def _mend(entry: Path, partial: Path) -> None:
    """Set an entry that isn't as it was written aside as an unfinished one; keep a copied one that is."""
    if not entry.exists() or _load(entry) is not None:
        return
    reason = _damage(entry)
    if reason is None:
        facts = json.loads((entry / _FACTS).read_text(encoding="utf-8"))
        write_text(entry / _FACTS, json.dumps({**facts, "stamp": _stamp(entry)}))
        return
    log.warning("%s is damaged: %s; set aside as %s and decoded again", entry, reason, partial.name)
    for file in entry.iterdir():
        if file.name != _LOCK and not file.match(REMEMBERED.format("*")):  # they may be of damaged images
            file.replace(partial / file.name)
    shutil.rmtree(entry)


def _damage(entry: Path) -> str | None:
    """Return what of an entry is not as it was written, by the hashes of all of it; None: nothing."""
    with suppress(*_DAMAGED):
        facts = json.loads((entry / _FACTS).read_text(encoding="utf-8"))
        _, blocks = _read_blocks(entry)
        num = sum(len(block["labels"]) for block in _intact(entry / IMAGES, blocks))
        if num == facts["num"] and file_sha256(entry / LABELS) == facts["labels_sha256"]:
            return None
        return f"{facts['num'] - num} of {facts['num']} images or their labels are not as they were written"
    return "it is incomplete"


def _make(entry: Path, partial: Path, source: Source, choose: Callable[[], Geometry]) -> None:
    """Decode what is missing of an unfinished entry, and finish it; one that can't be finished is removed."""
    head, blocks = _read_blocks(partial)
    try:
        if head is None:
            num = source.count()
            if num == 0:
                where = f" in {source.files[0]}" if source.files else ""
                raise InputError(f"a dataset must have images, got none{where}")
            head = {"num": num, **asdict(choose())}
        channels, height, width = head["shape"]
        geometry = Geometry((channels, height, width), head["resize"], head["rule"])
        offset = _allocate(partial / IMAGES, head["num"], geometry)
        blocks = {block["start"]: block for block in _intact(partial / IMAGES, blocks)}
        _write_blocks(partial, head, blocks)
        starts = _decode(partial, source, geometry, head["num"], offset, blocks)
        if blocks.keys() - starts:  # of an earlier version, which cut the source otherwise
            blocks = {start: blocks[start] for start in sorted(starts)}
            _write_blocks(partial, head, blocks)
        _finish(entry, partial, head, geometry, [blocks[start] for start in sorted(blocks)])
    except BaseException as error:
        if isinstance(error, InputError) or not blocks:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_blocks(folder: Path, head: dict[str, Any], blocks: dict[int, dict[str, Any]]) -> None:
    write_text(folder / _BLOCKS, "".join(json.dumps(line) + "\n" for line in (head, *blocks.values())))


def _read_blocks(folder: Path) -> tuple[dict[str, Any] | None, dict[int, dict[str, Any]]]:
    """Return the first line of `blocks.jsonl`, and the finished blocks by their first row; torn lines not."""
    head, blocks = None, {}
    with suppress(OSError, UnicodeDecodeError):
        for number, line in enumerate((folder / _BLOCKS).read_text(encoding="utf-8").splitlines()):
            with suppress(ValueError, KeyError, TypeError):
                values = json.loads(line)
                if number == 0:
                    head = values if values["num"] > 0 and {"shape", "resize", "rule"} <= {*values} else None
                else:
                    blocks[int(values["start"])] = values
    return (None, {}) if head is None else (head, blocks)


def _allocate(file: Path, num: int, geometry: Geometry) -> int:
    """Give the images' file its final size, if the disk has it; return where their bytes begin in it."""
    size = num * int(np.prod(geometry.shape))
    there = file.stat() if file.exists() else None
    free = shutil.disk_usage(file.parent).free + (there.st_blocks * 512 if there is not None else 0)
    what = (
        f"{num} images of {'x'.join(map(str, geometry.shape))} take {size / 2**30:.2f} GiB in {file.parent}"
    )
    if size > free:
        raise StorageError(
            f"{what}, got {free / 2**30:.2f} GiB free; set $DDRAY_HOME to a folder with more, or use a "
            "smaller --image-size"
        )
    if size > _IN_MEMORY_BYTES:
        log.info("%s", what)
    with file.open("r+b" if there is not None else "w+b") as opened:
        header = {"descr": "|u1", "fortran_order": False, "shape": (num, *geometry.shape)}
        np.lib.format.write_array_header_1_0(opened, header)
        offset = opened.tell()
        if there is None or there.st_size != offset + size:  # new, or cut off
            opened.truncate(offset + size)
            # A full disk shows now, not when everything is nearly done, nor as a fatal SIGBUS.
            os.posix_fallocate(opened.fileno(), 0, offset + size)
    return offset


def _intact(file: Path, blocks: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the blocks whose images are in the file as they were written, by their hashes."""
    head = np.load(file, mmap_mode="r") if file.exists() else None
    if head is None or not blocks:
        return []
    size, offset = head[0].nbytes, head.offset
    with file.open("rb") as opened, ThreadPoolExecutor(_threads()) as pool:

        def is_intact(block: dict[str, Any]) -> bool:
            start = block["start"]
            for num, expected in block["parts"]:
                data = os.pread(opened.fileno(), num * size, offset + start * size)
                if hashlib.sha256(data).hexdigest() != expected:
                    return False
                start += num
            return bool(start == block["start"] + len(block["labels"]))

        intact = list(pool.map(is_intact, blocks.values()))
    return list(compress(blocks.values(), intact))


def _decode(
    partial: Path,
    source: Source,
    geometry: Geometry,
    num: int,
    offset: int,
    blocks: dict[int, dict[str, Any]],
) -> set[int]:
    """Decode the images that are in none of the blocks, and add theirs; return where the source's begin."""
    size, starts = int(np.prod(geometry.shape)), set[int]()
    handle = os.open(partial / IMAGES, os.O_RDWR)

    def fill(start: int, items: Sequence[Item]) -> dict[str, Any]:
        pixels = np.empty((len(items), *geometry.shape), dtype=np.uint8)
        changes: list[Change] = []
        for row, item in enumerate(items):
            pixels[row], of_item = decode(item, geometry)
            changes += [*((kind, item.where) for kind in item.changes), *of_item]
        _write(handle, pixels, offset + start * size)
        digest = hashlib.sha256(pixels.data).hexdigest()
        labels = [int(item.label) for item in items]
        return {"part": [len(items), digest], "labels": labels, "changes": changes}

    def missing() -> Iterator[tuple[int, Sequence[Item]]]:
        start = 0
        for batch in source.batches():
            if batch:
                starts.add(start)
            if start not in blocks or blocks[start]["labels"] != [item.label for item in batch]:
                yield start, batch
            start += len(batch)

    done = sum(len(block["labels"]) for block in blocks.values())
    try:
        with (
            (partial / _BLOCKS).open("a", encoding="utf-8") as lines,
            progress("decoding images", num, start=done) as show,
        ):
            for start, results in in_threads(fill, missing()):
                blocks[start] = block = _block(start, results)
                lines.write(json.dumps(block) + "\n")
                lines.flush()
                done += len(block["labels"])
                show(done, "")
        os.fsync(handle)
    finally:
        os.close(handle)
    return starts


def _write(handle: int, pixels: np.ndarray[Any, Any], offset: int) -> None:
    """Write images at an offset; the file system may take them in pieces."""
    data = pixels.data.cast("B")
    while data:
        written = os.pwrite(handle, data, offset)
        data, offset = data[written:], offset + written


def _block(start: int, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the line of a finished block: its tasks' labels and hashes, and what was done to its images."""
    examples: dict[str, list[str]] = defaultdict(list)
    counts: Counter[str] = Counter()
    for kind, where in (change for result in results for change in result["changes"]):
        counts[kind] += 1
        if counts[kind] <= _EXAMPLES:
            examples[kind].append(where)
    return {
        "start": start,
        "parts": [result["part"] for result in results],
        "labels": [label for result in results for label in result["labels"]],
        "counts": counts,
        "examples": examples,
    }


def _finish(
    entry: Path, partial: Path, head: dict[str, Any], geometry: Geometry, blocks: Sequence[dict[str, Any]]
) -> None:
    """Write what is left of an entry, its facts last, and rename it; a good one there already wins."""
    labels = [label for block in blocks for label in block["labels"]]
    np.save(partial / LABELS, np.array(labels, dtype=np.int64))
    facts = {
        **head,
        "notes": _notes(head["num"], geometry, blocks),
        "labels_sha256": file_sha256(partial / LABELS),
        "stamp": _stamp(partial),
    }
    write_text(partial / _FACTS, json.dumps(facts))
    try:
        partial.rename(entry)
    except OSError:
        if _load(entry) is None:  # otherwise a process on another node was first
            raise
        shutil.rmtree(partial, ignore_errors=True)


def _notes(num: int, geometry: Geometry, blocks: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for each kind of change that images went through."""
    counts: Counter[str] = Counter()
    examples: dict[str, list[str]] = defaultdict(list)
    for block in blocks:
        counts.update(block["counts"])
        for kind, places in block["examples"].items():
            examples[kind] = [*examples[kind], *places][:_EXAMPLES]
    size = f" (to {geometry.shape[2]}x{geometry.shape[1]})"
    return [
        f"{counts[kind]} of {num} images are {kind}{size * (kind == RESIZED)}, such as {', '.join(places)}"
        for kind, places in examples.items()
    ]


def in_threads(
    function: Callable[[int, Sequence[Item]], T], batches: Iterable[tuple[int, Sequence[Item]]]
) -> Iterator[tuple[int, list[T]]]:
    """Yield each batch's first row, and `function(first row, images)` for every 64 of its images, in order.

    The next batch is worked on while one is waited for.
    """
    pending: deque[tuple[int, list[Future[T]]]] = deque()
    with ThreadPoolExecutor(_threads()) as pool:
        try:
            for start, batch in batches:
                tasks = enumerate(chunks(batch, _TASK))
                pending.append((start, [pool.submit(function, start + i * _TASK, part) for i, part in tasks]))
                if len(pending) > 1:
                    first, futures = pending.popleft()
                    yield first, [future.result() for future in futures]
            for first, futures in pending:
                yield first, [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)


def _threads() -> int:
    return min(_MOST_THREADS, cpu_count())


def chunks(entries: Sequence[T], size: int) -> list[Sequence[T]]:
    """Cut a sequence into pieces of `size`, the last one shorter."""
    return [entries[start : start + size] for start in range(0, len(entries), size)]
