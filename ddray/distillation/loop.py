"""The distillation loop: step, checkpoint, report, resume. Independent of methods and of Ray."""

import logging
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ddray.artifact.distilled_set import DistilledSet
from ddray.distillation.meter import Meter, MeteredPool
from ddray.distillation.method import DistillContext, Distiller
from ddray.distillation.snapshots import Snapshots
from ddray.errors import DivergedError, one_line
from ddray.nets import build_net
from ddray.system import numerics
from ddray.system.files import write_atomically
from ddray.system.interrupts import SavedInterrupt, deferred_interrupts
from ddray.system.memory import is_short
from ddray.system.progress import Row, progress

log = logging.getLogger(__name__)
_CURVE_POINTS: Final = 200
_SAVE_EVERY_S: Final = 30.0
_SAVE_SHARE: Final = 0.05
"""Of a run's time, the most that checkpoints by time take."""


@dataclass(frozen=True)
class Distillation:
    """The outcome of a distillation.

    Attributes:
        distilled: the set after the last step (never the best on test).
        losses: float32 [num_steps], one per step.
        resumed_from_step: 0 for a run from the start.
        wall_s: seconds in this process.
        seconds_per_step: median after warm-up; None without steps.
        seconds: of all processes that led to the set, without the pool's work and without keeping snapshots;
            None if an earlier process did not count them.
        pool_s: seconds that training the pool's networks took, whenever that was.
        whitening_s: seconds that fitting the whitening took, whenever that was.
        peak_memory_bytes: the largest of all processes (`ddray.system.memory.peak_bytes`), without the pool's
            training.
        measures: what the method measured besides, by name.
        precision: fp32, tf32 or bf16, as it was computed.
        half_memory_budget: whether memory had run out and this was a second try with half the budget: how
            steps are cut decides their last digits.
    """

    distilled: DistilledSet
    losses: Tensor
    resumed_from_step: int
    wall_s: float
    seconds_per_step: float | None
    seconds: float | None = None
    pool_s: float = 0.0
    whitening_s: float = 0.0
    peak_memory_bytes: int | None = None
    measures: Mapping[str, float] = field(default_factory=dict)
    precision: str | None = None
    half_memory_budget: bool = False

    def costs(self) -> dict[str, Any]:
        """Return what is known of seconds, also with those of the pool, peak memory, storage and measures."""
        meta = self.distilled.meta
        mse = None if meta.bases is None else meta.bases.approximation_mse
        with_pool = None if self.seconds is None else self.seconds + self.pool_s
        costs = {
            "seconds": self.seconds,
            "seconds_with_pool": with_pool,
            "whitening_s": self.whitening_s or None,
            "peak_memory_bytes": self.peak_memory_bytes,
            "storage_floats": meta.storage_floats,
            "approximation_mse": mse,
            "precision": self.precision,
            "half_memory_budget": self.half_memory_budget or None,
            **self.measures,
        }
        return {name: value for name, value in costs.items() if value is not None}

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
    snapshots: Snapshots | None = None,
) -> Distillation:
    """Run a new method object to its end, or to step `until`, from its checkpoint if there is one.

    Every `checkpoint_every` steps (default: the run's setting), and at `eval_steps` (a search's rungs), the
    loss is checked, the checkpoint written, and `on_step` called with (step, loss). A run that resumes at one
    of `eval_steps` calls it for that step first, as the interrupted run may not have got to it. The sets of
    the steps of `snapshots` are kept there; a run that finds one missing begins anew. The checkpoint is also
    written about every 30 s, and when SIGINT or SIGTERM comes, which wait for the end of the step.

    Raises:
        DivergedError: a loss or an image became NaN or infinite.
        StorageError: a file can't be written.
        SavedInterrupt: a signal ended the run, whose checkpoint has all of its steps.
    """
    settings = {name: ctx.config[name] for name in ("precision", "deterministic") if name in ctx.config}
    with numerics.applied(device=ctx.device.type, **settings) as applied:
        if "precision" in ctx.config.get("method", {}):
            _probe_statistics(ctx, applied)
        run = _Run(distiller, ctx, checkpoint, snapshots)
        distillation = _distil(run, until, checkpoint_every, eval_steps, on_step)
    used = applied.used()
    if applied.precision == "bf16" and used != "bf16":
        log.warning("precision bf16: this method computes nothing in bfloat16; its set is of %s", used)
    return replace(distillation, precision=used, half_memory_budget=is_short())


@torch.no_grad()
def _probe_statistics(ctx: DistillContext, applied: numerics.Numerics) -> None:
    """Let `auto` choose the precision of the statistics that a method matches, by its network's passes."""
    if applied.precision != "auto":
        return
    shape, num_classes = ctx.dataset.image_shape, ctx.dataset.num_classes
    net = build_net(ctx.arch, shape, num_classes, seed=0, device=ctx.device).eval()
    net.to(memory_format=torch.channels_last)
    blank = torch.zeros(64, *shape, device=ctx.device).contiguous(memory_format=torch.channels_last)

    def run(bf16: bool) -> None:
        with torch.autocast(ctx.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            net.features(blank)

    applied.bf16("statistics", run)


def _distil(
    run: "_Run",
    until: int | None,
    checkpoint_every: int | None,
    eval_steps: Collection[int],
    on_step: Callable[[int, float], None] | None,
) -> Distillation:
    distiller, ctx = run.distiller, run.ctx
    settings = ctx.config.get("method", {})
    every = checkpoint_every or ctx.config["checkpoint_every"]
    last = distiller.num_steps if until is None else min(until, distiller.num_steps)
    losses, done = run.losses, run.restore()
    if done and done in eval_steps and on_step is not None:
        on_step(done, _finite(losses.last(), done, settings))
    timer = StepTimer(ctx.device)
    with run.drawn(done, last) as (show, interrupted):
        show(done, "compiling" if ctx.compile else "")
        for step in range(done + 1, last + 1):
            losses.add(distiller.step()["loss"])
            look = step % every == 0 or step == last or step in eval_steps or run.keeps(step)
            early = not look and (interrupted() or run.is_due())
            timer.stop(sync=look or early)
            show(step, losses.latest())
            if look:
                value = _finite(losses.last(), step, settings)
                run.keep(step)
                run.save(step)
                if on_step is not None:
                    on_step(step, value)
            elif early:
                run.save_early(step)
            if look or early:
                timer.restart()
            if interrupted():
                raise SavedInterrupt(f"at step {step:,} of {last:,}, {run.where_saved(step)}")
    distilled = run.snapshot(last)
    return Distillation(
        distilled=distilled,
        losses=losses.all().float(),
        resumed_from_step=done,
        wall_s=time.perf_counter() - run.begin,
        seconds_per_step=timer.median(),
        pool_s=sum(run.pool.trained_s.values()),
        whitening_s=ctx.space.fit_s,
        measures=getattr(distiller, "measures", {}),
        **run.meter.spent(),
    )


class _Losses:
    """The loss of every step: on the CPU, but for those since the last look, where the method left them."""

    def __init__(self) -> None:
        self._past, self._recent = torch.zeros(0), list[Tensor]()

    def add(self, loss: Tensor) -> None:
        """Add a scalar on any device, without waiting for it."""
        self._recent.append(loss.detach().reshape(1))

    def all(self) -> Tensor:
        """Return the losses [num_steps] on the CPU (the only sync in the loop)."""
        if self._recent:
            self._past = torch.cat([self._past, torch.cat(self._recent).cpu()])
            self._recent = []
        return self._past

    def last(self) -> float:
        """Return the latest loss."""
        return float(self.all()[-1])

    def latest(self) -> str:
        """Return the latest loss that is on the CPU, without waiting for another, for people."""
        on_cpu = next((loss for loss in self._recent[-1:] if loss.device.type == "cpu"), self._past[-1:])
        return f"loss {float(on_cpu):.4g}" if len(on_cpu) else ""

    def restore(self, losses: Tensor) -> None:
        """Begin with the losses [num_steps] of a checkpoint."""
        self._past, self._recent = losses, []


class _Run:
    """A method object at work: its files, its losses so far, and what it takes."""

    def __init__(
        self, distiller: Distiller, ctx: DistillContext, checkpoint: Path | None, snapshots: Snapshots | None
    ) -> None:
        self.begin = time.perf_counter()
        self.distiller, self.ctx, self._checkpoint = distiller, ctx, checkpoint
        self._snapshots = snapshots or Snapshots(Path(), ())
        self.meter = Meter(ctx.device)
        self.pool = MeteredPool(ctx.pool, self.meter)
        self.losses = _Losses()
        self._saved_at, self._pause_s, self._saved_step = time.monotonic(), _SAVE_EVERY_S, 0
        distiller.setup(replace(ctx, pool=self.pool))

    @contextmanager
    def drawn(self, done: int, last: int) -> Iterator[tuple[Row, Callable[[], bool]]]:
        """Show the steps while the block does them; yield the row, and what says whether a signal came.

        A run without checkpoint has nothing to wait for: a signal ends it at once.
        """
        if done >= last:
            yield Row("", last), lambda: False
            return
        ctx = self.ctx
        shard = f", classes {ctx.classes.start}..{ctx.classes.stop - 1}" if ctx.shard is not None else ""
        title = f"{ctx.method} on {ctx.dataset.name}{shard}"
        with progress(title, last, start=done, unit="step") as row:
            if self._checkpoint is None:
                yield row, lambda: False
                return
            with deferred_interrupts(lambda: row.rename(f"{title}: stops after this step")) as interrupted:
                yield row, interrupted

    def restore(self) -> int:
        """Load the checkpoint, if there is one whose snapshots are there too; return its step, else 0."""
        checkpoint = None if self._checkpoint is None else _read(self._checkpoint)
        if checkpoint is None:
            return 0
        step = int(checkpoint["step"])
        if missing := self._snapshots.missing(before=step):
            text = "the snapshots of steps %s are missing from %s: starting anew"
            log.warning(text, ", ".join(map(str, missing)), self._snapshots.folder)
            return 0
        self.distiller.load_state_dict(checkpoint["state"])
        self.losses.restore(checkpoint["losses"])
        self.meter.continue_from(checkpoint.get("spent"))
        self._saved_step = step
        self.keep(step)  # the run may have been cut off before, or was one of as many steps
        return step

    def save(self, step: int) -> None:
        """Write the checkpoint, if the run has one."""
        if self._checkpoint is None:
            return
        begin = time.monotonic()
        checkpoint = {
            "step": step,
            "state": self.distiller.state_dict(),
            "losses": self.losses.all(),
            "spent": self.meter.spent(),
        }
        write_atomically(self._checkpoint, lambda file: torch.save(checkpoint, file))
        self._saved_at = time.monotonic()
        self._pause_s = max(_SAVE_EVERY_S, (self._saved_at - begin) / _SAVE_SHARE)
        self._saved_step = step

    def where_saved(self, step: int) -> str:
        """Return whether a step, which is the last that was done, is saved, for people."""
        if self._saved_step == step:
            return "saved"
        return f"saved at step {self._saved_step:,}" if self._saved_step else "not saved"

    def is_due(self) -> bool:
        """Return whether the last checkpoint, or the start, is long enough ago."""
        return self._checkpoint is not None and time.monotonic() - self._saved_at >= self._pause_s

    def save_early(self, step: int) -> None:
        """Write the checkpoint between looks; not with a loss that the next look will refuse.

        That look decides, as it does in a run without such checkpoints.
        """
        if math.isfinite(self.losses.last()):
            self.save(step)
        else:
            self._saved_at = time.monotonic()

    def keeps(self, step: int) -> bool:
        """Return whether the set of a step is kept."""
        return step in self._snapshots.steps

    def keep(self, step: int) -> None:
        """Write the set of a step that is kept."""
        if self.keeps(step):
            with self.meter.excluded():
                self.snapshot(step).save(self._snapshots.path(step), shared=self._snapshots.run_dir)

    def snapshot(self, step: int) -> DistilledSet:
        """Return the current set; DivergedError if an image is NaN or infinite."""
        distilled = self.distiller.snapshot()
        if not distilled.is_finite():
            name = rate_name(self.ctx.config.get("method", {}))
            raise DivergedError(
                f"{self.ctx.method} diverged by step {step}: an image is NaN or infinite; lower {name}"
            )
        return distilled


def rate_name(settings: Mapping[str, Any]) -> str:
    """Return the name of a method's learning rate for distilled images, for error messages."""
    return next((name for name in ("lr_img", "lr_outer") if name in settings), "its learning rate")


def _finite(loss: float, step: int, settings: Mapping[str, Any]) -> float:
    """Return the loss; DivergedError if it is NaN or infinite."""
    if math.isfinite(loss):
        return loss
    raise DivergedError(f"the loss must stay finite, got {loss} at step {step}; lower {rate_name(settings)}")


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


def _read(path: Path) -> dict[str, Any] | None:
    """Return a checkpoint; a damaged one is set aside with a warning and counts as missing."""
    if not path.exists():
        return None
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        int(checkpoint["step"]), checkpoint["state"], checkpoint["losses"]  # all there
    except Exception as error:  # torch raises many types for a torn file
        aside = path.replace(path.with_suffix(".corrupt"))
        reason = one_line(error, 120)
        log.warning("checkpoint %s is damaged (%s): set aside as %s, starting anew", path, reason, aside.name)
        return None
    return checkpoint
