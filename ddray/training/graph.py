"""CUDA graphs: a function of tensors that is captured once per shape of its arguments and then replayed."""

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ddray.system.memory import is_short

log = logging.getLogger(__name__)

# Steps from which capturing a graph, which costs about five, is worth it.
WORTHWHILE_STEPS: Final = 50
_WARM_UPS: Final = 3


class Graphs:
    """The CUDA graphs of one function of tensors, one per shape of its arguments.

    What can't be captured is called instead, with one warning. A graph has its memory for itself: where that
    runs out, so that the caller can make parts smaller, torch.OutOfMemoryError passes; but in a second try
    (`memory.halved_budget`) the function is called instead.

    Args:
        on: whether to capture; False: the function is always called.

    Attributes:
        captured: whether a graph has been replayed.
    """

    def __init__(self, *, on: bool) -> None:
        self._on = on
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Any]] = {}
        self.captured = False

    def __call__(
        self,
        function: Callable[..., Any],
        args: Sequence[Tensor],
        changes: Callable[[], Sequence[Tensor]] = tuple,
    ) -> Any:
        """Return what the function returns, by a replay where it can be; the next call overwrites the result.

        Args:
            function: the same at each call (not kept: that would tie its owner's memory to the graphs). It
                may change tensors in place, must not wait for the device, and may depend on no values but
                those of `args` and of tensors that keep their memory.
            args: detached tensors on one CUDA device.
            changes: returns the tensors that the function changes in place. They are restored after the calls
                that warm up; those that the first of these made are zeroed.
        """
        if not self._on:
            return function(*args)
        key = tuple((tensor.shape, tensor.dtype, _strides(tensor)) for tensor in args)
        if key not in self._graphs:
            try:
                self._graphs[key] = _capture(function, args, changes)
                self.captured = True
            except RuntimeError as error:
                if (lack := _lack_of_memory(error)) is not None and not is_short():
                    raise lack from None
                self._on = False
                log.warning("no CUDA graph (%s): steps run eagerly", str(error).partition("\n")[0])
                return function(*args)
        graph, static, results = self._graphs[key]
        for to, tensor in zip(static, args, strict=True):
            to.copy_(tensor)
        graph.replay()
        return results


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Return the strides that tell where values are; an axis of one element has any."""
    return tuple(step for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)


def _lack_of_memory(error: BaseException | None) -> torch.OutOfMemoryError | None:
    """Return the lack of memory that an error is or comes from: a capture ends with an error of its own."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__ or error.__context__
    return error


def _end_captures_of_generators() -> None:
    """Let the devices' global generators draw again after a capture that failed.

    CUDA's error at the capture's end comes before torch tells them of it, and they would refuse every draw,
    such as fresh weights': "Offset increment outside graph capture encountered unexpectedly".
    """
    for generator in torch.cuda.default_generators:
        generator.graphsafe_set_state(generator.clone_state())


def _capture(
    function: Callable[..., Any], args: Sequence[Tensor], changes: Callable[[], Sequence[Tensor]]
) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Any]:
    """Warm up on a side stream, capture, and restore what the warm-up changed."""
    before = {value.data_ptr(): value.clone() for value in changes()}
    static = tuple(tensor.clone() for tensor in args)
    captured = False
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(current)
    try:
        with torch.cuda.stream(side), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*capturable=True")  # the warm-up is no capture
            for _ in range(_WARM_UPS):
                function(*static)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = function(*static)
        captured = True
    finally:
        # A capture that fails leaves its own stream as the current one (torch 2.11).
        torch.cuda.set_stream(current)
        if not captured:
            current.wait_stream(side)  # what the warm-up had queued would come after what is restored here
        for value in changes():
            if (old := before.get(value.data_ptr())) is not None:
                value.copy_(old)
            else:  # made in the warm-up, such as an optimiser's moments and counters, which begin at 0
                value.zero_()
        if not captured:
            _end_captures_of_generators()
    return graph, static, results
