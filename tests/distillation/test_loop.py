from __future__ import annotations

import logging
import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddray.artifact.distilled_set import DistilledSet
from ddray.config import Config
from ddray.distillation import loop as module
from ddray.distillation.loop import Distillation, StepTimer, run_distillation
from ddray.distillation.method import DistillContext
from ddray.errors import DivergedError, StorageError
from ddray.system.interrupts import SavedInterrupt
from ddray.system.progress import Row


class Counter:
    """A method whose image is a random walk; its loss is the step number."""

    config_type = Config

    def __init__(self, num_steps: int, *, fail_at: int = 0, nan_at: int = 0, nan_image: bool = False) -> None:
        self.num_steps = num_steps
        self._fail_at, self._nan_at, self._nan_image = fail_at, nan_at, nan_image
        self.steps_done: list[int] = []

    def setup(self, ctx: DistillContext) -> None:
        self._ctx = ctx
        self._step = 0
        self._image = torch.zeros(1, *ctx.dataset.image_shape)

    def step(self) -> dict[str, Tensor]:
        self._step += 1
        if self._step == self._fail_at:
            raise KeyboardInterrupt
        self.steps_done.append(self._step)
        self._image = self._image + torch.rand((), generator=self._ctx.generator("walk", self._step))
        return {"loss": torch.tensor(math.nan if self._step == self._nan_at else float(self._step))}

    def snapshot(self) -> DistilledSet:
        images = self._image.repeat(self._ctx.dataset.num_classes, 1, 1, 1)
        if self._nan_image:
            images[0, 0, 0, 0] = math.inf
        return self._ctx.make_set(images, torch.arange(len(images)))

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step, "image": self._image.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step, self._image = state["step"], state["image"].clone()


@pytest.fixture
def ctx(toy: Any, planned: Any) -> DistillContext:
    return planned("random", toy())[1]


def test_every_step_is_done_once_and_its_loss_kept(ctx: DistillContext) -> None:
    method = Counter(25)

    result = run_distillation(method, ctx)

    assert method.steps_done == list(range(1, 26))
    assert result.losses.tolist() == [float(step) for step in range(1, 26)]
    assert result.edge_losses() == (1.5, 24.5)
    assert result.resumed_from_step == 0
    assert result.seconds_per_step is not None
    assert 0 < result.seconds_per_step < result.wall_s


def test_no_steps_give_the_initialisation(ctx: DistillContext) -> None:
    result = run_distillation(Counter(0), ctx)

    assert float(result.distilled.images.abs().max()) == 0
    assert result.edge_losses() == (None, None)
    assert result.seconds_per_step is None
    assert result.losses.shape == (0,)


@pytest.mark.parametrize(("count", "edges"), [(1, (1, 1)), (9, (1, 9)), (10, (1, 10)), (20, (1.5, 19.5))])
def test_edge_losses_are_means_over_a_tenth(count: int, edges: Any, ctx: DistillContext) -> None:
    losses = torch.arange(1.0, count + 1)
    result = Distillation(run_distillation(Counter(0), ctx).distilled, losses, 0, 1.0, None)

    assert result.edge_losses() == edges


@pytest.mark.parametrize("fail_at", [1, 5, 6, 7, 12])
def test_a_run_cut_off_anywhere_resumes_to_the_same_bytes(
    fail_at: int, ctx: DistillContext, tmp_path: Path
) -> None:
    whole = run_distillation(Counter(12), ctx)
    path = tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        run_distillation(Counter(12, fail_at=fail_at), ctx, checkpoint=path, checkpoint_every=5)

    method = Counter(12)
    again = run_distillation(method, ctx, checkpoint=path, checkpoint_every=5)

    checkpoint_step = 5 * ((fail_at - 1) // 5)
    assert again.resumed_from_step == checkpoint_step
    assert method.steps_done == list(range(checkpoint_step + 1, 13))
    assert torch.equal(again.distilled.images, whole.distilled.images)
    assert torch.equal(again.losses, whole.losses)
    assert [entry.name for entry in tmp_path.iterdir() if entry.suffix == ".tmp"] == []


def test_a_real_method_resumes_after_an_exception_to_the_same_bytes(
    toy: Any, planned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fresh() -> Any:
        return planned("datadam", toy(), ipc=2, steps=5, method={"batch_real": 4})

    _, ctx, method = fresh()
    whole = run_distillation(method, ctx)
    _, ctx, method = fresh()
    with monkeypatch.context() as patch:
        step = type(method).step
        patch.setattr(type(method), "step", lambda self: 1 / 0 if self._engine._step == 3 else step(self))
        with pytest.raises(ZeroDivisionError):
            run_distillation(method, ctx, checkpoint=tmp_path / "c.pt", checkpoint_every=2)
    _, ctx, method = fresh()

    again = run_distillation(method, ctx, checkpoint=tmp_path / "c.pt", checkpoint_every=2)

    assert again.resumed_from_step == 2
    assert torch.equal(again.losses, whole.losses)
    whole.distilled.save(tmp_path / "a.pt")
    again.distilled.save(tmp_path / "b.pt")
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_a_finished_run_is_not_run_again(ctx: DistillContext, tmp_path: Path) -> None:
    first = run_distillation(Counter(4), ctx, checkpoint=tmp_path / "c.pt")
    method = Counter(4)

    again = run_distillation(method, ctx, checkpoint=tmp_path / "c.pt")

    assert method.steps_done == []
    assert again.resumed_from_step == 4
    assert torch.equal(again.distilled.images, first.distilled.images)
    assert again.edge_losses() == first.edge_losses()


def test_until_stops_early_and_the_next_call_goes_on(ctx: DistillContext, tmp_path: Path) -> None:
    first = run_distillation(Counter(9), ctx, checkpoint=tmp_path / "c.pt", until=4)
    second = Counter(9)
    rest = run_distillation(second, ctx, checkpoint=tmp_path / "c.pt", until=99)

    assert first.losses.tolist() == [1, 2, 3, 4]
    assert second.steps_done == [5, 6, 7, 8, 9]
    assert torch.equal(rest.distilled.images, run_distillation(Counter(9), ctx).distilled.images)


def damage(path: Path, how: str) -> None:
    if how == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        torch.save({"step": 3}, path)


@pytest.mark.parametrize("how", ["half", "empty", "other"])
def test_a_damaged_checkpoint_is_set_aside_said_and_the_run_starts_anew(
    how: str, ctx: DistillContext, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "c.pt"
    whole = run_distillation(Counter(6), ctx, checkpoint=path)
    damage(path, how)
    damaged = path.read_bytes()

    with caplog.at_level(logging.WARNING):
        again = run_distillation(Counter(6), ctx, checkpoint=path)

    assert again.resumed_from_step == 0
    assert torch.equal(again.distilled.images, whole.distilled.images)
    assert (tmp_path / "c.corrupt").read_bytes() == damaged
    assert "is damaged" in caplog.text
    assert "starting anew" in caplog.text


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"lr_img": 1.0, "lr_net": 0.1}, "lr_img"),
        ({"ridge": 1.0, "lr_outer": 1.0, "lr_inner": 0.1}, "lr_outer"),
        ({}, "its learning rate"),
    ],
)
def test_a_nan_loss_ends_the_run_at_the_next_look_and_is_not_kept(
    settings: dict[str, float], advice: str, ctx: DistillContext, tmp_path: Path
) -> None:
    """The message names a setting that the method has."""
    path = tmp_path / "c.pt"
    method = Counter(12, nan_at=6)
    ctx = replace(ctx, config={"method": settings})

    with pytest.raises(DivergedError, match=rf"must stay finite, got nan at step 6; lower {advice}$"):
        run_distillation(method, ctx, checkpoint=path, checkpoint_every=3)
    assert torch.load(path, weights_only=True)["step"] == 3


def test_an_infinite_image_ends_the_run(ctx: DistillContext) -> None:
    with pytest.raises(DivergedError, match="random diverged by step 3: an image is NaN or infinite"):
        run_distillation(Counter(3, nan_image=True), ctx)


def test_a_real_method_with_a_mad_rate_diverges(toy: Any, planned: Any) -> None:
    _, ctx, method = planned("dm", toy(), steps=40, method={"batch_real": 4, "lr_img": 1e30})

    with pytest.raises(DivergedError):
        run_distillation(method, ctx, checkpoint_every=5)


def test_eval_steps_are_the_rungs_the_checkpoints_and_the_end(ctx: DistillContext, tmp_path: Path) -> None:
    seen: list[tuple[int, float, int]] = []
    path = tmp_path / "c.pt"

    def look(step: int, loss: float) -> None:
        seen.append((step, loss, torch.load(path, weights_only=True)["step"]))

    run_distillation(
        Counter(11), ctx, checkpoint=path, checkpoint_every=4, eval_steps={3, 4, 50}, on_step=look
    )

    assert seen == [(s, float(s), s) for s in (3, 4, 8, 11)]  # the checkpoint is written before the call


def test_a_run_cut_off_in_a_look_is_asked_again_at_that_step(ctx: DistillContext, tmp_path: Path) -> None:
    seen: list[int] = []

    def look(step: int, loss: float) -> None:
        if step == 3 and 3 not in seen:
            seen.append(step)
            raise KeyboardInterrupt
        assert loss == step
        seen.append(step)

    settings: dict[str, Any] = {
        "checkpoint": tmp_path / "c.pt",
        "checkpoint_every": 5,
        "eval_steps": (3, 6),
        "on_step": look,
    }
    with pytest.raises(KeyboardInterrupt):
        run_distillation(Counter(6), ctx, **settings)
    method = Counter(6)
    run_distillation(method, ctx, **settings)

    assert seen == [3, 3, 5, 6]
    assert method.steps_done == [4, 5, 6]


def test_resuming_elsewhere_asks_for_no_look_again(ctx: DistillContext, tmp_path: Path) -> None:
    seen: list[int] = []
    settings: dict[str, Any] = {
        "checkpoint": tmp_path / "c.pt",
        "eval_steps": (0, 2, 6),
        "on_step": lambda step, loss: seen.append(step),
    }
    run_distillation(Counter(6), ctx, until=4, **settings)
    run_distillation(Counter(6), ctx, **settings)

    assert seen == [2, 4, 6]


def test_a_full_disk_is_a_storage_error(
    ctx: DistillContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.pt"
    run_distillation(Counter(4), ctx, checkpoint=path, until=2)
    before = path.read_bytes()

    def full(checkpoint: Any, file: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.torch, "save", full)
    with pytest.raises(
        StorageError, match=r"could not write .*c\.pt: No space left on device; free some space"
    ):
        run_distillation(Counter(4), ctx, checkpoint=path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_file()] == ["c.pt"]


def test_the_set_tells_what_made_it_and_shares_no_memory(ctx: DistillContext) -> None:
    images, labels = torch.randn(3, 3, 16, 16, requires_grad=True), torch.arange(3)

    distilled = ctx.make_set(images, labels)

    assert distilled.images.data_ptr() != images.data_ptr()
    assert not distilled.images.requires_grad
    assert distilled.meta.method == "random"
    assert distilled.meta.config == ctx.config
    assert (distilled.meta.seed, distilled.meta.arch, distilled.meta.norm) == (0, "convnet2_w8", "instance")
    assert torch.__version__.startswith(distilled.meta.versions["torch"])
    distilled.validate()


class Signalled(Counter):
    """Gets SIGINT in one of its steps."""

    def __init__(self, num_steps: int, at: int, **fields: Any) -> None:
        super().__init__(num_steps, **fields)
        self._at = at

    def step(self) -> dict[str, Tensor]:
        losses = super().step()
        if self._step == self._at:
            signal.raise_signal(signal.SIGINT)
        return losses


@pytest.mark.parametrize("at", [1, 7, 10, 12])
def test_a_signal_waits_for_the_end_of_its_step_which_is_saved(
    at: int, ctx: DistillContext, tmp_path: Path
) -> None:
    whole = run_distillation(Counter(12), ctx)
    path = tmp_path / "c.pt"
    with pytest.raises(SavedInterrupt, match=rf"^at step {at} of 12, saved$"):
        run_distillation(Signalled(12, at), ctx, checkpoint=path, checkpoint_every=5)
    method = Counter(12)

    again = run_distillation(method, ctx, checkpoint=path, checkpoint_every=5)

    assert again.resumed_from_step == at
    assert method.steps_done == list(range(at + 1, 13))
    assert torch.equal(again.distilled.images, whole.distilled.images)
    assert torch.equal(again.losses, whole.losses)


def test_without_a_checkpoint_a_signal_ends_the_run_at_once(ctx: DistillContext) -> None:
    method = Signalled(12, 3)
    with pytest.raises(KeyboardInterrupt) as caught:
        run_distillation(method, ctx)
    assert caught.type is KeyboardInterrupt
    assert method.steps_done == [1, 2, 3]


def test_checkpoints_by_time_change_no_result(
    ctx: DistillContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step is due: what is written, when it is looked at, and where it ends stays the same."""
    whole = run_distillation(Counter(9), ctx)
    monkeypatch.setattr(module, "_SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(module, "_SAVE_SHARE", 1e9)
    seen, saved = list[int](), list[int]()
    save = module._Run.save

    def note(run: Any, step: int) -> None:
        saved.append(step)
        save(run, step)

    monkeypatch.setattr(module._Run, "save", note)
    result = run_distillation(
        Counter(9),
        ctx,
        checkpoint=tmp_path / "c.pt",
        checkpoint_every=4,
        on_step=lambda step, loss: seen.append(step),
    )
    assert saved == list(range(1, 10))
    assert seen == [4, 8, 9]
    assert torch.equal(result.losses, whole.losses)
    assert torch.equal(result.distilled.images, whole.distilled.images)


def test_a_nan_between_looks_is_not_saved_and_left_to_the_next_look(
    ctx: DistillContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(module, "_SAVE_SHARE", 1e9)
    path = tmp_path / "c.pt"
    result = run_distillation(Counter(6, nan_at=2), ctx, checkpoint=path, checkpoint_every=6)
    assert math.isnan(float(result.losses[1]))  # as in a run without such checkpoints
    path.unlink()
    with pytest.raises(SavedInterrupt, match=r"at step 1 of 6, not saved$"):
        run_distillation(Signalled(6, 1, nan_at=1), ctx, checkpoint=path, checkpoint_every=6)
    assert not path.exists()
    with pytest.raises(SavedInterrupt, match=r"at step 3 of 6, saved at step 2$"):
        run_distillation(Signalled(6, 3, nan_at=3), ctx, checkpoint=path, checkpoint_every=2)


def test_a_slow_checkpoint_is_written_less_often(
    ctx: DistillContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = module._Run(Counter(3), ctx, tmp_path / "c.pt", None)
    before = run._pause_s
    clock = iter([0.0, 10.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(module, "write_atomically", lambda path, write: None)
    run.save(0)
    assert (before, run._pause_s) == (30.0, 200.0)


def test_the_row_moves_with_every_step(
    ctx: DistillContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str]] = []
    monkeypatch.setattr(Row, "__call__", lambda row, done, note: calls.append((row.title, f"{done} {note}")))
    run_distillation(Counter(3), ctx)
    assert calls == [("random on toy", text) for text in ("0 ", "1 loss 1", "2 loss 2", "3 loss 3")]


class TestStepTimer:
    def run(self, monkeypatch: pytest.MonkeyPatch, times: list[float]) -> StepTimer:
        clock = iter([0.0, *times])
        monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
        timer = StepTimer(torch.device("cpu"))
        for _ in times:
            timer.stop(sync=False)
        return timer

    def test_the_median_leaves_out_the_warm_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Ten steps: the first tenth is one step of 100 s."""
        times = [100.0 + step * (1 if step < 5 else 3) for step in range(10)]
        durations = [b - a for a, b in zip([0.0, *times], times, strict=False)][1:]

        assert self.run(monkeypatch, times).median() == sorted(durations)[4]

    def test_of_no_steps_there_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.run(monkeypatch, []).median() is None
