"""Files of tensors that would take more memory than there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddray.errors import InputError
from ddray.system.tensors import load_plain, read_tensors


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
