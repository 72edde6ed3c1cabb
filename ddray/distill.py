"""The distillation loop: step, checkpoint, report, resume. Independent of methods and of Ray."""

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

from ddray.artifact.bases import Bases, images_of, targets_of
from ddray.artifact.distilled_set import DistilledSet, Meta
from ddray.artifact.partition import Partition
from ddray.config import Config
from ddray.data import Dataset, PixelSpace, Split
from ddray.errors import DivergedError
from ddray.pool.spec import ModelPool
from ddray.runs.environment import git_commit, versions
from ddray.seeding import derive
from ddray.system.files import write_atomically

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
    """Storage in images, for methods without classes."""
    is_audio: bool = False
    """Whether the images are spectrograms (the shape alone does not tell)."""
    factor: int | None = None
    """Parts along each axis of a stored image, if settings that override the preset set it."""


@dataclass(frozen=True)
class DistillContext:
    """Everything a method gets.

    Attributes:
        dataset: name, classes, shape; its test set is never opened here.
        split: the real images to distil from, uint8 [N, C, H, W], on the CPU.
        split_name: which part of the dataset `split` is (included in pool hashes).
        space: the pixel space that images are matched and stored in.
        ipc: images per class.
        arch: the network to match in.
        seed: the run's seed; all randomness derives from it.
        device: where to compute.
        pool: provides shared networks, trained on first use.
        compile: whether the hot function may be compiled.
        method: the method's name.
        config: the resolved configuration, stored in the artifact.
        budget: storage in images, for methods without classes.
        search_seed: for a run on all of train: the seed whose val tenth its shared networks must not see.
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
        """The part of train for networks shared by searches, their final runs and other runs.

        It excludes val: networks trained on val would bias the val scores of a search.
        """
        return f"train-val{self.search_seed}" if self.split_name == "train" else self.split_name

    def generator(self, *labels: str | int) -> torch.Generator:
        """Return a CPU generator for one purpose; step i's draws depend only on the seed and i."""
        return derive(self.seed, "distill", *labels)

    def make_set(self, images: Tensor, labels: Tensor, partition: Partition | None = None) -> DistilledSet:
        """Return images [N, C, H, W] (in `space`) and labels [N] as a self-describing set on the CPU.

        Args:
            images: as stored.
            labels: one per stored image.
            partition: how each image splits into mini-images; None or one part: not at all.
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
        distilled = self.make_set(images, torch.zeros(0, dtype=torch.int64))
        counted = {"storage_floats": images.numel() + targets.numel(), "budget": self.budget}
        return replace(
            distilled,
            targets=targets.detach().to("cpu", torch.float32, copy=True).contiguous(),
            meta=distilled.meta.model_copy(update=counted),
        )

    def make_based_set(self, tensors: Mapping[str, Tensor], bases: Bases) -> DistilledSet:
        """Return a set that is stored as bases, coefficients and networks (decoder `boost_ssdd`)."""
        compact = {
            name: t.detach().to("cpu", torch.float32, copy=True).contiguous() for name, t in tensors.items()
        }
        distilled = self.make_ssl_set(images_of(compact, bases), targets_of(compact))
        decoded = len(distilled.images) * (bases.num_views + 1)
        counted = {
            "storage_floats": sum(tensor.numel() for tensor in compact.values()),
            "ipc_decoded": max(1, decoded // self.dataset.num_classes),
            "decoder": "boost_ssdd",
            "bases": bases,
        }
        return replace(distilled, compact=compact, meta=distilled.meta.model_copy(update=counted))


class Distiller(Protocol):
    """The interface of a method.

    Attributes:
        config_type: the method's settings.
        num_steps: steps of a whole run; 0 for methods that select in `setup`. If the number depends on the
            images (D3HR), it is 0 until `setup` has run.
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
        """Run the next step; return device scalars, including `loss`."""
        ...

    def snapshot(self) -> DistilledSet:
        """Return the current set as a detached CPU copy."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state to checkpoint: tensors and counters, no hyperparameters."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        ...


class BudgetDistiller(Distiller, Protocol):
    """A method without classes, which takes a storage budget instead of images per class.

    Attributes:
        uses_budget: marks such a method.
    """

    uses_budget: ClassVar[Literal[True]]

    @staticmethod
    def num_distilled(config: Any, budget: int, image_shape: tuple[int, int, int], num_real: int) -> int:
        """Return how many images the method can store within `budget` images of storage; 0: none fits."""
        ...


@dataclass(frozen=True)
class DistillResult:
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
    """Run a method to its end, or to step `until`, starting from its checkpoint if there is one.

    Args:
        distiller: a new method object; this function calls its `setup`.
        ctx: what it runs on.
        checkpoint: file to resume from and to keep up to date; None writes none.
        checkpoint_every: steps between checkpoints and loss checks.
        until: stop after this step; None runs all.
        looks: further steps to checkpoint and check (a search's rungs).
        on_step: called with (step, loss) at every check, after its checkpoint. A run that resumes at one of
            `looks` calls it for that step first, as the interrupted run may not have got to it.

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
    """Return the name of a method's learning rate for distilled images, for error messages."""
    return next((name for name in ("lr_img", "lr_outer") if name in settings), "its learning rate")


def _finite(loss: Tensor, step: int, settings: Mapping[str, Any]) -> float:
    """Return the loss as a float (the only sync in the loop)."""
    value = float(loss)
    if not math.isfinite(value):
        rate = rate_name(settings)
        raise DivergedError(f"the loss must stay finite, got {value} at step {step}; lower {rate}")
    return value


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
    checkpoint = {
        "step": step,
        "state": distiller.state_dict(),
        "losses": torch.cat(losses).cpu(),
    }
    write_atomically(path, lambda file: torch.save(checkpoint, file))


def _restore(distiller: Distiller, path: Path | None, losses: list[Tensor], device: torch.device) -> int:
    """Load the checkpoint if there is one; a damaged one is set aside with a warning and the run restarts."""
    if path is None or not path.exists():
        return 0
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        step, state, earlier_losses = int(checkpoint["step"]), checkpoint["state"], checkpoint["losses"]
    except Exception as error:  # torch raises many types for a torn file
        aside = path.with_suffix(".corrupt")
        path.replace(aside)
        reason = " ".join(str(error).split())[:120]
        log.warning("checkpoint %s is damaged (%s): set aside as %s, starting anew", path, reason, aside.name)
        return 0
    distiller.load_state_dict(state)
    losses.extend(earlier_losses.to(device).split(1))
    return step
