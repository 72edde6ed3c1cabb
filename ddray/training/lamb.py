"""LAMB: Adam's step, scaled to each tensor's norm (You et al., ICLR 2020, Algorithm 2; FRePo's optimiser)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Lamb(torch.optim.Optimizer):
    """LAMB without weight decay: p <- p - lr (||p|| / ||u||) u with u = m / (sqrt(v) + eps) of Adam.

    m and v are corrected for their start at 0; where a norm is 0 the ratio is 1.

    Args:
        params: what is optimised.
        lr: learning rate, the share of its norm that a tensor moves by.
        betas: decay of the averages m and v.
        eps: below the root of v.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take one step; tensors without a gradient stay."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, param.grad, group)

    def _update(self, param: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        state["step"] += 1
        first, second = group["betas"]
        average = state["exp_avg"].lerp_(gradient, 1 - first)
        square = state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        root = (square / (1 - second ** state["step"])).sqrt_().add_(group["eps"])
        update = average / (1 - first ** state["step"]) / root
        lengths = param.norm(), update.norm()
        ratio = torch.where((lengths[0] > 0) & (lengths[1] > 0), lengths[0] / lengths[1], 1.0)
        param.sub_(update.mul_(ratio * group["lr"]))
