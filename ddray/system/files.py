"""Writing files so that nothing half-written is ever left under its final name."""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

from ddray.errors import DdrayError, InputError, StorageError

log = logging.getLogger(__name__)


def home() -> Path:
    """Return `$DDRAY_HOME` (default `~/.cache/ddray`), made absolute: the folder that runs share."""
    return Path(os.environ.get("DDRAY_HOME") or "~/.cache/ddray").expanduser().absolute()


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` of writing `path` into a `StorageError` that names the path and the fix."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        fix = "free some space" if error.errno == errno.ENOSPC else "check the folder's permissions and space"
        message = f"could not write {path}: {reason}; {fix}, then run again with --resume"
        raise StorageError(message) from error


def write_atomically(
    path: Path, write: Callable[[BinaryIO], object], *, only_if_absent: bool = False
) -> bool:
    """Write `path` through a temporary file beside it: written, synced, then renamed; its folder is created.

    With `only_if_absent`, it is linked instead, so that the first writer wins. Return whether this call's
    bytes are now at `path`. StorageError if the disk is full, or the folder can't be written.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        temporary = Path(name)
        try:
            with _as_os_error(), os.fdopen(handle, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())
            if only_if_absent:
                try:
                    os.link(temporary, path)
                except FileExistsError:
                    return False
            else:
                temporary.replace(path)
            _sync_folder(path.parent)
            return True
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, *, exclusive: bool = True) -> Iterator[None]:
    """Hold a lock file while the block runs, after waiting for the processes that hold it.

    StorageError if it can't be created.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)


def copy_atomically(source: Path, path: Path) -> None:
    """Copy a file through a temporary file beside `path`; errors as for `write_atomically`."""
    with source.open("rb") as file:
        write_atomically(path, lambda target: shutil.copyfileobj(file, target))


def append_line(path: Path, line: str) -> None:
    """Append one line to a UTF-8 text file, in one write call: lines of several processes don't mix.

    It begins a new line even if the file's last one is torn. StorageError if it can't be written.
    """
    with storage_errors(path):
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            size = os.fstat(handle).st_size
            is_torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
            text = b"\n" * is_torn + line.encode() + b"\n"
            if os.write(handle, text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(handle)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines, none if there is no file; a torn line is left out."""
    values = []
    lines = path.read_bytes().splitlines() if path.exists() else []
    for line in filter(bytes.strip, lines):
        try:
            values.append(json.loads(line))
        except ValueError:
            log.warning("%s has a torn line: left out", path)
    return values


def write_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Write a folder beside its final name and move it there whole; an old one is replaced after success.

    StorageError if the disk is full, or the folder can't be written.
    """
    with storage_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        try:
            with _as_os_error():
                write(draft)
            draft.chmod(0o777 & ~_umask())
            if folder.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", suffix=".tmp", dir=folder.parent))
                folder.rename(old / folder.name)
                draft.rename(folder)
                shutil.rmtree(old, ignore_errors=True)
            else:
                draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


_FAULTS: Final = frozenset(
    (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
)


def reading_error(message: str, error: Exception) -> DdrayError:
    """Return the error of a source file that can't be read, with a message that names it.

    An InputError where the file is at fault: it is missing, forbidden or malformed (then the error is no
    system's). What the disk or the network is to blame for may be gone at the next try: a StorageError.
    """
    if isinstance(error, OSError) and error.errno is not None and error.errno not in _FAULTS:
        return StorageError(f"{message}; check the disk or network, then run again")
    return InputError(message)


def file_sha256(path: Path) -> str:
    """Return the sha256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Torch's zip writer reports a full disk as a RuntimeError: turn it back into the OSError that it was."""
    try:
        yield
    except RuntimeError as error:
        if any(words in str(error) for words in ("PytorchStreamWriter", "file write", "unexpected pos")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise


def _umask() -> int:
    """Return the process's umask (POSIX offers no read without a write)."""
    current = os.umask(0o077)
    os.umask(current)
    return current


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
