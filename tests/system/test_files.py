from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from ddray.errors import InputError, StorageError
from ddray.system import files
from ddray.system.files import reading_error, storage_errors, write_atomically, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporary files go to /dev/full, whose every write fails with the real ENOSPC."""

    def opened(handle: int, mode: str) -> Any:
        os.close(handle)
        return Path("/dev/full").open(mode)

    monkeypatch.setattr(files.os, "fdopen", opened)


def test_a_file_is_written_whole_in_a_new_folder_with_the_umasks_rights(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.txt"
    before = os.umask(0o027)
    try:
        write_text(path, "first")
        write_text(path, "zweite ü")
    finally:
        os.umask(before)

    assert path.read_bytes() == "zweite ü".encode()
    assert names(path.parent) == ["file.txt"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_only_if_absent_lets_the_first_writer_win(tmp_path: Path) -> None:
    path = tmp_path / "row"

    assert write_atomically(path, lambda file: file.write(b"1"), only_if_absent=True)
    assert not write_atomically(path, lambda file: file.write(b"2"), only_if_absent=True)

    assert path.read_bytes() == b"1"
    assert names(tmp_path) == ["row"]


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("only_if_absent", [False, True])
def test_a_full_disk_is_named_and_leaves_nothing_half_written(tmp_path: Path, only_if_absent: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    with pytest.raises(
        StorageError, match=r"could not write .*/file: No space left on device; free some space"
    ):
        write_atomically(path, lambda file: file.write(b"new" * 10_000), only_if_absent=only_if_absent)

    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


@pytest.mark.usefixtures("full_disk")
def test_torchs_runtime_error_of_a_full_disk_is_one_too(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"

    with pytest.raises(StorageError, match=r"could not write .*checkpoint\.pt: No space left on device"):
        write_atomically(path, lambda file: torch.save({"a": torch.zeros(100_000)}, file))

    assert names(tmp_path) == []


def test_a_failed_sync_counts_as_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(StorageError, match="Input/output error; check the folder's permissions and space"):
        write_text(path, "new")

    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "text", ["PytorchStreamWriter failed writing file data/0", "unexpected pos 64 vs 10"]
)
def test_torchs_writers_messages_are_known(text: str, tmp_path: Path) -> None:
    def fail(file: Any) -> None:
        raise RuntimeError(text)

    with pytest.raises(StorageError, match="No space left on device"):
        write_atomically(tmp_path / "file", fail)
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt(), ValueError("no")])
def test_other_errors_pass_and_leave_nothing(error: BaseException, tmp_path: Path) -> None:
    def fail(file: Any) -> None:
        file.write(b"half")
        raise error

    with pytest.raises(type(error)):
        write_atomically(tmp_path / "file", fail)
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(StorageError, match=r"could not write .*/file/below/row"):
        write_text(tmp_path / "file" / "below" / "row", "x")


def test_storage_errors_names_the_fix(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="then run again with --resume"), storage_errors(tmp_path):
        raise OSError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (FileNotFoundError(errno.ENOENT, "gone"), InputError),
        (PermissionError(errno.EACCES, "forbidden"), InputError),
        (OSError("truncated"), InputError),  # as Pillow and pyarrow say it of a file's content
        (ValueError("malformed"), InputError),
        (OSError(errno.EIO, "failed"), StorageError),
        (OSError(errno.ESTALE, "stale"), StorageError),
    ],
)
def test_a_failing_disk_is_not_the_file(error: Exception, kind: type[Exception]) -> None:
    assert type(reading_error("file must be readable, got x", error)) is kind
