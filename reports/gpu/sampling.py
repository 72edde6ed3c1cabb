"""D3HR's group sampling by the size of its blocks."""

from __future__ import annotations

import statistics
from functools import partial
from unittest import mock

import torch

from ddray.methods.families.diffusion import groups as group_sampling
from reports.gpu.lab import Figure, Figures, Lab, attempts, figure

_BLOCKS = tuple(2**power for power in (20, 21, 22, 23, 24, 25))


def groups(lab: Lab) -> Figures:
    """Time group sampling of ten latents of 4,096 numbers by the elements of a block."""
    candidates, dim = lab.size(1_000_000, 200), lab.size(4096, 16)
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(dim, generator=generator).to(lab.device)
    std = torch.rand(dim, generator=generator).to(lab.device) + 0.5

    def case(block: int) -> dict[str, Figure]:
        with mock.patch.dict(group_sampling._BLOCK, {lab.device.type: block}):
            sample = partial(
                group_sampling.group_sample,
                *(mean, std),
                ipc=10,
                num_candidates=candidates,
                generator=torch.Generator().manual_seed(1),
            )
            seconds = lab.seconds(sample, repeats=2)
        spread = statistics.stdev(seconds)
        notes = {"candidates": candidates, "dim": dim}
        return {"": figure(statistics.fmean(seconds), "s", std=spread, n=len(seconds), **notes)}

    blocks = _BLOCKS[:1] if lab.is_tiny else (2**23, *(block for block in _BLOCKS if block != 2**23))
    yield from attempts({f"blocks of {block}": partial(case, block) for block in blocks})
