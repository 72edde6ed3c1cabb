"""Gradients through a training by plain SGD, exact and in constant memory.

The steps are th_{i+1} = th_i - a_i g_i(th_i, z), where g_i is the gradient of step i's loss in the
parameters, a_i its rate, and z the leaves: images, soft labels. Only the T + 1 vectors th_i are stored. The
sweep goes backwards with lam_T = dL/dth_T; step i's graph is rebuilt, and one product with its second
derivatives gives

    dL/dz   += d<g_i, -a_i lam_{i+1}>/dz
    dL/da_i  = -<g_i, lam_{i+1}>
    lam_i    = lam_{i+1} + d<g_i, -a_i lam_{i+1}>/dth_i

so that the memory is one step's graph and the vectors, whatever T is. TESLA (Cui et al., ICML 2023) leaves
out the last line: each step then counts as if the later ones did not depend on it, which is another gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ddray.training.student import StepLoss, descend

Gradient = Literal["exact", "tesla"]
EndGradient = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps the last parameters [P] to the outer loss, a scalar, and its gradient in them [P]."""


@dataclass(frozen=True)
class Swept:
    """What a sweep returns, detached.

    Attributes:
        loss: the outer loss, a scalar.
        leaves: its gradient in each leaf, summed over the steps.
        rates: its gradient in each step's rate [T]; a rate that all share has their sum.
        end: the parameters after the last step [P].
    """

    loss: Tensor
    leaves: list[Tensor]
    rates: Tensor
    end: Tensor


def sweep(
    loss_of_step: StepLoss,
    leaves: Sequence[Tensor],
    start: Tensor,
    rates: Tensor,
    end_gradient: EndGradient,
    gradient: Gradient = "exact",
) -> Swept:
    """Train from `start`, and return the outer loss with its gradients in leaves and rates.

    Args:
        loss_of_step: each step's loss, differentiable twice. It is called twice for each step and must
            compute the same: whatever it draws (rows, augmentation) is drawn before, once.
        leaves: floating tensors to differentiate in; their `requires_grad` does not matter.
        start: the first parameters [P].
        rates: [T], on the parameters' device.
        end_gradient: the outer loss and its gradient.
        gradient: `exact`, or `tesla` (see the module).
    """
    points = [start.detach(), *descend(loss_of_step, leaves, start, rates)]
    end = points.pop()
    loss, adjoint = (value.detach() for value in end_gradient(end))
    tracked = [leaf.detach().requires_grad_(True) for leaf in leaves]
    totals = [torch.zeros_like(leaf) for leaf in tracked]
    by_step: list[Tensor] = []
    for index in reversed(range(len(points))):
        point = points.pop().detach().requires_grad_(True)
        step_loss = loss_of_step(index, point, tracked)
        (slope,) = torch.autograd.grad(step_loss, point, create_graph=True)
        by_step.append(-torch.dot(slope.detach(), adjoint))
        carries = gradient == "exact" and index > 0
        products = torch.autograd.grad(
            slope,
            [*tracked, point] if carries else tracked,
            adjoint * -rates[index].detach(),
            materialize_grads=True,
        )
        if carries:
            adjoint = adjoint + products[-1]
        for total, product in zip(totals, products, strict=False):
            total += product
    return Swept(loss, totals, torch.stack(by_step[::-1]) if by_step else rates.detach().clone(), end)
