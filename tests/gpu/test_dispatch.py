"""What CUDA's dispatch decides, on tensors without memory: vmap of each norm, autocast.

FakeTensorMode runs the rules of PyTorch's CUDA build, cuDNN's choices too, on shapes alone. The fake device
of the other tests can't show these: its tensors are a CPU's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ddray.nets import Net
from ddray.nets.build import _body, training_format
from ddray.nets.features import CpuLayer
from ddray.nets.names import parse_arch
from ddray.nets.nasbench201 import CellNet, Skeleton, parse_arch_str

pytestmark = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="PyTorch without CUDA's kernels")

CUDA = torch.device("cuda", 0)
SHAPE = (3, 32, 32)
CELL = "|nor_conv_3x3~0|+|nor_conv_1x1~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_3x3~1|none~2|"
NORMS = ("convnet3_w8", "convnet3_w8_bn", "convnet3_w8_ln", "convnet3_w8_gn", "convnet3_w8_nonorm")
OTHERS = ("convnet2_w32_max", "convnet2_w32_bn_nopool", "convnet3_w8_sigmoid", "convnet3_w8_leakyrelu")
CELLS = {"cell": (True, None), "cell, softmax": (False, "softmax")}


@pytest.fixture(autouse=True)
def without_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors on CUDA without memory; autocast believes that there is a GPU with bfloat16."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    move = nn.Module.to

    def to(module: nn.Module, *args: Any, **options: Any) -> nn.Module:
        """Change the memory format in place: PyTorch swaps such tensors, if nothing refers to them."""
        if args or set(options) != {"memory_format"}:
            return move(module, *args, **options)
        for value in (*module.parameters(), *module.buffers()):
            if value.dim() == 4:
                value.data = value.data.contiguous(**options)
        return module

    monkeypatch.setattr(nn.Module, "to", to)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def networks(arch: str) -> list[Net]:
    """Return two networks, made on CUDA: to move them, PyTorch would swap tensors that are referred to."""
    with torch.device(CUDA):
        if arch not in CELLS:
            return [Net(arch, SHAPE, 10, _body(parse_arch(arch), SHAPE, 10)) for _ in range(2)]
        affine, mixture = CELLS[arch]
        skeleton = Skeleton(8, 1, affine, mixture)
        return [Net(arch, SHAPE, 10, CellNet(parse_arch_str(CELL), 3, 10, skeleton)) for _ in range(2)]


def fused_logits(arch: str, precision: str, form: torch.memory_format | None = None) -> Tensor:
    """Return the logits [S, n, K] of networks as one; `form` None: the format that is taken for them."""
    nets, num = networks(arch), 8
    form = form or training_format(nets[0], CUDA, fused=True, bf16=precision == "bf16")
    template, *_ = [net.train().to(memory_format=form) for net in nets]
    for module in template.modules():
        if isinstance(module, CpuLayer):
            module.plain = True
    images = torch.empty(len(nets) * num, *SHAPE, device=CUDA).contiguous(memory_format=form)

    def outputs(params: Any, buffers: Any, inputs: Tensor) -> Any:
        return torch.func.functional_call(template, (params, buffers), (inputs,))

    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
        stacked = torch.func.stack_module_state(nets)
        logits: Tensor = torch.func.vmap(outputs)(*stacked, images.view(len(nets), num, *SHAPE))
        return logits


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("arch", [*NORMS, *OTHERS, *CELLS])
def test_networks_can_be_fused(arch: str, precision: str) -> None:
    """In the format that is taken for them, vmap has a rule for every layer."""
    assert fused_logits(arch, precision).shape == (2, 8, 10)


def test_batch_norm_of_channels_last_maps_can_not() -> None:
    """Why fused networks are contiguous; once torch can do it, so may they be."""
    with pytest.raises(RuntimeError):
        fused_logits("convnet3_w8_bn", "fp32", torch.channels_last)


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
