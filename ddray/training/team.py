"""Processes that train one network together, each on its own rows of every batch.

A team of N takes the steps of one process, to rounding: every member draws what a whole batch needs, works on
its rows, and takes the same step with the gradient of the mean over all rows. Batch norms use the statistics
of the whole batch, so a network with them does not depend on N either. What draws from torch's global
generator in each process (dropout, stochastic depth) does.

The caller starts `torch.distributed` (gloo on CPUs, NCCL on GPUs) and ends it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass(frozen=True)
class Team:
    """This process's place among those that train a network.

    Attributes:
        rank: 0 to size - 1.
        size: N, the number of processes.
    """

    rank: int
    size: int

    def share(self, num: int) -> slice:
        """Return this member's part of `num` rows; the parts are contiguous, in order and almost equal."""
        return slice(self.rank * num // self.size, (self.rank + 1) * num // self.size)

    def rows(self, num: int) -> slice:
        """Return the rows of a batch of `num` that this member works on, at least one.

        Of a batch with fewer rows than members, every member takes all: the mean gradient is the same. In the
        mean loss of the epoch, and in the unbiased variance of a batch norm, they count that often.
        """
        return self.share(num) if num >= self.size else slice(0, num)

    def join(self, net: nn.Module) -> None:
        """Give a network the first member's weights, and batch norms that see all rows, in place.

        GPUs of several models may draw other initial weights from one seed.
        """
        with torch.no_grad():
            for tensor in (*net.parameters(), *net.buffers()):
                dist.broadcast(tensor, 0)
        if any(tensor.device.type == "cuda" for tensor in net.parameters()):
            nn.SyncBatchNorm.convert_sync_batchnorm(net)  # type: ignore[no-untyped-call]
            return
        for module in net.modules():
            if isinstance(module, _BatchNorm):
                module.__class__ = _CpuSyncBatchNorm

    def share_of_rows(self, rows: int, like: Tensor) -> Tensor:
        """Return this member's `rows` of all members', a scalar: what the mean of their losses counts."""
        num = like.new_full((), rows, dtype=torch.float64)
        return num / self.sum(num)

    @torch.no_grad()
    def sum_gradients(self, params: Sequence[Tensor]) -> None:
        """Replace gradients by their sums over the members."""
        grads = [param.grad for param in params if param.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        for grad, part in zip(grads, torch.split(flat, [grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of all members' tensors, which have one shape."""
        total = value.detach().clone()
        dist.all_reduce(total)
        return total

    def first(self, value: float, device: torch.device) -> float:
        """Return the first member's number: for what only one of them can decide, such as by its clock."""
        shared = torch.tensor(value, dtype=torch.float64, device=device)
        dist.broadcast(shared, 0)
        return float(shared)


class _Sum(torch.autograd.Function):
    """The sum of all members' tensors; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total


class _CpuSyncBatchNorm(_BatchNorm):
    """Batch norm over the rows of all members; torch's `SyncBatchNorm` is for GPUs only."""

    def _check_input_dim(self, input: Tensor) -> None: ...

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised maps of `input` [n, C, ...], in eval mode by the running averages."""
        if not self.training:
            return super().forward(input)
        axes = [axis for axis in range(input.ndim) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(input.ndim)]
        num = input.numel() // input.shape[1]
        sums: Tensor = _Sum.apply(torch.cat([input.sum(axes), input.new_full((1,), num)]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = input - mean.view(shape)
        variance: Tensor = _Sum.apply(centred.square().sum(axes)) / count
        normed = centred * torch.rsqrt(variance + self.eps).view(shape)
        self._move(mean.detach(), variance.detach() * count / (count - 1))
        if self.affine:
            normed = normed * self.weight.view(shape) + self.bias.view(shape)
        return normed

    def _move(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running averages towards a batch's mean and unbiased variance [C]."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance, momentum)
