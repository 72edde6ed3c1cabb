"""The distillation loop: step, checkpoint, report, resume. Independent of methods and of Ray."""

import logging
import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ddray.artifact.distilled_set import DistilledSet
from ddray.distillation.method import DistillContext, Distiller
from ddray.errors import DivergedError, one_line
from ddray.system.files import write_atomically

log = logging.getLogger(__name__)
_CURVE_POINTS: Final = 200


@dataclass(frozen=True)
class Distillation:
    """The outcome of a distillation.

    Attributes:
        distilled: the set after the last step (never the best on test).
        losses: float32 [num_steps], one per step.
        resumed_from_step: 0 for a run from the start.
        wall_s: seconds in this process.
        seconds_per_step: median after warm-up; None without steps.
    """

    distilled: DistilledSet
    losses: Tensor
    resumed_from_step: int
    wall_s: float
    seconds_per_step: float | None

    def edge_losses(self) -> tuple[float | None, float | None]:
        """Return the mean losses over the first and the last tenth of the steps."""
        if len(self.losses) == 0:
            return None, None
        tenth = max(1, len(self.losses) // 10)
        return float(self.losses[:tenth].mean()), float(self.losses[-tenth:].mean())

    def curve(self) -> list[tuple[int, float]]:
        """Return at most 200 points (step, loss), each the mean over the steps since the previous point."""
        num = len(self.losses)
        size = max(1, -(-num // _CURVE_POINTS))
        chunks = torch.split(self.losses, size) if num else ()
        return [(min(i * size, num), float(chunk.mean())) for i, chunk in enumerate(chunks, start=1)]


def run_distillation(
    distiller: Distiller,
    ctx: DistillContext,
    *,
    checkpoint: Path | None = None,
    checkpoint_every: int | None = None,
    until: int | None = None,
    eval_steps: Collection[int] = (),
    on_step: Callable[[int, float], None] | None = None,
) -> Distillation:
    """Run a new method object to its end, or to step `until`, from its checkpoint if there is one.

    Every `checkpoint_every` steps (default: the run's setting), and at `eval_steps` (a search's rungs), the
    loss is checked, the checkpoint written, and `on_step` called with (step, loss). A run that resumes at one
    of `eval_steps` calls it for that step first, as the interrupted run may not have got to it. DivergedError
    if a loss or an image became NaN or infinite; StorageError if the checkpoint can't be written.
    """
    begin, settings = time.perf_counter(), ctx.config.get("method", {})
    every = checkpoint_every or ctx.config["checkpoint_every"]
    distiller.setup(ctx)
    last = distiller.num_steps if until is None else min(until, distiller.num_steps)
    losses: list[Tensor] = []
    done = _restore(distiller, checkpoint, losses, ctx.device)
    if losses and done in eval_steps and on_step is not None:
        on_step(done, _finite(losses[-1], done, settings))
    timer = StepTimer(ctx.device)
    for step in range(done + 1, last + 1):
        losses.append(distiller.step()["loss"].detach().reshape(1))
        look = step % every == 0 or step == last or step in eval_steps
        timer.stop(sync=look)
        if look:
            value = _finite(losses[-1], step, settings)
            if checkpoint is not None:
                _save(distiller, checkpoint, step, losses)
            if on_step is not None:
                on_step(step, value)
            timer.restart()
    distilled = distiller.snapshot()
    if not distilled.is_finite():
        raise DivergedError(
            f"{ctx.method} diverged by step {last}: an image is NaN or infinite; lower {rate_name(settings)}"
        )
    return Distillation(
        distilled=distilled,
        losses=torch.cat(losses).cpu().float() if losses else torch.zeros(0),
        resumed_from_step=done,
        wall_s=time.perf_counter() - begin,
        seconds_per_step=timer.median(),
    )


def rate_name(settings: Mapping[str, Any]) -> str:
    """Return the name of a method's learning rate for distilled images, for error messages."""
    return next((name for name in ("lr_img", "lr_outer") if name in settings), "its learning rate")


def _finite(loss: Tensor, step: int, settings: Mapping[str, Any]) -> float:
    """Return the loss as a float (the only sync in the loop)."""
    value = float(loss)
    if math.isfinite(value):
        return value
    raise DivergedError(f"the loss must stay finite, got {value} at step {step}; lower {rate_name(settings)}")


class StepTimer:
    """Times steps without a sync per step: the time between two syncs is divided among their steps."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: list[float] = []
        self._pending = 0
        self._mark = time.perf_counter()

    def stop(self, *, sync: bool) -> None:
        """Record the end of a step; on a GPU, the clock is read only where the loop syncs anyway."""
        self._pending += 1
        if self._cuda:
            if not sync:
                return
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._seconds += [(now - self._mark) / self._pending] * self._pending
        self._mark, self._pending = now, 0

    def restart(self) -> None:
        """Exclude the time since the last stop (a checkpoint, a rung's evaluation)."""
        self._mark = time.perf_counter()

    def median(self) -> float | None:
        """Return the median seconds per step, without the first tenth (warm-up)."""
        measured = self._seconds[len(self._seconds) // 10 :]
        return statistics.median(measured) if measured else None


def _save(distiller: Distiller, path: Path, step: int, losses: list[Tensor]) -> None:
    checkpoint = {"step": step, "state": distiller.state_dict(), "losses": torch.cat(losses).cpu()}
    write_atomically(path, lambda file: torch.save(checkpoint, file))


def _restore(distiller: Distiller, path: Path | None, losses: list[Tensor], device: torch.device) -> int:
    """Load the checkpoint if there is one; a damaged one is set aside with a warning and the run restarts."""
    if path is None or not path.exists():
        return 0
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        step, state, earlier_losses = int(checkpoint["step"]), checkpoint["state"], checkpoint["losses"]
    except Exception as error:  # torch raises many types for a torn file
        aside = path.replace(path.with_suffix(".corrupt"))
        reason = one_line(error, 120)
        log.warning("checkpoint %s is damaged (%s): set aside as %s, starting anew", path, reason, aside.name)
        return 0
    distiller.load_state_dict(state)
    losses.extend(earlier_losses.to(device).split(1))
    return step
