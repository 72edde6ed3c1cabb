"""A network as a function of one flat vector of parameters, which can be differentiated twice.

Trajectories store such vectors, unrolled training moves along them. The order is that of
`named_parameters()`, and weights and images are in the contiguous format.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ddray.errors import InputError
from ddray.nets import Net
from ddray.nets.features import CpuLayer
from ddray.nets.names import parse_arch

StepLoss = Callable[[int, Tensor, Sequence[Tensor]], Tensor]
"""Maps step i, parameters [P] and what else it depends on (images, soft labels) to its loss, a scalar."""


def flat_parameters(net: nn.Module) -> Tensor:
    """Return a network's parameters as one vector [P], a copy."""
    return torch.cat([parameter.detach().reshape(-1) for parameter in net.parameters()]).clone()


class Student:
    """A network in train mode whose parameters are passed in; the same vector and images give the same bytes.

    Batch norm takes the batch's statistics and keeps none.

    Args:
        net: the architecture; it is copied, its weights do not matter.

    Attributes:
        names: of the parameters, in order.
        shapes: of the parameters, in order.
        num_params: P.

    Raises:
        InputError: the network drops at random, so that a step can't be repeated.
    """

    def __init__(self, net: nn.Module) -> None:
        self._net = copy.deepcopy(net).requires_grad_(False).to(memory_format=torch.contiguous_format).train()
        check_repeats(net)
        for module in self._net.modules():
            if isinstance(module, CpuLayer):
                module.plain = True
            if isinstance(module, _BatchNorm):
                module.track_running_stats = False
        parameters = dict(self._net.named_parameters())
        self.names = tuple(parameters)
        self.shapes = tuple(tuple(parameter.shape) for parameter in parameters.values())
        self._sizes = [math.prod(shape) for shape in self.shapes]
        self.num_params = sum(self._sizes)

    def parameters(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the parameters by name, views of a vector [P]."""
        parts = torch.split(flat, self._sizes)
        named = zip(self.names, parts, self.shapes, strict=True)
        return {name: part.view(shape) for name, part, shape in named}

    def logits(self, flat: Tensor, images: Tensor) -> Tensor:
        """Return the logits [N, K] of images [N, C, H, W] under parameters [P]; differentiable twice."""
        with sdpa_kernel(SDPBackend.MATH):  # attention's other kernels have no second derivative
            outputs: Tensor = torch.func.functional_call(
                self._net, self.parameters(flat), (images.contiguous(),)
            )
        return outputs


def check_repeats(net: nn.Module) -> None:
    """Refuse a network that drops at random, so that a student can't repeat a step.

    Raises:
        InputError: naming the network.
    """
    arch = net.arch if isinstance(net, Net) else type(net).__name__
    has_dropout = any(isinstance(module, _DropoutNd) and module.p > 0 for module in net.modules())
    if has_dropout or (isinstance(net, Net) and parse_arch(arch).drops):
        raise InputError(
            f"a student must repeat its steps exactly, but {arch} drops at random; use another --arch"
        )


def ordered_loss(student: Student, order: Sequence[Tensor], labels: Tensor) -> StepLoss:
    """Return the cross entropy of step i on rows `order[i]`, int64 [n], of images that are passed in.

    `labels` are int64 [N] or probabilities [N, K].
    """

    def loss(step: int, flat: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        rows = order[step]
        return F.cross_entropy(student.logits(flat, leaves[0][rows]), labels[rows])

    return loss


def descend(
    loss_of_step: StepLoss, leaves: Sequence[Tensor], start: Tensor, rates: Tensor
) -> Iterator[Tensor]:
    """Yield the parameters [P] after each step of plain SGD, without a graph.

    Args:
        loss_of_step: each step's loss.
        leaves: what the losses depend on besides the parameters.
        start: the first parameters [P].
        rates: a rate per step [T], on the parameters' device.
    """
    constants = [leaf.detach() for leaf in leaves]
    flat = start.detach()
    for step, rate in enumerate(rates.detach().unbind()):
        point = flat.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(loss_of_step(step, point, constants), point)
        flat = torch.addcmul(flat, slope, rate, value=-1)
        yield flat
