"""Training loop of a generator's networks: learning rates, averaged weights, a checkpoint of every stage."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from ddray.errors import DivergedError, one_line
from ddray.system.files import write_atomically
from ddray.system.progress import progress

log = logging.getLogger(__name__)

_SAVE_EVERY_S: Final = 60.0


class Checkpoint:
    """One file with the state of training, by stage; rewritten at most once a minute.

    It outlives training: remove it only after the resulting model has been stored.
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self._saved = path, time.monotonic()
        self.stages: dict[str, Any] = {}
        if path is not None and path.exists():
            try:
                self.stages = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # torch raises many types for a truncated file
                log.warning("checkpoint %s is damaged (%s): starting over", path, one_line(error, 120))

    def save(self, stage: str, state: Callable[[], dict[str, Any]], *, now: bool = False) -> None:
        """Write a stage's state, if the last save is old enough or `now`."""
        if self._path is None or (not now and time.monotonic() - self._saved < _SAVE_EVERY_S):
            return
        self.stages[stage] = state()
        write_atomically(self._path, lambda file: torch.save(self.stages, file))
        self._saved = time.monotonic()


class Stateful(Protocol):
    """What a loss keeps from step to step."""

    def state_dict(self) -> dict[str, Any]:
        """Return its state, on the CPU."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state."""


@dataclass
class TrainingStage:
    """One network being trained; `loss` and `lr` map a step's number to its loss and learning rate."""

    name: str
    """In checkpoints and messages."""
    net: Any
    """Trained in place, left in eval mode without gradients."""
    optimizer: torch.optim.Optimizer
    loss: Callable[[int], Tensor]
    lr: Callable[[int], float]
    per_epoch: int
    """Steps in an epoch."""
    epochs: int
    ema: float | None = None
    """Decay of the moving average of the parameters, which replaces them at the end; None: no average."""
    is_warm: bool = True
    """Whether a young average has a smaller decay, and so forgets its start sooner."""
    trained: Sequence[nn.Parameter] | None = None
    """The parameters that are trained; None: all of the network's."""
    memory: Stateful | None = None
    """What the loss keeps from step to step, for checkpoints."""

    def run(self, checkpoint: Checkpoint) -> float:
        """Train from the checkpoint's state, if it has one; return the mean loss of the last epoch."""
        parameters = list(self.net.parameters() if self.trained is None else self.trained)
        average = [parameter.detach().clone() for parameter in parameters] if self.ema is not None else []
        total, done, mean = self.per_epoch * self.epochs, 0, math.nan
        loss_sum = torch.zeros((), device=parameters[0].device)
        if self.name in checkpoint.stages:
            state = checkpoint.stages[self.name]
            done, mean = state["step"], state["mean"]
            self.net.load_state_dict(state["net"])
            if done == total:  # its weights are already the average; `average` is of untrained ones
                self.net.requires_grad_(False)
                return float(mean)
            self.optimizer.load_state_dict(state["optimizer"])
            average = [tensor.to(loss_sum.device) for tensor in state["average"]]
            loss_sum += state["loss_sum"]
            if self.memory is not None:
                self.memory.load_state_dict(state["memory"])

        def current_state() -> dict[str, Any]:
            state = {"step": done, "mean": mean, "net": self.net.state_dict(), "loss_sum": float(loss_sum)}
            if done < total:
                state |= {"optimizer": self.optimizer.state_dict(), "average": average}
                state |= {} if self.memory is None else {"memory": self.memory.state_dict()}
            return state

        for parameter in parameters:
            parameter.requires_grad_(True)
        with progress(f"training the {self.name}", total, start=done) as show:
            while done < total:
                loss_sum += self._step(done, parameters, average)
                done += 1
                if done % self.per_epoch == 0:
                    mean = self._mean(loss_sum)
                    loss_sum.zero_()
                    show(done, f"loss {mean:.4g}")
                if done < total:
                    checkpoint.save(self.name, current_state)
        with torch.no_grad():
            for parameter, smooth in zip(parameters, average, strict=False):  # no average: nothing to copy
                parameter.copy_(smooth)
        self.net.requires_grad_(False)
        checkpoint.save(self.name, current_state, now=True)
        return mean

    def _step(self, step: int, parameters: list[Tensor], average: list[Tensor]) -> Tensor:
        """Update the parameters and their average; return the loss."""
        self.optimizer.param_groups[0]["lr"] = self.lr(step)
        loss = self.loss(step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if average and self.ema is not None:
            decay = min(self.ema, (step + 1) / (step + 11)) if self.is_warm else self.ema
            torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 1 - decay)
        return loss.detach()

    def _mean(self, loss_sum: Tensor) -> float:
        mean = float(loss_sum) / self.per_epoch
        if not math.isfinite(mean):
            raise DivergedError(f"the loss of the {self.name} must stay finite, got {mean}; lower its lr")
        return mean
