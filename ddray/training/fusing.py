"""Whether several networks of one architecture are trained as one (torch.func over stacked weights).

A probe decides, on CUDA only: on a CPU, 8 fused ConvNets took twice the time of a loop (docs/ray.md, 17).
"""

import copy
import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

import torch

from ddray.nets import Net

log = logging.getLogger(__name__)

PROBE_STEPS: Final = 6


def fusing_pays(nets: Sequence[Net], fit: Callable[[Sequence[Net], bool], object]) -> bool:
    """Return whether fusing is faster than a loop, by timing a few steps both ways on copies of the networks.

    Not if only deterministic algorithms are used: timings differ, and with them the last digits would.

    Args:
        nets: on CUDA.
        fit: trains networks, as one or a single one, for `PROBE_STEPS` steps.
    """
    if torch.are_deterministic_algorithms_enabled():
        return False

    def seconds(num: int, fused: bool) -> float:
        copies = copy.deepcopy(nets[:num])
        torch.cuda.synchronize()
        begin = time.perf_counter()
        fit(copies, fused)
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    try:
        fused = seconds(len(nets), fused=True)
    except RuntimeError as error:  # an operation that can't be vmapped, or no memory
        log.warning("%s: networks are not fused (%s)", nets[0].arch, str(error).partition("\n")[0])
        return False
    return fused < seconds(1, fused=False) * len(nets)
