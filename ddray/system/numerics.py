"""How numbers are computed: the precision of convolutions and matrix products, and determinism.

`applied` sets both where a unit of work begins (a distillation, an architecture's evaluation, a NAS task),
and gives torch's settings back after it. The training engine and the matching methods read `current`.

- `tf32`, the default: float32. On GPUs that have it, convolutions round their inputs to TF32, as torch does
  by default; matrix products don't, as covariances, kernels and solvers need their digits. On a CPU: `fp32`.
- `fp32`: float32 throughout.
- `bf16`: the forward passes of trainings, and of the statistics that methods match, are autocast to bfloat16.
  Weights, gradients, losses and optimiser states stay float32, and so does scoring.
- `auto`: `bf16` where a probe finds it faster than `tf32`. Timings differ: it may choose otherwise next time.

By default GPUs may sum in any order, so that the last digits of equal runs differ there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from ddray.system.options import Precision

_ROUNDS: Final = 3
# By how much bfloat16 has to be faster to be worth its digits.
_WORTHWHILE: Final = 0.95
_CUBLAS: Final = "CUBLAS_WORKSPACE_CONFIG"


@dataclass(frozen=True)
class Numerics:
    """What `applied` has set.

    Attributes:
        precision: as it was asked for.
        device: where the work is done.
        probed: what `auto` has chosen so far, by the probed work: whether bfloat16.
        computed: what was computed so far of what has a choice: whether in bfloat16.
    """

    precision: Precision = "tf32"
    device: str = "cpu"
    probed: dict[Hashable, bool] = field(default_factory=dict)
    computed: set[bool] = field(default_factory=set)

    def bf16(self, work: Hashable, run: Callable[[bool], object] | None = None) -> bool:
        """Return whether to compute some work in bfloat16.

        Under `auto`, `run(bf16)` does it (without lasting effects) both ways in turns, and the faster one is
        taken for all work that is equal. None: as probed before; if it never was, no.
        """
        if self.precision != "auto":
            in_bf16 = self.precision == "bf16"
        else:
            if run is not None and work not in self.probed:
                low, full = _seconds(run, self.device)
                self.probed[work] = low < _WORTHWHILE * full
            in_bf16 = self.probed.get(work, False)
        self.computed.add(in_bf16)
        return in_bf16

    def used(self) -> str:
        """Return the precision that was used, for rows: fp32, tf32 or bf16; both where a probe chose both.

        Of what has no choice, such as a method without networks, it is float32 whatever was asked for.
        """
        full = "tf32" if self.device == "cuda" and self.precision != "fp32" else "fp32"
        return "+".join(sorted({"bf16" if bf16 else full for bf16 in self.computed or {False}}))


_CURRENT: Final[ContextVar[Numerics | None]] = ContextVar("numerics", default=None)


def current() -> Numerics:
    """Return the settings in force."""
    return _CURRENT.get() or Numerics()


def has_bf16(device: torch.device) -> bool:
    """Return whether `device` is a GPU that computes in bfloat16; older ones than Ampere emulate it."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


@contextmanager
def applied(
    precision: Precision = "tf32", *, deterministic: bool = False, device: str = "cpu"
) -> Iterator[Numerics]:
    """Compute in a precision, and with `deterministic` only by deterministic algorithms.

    What torch can't compute deterministically then raises a RuntimeError. `device` is a type: cpu or cuda.
    """
    numerics = Numerics(precision, device)
    token = _CURRENT.set(numerics)
    with ExitStack() as undo:
        undo.callback(_CURRENT.reset, token)
        if device == "cuda":
            _set(undo, torch.backends.cudnn, "allow_tf32", precision != "fp32")
            _set(undo, torch.backends.cuda.matmul, "allow_tf32", False)
        if deterministic:
            _make_deterministic(undo)
        yield numerics


def _set(undo: ExitStack, owner: Any, name: str, value: object) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _make_deterministic(undo: ExitStack) -> None:
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    enabled = torch.are_deterministic_algorithms_enabled()
    undo.callback(torch.use_deterministic_algorithms, enabled, warn_only=warn_only)
    torch.use_deterministic_algorithms(True)
    _set(undo, torch.backends.cudnn, "benchmark", False)
    _set(undo, torch.utils.deterministic, "fill_uninitialized_memory", False)
    if _CUBLAS not in os.environ:  # cuBLAS reads it at its first product in the process
        undo.callback(os.environ.pop, _CUBLAS, None)
        os.environ[_CUBLAS] = ":4096:8"


def _seconds(run: Callable[[bool], object], device: str) -> tuple[float, float]:
    """Return the least seconds of some work in bfloat16 and in float32, done in turns."""
    least = {True: float("inf"), False: float("inf")}
    for timed in range(-1, _ROUNDS):  # the first round warms up
        for bf16 in least:
            begin = time.perf_counter()
            run(bf16)
            if device == "cuda":
                torch.cuda.synchronize()
            if timed >= 0:
                least[bf16] = min(least[bf16], time.perf_counter() - begin)
    return least[True], least[False]
