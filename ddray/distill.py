"""The distillation loop: step, checkpoint, report, resume. It knows no method and no Ray."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, Protocol

import torch
from torch import Tensor

from ddray.artifact import DistilledSet, Meta
from ddray.bases import Bases, images_of, targets_of
from ddray.config import Config
from ddray.data import Dataset, PixelSpace, Split
from ddray.errors import DivergedError
from ddray.files import write_atomically
from ddray.partition import Partition
from ddray.pool import ModelPool
from ddray.run import git_commit, versions
from ddray.seeding import derive

log = logging.getLogger(__name__)
_CURVE_POINTS: Final = 200


@dataclass(frozen=True)
class Target:
    """What a preset may depend on."""

    dataset: str
    image_shape: tuple[int, int, int]
    num_classes: int
    ipc: int
    budget: int | None = None
    """Images of storage, for methods that count no classes."""
    is_audio: bool = False
    """Whether the images are spectrograms; pictures may have their shape."""
    factor: int | None = None
    """Parts along each axis that a stored image is to be cut into, if settings over the preset say so."""


@dataclass(frozen=True)
class DistillContext:
    """Everything a method is given.

    Attributes:
        dataset: name, classes, shape; its test set is never opened here.
        split: the real images to distil from, uint8 [N, C, H, W], on the CPU.
        split_name: which part of the dataset that is (part of pool hashes).
        space: the pixel space that images are matched and stored in.
        ipc: images per class.
        arch: the network to match in.
        seed: the run's seed; every draw is derived from it.
        device: where to compute.
        pool: trains and gives shared networks.
        compile: whether the hot function may be compiled.
        method: the method's name.
        config: the resolved configuration, kept in the artifact.
        budget: images of storage, for methods that count no classes.
        search_seed: of a run on all of train: whose val tenth its shared networks have not seen.
    """

    dataset: Dataset
    split: Split
    split_name: str
    space: PixelSpace
    ipc: int
    arch: str
    seed: int
    device: torch.device
    pool: ModelPool
    compile: bool
    method: str
    config: Mapping[str, Any]
    budget: int | None = None
    search_seed: int = 0

    @property
    def shared_split(self) -> str:
        """The part of train for networks that searches, their final runs and other runs share.

        No val image is in it: a network that has seen val would favour what it knows when val is looked at.
        """
        return f"train-val{self.search_seed}" if self.split_name == "train" else self.split_name

    def generator(self, *labels: str | int) -> torch.Generator:
        """Return a CPU generator for one purpose; step i's draws depend on the seed and i alone."""
        return derive(self.seed, "distill", *labels)

    def make_set(self, images: Tensor, labels: Tensor, partition: Partition | None = None) -> DistilledSet:
        """Return images [N, C, H, W] (in `space`) and labels [N] as a self-describing set on the CPU.

        Args:
            images: as stored.
            labels: one per stored image.
            partition: how each image holds mini-images; None, or one part: it is itself a training image.
        """
        from ddray.nets.names import parse_arch

        if partition is not None and partition.num_parts == 1:
            partition = None
        zca = {"zca_mean": self.space.zca_mean, "zca_matrix": self.space.zca_matrix}
        meta = Meta(
            dataset=self.dataset.name,
            fingerprint=self.dataset.fingerprint,
            class_names=self.dataset.class_names,
            ipc=self.ipc,
            ipc_decoded=self.ipc * (partition.num_parts if partition else 1),
            storage_floats=images.numel(),
            pixel_space=self.space.kind,
            mean=self.dataset.mean,
            std=self.dataset.std,
            image_shape=self.dataset.image_shape,
            method=self.method,
            config=dict(self.config),
            seed=self.seed,
            split=self.split_name,
            arch=self.arch,
            norm=parse_arch(self.arch).norm,
            decoder="partition" if partition else None,
            partition=partition,
            versions=versions(),
            git_commit=git_commit(),
        )
        return DistilledSet(
            images=images.detach().to("cpu", torch.float32, copy=True).contiguous(),
            labels=labels.detach().to("cpu", torch.int64, copy=True),
            meta=meta,
            zca={k: v.cpu() for k, v in zca.items() if v is not None} if self.space.kind == "zca" else {},
        )

    def make_ssl_set(self, images: Tensor, targets: Tensor) -> DistilledSet:
        """Return images [N, C, H, W] (in `space`) and targets [N, D] as a set without labels."""
        made = self.make_set(images, torch.zeros(0, dtype=torch.int64))
        counted = {"storage_floats": images.numel() + targets.numel(), "budget": self.budget}
        return replace(
            made,
            targets=targets.detach().to("cpu", torch.float32, copy=True).contiguous(),
            meta=made.meta.model_copy(update=counted),
        )

    def make_based_set(self, tensors: Mapping[str, Tensor], bases: Bases) -> DistilledSet:
        """Return a set that is stored as bases, coefficients and networks (decoder `boost_ssdd`)."""
        held = {
            name: t.detach().to("cpu", torch.float32, copy=True).contiguous() for name, t in tensors.items()
        }
        made = self.make_ssl_set(images_of(held, bases), targets_of(held))
        decoded = len(made.images) * (bases.num_views + 1)
        counted = {
            "storage_floats": sum(tensor.numel() for tensor in held.values()),
            "ipc_decoded": max(1, decoded // self.dataset.num_classes),
            "decoder": "boost_ssdd",
            "bases": bases,
        }
        return replace(made, compact=held, meta=made.meta.model_copy(update=counted))


class Distiller(Protocol):
    """What a method is (DESIGN: the abstractions).

    Attributes:
        config_type: the method's own settings.
        num_steps: how many steps a whole run has; 0 for methods that select in `setup`. A method whose steps
            depend on the images (D3HR) says 0 before `setup` and the number after it.
    """

    config_type: ClassVar[type[Config]]
    num_steps: int

    def __init__(self, config: Any, num_steps: int) -> None: ...

    @staticmethod
    def preset(name: str, target: Target) -> dict[str, Any]:
        """Return the run settings (nested, as in a YAML) of preset `paper` or `repo` for a target."""
        ...

    def setup(self, ctx: DistillContext) -> None:
        """Take splits, pool, generators and device; make the initial images."""
        ...

    def step(self) -> dict[str, Tensor]:
        """Do the next step; return device scalars, `loss` among them."""
        ...

    def snapshot(self) -> DistilledSet:
        """Return the current set as a detached CPU copy."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the trial's state: tensors and counters, no hyperparameters."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        ...


class BudgetDistiller(Distiller, Protocol):
    """A method without classes: it is given a budget of storage instead of images per class.

    Attributes:
        uses_budget: marks it.
    """

    uses_budget: ClassVar[Literal[True]]

    @staticmethod
    def num_distilled(config: Any, budget: int, image_shape: tuple[int, int, int], num_real: int) -> int:
        """Return how many images the method stores within `budget` images of storage; 0: none fits."""
        ...


@dataclass(frozen=True)
class DistillResult:
    """What a finished distillation measured.

    Attributes:
        distilled: the last set (never the best on test).
        losses: float32 [num_steps], one per step.
        resumed_from_step: 0 for a run from the start.
        wall_s: seconds of this process's part.
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
        """Return (step, loss) at no more than 200 steps: each the mean of the steps since the last."""
        num = len(self.losses)
        size = max(1, -(-num // _CURVE_POINTS))
        return [
            (min(start + size, num), float(self.losses[start : start + size].mean()))
            for start in range(0, num, size)
        ]


def run_distillation(
    distiller: Distiller,
    ctx: DistillContext,
    *,
    checkpoint: Path | None = None,
    checkpoint_every: int = 100,
    until: int | None = None,
    looks: Collection[int] = (),
    on_step: Callable[[int, float], None] | None = None,
) -> DistillResult:
    """Run a method to its end, or to step `until`, from its checkpoint if there is one.

    Args:
        distiller: a fresh method object; set up here.
        ctx: what it works on.
        checkpoint: file to continue from and to keep up to date; None keeps none.
        checkpoint_every: steps between checkpoints; also between the loop's looks at the loss.
        until: stop after this step; None runs all.
        looks: further steps to checkpoint and look at (a search's rungs).
        on_step: called with (step, loss) at every look, after its checkpoint; a run that resumes at one of
            `looks` calls it for that step first, since it may have been cut off before.

    Raises:
        DivergedError: a loss or an image became NaN or infinite.
        StorageError: the checkpoint can't be written.
    """
    begin, settings = time.perf_counter(), ctx.config.get("method", {})
    distiller.setup(ctx)
    last = distiller.num_steps if until is None else min(until, distiller.num_steps)
    losses: list[Tensor] = []
    done = _restore(distiller, checkpoint, losses, ctx.device)
    if losses and done in looks and on_step is not None:
        on_step(done, _finite(losses[-1], done, settings))
    timer = StepTimer(ctx.device)
    for step in range(done + 1, last + 1):
        losses.append(distiller.step()["loss"].detach().reshape(1))
        look = step % checkpoint_every == 0 or step == last or step in looks
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
    return DistillResult(
        distilled=distilled,
        losses=torch.cat(losses).cpu().float() if losses else torch.zeros(0),
        resumed_from_step=done,
        wall_s=time.perf_counter() - begin,
        seconds_per_step=timer.median(),
    )


def rate_name(settings: Mapping[str, Any]) -> str:
    """Return which of a method's settings is the learning rate of what it distils, for a message's advice."""
    return next((name for name in ("lr_img", "lr_outer") if name in settings), "its learning rate")


def _finite(loss: Tensor, step: int, settings: Mapping[str, Any]) -> float:
    """Return the loss as a number (the loop's one sync)."""
    value = float(loss)
    if not math.isfinite(value):
        rate = rate_name(settings)
        raise DivergedError(f"the loss must stay finite, got {value} at step {step}; lower {rate}")
    return value


class StepTimer:
    """Seconds per step without a sync per step: steps between two syncs share the time between them."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: list[float] = []
        self._pending = 0
        self._mark = time.perf_counter()

    def stop(self, *, sync: bool) -> None:
        """Note the end of a step; on a GPU, time is read only where the loop syncs anyway."""
        self._pending += 1
        if self._cuda:
            if not sync:
                return
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._seconds += [(now - self._mark) / self._pending] * self._pending
        self._mark, self._pending = now, 0

    def restart(self) -> None:
        """Leave what was done since the last stop (a checkpoint, a rung's score) out of the steps' time."""
        self._mark = time.perf_counter()

    def median(self) -> float | None:
        """Return the median seconds per step after the first tenth (warm-up)."""
        kept = self._seconds[len(self._seconds) // 10 :]
        return statistics.median(kept) if kept else None


def _save(distiller: Distiller, path: Path, step: int, losses: list[Tensor]) -> None:
    held = {
        "step": step,
        "state": distiller.state_dict(),
        "losses": torch.cat(losses).cpu(),
    }
    write_atomically(path, lambda file: torch.save(held, file))


def _restore(distiller: Distiller, path: Path | None, losses: list[Tensor], device: torch.device) -> int:
    """Load the checkpoint, if there is one; a damaged one is set aside, said, and the run starts anew."""
    if path is None or not path.exists():
        return 0
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
        step, state, old = int(held["step"]), held["state"], held["losses"]
    except Exception as error:  # torch raises many types for a torn file
        aside = path.with_suffix(".corrupt")
        path.replace(aside)
        reason = " ".join(str(error).split())[:120]
        log.warning("checkpoint %s is damaged (%s): set aside as %s, starting anew", path, reason, aside.name)
        return 0
    distiller.load_state_dict(state)
    losses.extend(old.to(device).split(1))
    return step
