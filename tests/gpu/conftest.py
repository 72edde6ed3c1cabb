from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.gpu.fake_cuda import FakeCuda


@pytest.fixture
def gpu() -> Iterator[FakeCuda]:
    """A fake GPU for the length of a test."""
    with FakeCuda() as fake:
        yield fake


@pytest.fixture(
    params=["cpu", "fake", pytest.param("cuda", marks=pytest.mark.gpu)],
)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device a test runs on: the CPU, a fake GPU, and a true one where there is one."""
    if request.param == "cpu":
        yield torch.device("cpu")
    elif request.param == "fake":
        with FakeCuda():
            yield torch.device("cuda", 0)
    elif torch.cuda.is_available():
        yield torch.device("cuda", 0)
    else:
        pytest.skip("no GPU")
