"""IDM's queue of networks that are trained while in use; part of the trial's state."""

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
from ddray.training.graph import WORTHWHILE_STEPS


class Member:
    """A network of the queue, and how it did on its own training batches.

    Attributes:
        net: the network.
        step: its training step (SGD, momentum .9, weight decay 5e-4), which counts what was right.
        right: real images classified correctly since the last reset, a scalar on the device.
        seen: real images seen since the last reset.
    """

    def __init__(self, net: Net, lr: float, device: torch.device, num_steps: int = 1) -> None:
        self.right, self.seen = torch.zeros((), device=device), 0
        # A CUDA graph's warm-up restores what the step changes, a network's buffers among them.
        net.register_buffer("right", self.right, persistent=False)
        optimizer = partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4)
        self.net, self.step = net, Step([net], Rule(self._loss, optimizer), lr=lr, num_steps=num_steps)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.right += (logits.argmax(1) == labels).sum()
        return F.cross_entropy(logits, labels)

    def tensors(self) -> list[Tensor]:
        """Return all that training changes: weights, velocities (0 before any), what was right."""
        optimizer = self.step.optimizer
        for param in self.net.parameters():
            if "momentum_buffer" not in optimizer.state[param]:
                optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
        moments = [optimizer.state[param]["momentum_buffer"] for param in self.net.parameters()]
        return [*self.net.state_dict().values(), *moments, self.right]

    def accuracy(self) -> Tensor:
        """Return the fraction right since the last reset; 0 before any training."""
        return self.right / max(1, self.seen)

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the tensors; no velocities before the first training step."""
        return {
            "values": cpu_copy(list(self.net.state_dict().values())),
            "velocities": velocities(self.step.optimizer),
            "right": cpu_copy(self.right),
            "seen": self.seen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        copy_values(self.net, state["values"])
        load_velocities(self.step.optimizer, state["velocities"])
        self.right.copy_(state["right"])
        self.seen = int(state["seen"])


class NetQueue:
    """At most `size` networks in order of creation, trained at rate `lr`; the oldest leaves a full queue.

    On CUDA one more network is trained in place of each, so that one graph serves all, if the members' steps
    together (`num_steps`) are worth it.
    """

    def __init__(self, ctx: DistillContext, *, size: int, lr: float, num_steps: int = 1) -> None:
        self._ctx, self._size, self._lr = ctx, size, lr
        self._num_pushed = 0
        self.members: list[Member] = []
        is_graphed = ctx.device.type == "cuda" and num_steps >= WORTHWHILE_STEPS
        self._substitute = self._member(0, num_steps) if is_graphed else None

    def push(self) -> None:
        self.members = [*self.members, self._member(self._num_pushed)][-self._size :]
        self._num_pushed += 1

    def _member(self, net_index: int, num_steps: int = 1) -> Member:
        ctx = self._ctx
        seed = derive_seed(ctx.seed, "distill", "queue", net_index)
        shape, num_classes = ctx.dataset.image_shape, ctx.dataset.num_classes
        net = build_net(ctx.arch, shape, num_classes, seed=seed, device=ctx.device)
        return Member(net.to(memory_format=torch.channels_last).train(), self._lr, ctx.device, num_steps)

    def train(self, position: int, images: Tensor, labels: Tensor) -> None:
        """Train one network on one batch [B, C, H, W]."""
        member, substitute = self.members[position], self._substitute
        images = images.contiguous(memory_format=torch.channels_last)
        if substitute is None:
            member.step(images, labels)
        else:
            mine, theirs = substitute.tensors(), member.tensors()
            torch._foreach_copy_(mine, theirs)
            substitute.step(images, labels)
            torch._foreach_copy_(theirs, mine)
        member.seen += len(labels)

    def forget_accuracies(self) -> None:
        for member in self.members:
            member.right.zero_()
            member.seen = 0

    def state_dict(self) -> dict[str, Any]:
        return {"made": self._num_pushed, "members": [member.state_dict() for member in self.members]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._num_pushed = int(state["made"])
        self.members = [self._member(0) for _ in state["members"]]
        for member, member_state in zip(self.members, state["members"], strict=True):
            member.load_state_dict(member_state)
