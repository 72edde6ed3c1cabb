"""`torch.cuda` of a fake device: streams, events, graphs, memory; what else of torch asks for a device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import _disable_current_modes

from tests.gpu.fake_marks import CPU, Generator, mark_storage, place, tensors

if TYPE_CHECKING:
    from tests.gpu.fake_cuda import FakeCuda

_GROUP = "_group_tensors_by_device_and_dtype"


class Graph:
    """Records the operations on CUDA tensors, and replays them on the same memory, without Python."""

    gpu: FakeCuda

    def __init__(self, keep_graph: bool = False) -> None:
        self.tape: list[tuple[Any, Any, Any, Any]] = []
        self.generators: set[int] = set()

    def register_generator_state(self, generator: Generator) -> None:
        self.generators.add(id(generator))

    def reset(self) -> None:
        self.tape.clear()

    def replay(self) -> None:
        self.gpu.replays += 1
        self.gpu.launches += 1
        with _disable_current_modes(), torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            for func, args, kwargs, results in self.tape:
                again = func(*args, **kwargs)
                for result, new in zip(tensors(results), tensors(again), strict=True):
                    if result.untyped_storage()._cdata != new.untyped_storage()._cdata:
                        result.detach().copy_(new)


class Stream:
    """A stream; everything runs at once, in order."""

    gpu: FakeCuda

    def __init__(self, device: Any = None, priority: int = 0) -> None: ...

    def wait_stream(self, stream: Stream) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.gpu.sync("synchronize")

    def is_capturing(self) -> bool:
        return self.gpu.graph is not None


class Event:
    """An event; 1 ms passes between any two."""

    gpu: FakeCuda

    def __init__(self, **_: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.gpu.sync("synchronize")

    def elapsed_time(self, end: Any) -> float:
        return 1.0


class _Module:
    """The functions that replace those of torch.cuda, by their names."""

    def __init__(self, gpu: FakeCuda) -> None:
        self._gpu = gpu
        for kind in (Graph, Stream, Event):  # classes of this device's
            setattr(self, kind.__name__, type(kind.__name__, (kind,), {"gpu": gpu}))
        self.CUDAGraph = self.Graph
        gpu.stream = self.Stream()

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        return True

    def device_count(self) -> int:
        return len(self._gpu.memories)

    def init(self) -> None:
        self._gpu.open()

    _lazy_init = init

    def current_device(self) -> int:
        self._gpu.open()
        return self._gpu.current

    def set_device(self, device: Any) -> None:
        self._gpu.open()
        self._gpu.current = self._gpu.resolve(device).index or 0

    @contextlib.contextmanager
    def device(self, device: Any) -> Iterator[None]:
        before = self._gpu.current
        self.set_device(device)
        try:
            yield
        finally:
            self._gpu.current = before

    def synchronize(self, device: Any = None) -> None:
        self._gpu.open()
        self._gpu.sync("synchronize")

    def _memory(self, device: Any) -> Any:
        self._gpu.open()
        return self._gpu.memories[self._gpu.resolve("cuda" if device is None else device).index]

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        memory = self._memory(device)
        return memory.capacity - memory.allocated, memory.capacity

    def memory_allocated(self, device: Any = None) -> int:
        return int(self._memory(device).allocated)

    memory_reserved = memory_allocated

    def max_memory_allocated(self, device: Any = None) -> int:
        return int(self._memory(device).peak)

    max_memory_reserved = max_memory_allocated

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        memory = self._memory(device)
        memory.peak = memory.allocated

    def empty_cache(self) -> None: ...

    def get_device_properties(self, device: Any = None) -> Any:
        values = {"major": 9, "minor": 0, "multi_processor_count": 132}
        return SimpleNamespace(name="Fake", total_memory=self._memory(device).capacity, **values)

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        return 9, 0

    def get_device_name(self, device: Any = None) -> str:
        return "Fake"

    # The devices' global generator is the CPU's: what a block draws is seen, forked and restored as one.
    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def manual_seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None: ...

    def current_stream(self, device: Any = None) -> Stream:
        self._gpu.open()
        return self._gpu.stream

    default_stream = current_stream

    def set_stream(self, stream: Stream) -> None:
        self._gpu.stream = stream

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._gpu.stream = self._gpu.stream, stream
        try:
            yield
        finally:
            self._gpu.stream = before

    def is_current_stream_capturing(self) -> bool:
        return self._gpu.graph is not None

    @contextlib.contextmanager
    def graph(self, graph: Graph, *_: Any, **__: Any) -> Iterator[None]:
        """Capture; a failure is reported as torch 2.11 does, and leaves the capture's stream."""
        gpu, before = self._gpu, self._gpu.stream
        gpu.stream, gpu.graph = self.Stream(), graph
        try:
            yield
            if gpu.capture_fails:
                raise RuntimeError("operation not permitted when stream is capturing")
        except RuntimeError as error:
            graph.tape.clear()
            message = "CUDA error: operation failed due to a previous error during capture"
            raise RuntimeError(message) from error
        finally:
            gpu.graph = None
        gpu.stream = before


@contextlib.contextmanager
def _replaced(owner: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextlib.contextmanager
def _files_name_devices(gpu: FakeCuda) -> Iterator[None]:
    """Let torch.save write, and torch.load read, which device a storage is on."""

    def tag(storage: Any) -> str | None:
        mark = getattr(storage, "__dict__", {}).get("mark")
        return None if mark is None else str(mark.device)

    def load(storage: Any, location: str) -> Any:
        if not str(location).startswith("cuda"):
            return None
        mark_storage(storage, gpu.resolve(location), gpu.memories)
        return storage

    registry = torch.serialization._package_registry
    entry = (-1, tag, load)
    registry.insert(0, entry)
    try:
        yield
    finally:
        registry.remove(entry)


def _backward(gpu: FakeCuda, run: Any) -> Any:
    """Return the engine's backward pass, whose Python code sees the device too."""

    def backward(roots: Any, *args: Any, **kwargs: Any) -> Any:
        home = next((there for there in map(place, tensors(roots)) if there.type == "cuda"), CPU)
        before, gpu.home = gpu.home, home
        is_active = any(mode is gpu for mode in _get_current_function_mode_stack())
        try:
            if is_active:
                return run(roots, *args, **kwargs)
            TorchFunctionMode.__enter__(gpu)
            try:
                return run(roots, *args, **kwargs)
            finally:
                TorchFunctionMode.__exit__(gpu, None, None, None)
        finally:
            gpu.home = before

    return backward


def _by_place(group: Any) -> Any:
    """Return the grouping of an optimiser's tensors by device, which reads the true one in C++."""

    def grouped(lists: Any, with_indices: bool = False) -> Any:
        groups = group(lists, with_indices).items()
        return {(place(parts[0][0][0]), dtype): parts for (_, dtype), parts in groups}

    return grouped


def replace_torch(gpu: FakeCuda, stack: contextlib.ExitStack) -> None:
    """Replace torch's functions until the stack is closed."""
    module = _Module(gpu)
    names = [name for name in dir(module) if not name.startswith("_") and name != "Graph"]
    functions = {name: getattr(module, name) for name in (*names, "_lazy_init")}
    autocast, is_on = torch.amp.autocast_mode.autocast, torch.is_autocast_enabled

    def on_cpu(device_type: str, dtype: torch.dtype | None = None, *args: Any, **kwargs: Any) -> Any:
        """Autocast for CUDA by the CPU's lists; without a dtype it is float16 there."""
        if torch.device(device_type).type != "cuda":
            return autocast(device_type, dtype, *args, **kwargs)
        if not gpu.autocasts:
            return contextlib.nullcontext()
        return autocast("cpu", torch.float16 if dtype is None else dtype, *args, **kwargs)

    def current(device: Any = None) -> Any:
        return gpu.stream

    replacements = [
        (torch.cuda, functions),
        (torch.accelerator, {"current_stream": current, "synchronize": module.synchronize}),
        (torch, {"Generator": Generator, "autocast": on_cpu, "is_autocast_enabled": lambda *_: is_on("cpu")}),
        (torch.amp, {"autocast": on_cpu}),
        (torch._C, {_GROUP: _by_place(getattr(torch._C, _GROUP))}),
        (torch.autograd, {"_engine_run_backward": _backward(gpu, torch.autograd._engine_run_backward)}),
    ]
    for owner, values in replacements:
        stack.enter_context(_replaced(owner, **values))
    stack.enter_context(_files_name_devices(gpu))
