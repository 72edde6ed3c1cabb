"""Files of tensors that would take more memory than there is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddray.errors import InputError, StorageError
from ddray.system import tensors
from ddray.system.tensors import empty_matrix, load_plain, read_tensors


@pytest.mark.parametrize("name", ["a.npz", "a.pt"])
def test_a_file_that_unpacks_to_more_than_there_is_is_not_unpacked(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 MiB of zeros are 4 kB deflated: the size on disk says nothing."""
    path, zeros = tmp_path / name, np.zeros(2**20, np.float32)
    if name == "a.npz":
        np.savez_compressed(path, images=zeros)
        assert path.stat().st_size < 2**14
    else:
        torch.save({"images": torch.from_numpy(zeros)}, path)
    free = 2**23

    def available(device: torch.device) -> int:
        return free

    monkeypatch.setattr("ddray.system.tensors.available_bytes", available)
    contents: dict[str, Any] = load_plain(path)
    assert contents["images"].shape == (2**20,)
    free = 2**21
    with pytest.raises(InputError, match=rf"{name} must be .*it would unpack to 0\.0 GiB, 0\.0 are free"):
        read_tensors(path)


def test_a_large_matrix_lies_on_the_disk_without_a_name(
    ddray_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.randn(2, 6)
    assert not empty_matrix(4, rows, "cpu").is_shared()
    monkeypatch.setattr(tensors, "_MOST_IN_MEMORY", 4 * 6 * 4 - 1)
    matrix = empty_matrix(4, rows, "cpu")
    matrix[:2], matrix[2:] = rows, -rows
    assert matrix.is_shared()
    assert (matrix.shape, matrix.dtype) == ((4, 6), torch.float32)
    assert torch.equal(matrix, torch.cat([rows, -rows]))
    assert list(ddray_home.iterdir()) == []


def test_a_matrix_without_space_is_an_error_of_ours(
    ddray_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors, "_MOST_IN_MEMORY", 1)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="No space left"):
        empty_matrix(4, torch.zeros(1, 6), "cpu")
