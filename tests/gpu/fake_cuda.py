"""A CUDA device without a GPU: tensors are on the CPU, and their storage says that they are on `cuda:N`.

    with FakeCuda() as gpu:
        images = torch.rand(4, 3, device="cuda")
        images + torch.ones(4, 3)      # RuntimeError, as on a GPU
        images.sum().item()            # counted in gpu.syncs, with the line of ddray that waited
    print(gpu.kernels, gpu.syncs)

Numbers are real, those of a CPU. What a GPU refuses is refused: tensors on two devices in one operation, a
generator of the other kind, NumPy on a CUDA tensor, a wait for the device during a graph's capture, more
memory than there is (`memory`). What a GPU does not refuse but pays for is counted: syncs (by place) and
kernels.

How: a mark on the storage (views share it) says where a tensor is. `FakeCuda`, a TorchFunctionMode, sees
Python calls: it answers `.device`, moves tensors, takes `device="cuda"` out of factories. `_Operations`, a
TorchDispatchMode, sees every ATen operation, those of the C++ backward pass too: it checks devices, marks
results, counts, and records graphs. `torch.cuda`'s functions are replaced while the fake is entered.

What it can't show: CUDA's own dispatch (cuDNN, autocast lists: `test_dispatch.py`; layouts), numerics, races
between streams, the allocator's fragments. A kernel is one ATen operation that is no view: close to launches.
"""

from __future__ import annotations

import collections
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import ddray
from tests.gpu.fake_functions import HANDLERS
from tests.gpu.fake_marks import CPU, Memory, mark_storage, place, tensors, unwrapped
from tests.gpu.fake_module import replace_torch

if TYPE_CHECKING:
    from tests.gpu.fake_module import Graph, Stream

PACKAGE = f"{Path(ddray.__file__).parent}/"

# Operations that wait for the device: their result's size or value is needed on the host.
SYNCS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "is_nonzero", "allclose"),
    *("_unique2", "unique_dim", "unique_consecutive", "histc", "linalg_lstsq"),
    *("_linalg_check_errors", "_linalg_eigh", "_linalg_svd", "linalg_eig"),
}
NO_KERNEL = (
    *("empty", "new_empty", "detach", "lift", "alias", "set_", "record_stream"),
    *("_unsafe_view", "_reshape_alias", "_local_scalar"),
)
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_PAST_DISPATCH = {Tensor.new_tensor, Tensor.__deepcopy__}  # their results come from no operation
MOVES = {"copy_", "_to_copy", "set_"}
# Besides pointwise operations, these take a CPU scalar (no axes) along with CUDA tensors.
TAKE_SCALARS = {
    *INDEXING,
    "fill_",
    "fill",
    "masked_fill",
    "masked_fill_",
    "index_fill",
    "index_fill_",
    "where",
}


class _Move(torch.autograd.Function):
    """A differentiable copy to another device."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: torch.device, gpu: FakeCuda) -> Tensor:
        ctx.device, ctx.gpu = place(tensor), gpu
        with _disable_current_modes():
            return gpu.mark(tensor.detach().clone(), device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        with _disable_current_modes():
            return ctx.gpu.mark(grad.clone(), ctx.device), None, None


class _Operations(TorchDispatchMode):
    """Checks, marks, counts and records every ATen operation."""

    def __init__(self, gpu: FakeCuda) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        gpu = self._gpu
        name = func._schema.name.partition("::")[2]
        inputs = tensors((args, kwargs))
        places = [place(tensor) for tensor in inputs]
        device = next((there for there in places if there.type == "cuda"), None)
        if device is not None:
            _refuse_mixed(gpu, func, name, args, inputs, places, device)
            _count_syncs(gpu, name, args, kwargs, places)
        elif not inputs:
            device = gpu.home
        if gpu.explicit is not None and (not inputs or name.startswith("new_") or name.endswith("_like")):
            device = gpu.explicit
        on_gpu = device is not None and device.type == "cuda"
        if on_gpu and not func.is_view and not name.startswith(NO_KERNEL):
            gpu.launch(name)
        results = func(*args, **kwargs)
        if on_gpu:
            gpu.mark(results, device, inputs)
            if gpu.graph is not None:
                gpu.graph.tape.append((func, *_baked(args, kwargs), results))
        return results


def _refuse_mixed(
    gpu: FakeCuda,
    func: Any,
    name: str,
    args: Any,
    inputs: list[Tensor],
    places: list[torch.device],
    device: Any,
) -> None:
    """Raise what a GPU raises if an operation's tensors are on two devices."""
    takes_scalars = torch.Tag.pointwise in func.tags or name in TAKE_SCALARS or name.startswith("_foreach")
    for tensor, there in zip(inputs, places, strict=True):
        if there == device or there.type == "meta" or name in MOVES:
            continue
        if there == CPU and tensor.dim() == 0 and takes_scalars:
            continue
        if (
            there == CPU
            and name in INDEXING
            and place(args[0]) == device
            and any(tensor is i for i in args[1])
        ):
            gpu.sync("index on the CPU")
            continue
        message = "Expected all tensors to be on the same device, but found at least two devices"
        raise RuntimeError(f"{message}, {device} and {there}! (when checking argument in method {name})")


def _count_syncs(gpu: FakeCuda, name: str, args: Any, kwargs: Any, places: list[torch.device]) -> None:
    if name in SYNCS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        gpu.sync(name)
    if name in INDEXING and any(i is not None and i.dtype == torch.bool and place(i) != CPU for i in args[1]):
        is_fill = name != "index" and args[2].numel() == 1  # PyTorch fills there
        if not is_fill:
            gpu.sync("index by a mask")
    if name == "copy_" and len(set(places)) > 1 and CPU in places:
        if not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False)):
            gpu.sync("copy_")
        elif gpu.graph is not None:
            raise RuntimeError("Cannot copy between CPU and CUDA tensors during CUDA graph capture")


def _baked(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return arguments of a recorded operation; what is on the CPU keeps the value of now."""

    def bake(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(bake(part) for part in value)
        return value.clone() if isinstance(value, Tensor) and place(value) == CPU else value

    with _disable_current_modes():
        return bake(args), {name: bake(value) for name, value in kwargs.items()}


class FakeCuda(TorchFunctionMode):
    """Fake CUDA devices while entered.

    Args:
        devices: how many.
        memory: bytes of each; an allocation beyond raises torch.OutOfMemoryError.
        capture_fails: no graph can be captured, as when a kernel does not allow it.
        autocasts: False: autocast for CUDA computes in float32, as a CPU run to compare with does.

    Attributes:
        syncs: waits for a device, by what waited and the innermost line of ddray.
        kernels: operations that launch a kernel, those of captures too, those of replays not.
        launches: kernels and replays, without what a capture records: what the host did.
        names: kernels by operation.
        replays: of graphs.
        memories: the devices' memories.
        opened: the first place that needed a CUDA context; None: none did.
    """

    stream: Stream

    def __init__(
        self, *, devices: int = 1, memory: int = 80 << 30, capture_fails: bool = False, autocasts: bool = True
    ) -> None:
        super().__init__()
        self.memories = [Memory(memory) for _ in range(devices)]
        self.capture_fails, self.autocasts = capture_fails, autocasts
        self.current = 0
        self.graph: Graph | None = None
        self.home: torch.device | None = None  # of the Python call that runs
        self.explicit: torch.device | None = None  # its `device` argument
        self.opened: str | None = None
        self.kernels = self.launches = self.replays = 0
        self.names: collections.Counter[str] = collections.Counter()
        self.syncs: collections.Counter[str] = collections.Counter()
        self._quiet = False
        self._fails_in: int | None = None

    def forget(self) -> None:
        """Count from here."""
        self.kernels = self.launches = self.replays = 0
        self.names.clear()
        self.syncs.clear()

    def fail_in(self, kernels: int) -> None:
        """Let the device run out of memory, once, at the kernel that is so many from now."""
        self._fails_in = kernels

    def launch(self, name: str) -> None:
        if self._fails_in is not None:
            self._fails_in -= 1
            if self._fails_in < 0:
                self._fails_in = None
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        if self._quiet:
            return
        self.kernels += 1
        self.launches += self.graph is None
        self.names[name] += 1

    def sync(self, what: str) -> None:
        """Count a wait for the device; a capture refuses it."""
        if self._quiet:
            return
        self.syncs[f"{what} {_line_of_ddray()}"] += 1
        if self.graph is not None:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")

    def open(self) -> None:
        """Note the first place that needs a context."""
        self.opened = self.opened or _line_of_ddray()

    def resolve(self, device: Any) -> torch.device:
        """Return the device that an argument means, such as `cuda` or 1."""
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if device.type == "cuda" and device.index is None:
            return torch.device("cuda", self.current)
        if device.type == "cuda" and device.index >= len(self.memories):
            raise RuntimeError("CUDA error: invalid device ordinal")
        return device

    def mark(self, results: Any, device: torch.device, inputs: Any = ()) -> Any:
        """Say that results that share no memory with `inputs` are on `device`; return the results."""
        new = [tensor for tensor in map(unwrapped, tensors(results)) if tensor.device.type == "cpu"]
        old = {tensor.untyped_storage()._cdata for tensor in map(unwrapped, inputs if new else ())}
        for storage in [tensor.untyped_storage() for tensor in new]:
            if storage._cdata not in old:
                if self.opened is None and device.type == "cuda":
                    self.open()
                mark_storage(storage, device, self.memories)
        return results

    def move(self, tensor: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
        here = place(tensor)
        if here == device:
            return tensor
        if here.type == "meta":
            raise NotImplementedError("Cannot copy out of meta tensor; no data!")
        if CPU in (here, device):
            if not non_blocking:
                self.sync("copy to the CPU" if device == CPU else "copy from the CPU")
            elif self.graph is not None:
                raise RuntimeError("Cannot copy between CPU and CUDA tensors during CUDA graph capture")
        moved: Tensor = _Move.apply(tensor, device, self)
        return moved

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Count nothing: checks that PyTorch makes for CPU tensors only."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if (handler := HANDLERS.get(func)) is not None:
            result = handler(self, func, args, kwargs)
            if result is not NotImplemented:
                return result
        if getattr(func, "__name__", "") == "__get__":  # an attribute: no new memory
            return func(*args)
        return self.run(func, args, kwargs)

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Call a function of torch on the device that its arguments say."""
        explicit = None if kwargs.get("device") is None else self.resolve(kwargs["device"])
        if explicit is not None and explicit.type == "cuda":
            kwargs["device"] = CPU
        inputs = tensors((args, kwargs))
        near = next((there for there in map(place, inputs) if there.type == "cuda"), None)
        home = explicit or near or CPU
        self._check_generators((*args, *kwargs.values()), home)
        before = self.home, self.explicit
        self.home, self.explicit = home, explicit
        try:
            results = func(*args, **kwargs)
        finally:
            self.home, self.explicit = before
        if explicit is not None or func in _PAST_DISPATCH:
            self.mark(results, home, inputs)
        return results

    def _check_generators(self, values: Any, home: torch.device) -> None:
        for value in values:
            if not isinstance(value, torch._C.Generator):
                continue
            there = getattr(value, "place", CPU)
            if there.type != home.type:
                message = f"Expected a '{home.type}' device type for generator but found '{there.type}'"
                raise RuntimeError(message)
            if there.type == "cuda" and self.graph is not None and id(value) not in self.graph.generators:
                raise RuntimeError("the generator must be registered with the graph that is captured")

    def __enter__(self) -> FakeCuda:
        with contextlib.ExitStack() as stack:
            replace_torch(self, stack)
            stack.enter_context(_Operations(self))
            self._undo = stack.pop_all()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._undo.close()


def _line_of_ddray() -> str:
    """Return the innermost line of ddray that is being run, `module.py:line`, else that of the caller."""
    frame = sys._getframe(1)
    while frame.f_back is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    if not frame.f_code.co_filename.startswith(PACKAGE):
        return "outside ddray"
    return f"{frame.f_code.co_filename.removeprefix(PACKAGE)}:{frame.f_lineno}"
