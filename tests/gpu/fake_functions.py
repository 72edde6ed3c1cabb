"""What Python functions of tensors do on a fake device where PyTorch's answer would be that of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.gpu.fake_marks import CPU, place

if TYPE_CHECKING:
    from tests.gpu.fake_cuda import FakeCuda

Handler = Callable[["FakeCuda", Any, Any, dict[str, Any]], Any]


def _device(gpu: FakeCuda, func: Any, args: Any, kwargs: Any) -> torch.device:
    return place(args[0])


def _is_cuda(gpu: FakeCuda, func: Any, args: Any, kwargs: Any) -> bool:
    return place(args[0]).type == "cuda"


def _is_cpu(gpu: FakeCuda, func: Any, args: Any, kwargs: Any) -> bool:
    return place(args[0]).type == "cpu"


def _get_device(gpu: FakeCuda, func: Any, args: Any, kwargs: Any) -> int:
    return -1 if place(args[0]).index is None else place(args[0]).index


def _to_cpu(gpu: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    return gpu.move(args[0], CPU)


def _to_cuda(gpu: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    device = kwargs.get("device", args[1] if len(args) > 1 else "cuda")
    return gpu.move(
        args[0], gpu.resolve("cuda" if device is None else device), bool(kwargs.get("non_blocking"))
    )


def _to(gpu: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    """`Tensor.to` in its three forms: device and dtype, dtype, another tensor."""
    tensor, *rest = args
    device, flags = kwargs.pop("device", None), [value for value in rest if isinstance(value, bool)]
    rest = [value for value in rest if not isinstance(value, bool)]
    if rest and isinstance(rest[0], Tensor):
        device, rest = place(rest[0]), [rest[0].dtype]
    elif rest and isinstance(rest[0], str | int | torch.device):
        device = rest.pop(0)
    rest = [value for value in rest if value is not None]
    non_blocking = kwargs.pop("non_blocking", flags[0] if flags else False)
    if len(flags) > 1:
        kwargs["copy"] = flags[1]
    device = None if device is None else gpu.resolve(device)
    if device is not None and device.type in ("cpu", "cuda") and device != place(tensor):
        tensor = gpu.move(tensor, device, non_blocking)
        kwargs.pop("copy", None)
    elif device is not None and device.type not in ("cpu", "cuda"):
        kwargs["device"] = device
    if not rest and not kwargs:
        return tensor
    return gpu.run(func, (tensor, *rest), kwargs)


def _numpy(gpu: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    if place(args[0]).type != "cuda":
        return NotImplemented
    if kwargs.pop("force", False):
        return gpu.move(args[0].detach(), CPU).numpy()
    raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")


def _tolist(gpu: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    if place(args[0]).type == "cuda":
        gpu.sync("tolist")
    return NotImplemented


def _pin_memory(gpu: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    if place(args[0]).type == "cuda":
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    pinned = args[0].clone()
    pinned.untyped_storage().__dict__["pinned"] = True
    return pinned


def _is_pinned(gpu: FakeCuda, func: Any, args: Any, kwargs: Any) -> bool:
    return args[0].untyped_storage().__dict__.get("pinned", False)


def _set_grad(gpu: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    if args[1] is not None and place(args[1]) != place(args[0]):
        raise RuntimeError("assigned grad has data located on a different device")
    return NotImplemented


def _from_values(gpu: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    """`torch.tensor`, `as_tensor` and `new_tensor` copy from the host, and wait for it."""
    device = kwargs.get("device")
    near = place(args[0]) if args and isinstance(args[0], Tensor) else CPU
    target = gpu.resolve(device) if device is not None else near if func is Tensor.new_tensor else CPU
    if target.type != "cuda":
        return NotImplemented
    if func in (torch.as_tensor, torch.asarray):
        value = args[0] if isinstance(args[0], Tensor) else torch.tensor(args[0], dtype=kwargs.get("dtype"))
        return (
            gpu.move(value, target)
            if kwargs.get("dtype") is None
            else gpu.move(value.to(kwargs["dtype"]), target)
        )
    gpu.sync("new tensor from values")
    return NotImplemented


def _set_item(gpu: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    """A number is filled in; on a CPU, PyTorch copies it from a tensor."""
    if place(args[0]).type != "cuda" or not isinstance(args[2], bool | int | float):
        return NotImplemented
    value = gpu.run(torch.scalar_tensor, (args[2],), {"dtype": args[0].dtype, "device": place(args[0])})
    return gpu.run(func, (args[0], args[1], value), {})


def _one_hot(gpu: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    """Its checks of values are for CPU tensors only; it waits for the number of classes unless it is told."""
    if kwargs.get("num_classes", args[1] if len(args) > 1 else -1) == -1 and place(args[0]).type == "cuda":
        gpu.sync("one_hot")
    with gpu.quiet():
        return gpu.run(func, args, kwargs)


def _nothing(gpu: FakeCuda, func: Any, args: Any, kwargs: Any) -> None:
    return None


HANDLERS: dict[Any, Handler] = {
    Tensor.device.__get__: _device,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__: _is_cuda,  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: _is_cpu,  # type: ignore[attr-defined]
    Tensor.get_device: _get_device,
    Tensor.cpu: _to_cpu,
    Tensor.cuda: _to_cuda,
    Tensor.to: _to,
    Tensor.numpy: _numpy,
    Tensor.__array__: _numpy,
    Tensor.tolist: _tolist,
    Tensor.pin_memory: _pin_memory,
    Tensor.is_pinned: _is_pinned,
    Tensor.grad.__set__: _set_grad,  # type: ignore[attr-defined]
    Tensor.record_stream: _nothing,
    Tensor.new_tensor: _from_values,
    torch.tensor: _from_values,
    torch.as_tensor: _from_values,
    torch.asarray: _from_values,
    Tensor.__setitem__: _set_item,
    F.one_hot: _one_hot,
}
