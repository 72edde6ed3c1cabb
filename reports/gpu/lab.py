"""What the parts share: a device, datasets made here, methods ready to step, and figures."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ddray.config import merge
from ddray.data import Dataset, Split, open_dataset
from ddray.distillation.method import Distiller
from ddray.jobs.context import make_context, make_distiller
from ddray.jobs.plan import resolve
from ddray.methods import get_method
from reports.gpu import wheels

Figure = dict[str, Any]
Figures = Iterator[tuple[str, Figure]]


def figure(value: float | None, unit: str, *, std: float | None = None, n: int = 1, **notes: Any) -> Figure:
    """Return a measured value, of `n` repeats, with what a reader needs beside it."""
    return {"value": value, "unit": unit, "std": std, "n": n, **notes}


def attempts(cases: Mapping[str, Callable[[], Mapping[str, Figure]]]) -> Figures:
    """Yield the figures of cases by name; one that fails is a figure that says so, and the next one follows.

    A case's figure called "" has the case's name alone.
    """
    for name, case in cases.items():
        try:
            figures = case()
        except ModuleNotFoundError as error:
            if (error.name or "").startswith(("ddray", "reports")):
                yield name, {"failed": str(error)}
            else:
                yield name, {"not_run": str(error)}
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            yield name, {"failed": f"{type(error).__name__}: {text}"}
        else:
            yield from ((" ".join(filter(None, (name, key))), value) for key, value in figures.items())


@dataclass(frozen=True)
class Lab:
    """Where the parts measure.

    Attributes:
        device: the first GPU; the CPU in a dry run.
        is_tiny: sizes that take seconds on a CPU, which show that a part works and measure nothing.
    """

    device: torch.device
    is_tiny: bool = False

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def size(self, full: int, tiny: int) -> int:
        """Return a size, `tiny` in a dry run."""
        return tiny if self.is_tiny else full

    def digits(self) -> Dataset:
        """Return the bundled digits, where scikit-learn is missing from the arrays beside the wheels."""
        try:
            return open_dataset("digits")
        except ModuleNotFoundError:
            return _carried_digits()

    def pictures(self, per_class: int = 600) -> Dataset:
        """Return CIFAR-shaped random pictures: 10 classes, each a pattern under noise."""
        num = self.size(per_class, 12) * 10
        generator = torch.Generator().manual_seed(0)
        patterns = F.interpolate(torch.rand(10, 3, 4, 4, generator=generator) * 255, size=32, mode="bilinear")
        labels = torch.arange(num) % 10
        noise = torch.randn(num, 3, 32, 32, generator=generator) * 60
        images = (patterns[labels] + noise).clamp(0, 255).round().to(torch.uint8)
        split = Split(images, labels)
        return Dataset(
            name="patterns",
            class_names=tuple(f"pattern {label}" for label in range(10)),
            image_shape=(3, 32, 32),
            mean=(0.5,) * 3,
            std=(0.25,) * 3,
            can_flip=True,
            load_train=lambda: split,
            load_test=lambda: split,
        )

    def started(
        self,
        method: str,
        dataset: Dataset,
        /,
        *,
        ipc: int = 1,
        device: torch.device | None = None,
        quick: bool = False,
        **settings: Any,
    ) -> Distiller:
        """Return a method that is ready to step; `settings` are the run's, nested, `quick` a test's sizes."""
        method_class = get_method(method)
        layers: list[dict[str, Any]] = [{"compile": "off"}]
        if quick or self.is_tiny:
            layers.append({"arch": "convnet2_w8", "method": getattr(method_class.config_type, "quick", {})})
        layers.append(settings)
        if resolve(method, dataset, ipc=ipc).config.steps:
            layers.insert(0, {"steps": 1000})
        plan = resolve(method, dataset, ipc=ipc, layers=[merge(*layers)])
        ctx = make_context(plan, dataset.train(), split_name="train", device=device or self.device)
        distiller = make_distiller(plan)
        distiller.setup(ctx)
        return distiller

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], *, repeats: int = 5, inner: int = 1) -> list[float]:
        """Return the seconds of one call, from blocks of `inner` calls; one more block warms up."""
        repeats, inner = self.size(repeats, 2), self.size(inner, 1)
        seconds = []
        for block in range(repeats + 1):
            self.synchronize()
            begin = time.perf_counter()
            for _ in range(inner):
                work()
            self.synchronize()
            if block:
                seconds.append((time.perf_counter() - begin) / inner)
        return seconds

    def timed(self, work: Callable[[], object], *, repeats: int = 5, inner: int = 1, **notes: Any) -> Figure:
        """Return the milliseconds of one call, see `seconds`."""
        values = [1000 * value for value in self.seconds(work, repeats=repeats, inner=inner)]
        return figure(statistics.fmean(values), "ms", std=statistics.stdev(values), n=len(values), **notes)

    def busy(self, work: Callable[[], object], calls: int, milliseconds: float) -> Figure:
        """Return the share of a call's `milliseconds` in which the device computes.

        torch's profiler says how long it computes. The calls it watches take longer, so it is no clock.
        """
        activity = torch.profiler.ProfilerActivity
        calls = self.size(calls, 1)
        activities = [activity.CPU, activity.CUDA] if self.on_gpu else [activity.CPU]
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(calls):
                work()
            self.synchronize()
        kinds = torch.autograd.DeviceType
        kind = kinds.CUDA if self.on_gpu else kinds.CPU
        spans = sorted(
            (event.time_range.start, event.time_range.end)
            for event in profile.events()
            if event.device_type == kind and not event.is_user_annotation  # they span idle time
        )
        share = covered(spans) / 1000 / calls / milliseconds
        return figure(share, "busy share", n=calls, spans=len(spans))

    @contextlib.contextmanager
    def syncs(self, mode: str) -> Iterator[None]:
        """Let an operation that waits for the GPU warn or raise (`mode` warn or error)."""
        if not self.on_gpu:
            yield
            return
        torch.cuda.set_sync_debug_mode(mode)
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def covered(spans: list[tuple[float, float]]) -> float:
    """Return the length of the union of spans (start, end), sorted by their starts."""
    total, reached = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _carried_digits() -> Dataset:
    """Return the digits that `wheels.write_digits` wrote.

    Raises:
        FileNotFoundError: there are none: `make gpu-wheels` has not run.
    """
    with np.load(wheels.FOLDER / wheels.DIGITS) as file:
        arrays = {name: torch.from_numpy(file[name].copy()) for name in file.files}
    train = Split(arrays["train_images"], arrays["train_labels"])
    test = Split(arrays["test_images"], arrays["test_labels"])
    return Dataset(
        name="digits",
        class_names=tuple(str(label) for label in range(10)),
        image_shape=(1, 16, 16),
        mean=tuple(arrays["mean"].tolist()),
        std=tuple(arrays["std"].tolist()),
        can_flip=False,
        load_train=lambda: train,
        load_test=lambda: test,
    )
