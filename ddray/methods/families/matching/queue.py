"""IDM's queue of networks that are trained while in use; part of the trial's state."""

from dataclasses import InitVar, dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.distillation.method import DistillContext
from ddray.methods.families.state import copy_values, cpu_copy, load_velocities, velocities
from ddray.nets import Net, build_net
from ddray.seeding import derive_seed
from ddray.training.engine import Rule, Step


@dataclass
class Member:
    """A network of the queue, its optimiser, and how it did on its own training batches.

    Attributes:
        net: the network.
        right: real images classified correctly since the last reset, a scalar on the device.
        lr: learning rate of its training.
        seen: real images seen since the last reset.
        step: its training step: SGD with momentum, counting what was right.
    """

    net: Net
    right: Tensor
    lr: InitVar[float]
    seen: int = 0
    step: Step = field(init=False)

    def __post_init__(self, lr: float) -> None:
        optimizer = partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4)
        self.step = Step([self.net], Rule(self._loss, optimizer), lr=lr)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.right = self.right + (logits.argmax(1) == labels).sum()
        return F.cross_entropy(logits, labels)

    def accuracy(self) -> Tensor:
        """Return the fraction right since the last reset; 0 before any training."""
        return self.right / max(1, self.seen)


class NetQueue:
    """Networks in order of creation; the oldest leaves when the queue is full.

    Args:
        ctx: architecture, classes, seed and device.
        size: maximum number of networks.
        lr: learning rate of their training (SGD, momentum .9, weight decay 5e-4).
    """

    def __init__(self, ctx: DistillContext, *, size: int, lr: float) -> None:
        self._ctx = ctx
        self._size = size
        self._lr = lr
        self._num_pushed = 0
        self.members: list[Member] = []

    def push(self) -> None:
        """Add a fresh network."""
        self.members = [*self.members, self._member(self._num_pushed)][-self._size :]
        self._num_pushed += 1

    def _member(self, net_index: int) -> Member:
        ctx = self._ctx
        seed = derive_seed(ctx.seed, "distill", "queue", net_index)
        shape, num_classes = ctx.dataset.image_shape, ctx.dataset.num_classes
        net = build_net(ctx.arch, shape, num_classes, seed=seed, device=ctx.device)
        net.to(memory_format=torch.channels_last).train()
        return Member(net, torch.zeros((), device=ctx.device), self._lr)

    def train(self, position: int, images: Tensor, labels: Tensor) -> None:
        """Train one network on one batch [B, C, H, W]."""
        member = self.members[position]
        member.step(images.contiguous(memory_format=torch.channels_last), labels)
        member.seen += len(labels)

    def forget_accuracies(self) -> None:
        """Restart the accuracy counts."""
        for member in self.members:
            member.right, member.seen = torch.zeros_like(member.right), 0

    def state_dict(self) -> dict[str, Any]:
        """Return weights, momentum and counts of every network."""
        return {"made": self._num_pushed, "members": [_member_state(member) for member in self.members]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self._num_pushed = int(state["made"])
        self.members = []
        for member_state in state["members"]:
            member = self._member(0)
            copy_values(member.net, member_state["values"])
            load_velocities(member.step.optimizer, member_state["velocities"])
            member.right = member_state["right"].to(member.right.device, copy=True)
            member.seen = int(member_state["seen"])
            self.members.append(member)


def _member_state(member: Member) -> dict[str, Any]:
    """Return copies of a member's tensors; no velocities before its first training step."""
    return {
        "values": cpu_copy(list(member.net.state_dict().values())),
        "velocities": velocities(member.step.optimizer),
        "right": cpu_copy(member.right),
        "seen": member.seen,
    }
