"""torch.compile that may fail: what can't be compiled runs eagerly, and says so once."""

import logging
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import torch

from ddray.errors import one_line

log = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")


class Compiled(Generic[P, R]):
    """A function that is compiled at its first call with each shape of arguments; see `compiled`."""

    def __init__(self, function: Callable[P, R], *, on: bool) -> None:
        self._function, self._on = function, on
        self._compiled: Callable[P, R] | None = None
        self._works = False

    @property
    def used(self) -> str:
        """`compiled`, or `eager`: compilation is off or failed, or there was no call yet."""
        return "compiled" if self._works else "eager"

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Return what the function returns."""
        if not self._on:
            return self._function(*args, **kwargs)
        try:
            if self._compiled is None:
                self._compiled = torch.compile(self._function, dynamic=False)
            result = self._compiled(*args, **kwargs)
            self._works = True
            return result
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of dynamo, inductor, Triton, a C++ compiler, a linker
            reason = f"{type(error).__name__}: {one_line(error, 200)}"
        result = self._function(*args, **kwargs)
        log.warning("not compiled (%s): steps run eagerly", reason)
        self._on = self._works = False
        self._compiled = None
        return result


def compiled(function: Callable[P, R], *, on: bool) -> Compiled[P, R]:
    """Return `function`, compiled with static shapes if `on`; what can't be compiled runs eagerly.

    There is one warning then, and `used` of the result says `eager`. The function's own errors pass through:
    after a failure it is called as it is, which tells its errors from the compiler's. Out of memory passes at
    once, and compilation stays on.

    Args:
        function: a pure function of tensors.
        on: whether to compile.
    """
    return Compiled(function, on=on)
