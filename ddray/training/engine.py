"""The training engine: the one loop that trains networks, and the one step in it.

A caller says what a batch is (an iterator of tensors that are on the device already), what the loss, the
optimiser and the rate are; the engine does the rest, and no step waits for the device:

- on a CPU, a batch of images is run in chunks that fit the cache, where no layer mixes samples. The chunks'
  gradients are summed, so the last digit may differ from the whole batch's;
- on CUDA the whole step (forward, backward, clipping, update) is a CUDA graph per shape of batch, with the
  eager step as the fallback. The rate is a tensor there, which a graph reads anew at every replay;
- several networks of one architecture may be trained as one (torch.func over stacked weights).
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from ddray.nets import is_per_sample
from ddray.nets.cpu_blocks import training_pass
from ddray.nets.features import CpuLayer
from ddray.system.numerics import current
from ddray.system.transfer import to_device
from ddray.training.graph import WORTHWHILE_STEPS, Graphs
from ddray.training.gsam import Gsam
from ddray.training.team import Team

Batch = tuple[Tensor, ...]
"""A step's inputs [n, ...] and its targets: tensors with a row per input, or scalars for all of them."""
# 64 images of 32 px: a batch of 256 at once took up to 1.5 times as long (ConvNets of width 128, one core).
_CHUNK_PIXELS: Final = 64 * 32 * 32


@dataclass(frozen=True)
class Rule:
    """How a step changes the weights.

    Attributes:
        loss: maps outputs [n, ...] and the batch's targets to the mean of the rows' losses.
        optimizer: a class of torch.optim with its settings but the rate, such as a `functools.partial`.
        clip: maximum norm of a network's gradient; None does not clip.
        bf16: autocast the forward pass to bfloat16 whatever the precision in force (`system.numerics`); the
            loss is computed in float32.
        groups: maps a network to the optimiser's parameter groups, such as `decay_matrices`; None: all of its
            parameters are one group. Not for fused networks.
        gsam: steps along its gradients instead, at twice the cost; None: along the loss's.
    """

    loss: Callable[..., Tensor]
    optimizer: Callable[..., torch.optim.Optimizer]
    clip: float | None = None
    bf16: bool = False
    groups: Callable[[nn.Module], list[dict[str, Any]]] | None = None
    gsam: Gsam | None = None


@dataclass(frozen=True)
class Order:
    """The random order of a set's rows, epoch after epoch.

    Attributes:
        num: rows of the set.
        batch: rows of a step.
        last: an incomplete last batch is kept or dropped, or joined to the one before if it has a single row.
        shuffle: False: every epoch in the order of the rows.
    """

    num: int
    batch: int
    last: Literal["keep", "drop", "join"] = "keep"
    shuffle: bool = True

    @property
    def sizes(self) -> list[int]:
        """Rows of each step of an epoch."""
        whole, rest = divmod(self.num, self.batch)
        if rest == 0 or (self.last == "drop" and whole):
            return [self.batch] * whole
        if self.last == "join" and rest == 1 and whole:
            return [self.batch] * (whole - 1) + [self.batch + 1]
        return [self.batch] * whole + [rest]

    def indices(self, generator: torch.Generator, device: torch.device) -> Iterator[Tensor]:
        """Yield every step's rows int64 [n], without end; an epoch is drawn on the CPU and copied once."""
        sizes = self.sizes
        num_drawn = sum(sizes)
        while True:
            order = torch.randperm(self.num, generator=generator) if self.shuffle else torch.arange(self.num)
            if num_drawn < self.num:
                order = order[:num_drawn]
            yield from torch.split(to_device(order, device), sizes)


def run(
    step: Step,
    batches: Iterable[Batch],
    *,
    lr: Callable[[int], float],
    epoch: int | None = None,
    on_epoch: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Do a step's `num_steps` steps, and return the mean loss of the last epoch.

    Args:
        step: the step.
        batches: as many or more; what is more is not drawn. If there are fewer, the training ends early.
        lr: maps a step, counted from 0, to its learning rate.
        epoch: steps of an epoch; default all.
        on_epoch: called after each epoch with the mean loss of its rows, a scalar on the device.
    """
    epoch = epoch or step.num_steps
    for step_index, batch in zip(range(step.num_steps), batches, strict=False):
        if step_index % epoch == 0:
            step.forget_loss()
        step.set_lr(lr(step_index))
        step(*batch)
        if on_epoch is not None and (step_index + 1) % epoch == 0:
            on_epoch(step.mean_loss())
    return step.mean_loss()


def cosine(step: int, num_steps: float) -> float:
    """Return the factor .5 (1 + cos(pi t / T)) on the rate, from 1 to 0; `step` counts from 0."""
    return 0.5 * (1 + math.cos(math.pi * step / num_steps))


def decay_matrices(net: nn.Module) -> list[dict[str, Any]]:
    """Return an optimiser's groups of which only weights of two or more axes are decayed.

    What is not called a weight, such as a class token, is not decayed either (`get_parameters` of SRe2L's
    ImageNet code, of RDED and of D3HR).
    """
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, param in net.named_parameters():
        groups["weight" in name and param.ndim > 1].append(param)
    return [{"params": groups[True]}, {"params": groups[False], "weight_decay": 0.0}]


class Step:
    """An optimiser step of a network, or of several of one architecture at once.

    Args:
        nets: what is trained, in train mode; several only with `fused`.
        rule: loss, optimiser, clipping.
        lr: learning rate until `set_lr`.
        fused: train `nets` as one; batches then hold equally many rows for each, in order. Their weights are
            updated by `finish`.
        num_steps: steps of the training; few are not worth a CUDA graph.
        team: the processes that train the network together, each with its rows of a batch; their steps are
            no CUDA graphs. None: this one alone.
    """

    def __init__(
        self,
        nets: Sequence[nn.Module],
        rule: Rule,
        *,
        lr: float = 0.0,
        fused: bool = False,
        num_steps: int = 1,
        team: Team | None = None,
    ) -> None:
        self.num_steps = num_steps
        self._rule, self._team = rule, team
        self._model: _Alone | _Stacked = _Stacked(nets) if fused else _Alone(*nets)
        device = self._model.params[0].device
        graphed = device.type == "cuda" and num_steps >= WORTHWHILE_STEPS and team is None
        options: dict[str, Any] = {"lr": lr}
        if device.type == "cuda":
            options["fused"] = True
            if "capturable" in inspect.signature(rule.optimizer).parameters:
                options["capturable"] = graphed
        params = self._model.params if rule.groups is None else rule.groups(nets[0])
        self.optimizer = rule.optimizer(params, **options)
        if device.type == "cuda":  # filled on the device: a constructor would wait to check it
            for group in self.optimizer.param_groups:
                group["lr"] = torch.full((), float(lr), device=device)
        self._lr = lr
        self._chunked = device.type == "cpu" and not fused and is_per_sample(nets[0])
        self._bf16: bool | None = rule.bf16 or None  # None: undecided
        if not rule.bf16 and current().precision != "auto":
            self._bf16 = current().bf16(None)
        self._loss_sum = torch.zeros((), device=device)
        self._num_rows = 0
        self._graphs = Graphs(on=graphed)

    @property
    def captured(self) -> bool:
        """Whether CUDA graphs have done steps."""
        return self._graphs.captured

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        if lr == self._lr:
            return
        self._lr = lr
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], Tensor) else lr

    def __call__(self, inputs: Tensor, *targets: Tensor) -> None:
        """Do one step."""
        self._num_rows += len(inputs)
        if self._bf16 is None:
            self._bf16 = self._is_bf16_faster((inputs, *targets))
        self._graphs(self._update, (inputs, *targets), self._state)

    def mean_loss(self) -> Tensor:
        """Return the mean loss per row since `forget_loss`, a scalar on the device."""
        if self._team is None:
            return self._loss_sum / max(1, self._num_rows)
        rows = self._loss_sum.new_full((), self._num_rows)
        loss_sum, num_rows = self._team.sum(torch.stack([self._loss_sum, rows]))
        mean: Tensor = loss_sum / num_rows.clamp(min=1)
        return mean

    def forget_loss(self) -> None:
        """Let `mean_loss` begin anew."""
        self._loss_sum.zero_()
        self._num_rows = 0

    def finish(self) -> None:
        """Copy the weights of fused networks into `nets`."""
        self._model.finish()

    def _update(self, *batch: Tensor) -> None:
        self._differentiate(batch)
        if self._rule.gsam is not None:
            self._sharpen(self._rule.gsam, batch)
        if self._rule.clip is not None:
            self._model.clip(self._rule.clip)
        self.optimizer.step()

    def _differentiate(self, batch: Batch, *, counts: bool = True) -> None:
        """Set the gradients to those of a batch; `counts`: its losses are part of `mean_loss`."""
        self.optimizer.zero_grad(set_to_none=True)
        share = None if self._team is None else self._team.share_of_rows(len(batch[0]), self._loss_sum)
        for loss, rows in self._backward(self._model, batch, bool(self._bf16), share):
            if counts:
                self._loss_sum += loss * rows
        if self._team is not None:
            self._team.sum_gradients(self._model.params)

    @torch.no_grad()
    def _sharpen(self, gsam: Gsam, batch: Batch) -> None:
        """Replace the gradients of a batch by GSAM's; the weights are left as they were."""
        params = [param for param in self._model.params if param.grad is not None]
        is_stacked = isinstance(self._model, _Stacked)

        def by_net(tensors: Iterable[Tensor | None]) -> list[Tensor]:
            return [part if is_stacked else part[None] for part in tensors if part is not None]

        weights, first = [param.clone() for param in params], by_net(param.grad for param in params)
        for param, change in zip(by_net(params), gsam.perturbation(by_net(weights), first), strict=True):
            param.add_(change)
        with torch.enable_grad():
            self._differentiate(batch, counts=False)
        combined = gsam.combined(first, by_net(param.grad for param in params))
        for param, weight, slope in zip(params, weights, combined, strict=True):
            param.copy_(weight)
            param.grad = slope if is_stacked else slope[0]

    def _backward(
        self, model: _Alone | _Stacked, batch: Batch, bf16: bool, share: Tensor | None = None
    ) -> Iterator[tuple[Tensor, int]]:
        """Add to the gradients part by part, times `share`; yield each part's loss and rows."""
        num = len(batch[0])
        for inputs, *targets in self._chunks(batch):
            rows = len(inputs)
            # No weight cache: it would outlive the step in a CUDA graph.
            with torch.autocast(inputs.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
                outputs = model(inputs)
            loss = self._rule.loss(outputs.float() if bf16 else outputs, *targets)
            # A sum over networks keeps their gradients separate, each that of its own mean loss.
            weight = self._model.num * rows / num
            scaled = loss if weight == 1 else loss * weight
            (scaled if share is None else scaled * share).backward()  # type: ignore[no-untyped-call]
            yield loss.detach(), rows

    def _is_bf16_faster(self, batch: Batch) -> bool:
        """Return whether bfloat16 was the faster one in a probe on a copy of the networks."""
        model = self._model
        work = (type(model).__name__, model.name, model.num, *(tuple(tensor.shape) for tensor in batch))
        if work in current().probed:
            return current().bf16(work)
        # The loss may count in the network's own buffers, as an accuracy.
        buffers, trained = [buffer.clone() for buffer in model.buffers], copy.deepcopy(model)
        is_faster = current().bf16(work, lambda bf16: list(self._backward(trained, batch, bf16)))
        for buffer, before in zip(model.buffers, buffers, strict=True):
            buffer.copy_(before)
        return is_faster

    def _chunks(self, batch: Batch) -> Iterable[Batch]:
        """Return the batch, on a CPU cut into parts that fit the cache."""
        inputs = batch[0]
        if not self._chunked or inputs.ndim != 4:
            return [batch]
        size = max(1, _CHUNK_PIXELS // (inputs.shape[2] * inputs.shape[3]))
        if size >= len(inputs):
            return [batch]
        count = math.ceil(len(inputs) / size)
        parts = [torch.split(t, size) if t.ndim else (t,) * count for t in batch]
        return zip(*parts, strict=True)

    def _state(self) -> list[Tensor]:
        """Return every tensor that a step changes."""
        values = [value for state in self.optimizer.state.values() for value in state.values()]
        changed = [*self._model.params, *self._model.buffers, self._loss_sum, *values]
        return [value.detach() for value in changed if isinstance(value, Tensor)]


def _name(net: nn.Module) -> str:
    return str(getattr(net, "arch", type(net).__name__))


class _Alone:
    """One network, trained in place."""

    num = 1

    def __init__(self, net: nn.Module) -> None:
        self._net, self.name = net, _name(net)
        self.params: list[Tensor] = list(net.parameters())
        self.buffers: list[Tensor] = list(net.buffers())

    def __call__(self, inputs: Tensor) -> Tensor:
        with training_pass():
            outputs: Tensor = self._net(inputs)
        return outputs

    def clip(self, norm: float) -> None:
        torch.nn.utils.clip_grad_norm_(self.params, norm)

    def finish(self) -> None: ...


class _Stacked:
    """Networks of one architecture as one, their weights stacked [S, ...]."""

    def __init__(self, nets: Sequence[nn.Module]) -> None:
        self._nets, self.num, self.name = nets, len(nets), _name(nets[0])
        stacked, self._buffers = torch.func.stack_module_state(list(nets))
        self._params = {name: tensor.detach().requires_grad_(True) for name, tensor in stacked.items()}
        self.params, self.buffers = list(self._params.values()), list(self._buffers.values())
        self._template = copy.deepcopy(nets[0]).to("meta")
        for module in self._template.modules():
            if isinstance(module, CpuLayer):
                module.plain = True

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return outputs [S * B, ...] of inputs [S * B, ...]."""
        rows = inputs.view(self.num, -1, *inputs.shape[1:])
        outputs: Tensor = torch.func.vmap(self._forward)(self._params, self._buffers, rows)
        return outputs.flatten(0, 1)

    def _forward(self, params: dict[str, Tensor], buffers: dict[str, Tensor], inputs: Tensor) -> Tensor:
        outputs: Tensor = torch.func.functional_call(self._template, (params, buffers), (inputs,))
        return outputs

    @torch.no_grad()
    def clip(self, norm: float) -> None:
        """Clip each network's gradient by its own norm."""
        grads = [param.grad for param in self.params if param.grad is not None]
        norms = torch.stack([grad.flatten(1).square().sum(1) for grad in grads]).sum(0).sqrt()
        scale = (norm / (norms + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(scale.view(-1, *[1] * (grad.ndim - 1)))

    @torch.no_grad()
    def finish(self) -> None:
        trained = self._params | self._buffers
        for net_index, net in enumerate(self._nets):
            for name, tensor in (*net.named_parameters(), *net.named_buffers()):
                tensor.copy_(trained[name][net_index])
