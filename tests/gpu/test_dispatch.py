"""What CUDA's dispatch decides, on tensors without memory: vmap of each norm, autocast.

FakeTensorMode runs the rules of PyTorch's CUDA build, cuDNN's choices too, on shapes alone. The fake device
of the other tests can't show these: its tensors are a CPU's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytestmark = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="PyTorch without CUDA's kernels")

CUDA = torch.device("cuda", 0)
SHAPE = (3, 32, 32)


@pytest.fixture(autouse=True)
def without_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors on CUDA without memory; autocast believes that there is a GPU with bfloat16."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


WEIGHT = (4, 4, 3, 3)
AUTOCAST: dict[str, tuple[Callable[[Tensor], Tensor], torch.dtype]] = {
    "convolution": (lambda x: F.conv2d(x, torch.empty(WEIGHT, device=CUDA)), torch.bfloat16),
    "linear": (lambda x: F.linear(x, torch.empty(2, 8, device=CUDA)), torch.bfloat16),
    "group norm": (lambda x: F.group_norm(x, 2), torch.float32),
    "layer norm": (lambda x: F.layer_norm(x, [8]), torch.float32),
    "batch norm of float32": (lambda x: F.batch_norm(x, None, None, training=True), torch.float32),
    "batch norm of bfloat16": (
        lambda x: F.batch_norm(x.bfloat16(), None, None, training=True),
        torch.bfloat16,
    ),
    "pooling of bfloat16": (lambda x: F.avg_pool2d(x.bfloat16(), 2), torch.bfloat16),
    "relu of bfloat16": (lambda x: F.relu(x.bfloat16()), torch.bfloat16),
    "softmax": (lambda x: F.softmax(x.bfloat16(), 1), torch.float32),
    "sum": (lambda x: x.bfloat16().sum(), torch.float32),
    "mean": (lambda x: x.bfloat16().mean(), torch.bfloat16),
    "square root": (lambda x: x.bfloat16().sqrt(), torch.bfloat16),
    "power": (lambda x: x.bfloat16().pow(4), torch.float32),
    "norm": (lambda x: x.bfloat16().norm(), torch.float32),
    "matrix product": (lambda x: x.flatten(1) @ x.flatten(1).T, torch.bfloat16),
    "grid": (
        lambda x: F.grid_sample(x, torch.empty(2, 8, 8, 2, device=CUDA), align_corners=False),
        torch.float32,
    ),
    "cross entropy": (
        lambda x: F.cross_entropy(x.bfloat16().flatten(1), torch.zeros(2, dtype=torch.int64, device=CUDA)),
        torch.float32,
    ),
}


@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_computes_in(name: str) -> None:
    function, dtype = AUTOCAST[name]

    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        result = function(torch.empty(2, 4, 8, 8, device=CUDA))

    assert result.dtype == dtype
